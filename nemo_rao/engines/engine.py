"""What a run asks of the engine that drives it, and which engine that is."""

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
    """A module that turns recipes into its own model, optimizer and loop, and calls the hooks of :mod:`nemo_rao.loop`.

    Importing it costs nothing; :meth:`load` imports what it stands for.
    """

    def load(self) -> bool:
        """Import what a run needs of Megatron and the engine, changed as this machine needs it. Takes some 20 seconds
        where it has not been done yet: not before everything that is wrong with the data has been said.

        Returns:
            whether runs are on the CPU.
        """

    def model_config(self, config: RunConfig) -> Any:
        """The engine's model config, a ``TransformerConfig`` with ``vocab_size``, that the recipe describes.

        Raises:
            UserError: the engine has no such network.
        """

    def train_rank(self, config: RunConfig, prepared: Prepared, data: TrainingData, hooks: list[Hook]) -> None:
        """One rank's part of a run; its place is in the environment. See :mod:`nemo_rao.training.ranks`.

        Args:
            prepared: what the parent has worked out.
            data: what is trained on, in the order of the steps.
            hooks: what happens around the steps, in their order.
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
        """One rank's part of a forward-only pass: ``compute`` is called with a checkpoint's model over ``data``.

        Args:
            objective_config: of the recipe's objective, which decides the model's head.
            folder: for what the engine writes.
        """

    def second_model(self, config: RunConfig, needs: Needs, *, is_trained: bool) -> list[Any]:
        """Build this rank's chunks of a second model inside a run, over the run's process groups.

        The chunks are not wrapped for training, and the caller reads their weights. Not a collective.

        Args:
            config: the second model's recipe, with the run's parallel sizes.
            needs: of the objective that it is used for, which decide its head.
            is_trained: the run trains it. If not, its weights are not initialized, which is also what marks them as
                sharded or replicated for Megatron's gradient norm.
        """


def engine_of(config: RunConfig) -> Engine:
    """The engine that a recipe asks for.

    Raises:
        UserError: it is not installed.
    """
    return cast(Engine, importlib.import_module(f"nemo_rao.engines.{engine_name(config)}.engine"))
