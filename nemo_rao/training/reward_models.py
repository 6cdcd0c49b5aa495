"""``online.reward=[model:RUN_FOLDER]``: a trained reward model scores samples on the policy's ranks.

See :mod:`nemo_rao.training.second_models` for what it shares with the policy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.loop.prepared import TokenScorer
from nemo_rao.training.loading import LoadedData
from nemo_rao.training.model_checks import check_model
from nemo_rao.training.second_models import beside, check_tokens, chunks_of
from nemo_rao.training.trained_run import TrainedRun, trained_run


@dataclass(frozen=True)
class RewardModelOfRun:
    """A reward model before it is built.

    Attributes:
        run: the directory that the user named.
        trained: the run in it.
        config: its recipe, with parallel sizes and tokenizer of the policy's run.
    """

    run: str
    trained: TrainedRun
    config: RunConfig

    def scorer(self, name: str) -> TokenScorer:
        """Return what the ranks need to build it."""
        build = functools.partial(chunks_of, self.config, self.trained.needs, self.trained.checkpoint)
        return TokenScorer(name, build)

    def check_tokens(self, policy: RunConfig, loaded: LoadedData) -> None:
        """Check that it was trained with the policy's tokenizer and chat template.

        Raises:
            UserError: it was trained with others.
        """
        with self._named():
            check_tokens(self.trained.config.data, policy, loaded, what="reward model")

    def check_model(self, num_tokens: int) -> None:
        """Check network and checkpoint; imports the engine.

        Raises:
            UserError: they do not fit each other, the tokenizer or the ranks.
        """
        with self._named():
            check_model(self.config, num_tokens, self.trained.checkpoint, None)

    def close(self) -> None:
        """Nothing to release, unlike with scorers of text."""

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"online.reward=model:{self.run}: {error}") from None


def reward_model_of(run: str, policy: RunConfig) -> RewardModelOfRun:
    """The reward model that a run has trained.

    Args:
        run: its directory, as the user named it.
        policy: the recipe of the run that it scores for.

    Raises:
        UserError: the run has not trained one, or it cannot be split as the policy is.
    """
    trained = trained_run(run)
    if not trained.needs.scores:
        raise UserError(
            f"{run}: objective {trained.config.model.objective} trains no reward model (its implicit reward is for "
            "nemo-rao score); name a run of rm or rm_regression"
        )
    return RewardModelOfRun(run, trained, beside(trained, run, policy))
