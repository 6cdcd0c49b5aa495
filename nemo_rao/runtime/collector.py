"""Python's garbage collector, kept off what lasts as long as the process."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """What is imported in the block is never looked through for garbage, here or in forks of this process.

    An engine has some 800,000 objects. Each full collection looks at all of them, of which there are many during the
    import itself, and in a forked rank copies the memory that they lie in: of a short run's CPU time, a third.
    """
    modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.collect()
            gc.freeze()
        if was_enabled:
            gc.enable()
