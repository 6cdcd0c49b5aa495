"""Prefetching of micro-batches on a thread while the model computes.

torch's DataLoader workers are not used: they are forks of a rank, which holds process groups and a CUDA context, and
pass micro-batches through pipes. A thread copies nothing. The caller's iterator determines the items and their order,
so a resumed run sees the same ones.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T")

MICRO_BATCHES_AHEAD = 2  # 1 is too few if collation times vary; more only cost memory


@dataclass(frozen=True)
class _End:
    """End of the items, caused by ``error`` if set."""

    error: BaseException | None


class Prefetcher(Generic[_T]):
    """Iterate over ``items`` on a thread: ``with Prefetcher(items) as ahead: for item in ahead: ...``.

    The thread starts with the block and ends with it, even in the middle of the items. An exception of the iterator is
    raised after the items before it, with its traceback.

    Args:
        items: iterated on the thread.
        num_ahead: maximum number of items made before they are requested.
    """

    def __init__(self, items: Iterable[_T], num_ahead: int = MICRO_BATCHES_AHEAD) -> None:
        assert num_ahead >= 1, num_ahead
        self._items = items
        self._ready: queue.SimpleQueue[_T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(num_ahead)
        self._stopped = False
        self._end: _End | None = None
        # Daemon: an interpreter that exits inside the block must not wait for the thread.
        self._thread = threading.Thread(target=self._make, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher[_T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread once its current item is made, and discard what is queued. Idempotent."""
        self._stopped = True
        self._room.release()
        self._thread.join()

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        if self._end is None:
            item = self._ready.get()
            if not isinstance(item, _End):
                self._room.release()
                return item
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def _make(self) -> None:
        end = _End(None)
        try:
            items = iter(self._items)
            while self._room.acquire() and not self._stopped:
                try:
                    item = next(items)
                except StopIteration:
                    break
                self._ready.put(item)
        except BaseException as error:
            end = _End(error)
        self._ready.put(end)


class NotAhead(Generic[_T]):
    """Drop-in replacement for :class:`Prefetcher` that makes each item when it is requested."""

    def __init__(self, items: Iterable[_T]) -> None:
        self._items = iter(items)

    def __enter__(self) -> NotAhead[_T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: there is no thread."""

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        return next(self._items)
