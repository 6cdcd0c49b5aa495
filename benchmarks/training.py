"""nemo_rao's side of a comparison: ``nemo-rao train``, whose steps take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sessions import Turn

# An unlimited run without checkpoints; batches follow the order of the file, as for the other side.
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
    """Train a recipe, each step in its turn. With several ranks, the first one waits, and the others wait for it.

    Notes of the turn: ``reference_seconds``, 0 without a reference pass; tokens as in ``metrics.jsonl``.

    Args:
        further: functions that take the turn and return a hook.
    """
    from nemo_rao.config.compose import compose
    from nemo_rao.training.checks import check_run
    from nemo_rao.training.train import train

    turn.begin()
    config = compose(recipe, list(overrides), config_dir)
    check_run(config)
    turn.notes["reference_seconds"] = 0.0

    def note(seconds: float) -> None:
        turn.notes["reference_seconds"] = seconds

    def with_turns(hooks: list[Any]) -> list[Any]:
        # The turn comes first, so that everything else before a step is part of it.
        return [taking_turns(turn), *reference_timed(hooks, note), *(make(turn) for make in further)]

    train(config, hooks=with_turns)


def reference_timed(hooks: list[Any], note: Callable[[float], None]) -> list[Any]:
    """The hooks, with ``note`` called with the seconds of the reference pass, if there is one."""
    from nemo_rao.loop.reference import ReferencePass
    from nemo_rao.loop.session import Hook

    class Begin(Hook):
        def start(self, session: Any) -> None:
            self.at = time.perf_counter()

    class End(Hook):
        def start(self, session: Any) -> None:
            note(time.perf_counter() - begin.at)

    begin = Begin()
    return [one for hook in hooks for one in ([begin, hook, End()] if isinstance(hook, ReferencePass) else [hook])]


def taking_turns(turn: Turn) -> Any:
    """A hook."""
    import torch

    from nemo_rao.loop.session import Hook

    class TakeTurns(Hook):
        def before_step(self, session: Any) -> None:
            metrics = session.reported()
            for name in ("data/token_efficiency", "data/tokens_shared"):
                if name in metrics:
                    turn.notes[name] = metrics[name]
            if session.is_first_rank:
                turn.between_steps()
            torch.distributed.barrier()  # no rank measures time while the first one waits for its turn

    return TakeTurns()
