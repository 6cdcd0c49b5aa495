"""Configure the C library's heap for tensors: large blocks are mapped one by one, so that freed blocks leave no holes.

glibc maps blocks above a threshold separately and returns them to the system when they are freed. It raises the
threshold up to 32 MiB as such blocks are freed, after which a micro-batch's activations come from the heap. There the
temporaries that a layer frees between two saved tensors leave holes that are too small for the next, longer
micro-batch: with SmolLM2-135M they took 4 GiB beside 12 GiB of tensors (docs/guides/planning.md).

Mapped blocks cost a page fault for every page each time. PyTorch can request pages of 2 MiB, which reduces them.
"""

from __future__ import annotations

import ctypes
import os

MMAP_THRESHOLD_BYTES = 2**20
_M_MMAP_THRESHOLD = -3  # malloc.h
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # read by PyTorch when it allocates its first tensor


def ask_for_huge_pages() -> None:
    """Let PyTorch request huge pages for tensors from 2 MiB on, unless the user's environment sets this.

    Call it at the start of a program: some imports create a tensor.
    """
    os.environ.setdefault(_HUGE_PAGES, "1")


def map_large_blocks() -> bool:
    """Fix the threshold at :data:`MMAP_THRESHOLD_BYTES`. Return whether it was fixed.

    Call it before the first tensor is created; forked processes inherit it. The threshold is unchanged with another C
    library, or if the user's environment configures glibc's heap (``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).
    """
    if _set_by_user() or not _is_glibc():
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES))


def _set_by_user() -> bool:
    variables = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    return any(name in os.environ for name in variables) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def _is_glibc() -> bool:
    try:
        return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, TypeError):  # a system where the program cannot be opened as a library, such as Windows
        return False
