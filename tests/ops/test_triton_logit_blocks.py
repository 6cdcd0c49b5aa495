"""The Triton kernels in Triton's interpreter: each block, and log-probabilities with them, against float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rao.ops import logit_blocks
from nemo_rao.ops.logit_blocks import PYTORCH, SWITCH, logit_blocks_for

from . import test_linear_log_probs as linear
from . import test_vocab_parallel as vocab
from .blocks_of_logits import BLOCKS, LINEAR_CASES, VOCAB_CASES, expected_of

ROOT = Path(__file__).resolve().parents[2]

# Of a gradient, relative to its largest entry. Triton's interpreter cuts 16-bit results off; a GPU rounds them.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("interpreted") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.interpreted", str(file)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=250)
    return torch.load(file, weights_only=False)


def test_each_block_is_that_of_float64_and_of_the_reference(results: dict[str, Any]) -> None:
    assert results["blocks"].keys() == BLOCKS.keys()
    for name, block in BLOCKS.items():
        statistics, gradient = expected_of(block)
        tolerance = ROUNDING[block.out_dtype]
        triton, pytorch = results["blocks"][name]
        for found in (triton, pytorch):
            torch.testing.assert_close(found["statistics"].double(), statistics, rtol=2e-6, atol=2e-6, msg=name)
            assert linear.relative_error(found["gradient"].double(), gradient) <= tolerance, name
        torch.testing.assert_close(triton["gradient"], pytorch["gradient"], rtol=2 * tolerance, atol=1e-7, msg=name)


@pytest.mark.parametrize("size", [1, 2])
def test_log_probs_from_hidden_states_are_those_of_float64(results: dict[str, Any], size: int) -> None:
    ranks = results[f"linear, TP {size}"]
    for name, case in LINEAR_CASES.items():
        logps, gradients = linear.dense(case)
        for result in ranks:
            assert torch.equal(result[name]["logps"], ranks[0][name]["logps"]), "ranks agree bitwise"
            assert linear.relative_error(result[name]["logps"].double(), logps) <= 2e-6, name
            assert result[name]["unchanged"], name
        for part, expected in gradients.items():
            by_rank = [result[name]["grads"][part].double() for result in ranks]
            split = part in ("weight", "b") or (part == "hidden" and case.sequence_parallel)
            gradient = torch.cat(by_rank) if split else by_rank[0]
            assert linear.relative_error(gradient, expected) <= linear.TOLERANCES[case.dtype], (name, part)
            if part == "weight":
                assert gradient[case.vocab_size :].eq(0).all(), "padding has none"


@pytest.mark.parametrize("size", [1, 2])
def test_log_probs_from_logits_are_those_of_float64(results: dict[str, Any], size: int) -> None:
    ranks = results[f"vocab, TP {size}"]
    for name, case in VOCAB_CASES.items():
        logps, expected = vocab.dense(case)
        for result in ranks:
            torch.testing.assert_close(result[name]["logps"].double(), logps, rtol=1e-6, atol=1e-6, msg=name)
            assert result[name]["unchanged"], name
        gradient = torch.cat([result[name]["grad"] for result in ranks], -1).double()
        assert linear.relative_error(gradient, expected) <= ROUNDING[case.dtype], name
        assert not gradient[..., case.vocab_size :].any(), "padding has none"


@pytest.mark.parametrize("logits", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["statistics", "gradient"])
def test_kernels_compile_for_hopper_and_move_16_bytes_at_a_time(
    name: str, logits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: down to machine code, of aligned rows, without registers spilled to local memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nemo_rao.ops import triton_logit_blocks as kernels

    kernel, columns = {
        "statistics": (kernels._statistics_kernel, kernels.STATISTICS_COLUMNS),
        "gradient": (kernels._gradient_kernel, kernels.GRADIENT_COLUMNS),
    }[name]
    of_16_bits = "bf16" if logits == "fp32" else logits
    pointers = {"logits": f"*{logits}", "out": f"*{of_16_bits}", "targets": "*i64"}
    pointers |= dict.fromkeys(("statistics", "largest", "total", "upstream"), "*fp32")
    signature = {one: pointers.get(one, "i32") for one in kernel.arg_names} | {"COLUMNS": "constexpr"}
    unaligned = {"COLUMNS", "largest_stride", "total_stride", "upstream_stride"}
    aligned = [number for number, one in enumerate(kernel.arg_names) if one not in unaligned]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index("COLUMNS"),): columns},
        attrs={(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.NUM_WARPS})
    code = made.asm["ptx"]
    assert made.asm["cubin"] and ".local" not in code
    assert "ld.global.v4.b32" in code
    assert ("st.global.v4.b32" in code) == (name == "gradient")


def test_kernels_are_for_float32_on_a_gpu_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    monkeypatch.delenv(SWITCH, raising=False)
    assert logit_blocks_for(gpu, torch.float32).name == "triton"
    assert logit_blocks_for(gpu, torch.float64) is PYTORCH
    assert logit_blocks_for(cpu, torch.float32) is PYTORCH
    monkeypatch.setenv(SWITCH, "0")
    assert logit_blocks_for(gpu, torch.float32) is PYTORCH


def test_without_triton_pytorch_computes_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setitem(sys.modules, "nemo_rao.ops.triton_logit_blocks", None)
    logit_blocks._triton.cache_clear()
    try:
        assert logit_blocks_for(torch.device("cuda:0"), torch.float32) is PYTORCH
    finally:
        logit_blocks._triton.cache_clear()
