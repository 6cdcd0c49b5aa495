"""The interface of engines, and the selection of a run's engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from nemo_rao.config.engine_choice import engine_name
from nemo_rao.config.run_config import RunConfig

if TYPE_CHECKING:
    from nemo_rao.loop.data import TrainingData
    from nemo_rao.loop.prepared import Prepared
    from nemo_rao.loop.session import Hook, Session
    from nemo_rao.objectives.base import Needs


class Engine(Protocol):
    """Builds model, optimizer and training loop from a recipe, and calls the hooks of :mod:`nemo_rao.loop`.

    Importing its module is cheap; :meth:`load` imports the engine itself.
    """

    def load(self) -> bool:
        """Import what a run needs of Megatron and the engine, adapted to this machine. The first call takes some 20
        seconds, so all errors in the data must be reported before it.

        Returns:
            whether runs are on the CPU.
        """

    def model_config(self, config: RunConfig) -> Any:
        """Return the engine's model config of the recipe, a ``TransformerConfig`` with ``vocab_size``.

        Raises:
            UserError: the engine does not support this network.
        """

    def train_rank(self, config: RunConfig, prepared: Prepared, data: TrainingData, hooks: list[Hook]) -> None:
        """Run one rank of a run; its rank is in the environment. See :mod:`nemo_rao.training.ranks`.

        Args:
            prepared: result of the parent's preparation.
            data: training data, in the order of the steps.
            hooks: hooks around the steps, in order.
        """

    def pass_rank(
        self,
        config: RunConfig,
        objective_config: Any,
        data: TrainingData,
        checkpoint: Path,
        folder: Path,
        compute: Callable[[Session], None],
    ) -> None:
        """Run one rank of a forward-only pass: call ``compute`` with a checkpoint's model over ``data``.

        Args:
            objective_config: keys of the recipe's objective, which decide the model's head.
            folder: directory for files that the engine writes.
        """

    def second_model(self, config: RunConfig, needs: Needs, *, is_trained: bool) -> list[Any]:
        """Build this rank's chunks of a second model inside a run, over the run's process groups.

        The chunks are not wrapped for training, and the caller loads their weights. Not a collective.

        Args:
            config: the second model's recipe, with the run's parallel sizes.
            needs: needs of the objective that uses it, which decide its head.
            is_trained: the run trains it. If not, its weights are not initialized; initialization also marks them as
                sharded or replicated for Megatron's gradient norm.
        """


def engine_of(config: RunConfig) -> Engine:
    """Return the engine that a recipe selects.

    Raises:
        UserError: it is not installed.
    """
    return cast(Engine, importlib.import_module(f"nemo_rao.engines.{engine_name(config)}.engine"))
