"""Checkpoints to keep: the best by a metric and the newest. Remains of killed runs are removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.pytorch.callbacks import ModelCheckpoint

from nemo_rao.checkpoint.find import remove_checkpoints, remove_unfinished
from nemo_rao.errors import UserError
from nemo_rao.runtime.console import say


class StepCheckpoint(ModelCheckpoint):
    """NeMo's checkpoints, named by the number of optimizer steps: ``step=40``, ``step=40-last``.

    A checkpoint is ranked by the metric of its own step, or not ranked. When a run is restarted, the remains of a
    killed one are removed: checkpoints that were being written or removed, and those that the run has written,
    according to the last checkpoint, and no longer needs.
    """

    CHECKPOINT_NAME_LAST = "{step}-last"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_reported = False  # whether the monitor has been reported since this start
        self._written: set[str] = set()  # names of checkpoints that this run has saved and not removed
        self._removed: list[str] = []

    # ------------------------------------------------------------------------------------------------ ranking

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self._is_reported = self._is_reported or self.monitor in trainer.callback_metrics
        super().on_train_batch_end(trainer, *args, **kwargs)

    def _monitor_candidates(self, trainer: Any) -> dict[str, torch.Tensor]:
        # NeMo logs a metric of the same name, still for the previous step.
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def _save_topk_checkpoint(self, trainer: Any, monitor_candidates: dict[str, torch.Tensor]) -> None:
        if self.save_top_k == 0 or self.monitor is None or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif self._is_reported:  # such as a margin when no prompt of this batch has a pair
            say(f"checkpoint of step {trainer.global_step} is not ranked: {self.monitor} has no value in this step")
        else:
            raise UserError(
                f"exp_manager.checkpoint_callback_params.monitor={self.monitor}: this run does not log such a metric. "
                f"Choose one of {', '.join(sorted(set(monitor_candidates) - {'epoch', 'step', 'global_step'}))}."
            )

    # ------------------------------------------------------------------------------------------------ clearing up

    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.is_global_zero:  # NeMo, which would do it silently, then finds none
            self._removed = remove_unfinished(Path(self.dirpath))
        super().setup(trainer, *args, **kwargs)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        self._written.add(_name(filepath))
        super()._save_checkpoint(trainer, filepath)

    def _link_checkpoint(self, trainer: Any, filepath: str, linkpath: str, *args: Any, **kwargs: Any) -> None:
        self._written.add(_name(linkpath))
        super()._link_checkpoint(trainer, filepath, linkpath, *args, **kwargs)

    def _remove_checkpoint(self, trainer: Any, filepath: str, override_async: bool = False) -> None:
        if self.async_save and override_async:  # NeMo would remove it on a thread, after its unfinished mark
            if trainer.is_global_zero:
                remove_checkpoints(Path(self.dirpath), [_name(filepath)])
            torch.distributed.barrier()
        else:  # while its replacement is being written, NeMo only queues the removal and calls this again
            super()._remove_checkpoint(trainer, filepath)
        if override_async or not self.async_save:
            self._written.discard(_name(filepath))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "written": sorted(self._written), "save_top_k": self.save_top_k}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Checkpoints kept under another save_top_k, or in another directory, are not remains.
        if state_dict["dirpath"] != self.dirpath or state_dict.get("save_top_k") != self.save_top_k:
            return
        self._written = set(state_dict["written"])
        if self.monitor is None and _is_there(state_dict["best_model_path"]):
            self.best_model_path = state_dict["best_model_path"]  # NeMo loses it if the ranking is empty

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._removed += remove_checkpoints(Path(self.dirpath), self._written - self._wanted(trainer))
            if self._removed:
                say(f"removed checkpoints left by an earlier start: {', '.join(self._removed)}")
        self._written &= self._wanted(trainer)
        super().on_train_start(trainer, pl_module)  # also a barrier

    def _wanted(self, trainer: Any, *, with_start: bool = True) -> set[str]:
        """Return the names of the best and the newest, and of the one resumed from; for a link, also its target."""
        if self.save_top_k == -1:
            return set(self._written)
        paths = [*self.best_k_models, self.best_model_path, self.last_model_path]
        paths += [trainer.ckpt_path] if with_start else []
        names = {_name(path) for path in paths if path}
        links = [Path(self.dirpath) / name for name in names]
        return names | {link.readlink().name for link in links if link.is_symlink()}

    def save_last_now(self, trainer: Any) -> None:
        """Write the newest checkpoint, unless it exists or is disabled; all are complete when this returns."""
        # NeMo decides by the validation interval of Lightning's loop, which is not used.
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if self.async_save:
            trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.save_last_now(trainer)
        # Lightning never removes the checkpoint that a run resumes from.
        wanted = self._wanted(trainer, with_start=not self.save_last)
        if trainer.is_global_zero:
            remove_checkpoints(Path(self.dirpath), self._written - wanted)
        self._written &= wanted


def _is_there(path: str) -> bool:
    return bool(path) and ckpt_to_dir(path).is_dir() and not ModelCheckpoint.is_checkpoint_unfinished(path)


def _name(path: str | Path) -> str:
    """Return the name of a checkpoint's directory, to which Lightning appends ``.ckpt``."""
    return ckpt_to_dir(str(path)).name
