"""``online.reward=[model:RUN_FOLDER]``: a trained reward model scores samples on the ranks of the run that draws them.

See :mod:`nemo_rao.training.second_models` for what it has in common with the policy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_rao.config.run_config import DataConfig, RunConfig
from nemo_rao.errors import UserError
from nemo_rao.loop.prepared import TokenScorer
from nemo_rao.objectives.base import Needs
from nemo_rao.training.loading import LoadedData
from nemo_rao.training.model_checks import check_model
from nemo_rao.training.second_models import beside, check_tokens, chunks_of
from nemo_rao.training.trained_run import trained_run


@dataclass(frozen=True)
class RewardModelOfRun:
    """A reward model beside the policy of a run.

    Attributes:
        run: the folder that the user named.
        data: how its own training made tokens of text.
        config: its recipe, with parallel sizes and tokenizer of the policy's run.
        needs: of its objective, which decide its head.
        checkpoint: its weights.
    """

    run: str
    data: DataConfig
    config: RunConfig
    needs: Needs
    checkpoint: Path

    def scorer(self, name: str) -> TokenScorer:
        """What the ranks make of it."""
        return TokenScorer(name, functools.partial(chunks_of, self.config, self.needs, self.checkpoint))

    def check_tokens(self, policy: RunConfig, loaded: LoadedData) -> None:
        """Checks that it was trained on the tokens that the policy samples.

        Raises:
            UserError: on those of another tokenizer or chat template.
        """
        with self._named():
            check_tokens(self.data, policy, loaded, what="reward model")

    def check_model(self, num_tokens: int) -> None:
        """Checks network and checkpoint; imports the engine.

        Raises:
            UserError: they do not fit each other, the tokenizer or the ranks.
        """
        with self._named():
            check_model(self.config, num_tokens, self.checkpoint, None)

    def close(self) -> None:
        """Nothing is held, unlike by scorers of text."""

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"online.reward=model:{self.run}: {error}") from None


def reward_model_of(run: str, policy: RunConfig) -> RewardModelOfRun:
    """The reward model that a run has trained.

    Raises:
        UserError: the run has trained none, or it cannot be split as the policy is.
    """
    trained = trained_run(run)
    if not trained.needs.scores:
        raise UserError(
            f"{run}: objective {trained.config.model.objective} trains no reward model (its implicit reward is for "
            "nemo-rao score); name a run of rm or rm_regression"
        )
    return RewardModelOfRun(run, trained.config.data, beside(trained, run, policy), trained.needs, trained.checkpoint)
