"""Progress of a task: a bar on a terminal, occasional lines in a log file.

    with Progress("reference log-probs", unit="prompt", total=480) as progress:
        ...
        progress.update(120)

A log file (SLURM, CI, a pipe) gets at most one line every 20 seconds, and one at the end::

    reference log-probs: 120 of 480 prompts, 3.2 prompts/s, 1 min 52 s left
    reference log-probs: 480 of 480 prompts in 2 min 30 s, 3.2 prompts/s

Everything goes to stderr.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Shows the progress of one piece of work.

    Args:
        label: name of the work.
        unit: what is counted, in the singular.
        total: total number of units; ``None``: unknown, or given to :meth:`update`.
        done: units that an earlier process finished.
        shown: ``False``: write nothing, as on all ranks but one. ``TQDM_DISABLE=1`` has the same effect.
        stays: the bar remains on the terminal when the work is done, and a log file gets a last line.
        position: line of the bar, below the cursor; nested work is shown only on terminals.
    """

    def __init__(
        self,
        label: str,
        *,
        unit: str,
        total: int | None = None,
        done: int = 0,
        shown: bool = True,
        stays: bool = True,
        position: int = 0,
    ) -> None:
        self._label, self._unit, self._total = label, unit, total
        self._stays, self._position = stays, position
        self._begun_at = self._done = done
        self._updated = False
        self._metrics: Mapping[str, str] = {}
        self._bar: Any = None
        on_terminal = sys.stderr.isatty()
        disabled = os.environ.get("TQDM_DISABLE", "").lower() in ("1", "true")
        self._shown = shown and not disabled and (on_terminal or position == 0)
        self._on_terminal = on_terminal

    def __enter__(self) -> Progress:
        self._started = self._line_written = time.monotonic()
        if self._shown and self._on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._label or None,
                total=self._total,
                initial=self._done,
                unit=self._unit,
                leave=self._stays,
                position=self._position,
                dynamic_ncols=True,
            )
        return self

    def update(self, done: int, total: int | None = None, metrics: Mapping[str, float] | None = None) -> None:
        """Report the units finished so far, including those of earlier processes.

        Args:
            total: total number of units, if it becomes known only now.
            metrics: values to show with it.
        """
        self._updated = True
        self._done, self._total = done, self._total if total is None else total
        if metrics is not None:
            self._metrics = {name: f"{value:.4g}" for name, value in metrics.items()}
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.set_postfix(self._metrics, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._line_written >= SECONDS_BETWEEN_LINES and done != self._total:
            self._write(ended=False)

    def advance(self, count: int) -> None:
        """Report that ``count`` more units are finished."""
        self.update(self._done + count)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stays = self._stays and self._updated  # work that was already finished needs no line
        if self._bar is not None:
            self._bar.leave = stays
            self._bar.close()
        elif self._shown and stays and kind is None:  # an error should be the last line
            self._write(ended=True)

    def _write(self, *, ended: bool) -> None:
        self._line_written = time.monotonic()
        seconds = self._line_written - self._started
        print(self._line(seconds, ended=ended), file=sys.stderr, flush=True)

    def _line(self, seconds: float, *, ended: bool) -> str:
        done, total = self._done, self._total
        count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        parts = [f"{count} {self._unit}{'' if (total or done) == 1 else 's'}"]
        if ended:
            parts[0] += f" in {duration(seconds)}"
        finished = done - self._begun_at
        if finished > 0 and seconds > 0:
            parts.append(_rate(finished / seconds, self._unit))
            if total is not None and not ended:
                parts.append(f"{duration((total - done) * seconds / finished)} left")
        parts += [f"{name} {value}" for name, value in self._metrics.items()]
        return f"{self._label}: {', '.join(parts)}"


def _rate(per_second: float, unit: str) -> str:
    """ "3.2 prompts/s", or "12 s/step" if a unit takes longer than a second."""
    if per_second < 1:
        return f"{_three_digits(1 / per_second)} s/{unit}"
    return f"{_three_digits(per_second)} {unit}s/s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """ "8 s", "1 min 50 s", "2 h 5 min", "3 d 4 h"."""
    whole = round(seconds)
    for size, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"
