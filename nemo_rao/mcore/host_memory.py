"""Tensors that are on the device only while in use, and otherwise in host memory.

The tensor objects stay the same: only their storage is freed and reallocated, so parameters, views of a buffer and
optimizer state keep their identity. megatron-core (since 0.17) does the same with its buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


class HostMemory:
    """Moves tensors between their device and host memory. They start on the device.

    Args:
        tensors: returns the tensors; called at each move to the host, because an optimizer creates its state in its
            first step.
        kept: their values are preserved; if not, as for gradient buffers, nothing is copied and values are undefined
            when they return.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, kept: bool = True) -> None:
        self._tensors = tensors
        self._kept = kept
        # By storage, with its size in bytes and the host copy.
        self._waiting: dict[int, tuple[torch.UntypedStorage, int, Tensor | None]] = {}
        self._is_away = False

    @contextlib.contextmanager
    def on_device(self, *, changed: bool) -> Iterator[None]:
        """Keep the tensors on the device inside the block, and off it afterwards.

        Args:
            changed: their values change inside the block; if not, the copy in host memory stays valid and is not
                rewritten.
        """
        self.bring()
        try:
            yield
        finally:
            self.send_away(changed=changed)

    def send_away(self, *, changed: bool = True) -> None:
        """Free the device's memory. See :meth:`on_device`."""
        assert not self._is_away, "the tensors must be on the device"
        found = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            if storage._cdata in found or storage.nbytes() == 0:
                continue
            known = self._waiting.get(storage._cdata)
            copy = None if known is None else known[2]
            if self._kept and (copy is None or changed):
                if copy is None or len(copy) != storage.nbytes():
                    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
                copy.copy_(_bytes_of(storage))
            found[storage._cdata] = storage, storage.nbytes(), copy
        for storage, _, _ in found.values():
            storage.resize_(0)
        self._waiting, self._is_away = found, True

    def bring(self) -> None:
        """Allocate device memory and copy the values to it."""
        assert self._is_away, "the tensors must be in host memory"
        for storage, size, copy in self._waiting.values():
            storage.resize_(size)
            if copy is not None:
                _bytes_of(storage).copy_(copy, non_blocking=True)
        self._is_away = False


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def on_gpu(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors that are on a GPU. Without one, device memory is host memory and nothing needs to move."""
    return (tensor for tensor in tensors if tensor.is_cuda)


def on_host(parameter: Tensor) -> Tensor:
    """Return a copy in host memory, page-locked if the tensor is on a GPU."""
    kept = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return kept.copy_(parameter.detach())
