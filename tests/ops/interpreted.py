"""The Triton kernels on a CPU: ``python -m tests.ops.interpreted RESULTS``, with ``TRITON_INTERPRET=1``.

Triton reads that variable when a kernel is decorated, so this runs in a process of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from nemo_rao.ops import linear_log_probs, vocab_parallel
from nemo_rao.ops.logit_blocks import PYTORCH, LogitBlocks
from nemo_rao.ops.triton_logit_blocks import TRITON

from . import test_linear_log_probs, test_vocab_parallel
from .blocks_of_logits import BLOCKS, LINEAR_CASES, VOCAB_CASES, of_block
from .gloo_ranks import run_ranks


def _kernels(device: torch.device, dtype: torch.dtype) -> LogitBlocks:
    return TRITON if dtype == torch.float32 else PYTORCH


def main() -> None:
    test_linear_log_probs.CASES = LINEAR_CASES
    test_vocab_parallel.CASES = VOCAB_CASES
    results: dict[str, Any] = {
        "blocks": {name: [of_block(block, which) for which in (TRITON, PYTORCH)] for name, block in BLOCKS.items()}
    }
    linear_log_probs.logit_blocks_for = vocab_parallel.logit_blocks_for = _kernels
    for size in (1, 2):
        results[f"linear, TP {size}"] = run_ranks(test_linear_log_probs.compute_all, size)
        results[f"vocab, TP {size}"] = run_ranks(test_vocab_parallel.compute_all, size)
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
