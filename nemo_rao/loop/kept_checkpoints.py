"""Checkpoints to keep: the best by a metric and the newest. Remains of killed runs are removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_rao.checkpoint.find import mark_unfinished, remove_checkpoints, remove_unfinished
from nemo_rao.config.run_config import CheckpointConfig
from nemo_rao.errors import UserError
from nemo_rao.loop.session import Hook, Session
from nemo_rao.runtime.console import say


class KeepCheckpoints(Hook):
    """Writes checkpoints at intervals and at the end: ``step=40``, ``step=40-last``. Must be the last hook.

    A checkpoint is ranked by the metric of its own step, or not ranked; without a metric, the newest one is the best.
    ``-last`` is a link if the newest is also among the best. When a run is restarted, the remains of a killed one are
    removed: checkpoints that were being written or removed, and those that the run has written, according to the last
    checkpoint, and no longer needs.

    Args:
        folder: directory of checkpoints.
        keys: ``exp_manager.checkpoint_callback_params``.
        save: writes a checkpoint into a directory, on all ranks together, and then calls the given function: at once,
            or from ``finish_written``.
        finish_written: finishes checkpoints that are written in the background; all of them with ``wait``.

    Attributes:
        state: state to include in a checkpoint; set before the run is resumed.
    """

    def __init__(
        self,
        folder: Path,
        keys: CheckpointConfig,
        save: Callable[[Path, Callable[[], None]], None],
        finish_written: Callable[..., None],
    ) -> None:
        self._folder = folder
        self._keys = keys
        self._save = save
        self._finish_written = finish_written
        self._best: dict[str, float] = {}  # name -> value of the metric
        self._last: str | None = None
        self._written: set[str] = set()
        self._saved_step = -1
        self._is_reported = False  # whether the monitor has been reported since this start

    @property
    def state(self) -> dict[str, Any]:
        return {**self._settings, "best": dict(self._best), "last": self._last, "written": sorted(self._written)}

    @state.setter
    def state(self, stored: Mapping[str, Any]) -> None:
        # Checkpoints kept by other rules, or in another directory, are not remains.
        if all(stored[name] == value for name, value in self._settings.items()):
            self._best, self._last = dict(stored["best"]), stored["last"]
            self._written = set(stored["written"])

    @property
    def _settings(self) -> dict[str, Any]:
        keys = self._keys
        return {
            "folder": str(self._folder.absolute()),
            "save_top_k": keys.save_top_k,
            "monitor": keys.monitor,
            "mode": keys.mode,
        }

    def start(self, session: Session) -> None:
        self._saved_step = session.step
        if session.is_first_rank:
            removed = remove_unfinished(self._folder)
            self._best = {name: value for name, value in self._best.items() if (self._folder / name).is_dir()}
            removed += remove_checkpoints(self._folder, self._written - self._wanted())
            if removed:
                say(f"removed checkpoints left by an earlier start: {', '.join(removed)}")
        best = [self._best]
        torch.distributed.broadcast_object_list(best, src=0)  # also a barrier
        self._best = best[0]
        self._written &= self._wanted()

    def after_step(self, session: Session) -> None:
        self._is_reported = self._is_reported or self._keys.monitor in session.reported()
        self._finish_written(wait=False)
        if session.step % self._keys.every_n_train_steps == 0:
            self._save_step(session)

    def end(self, session: Session) -> None:
        self.save_last(session)

    def save_last(self, session: Session) -> None:
        """Write the newest checkpoint, unless it exists or is disabled; all are complete when this returns."""
        if self._keys.save_last and self._saved_step != session.step:
            self._write(session, f"step={session.step}-last", is_last=True)
        self._finish_written(wait=True)

    def _save_step(self, session: Session) -> None:
        name, last = f"step={session.step}", f"step={session.step}-last"
        value = self._value(session)
        if value is not None and self._takes(value):
            self._best[name] = value
            if 0 < self._keys.save_top_k < len(self._best):
                del self._best[max(self._best, key=lambda other: self._badness(self._best[other]))]
            self._write(session, name, is_last=self._keys.save_last, link=last if self._keys.save_last else None)
        elif self._keys.save_last:
            self._write(session, last, is_last=True)

    def _write(self, session: Session, name: str, *, is_last: bool, link: str | None = None) -> None:
        self._finish_written(wait=True)  # one at a time: each records which earlier ones are no longer needed
        if is_last:
            self._last = link or name
        self._written |= {name, link} if link else {name}
        # Until these are removed, the checkpoint lists them as written.
        unwanted = self._written - self._wanted() - {name}
        self._saved_step = session.step
        if session.is_first_rank:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_checkpoints(self._folder, [name])
            mark_unfinished(self._folder / name, True)
        torch.distributed.barrier()

        def finish() -> None:
            if session.is_first_rank:
                mark_unfinished(self._folder / name, False)
                if link:
                    remove_checkpoints(self._folder, [link])
                    (self._folder / link).symlink_to(name)
                remove_checkpoints(self._folder, unwanted)
            self._written.difference_update(unwanted)
            torch.distributed.barrier()

        self._save(self._folder / name, finish)

    def _value(self, session: Session) -> float | None:
        """Return the value that ranks this step; ``None``: it is not ranked."""
        monitor = self._keys.monitor
        if self._keys.save_top_k == 0:
            return None
        if monitor is None:
            return float(session.step)
        reported = session.reported()
        if monitor in reported:
            return reported[monitor]
        if self._is_reported:  # such as a margin when no prompt of this batch has a pair
            say(f"checkpoint of step {session.step} is not ranked: {monitor} has no value in this step")
            return None
        raise UserError(
            f"exp_manager.checkpoint_callback_params.monitor={monitor}: this run does not log such a metric. Choose "
            f"one of {', '.join(sorted(reported))}."
        )

    def _takes(self, value: float) -> bool:
        top = self._keys.save_top_k
        if top == -1 or len(self._best) < top:
            return True
        return self._badness(value) < max(map(self._badness, self._best.values()))

    def _badness(self, value: float) -> float:
        if math.isnan(value):
            return math.inf
        higher_is_better = self._keys.monitor is None or self._keys.mode == "max"
        return -value if higher_is_better else value

    def _wanted(self) -> set[str]:
        """Return the names of the best and the newest; for a link, also its target."""
        names = {*self._best, *([self._last] if self._last else [])}
        links = [self._folder / name for name in names]
        return names | {link.readlink().name for link in links if link.is_symlink()}
