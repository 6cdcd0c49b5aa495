"""``online.reward=model:RUN_FOLDER``: a trained reward model scores samples on the policy's ranks.

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
    """Description of a reward model that is not built yet.

    Attributes:
        run: directory of its run, as the user wrote it.
        trained: that run.
        config: its recipe, with the parallel sizes and the tokenizer of the policy.
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
            UserError: it was trained with different ones.
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
        """Do nothing; only text scorers hold resources."""

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"online.reward=model:{self.run}: {error}") from None


def reward_model_of(run: str, policy: RunConfig) -> RewardModelOfRun:
    """Return the reward model that a run has trained.

    Args:
        run: its directory, as the user wrote it.
        policy: the recipe of the run that it scores for.

    Raises:
        UserError: the run did not train a reward model, or it cannot be split as the policy is.
    """
    trained = trained_run(run)
    if not trained.needs.scores:
        raise UserError(
            f"{run}: objective {trained.config.model.objective} does not train a reward model (nemo-rao score can use "
            "its implicit reward). Name a run of rm or rm_regression."
        )
    return RewardModelOfRun(run, trained, beside(trained, run, policy))
