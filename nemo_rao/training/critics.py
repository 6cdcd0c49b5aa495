"""``model.ppo.critic=model``: a critic beside the policy, with an optimizer of its own.

It starts from the last checkpoint of a run, such as a reward model's, or from the policy's own start. See
:mod:`nemo_rao.training.second_models` for what it has in common with the policy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rao.checkpoint.continuing import START
from nemo_rao.checkpoint.layout import CRITIC
from nemo_rao.config.derived import objective_config
from nemo_rao.config.megatron_fields import ddp_fields, optimizer_fields, optimizer_precision_fields
from nemo_rao.config.model_config import PeftConfig
from nemo_rao.config.run_config import DataConfig, RunConfig
from nemo_rao.errors import UserError
from nemo_rao.loop.prepared import CriticTask
from nemo_rao.objectives import registry
from nemo_rao.training.loading import LoadedData
from nemo_rao.training.model_checks import check_model
from nemo_rao.training.second_models import beside, check_tokens, chunks_of
from nemo_rao.training.trained_run import trained_run

if TYPE_CHECKING:
    from nemo_rao.mcore.trained_model import TrainedModel

_KEY = "model.ppo.critic_path"


@dataclass(frozen=True)
class Critic:
    """A critic before it is built.

    Attributes:
        run: the folder that the user named; ``None``: it has the policy's start and network.
        data: how that run made tokens of text.
        config: its recipe: of the run its network, and all else of the policy.
        checkpoint: what it starts from; ``None``: the policy's start.
    """

    run: str | None
    data: DataConfig
    config: RunConfig
    checkpoint: Path | None

    def check_tokens(self, policy: RunConfig, loaded: LoadedData) -> None:
        """Checks that the run was trained on the tokens that the policy samples.

        Raises:
            UserError: on those of another tokenizer or chat template.
        """
        if self.run is not None:
            with self._named():
                check_tokens(self.data, policy, loaded, what="critic's run")

    def check_model(self, num_tokens: int, resume_from: Path | None) -> None:
        """Checks network and checkpoints; imports the engine.

        Args:
            resume_from: this run's last checkpoint.

        Raises:
            UserError: they do not fit each other, the tokenizer or the ranks.
        """
        if self.run is not None:
            with self._named():
                check_model(self.config, num_tokens, self.checkpoint, None)
        if resume_from is not None and not (resume_from / CRITIC).is_dir():
            raise UserError(
                f"{resume_from} holds no critic, which model.ppo.critic=model goes on from; restore {CRITIC}/, or give "
                "another exp_manager.name"
            )

    def task(self, start_from: Path | None, resume_from: Path | None) -> CriticTask:
        """What the ranks make of it.

        Args:
            start_from: the policy's start.
            resume_from: this run's last checkpoint.
        """
        optim = self.config.model.optim
        return CriticTask(
            functools.partial(_built, self.config, self.checkpoint or start_from),
            optim.lr,
            optim.sched,
            None if resume_from is None else resume_from / CRITIC,
        )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{_KEY}={self.run}: {error}") from None


def critic_of(policy: RunConfig) -> Critic | None:
    """The critic of a run, where its objective has one that is a model.

    Raises:
        UserError: there is nothing that it could start from, or that cannot be split as the policy is.
    """
    keys = objective_config(policy)
    if not registry.get(policy.model.objective).needs_of(keys).critic:
        return None
    optim = policy.model.optim if keys.value_lr is None else replace(policy.model.optim, lr=keys.value_lr)
    run = keys.critic_path
    if run is None:
        if policy.model.restore_from_path is None:
            raise UserError(
                f"model.ppo.critic=model: starts from a checkpoint, and both {_KEY} and {START} are null; name one"
            )
        config = policy
    else:
        try:
            trained = trained_run(run)
            config = beside(trained, run, policy, precision=policy.precision)
        except UserError as error:
            raise UserError(f"{_KEY}={error}") from None
    model = replace(
        config.model,
        optim=optim,
        peft=PeftConfig(),
        recompute_granularity=policy.model.recompute_granularity,
        recompute_method=policy.model.recompute_method,
        recompute_num_layers=policy.model.recompute_num_layers,
    )
    made = replace(config, model=model)
    if run is None:
        return Critic(None, policy.data, made, None)
    return Critic(run, trained.config.data, made, trained.checkpoint)


def _built(config: RunConfig, start: Path | None, resumed: bool) -> TrainedModel:
    """This rank's part, with the weights of ``start`` unless the run is resumed. A collective of all ranks."""
    import torch

    from nemo_rao.mcore.trained_model import TrainedModel

    objective = registry.get("ppo").critic
    assert objective is not None, "ppo has one"
    assert not callable(objective.needs), "whatever the keys"
    assert resumed or start is not None, "checked before the run"
    chunks = chunks_of(config, objective.needs, None if resumed else start, is_trained=True)
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return TrainedModel(
        chunks,
        gradients=ddp_fields(config),
        optimizer={
            **optimizer_fields(config),
            **optimizer_precision_fields(config),
            "params_dtype": formats[config.precision.params],
        },
    )
