"""``model.ppo.critic=model``: a critic that is a separate model, with its own optimizer.

It starts from the last checkpoint of a run, such as a reward model's, or from the policy's start. See
:mod:`nemo_rao.training.second_models` for what it shares with the policy.
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
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.loop.prepared import CriticTask
from nemo_rao.objectives import registry
from nemo_rao.objectives.base import Needs
from nemo_rao.training.loading import LoadedData
from nemo_rao.training.model_checks import check_model
from nemo_rao.training.second_models import beside, check_tokens, chunks_of
from nemo_rao.training.trained_run import TrainedRun, trained_run

if TYPE_CHECKING:
    from nemo_rao.mcore.trained_model import TrainedModel

_KEY = "model.ppo.critic_path"


@dataclass(frozen=True)
class Critic:
    """Description of a critic that is not built yet.

    Attributes:
        config: its recipe: the network of the run that it starts from, everything else from the policy.
        needs: needs of the objective that trains it, which decide its head.
        trained: the run that it starts from; ``None``: it has the policy's start and network.
        run: directory of that run, as the user wrote it.
    """

    config: RunConfig
    needs: Needs
    trained: TrainedRun | None = None
    run: str | None = None

    def check_tokens(self, policy: RunConfig, loaded: LoadedData) -> None:
        """Check that the run it starts from was trained with the policy's tokenizer and chat template.

        Raises:
            UserError: it was trained with different ones.
        """
        if self.trained is not None:
            with self._named():
                check_tokens(self.trained.config.data, policy, loaded, what="critic's run")

    def check_model(self, num_tokens: int, resume_from: Path | None) -> None:
        """Check network and checkpoints; imports the engine.

        Args:
            resume_from: this run's last checkpoint.

        Raises:
            UserError: they do not fit each other, the tokenizer or the ranks.
        """
        if self.trained is not None:
            with self._named():
                check_model(self.config, num_tokens, self.trained.checkpoint, None)
        if resume_from is not None and not (resume_from / CRITIC).is_dir():
            raise UserError(
                f"{resume_from}: has no critic, but model.ppo.critic=model resumes from one. Restore {CRITIC}/, or "
                "change exp_manager.name."
            )

    def task(self, start_from: Path | None, resume_from: Path | None) -> CriticTask:
        """Return what the ranks need to build and train it.

        Args:
            start_from: the policy's start.
            resume_from: this run's last checkpoint.
        """
        optim = self.config.model.optim
        start = start_from if self.trained is None else self.trained.checkpoint
        return CriticTask(
            functools.partial(_built, self.config, self.needs, start),
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
    """Return the critic of a run; ``None`` unless its objective has one that is a separate model.

    Raises:
        UserError: there is no checkpoint to start from, or its model cannot be split as the policy is.
    """
    objective, keys = registry.get(policy.model.objective), objective_config(policy)
    if not objective.needs_of(keys).critic:
        return None
    assert objective.critic is not None, "an objective that needs a critic defines one"
    optim = policy.model.optim if keys.value_lr is None else replace(policy.model.optim, lr=keys.value_lr)
    run, trained = keys.critic_path, None
    if run is None:
        if policy.model.restore_from_path is None:
            raise UserError(
                f"model.ppo.critic=model: needs a checkpoint to start from, but {_KEY} and {START} are null. Set one."
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
    return Critic(replace(config, model=model), objective.critic.needs_of(keys), trained, run)


def _built(config: RunConfig, needs: Needs, start: Path | None, resumed: bool) -> TrainedModel:
    """Build this rank's part, with the weights of ``start`` unless the run is resumed. A collective of all ranks."""
    import torch

    from nemo_rao.mcore.trained_model import TrainedModel

    assert resumed or start is not None, "checked before the run"
    chunks = chunks_of(config, needs, None if resumed else start, is_trained=True)
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
