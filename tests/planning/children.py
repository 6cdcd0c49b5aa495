"""Run functions in forks of a process that has imported NeMo, so that process groups and devices do not leak."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

from ..megatron_ranks import import_once


def in_child(function: Callable[..., Any], args: Sequence[Any] = ()) -> Any:
    """The result of ``function(*args)`` in the fork; a failure is raised here with its traceback."""
    import_once()
    context = get_context("fork")
    results = context.Queue()
    child = context.Process(target=_answer, args=(function, args, results))
    child.start()
    result, failure = results.get(timeout=280)
    child.join(30)
    assert failure is None, failure
    return result


def _answer(function: Callable[..., Any], args: Sequence[Any], results: Any) -> None:
    try:
        results.put((function(*args), None))
    except BaseException:
        results.put((None, traceback.format_exc()))
