"""The next micro-batches, made on a thread while the model computes.

Not the workers of torch's DataLoader: they are forks of a rank, which holds process groups and a CUDA context, and hand
micro-batches over through pipes. Here nothing is copied, and nothing is drawn at random: what comes next, and in which
order, is the caller's iterator's to say, so a resumed run sees the same.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T")

MICRO_BATCHES_AHEAD = 2  # one is too few where their making takes uneven time; more only take memory


@dataclass(frozen=True)
class _End:
    """No item is left, or ``error`` has ended them."""

    error: BaseException | None


class Prefetcher(Generic[_T]):
    """``with Prefetcher(items) as ahead: for item in ahead: ...``; the thread ends with the block, wherever it stands.

    What the iterator raises is raised in its place among the items, with its traceback.

    Args:
        items: iterated on the thread, which begins at the start of the block.
        num_ahead: items that are made before they are asked for, at most.
    """

    def __init__(self, items: Iterable[_T], num_ahead: int = MICRO_BATCHES_AHEAD) -> None:
        assert num_ahead >= 1, num_ahead
        self._items = items
        self._ready: queue.SimpleQueue[_T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(num_ahead)
        self._stopped = False
        self._end: _End | None = None
        # Daemon: an interpreter that ends without leaving the block does not wait for it.
        self._thread = threading.Thread(target=self._make, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher[_T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, which may be making an item; what was made is dropped. Twice is as good as once."""
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
    """A :class:`Prefetcher` that makes an item when it is asked for, and none before."""

    def __init__(self, items: Iterable[_T]) -> None:
        self._items = iter(items)

    def __enter__(self) -> NotAhead[_T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """As there is no thread to end, nothing."""

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        return next(self._items)
