"""glibc's heap: where large blocks come from, once ones as large have been freed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rao.runtime import malloc

# A block of 24 MiB is freed, which lets glibc raise its threshold; then one of 12 MiB is allocated.
WORK = """
import ctypes, json, sys
from nemo_rao.runtime.malloc import map_large_blocks

libc = ctypes.CDLL(None)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Information(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
libc.mallinfo2.restype = Information
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

fixed = map_large_blocks() if sys.argv[1] == "fix" else None
libc.free(libc.malloc(24 * 2**20))
before = libc.mallinfo2()
block = libc.malloc(12 * 2**20)
after = libc.mallinfo2()
print(json.dumps([fixed, after.hblkhd > before.hblkhd, after.arena > before.arena]))
"""


def allocated(how: str, **environment: str) -> list[bool | None]:
    """[whether the threshold was fixed, the block was mapped by itself, the heap grew]."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", WORK, how], env={**others, **environment}, capture_output=True, text=True, timeout=60
    )
    if "mallinfo2" in done.stderr:
        pytest.skip("needs glibc 2.33")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_large_block_is_mapped_by_itself_and_leaves_no_hole_in_the_heap() -> None:
    assert allocated("leave") == [None, False, True]
    assert allocated("fix") == [True, True, False]


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_MMAP_THRESHOLD_": "33554432"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}],
)
def test_what_the_user_sets_stays(environment: dict[str, str]) -> None:
    assert allocated("fix", **environment) == [False, False, True]


HUGE_PAGES = """
from nemo_rao.cli import main
assert main(["plan", "--gpu", "none"]) == 2
import nemo_rao.config.checks  # which imports something that makes a tensor
import torch
kept = torch.ones(16 * 2**20)
sizes_and_flags = [
    line.split() for line in open("/proc/self/smaps") if line.startswith(("Size:", "VmFlags:"))
]
of_large = [flags for size, flags in zip(sizes_and_flags[::2], sizes_and_flags[1::2]) if int(size[1]) >= 60 * 1024]
print(any("hg" in flags for flags in of_large))  # huge pages are advised
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
@pytest.mark.parametrize(("given", "asked_for"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_huge_pages_are_asked_for_unless_the_user_forbids_it(given: dict[str, str], asked_for: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", HUGE_PAGES]
    done = subprocess.run(command, env={**environment, **given}, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[-1] == str(asked_for)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())  # it has neither of glibc's functions
    assert malloc.map_large_blocks() is False
