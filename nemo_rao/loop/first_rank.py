"""Results that only rank 0 computes, such as file contents, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nemo_rao.errors import RankFailure

_T = TypeVar("_T")


def from_first_rank(compute: Callable[[], _T]) -> _T:
    """Call ``compute`` on rank 0 and return its result, which must be picklable, on every rank. A collective.

    Raises:
        RankFailure: on every rank, if ``compute`` raises one.
    """
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [compute(), None]
        except RankFailure as failure:
            found = [None, str(failure)]
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise RankFailure(found[1])
    result: _T = found[0]
    return result
