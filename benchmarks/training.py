"""Our side of a comparison: ``nemo-rao train``, its steps taken in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.sessions import Turn

# A run without an end, without checkpoints; every batch is the file's next, as for everyone else.
ENDLESS = (
    "model.optim.sched.name=constant",
    "model.optim.sched.warmup_steps=0",
    "data.shuffle=false",
    "trainer.max_epochs=null",
    "trainer.max_steps=1000000",
    "trainer.enable_progress_bar=false",
    "exp_manager.draw_curves=false",
    "exp_manager.checkpoint_callback_params.save_top_k=0",
    "exp_manager.checkpoint_callback_params.save_last=false",
)


def import_model(source: Path, imported: Path) -> None:
    """``nemo-rao import-hf``."""
    from nemo_rao.cli import main

    assert main(["import-hf", str(source), str(imported)]) == 0


def run_ours(
    turn: Turn, recipe: str, overrides: Sequence[str], config_dir: str | None, further: Sequence[Any] = ()
) -> None:
    """Train as a recipe says, each step in its turn. On several ranks the first one waits, and so the others for it.

    Notes of the turn: ``reference_seconds``, 0 where no reference pass is run; tokens as ``metrics.jsonl`` has them.

    Args:
        further: functions that are given the turn and make a callback.
    """
    from nemo_rao.integration import train
    from nemo_rao.integration.checks import check_run
    from nemo_rao.integration.compose import compose

    turn.begin()
    config = compose(recipe, list(overrides), config_dir)
    check_run(config)
    made = train._callbacks

    def with_turns(*arguments: Any) -> list[Any]:
        callbacks = made(*arguments)
        return [*timed_reference(callbacks, turn), taking_turns(turn), *(make(turn) for make in further)]

    # There is no key for further callbacks, and nothing else of a run is to be another one.
    with mock.patch.object(train, "_callbacks", with_turns):
        train.train(config)


def timed_reference(callbacks: list[Any], turn: Turn) -> list[Any]:
    from nemo_rao.integration.callbacks import ReferencePass

    turn.notes["reference_seconds"] = 0.0
    for callback in callbacks:
        if isinstance(callback, ReferencePass):
            callback.on_train_start = _timed(callback.on_train_start, turn)  # type: ignore[method-assign]
    return callbacks


def _timed(function: Any, turn: Turn) -> Any:
    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        function(*arguments)
        turn.notes["reference_seconds"] = time.perf_counter() - start

    return timed


def taking_turns(turn: Turn) -> Any:
    """A callback of Lightning's."""
    import lightning.pytorch as pl
    import torch

    class TakeTurns(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            metrics = trainer.callback_metrics
            for name in ("data/token_efficiency", "data/tokens_shared"):
                if name in metrics:
                    turn.notes[name] = float(metrics[name])
            if trainer.is_global_zero:
                turn.between_steps()
            torch.distributed.barrier()  # no rank's clock runs while the first one waits for its turn

    return TakeTurns()
