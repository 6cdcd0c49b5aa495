"""``rollouts/`` in the run's directory: rollouts that a restart may need. Rank 0 reads and writes them.

Arrays of numpy, one file each: not :class:`nemo_rao.runtime.part_file.PartFile`, because a rollout is rewritten as its
parts are computed, and removed when no checkpoint needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemo_rao.errors import RankFailure
from nemo_rao.loop.first_rank import from_first_rank
from nemo_rao.rollout.samples import Rollout, load
from nemo_rao.runtime.files import remove_unfinished_files

ROLLOUTS = "rollouts"


class RolloutFiles:
    """One file for each rollout, by its number.

    Args:
        run_folder: directory of the run.
    """

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / ROLLOUTS

    def load(self, number: int) -> Rollout | None:
        """Read a rollout, with the parts it has so far; ``None`` if there is no file. A collective of all ranks."""
        return from_first_rank(lambda: load(self._path(number)))

    def save(self, number: int, rollout: Rollout) -> None:
        """Write a rollout atomically, replacing an earlier version. On rank 0."""
        rollout.save(self._path(number))

    def rewards_before(self, number: int) -> np.ndarray:
        """Return ``[2]`` float64, sum and count of the rewards of all earlier rollouts. A collective of all ranks.

        Raises:
            RankFailure: the file of the previous rollout is missing.
        """
        if number == 0:
            return np.zeros(2)
        before = self.load(number - 1)
        if before is None or before.rewards_so_far is None:
            raise self.missing(number - 1)
        return before.rewards_so_far

    def missing(self, number: int) -> RankFailure:
        """Return the error for a missing rollout that the run needs to continue."""
        return RankFailure(
            f"{self._path(number)}: is missing, or was sampled with other keys, and the next step needs its samples "
            "and rewards. Restore it, or start a new run under another exp_manager.name."
        )

    def remove_unfinished(self) -> None:
        """Remove partially written files of a killed run. On rank 0."""
        remove_unfinished_files(self._folder)

    def remove(self, which: Callable[[int], bool]) -> None:
        """Remove the rollouts for whose numbers ``which`` is true. On rank 0."""
        for path in self._folder.glob("*.npz"):
            if path.stem.isdigit() and which(int(path.stem)):
                path.unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.npz"
