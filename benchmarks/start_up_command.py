"""``nemo-rao train`` up to the end of its first step, with the seconds of its parts.

    python -m benchmarks.start_up_command BEGIN REPORT key=value ...

BEGIN is the start time of the command (``time.time()``), REPORT the JSON file to write. Nothing heavy is imported
before the command itself imports it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parts:
    """Seconds of named parts, and since the beginning. Parts do not nest, so no time is counted twice."""

    def __init__(self, begin: float) -> None:
        self.begin, self.seconds = begin, {"interpreter": time.time() - begin}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.time() - start

        return wrapper

    def write(self, report: Path) -> None:
        total = time.time() - self.begin
        rest = total - sum(self.seconds.values())
        report.write_text(json.dumps({**self.seconds, "everything else": rest, "total": total}))


def main() -> None:
    begin, report, overrides = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    parts = Parts(begin)

    def imports() -> Any:
        from nemo_rao.config import compose
        from nemo_rao.engines.nemo import engine
        from nemo_rao.training import checks, prepare, train

        return checks.check_run, compose.compose, prepare, train, engine

    check_run, compose, prepare, train, engine = parts.timed("import of PyTorch and ours", imports)()
    prepare.load_data = parts.timed("data and tokenizer", prepare.load_data)
    engine.load = parts.timed("import of NeMo and Megatron", engine.load)
    from benchmarks.training import reference_timed

    def note(seconds: float) -> None:
        parts.seconds["reference pass"] = seconds

    def hooks(found: list[Any]) -> list[Any]:
        from nemo_rao.loop.session import Hook

        class FirstStep(Hook):
            def before_step(self, session: Any) -> None:
                self._start = time.time()

            def after_step(self, session: Any) -> None:
                parts.seconds["first step"] = time.time() - self._start
                parts.write(report)
                os._exit(0)

        return [*reference_timed(found, note), FirstStep()]

    # What ``nemo-rao train`` does with its arguments, but for these hooks.
    config = compose("gpt_rao", overrides)
    check_run(config)
    train.train(config, hooks=hooks)


if __name__ == "__main__":
    main()
