"""Exclude long-lived objects from Python's garbage collection."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Exclude what is imported in the block from garbage collection, here and in forks of this process.

    An engine has some 800,000 objects. Each full collection traverses all of them, many times during the import itself,
    and in a forked rank copies the memory of these objects: a third of a short run's CPU time.
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
