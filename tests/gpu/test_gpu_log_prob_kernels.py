"""Log-probabilities on a GPU: the Triton kernels and PyTorch's operations, against float64 on the CPU.

Tolerances: float32 sums 1e-5 of the largest entry (TF32 is off, exponentials are the device's approximations); 16-bit
gradients are rounded once as a factor of the products and once at the end, 2 x 2^-8 (bf16) and 2 x 2^-11 (fp16).
"""

from __future__ import annotations

import pytest
import torch

from nemo_rao.ops.linear_log_probs import linear_vocab_parallel_log_probs
from nemo_rao.ops.logit_blocks import PYTORCH, SWITCH, Tokens, logit_blocks_for
from nemo_rao.ops.vocab_parallel import vocab_parallel_log_probs
from nemo_rao.ops.vocabulary import empty_statistics
from nemo_rao.runtime.gpus import has_gpu

from ..ops import test_linear_log_probs as linear
from ..ops import test_vocab_parallel as vocab
from ..ops.blocks_of_logits import BLOCKS, Block, expected_of, of_block

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs a GPU")]
GPU = "cuda"
TRITON = pytest.importorskip("nemo_rao.ops.triton_logit_blocks").TRITON
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

LARGE = {
    "a block as linear_log_probs has it": Block(512, 4608, row_stride=4608),
    "rows of a vocabulary, 16 bits": Block(64, 128_256, logits_dtype=torch.bfloat16),
    "rows of an odd vocabulary, 16 bits": Block(64, 50_257, logits_dtype=torch.bfloat16),
}


@pytest.fixture(params=["1", "0"], ids=["triton", "pytorch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(SWITCH, request.param)
    chosen = logit_blocks_for(torch.device(GPU), torch.float32)
    assert chosen is (TRITON if request.param == "1" else PYTORCH)
    return chosen.name


@pytest.mark.parametrize("name", [*BLOCKS, *LARGE])
def test_each_block_is_that_of_float64(name: str) -> None:
    block = (BLOCKS | LARGE)[name]
    statistics, gradient = expected_of(block)
    for compute in (TRITON, PYTORCH):
        found = of_block(block, compute, GPU)
        torch.testing.assert_close(found["statistics"].double(), statistics, rtol=1e-5, atol=1e-5)
        assert linear.relative_error(found["gradient"].double(), gradient) <= ROUNDING[block.out_dtype], compute.name


def test_rows_beyond_2_to_the_31_elements_are_reached() -> None:
    num_rows, stride = 34_000, 65_536  # 4.5 GB in bf16
    memory = torch.zeros(num_rows, stride, dtype=torch.bfloat16, device=GPU)
    tail = slice(num_rows - 5, num_rows)
    assert tail.start * stride > 2**31
    generator = torch.Generator(GPU).manual_seed(0)
    memory[tail].normal_(generator=generator)
    targets = torch.arange(num_rows, device=GPU) % stride
    statistics = empty_statistics(num_rows, memory, torch.float32)
    TRITON.add_to_statistics(statistics, memory, targets)
    alone = memory[tail].clone()
    wanted = alone.double().logsumexp(-1)
    found = statistics[tail, 0].double() + statistics[tail, 1].double().log()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    softmax = alone.double().softmax(-1)
    upstream = torch.ones(num_rows, device=GPU)
    TRITON.gradient(memory, Tokens(targets, statistics[:, 0], statistics[:, 1], upstream), out_nc=memory)
    expected = torch.nn.functional.one_hot(targets[tail], stride).double() - softmax
    assert linear.relative_error(memory[tail].double(), expected) <= 2**-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_from_hidden_states_are_those_of_float64(implementation: str, dtype: torch.dtype) -> None:
    case = linear.Case(
        dtype=dtype, shape=(64, 5), hidden_size=64, vocab_size=990, padded_size=1024, rank=8, masked=True
    )
    parts, targets, upstream, mask = case.make()
    assert mask is not None
    inputs = {name: part.cuda().requires_grad_() for name, part in parts.items()}
    expected_logps, expected = linear.dense(case)
    for workspace_bytes in (100_000, 3_000_000, None):  # blocks of a few columns, of whole tiles, and one of all
        logps = linear_vocab_parallel_log_probs(
            inputs["hidden"],
            inputs["weight"],
            targets.cuda(),
            vocab_size=case.vocab_size,
            mask=mask.cuda(),
            low_rank=(inputs["u"], inputs["b"]),
            workspace_bytes=workspace_bytes,
        )
        grads = torch.autograd.grad(logps, list(inputs.values()), upstream.to(logps))
        assert linear.relative_error(logps.detach().cpu().double(), expected_logps) <= max(1e-5, ROUNDING[dtype] / 100)
        for name, grad in zip(inputs, grads, strict=True):
            assert linear.relative_error(grad.cpu().double(), expected[name]) <= 2 * ROUNDING[dtype], name


@pytest.mark.parametrize("name", ["padded, transposed, masked", "strided vocabulary", "bfloat16", "float16", "extreme"])
def test_log_probs_from_logits_are_those_of_float64(implementation: str, name: str) -> None:
    case = vocab.CASES[name]
    logits, targets, upstream, mask = case.make()
    leaf = vocab.lay_out(logits, case.layout).cuda().requires_grad_()
    options = {"vocab_size": case.vocab_size, "mask": None if mask is None else mask.cuda()}
    logps = vocab_parallel_log_probs(leaf, targets.cuda(), chunk_bytes=case.chunk_bytes, **options)
    logps.backward(upstream.to(logps))
    expected_logps, expected = vocab.dense(case)
    torch.testing.assert_close(logps.detach().cpu().double(), expected_logps, rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None
    assert linear.relative_error(leaf.grad.cpu().double(), expected) <= ROUNDING[case.dtype]


def inputs_of(num_tokens: int, size: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and weight in bf16, targets."""
    generator = torch.Generator(GPU).manual_seed(0)
    options = {"generator": generator, "device": GPU, "dtype": torch.bfloat16}
    hidden = torch.randn(num_tokens, size, **options)
    weight = torch.randn(vocab_size, size, **options).mul_(size**-0.5)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator, device=GPU)
    return hidden.requires_grad_(), torch.nn.Parameter(weight), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_in_main_grad(implementation: str, dtype: torch.dtype) -> None:
    """As Megatron's linear layers add theirs; with a float32 sum, cuBLAS adds where PyTorch lets it."""
    hidden, weight, targets = inputs_of(700, 256, 3000)
    targets.clamp_(max=2989)
    weight.main_grad = torch.ones_like(weight, dtype=dtype)
    weight.grad_added_to_main_grad = False
    for _ in range(3):
        logps = linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=2990, workspace_bytes=8_000_000)
        logps.sum().backward()
        assert weight.grad_added_to_main_grad
    wide_hidden, wide_weight = hidden.detach().double(), weight.detach().double().requires_grad_()
    logps = (wide_hidden @ wide_weight[:2990].T).log_softmax(-1).gather(-1, targets[:, None])
    logps.sum().backward()
    expected = 3 * wide_weight.grad
    scale = expected.abs().max()
    tolerance = 2**-7 if dtype == torch.float32 else 2**-5  # as it is rounded after each block
    assert (weight.main_grad.double() - 1 - expected).abs().max() <= tolerance * scale


def test_neither_pass_waits_for_the_device(implementation: str) -> None:
    hidden, weight, targets = inputs_of(300, 128, 2000)
    positions = (torch.arange(250, device=GPU),)

    def both() -> None:
        logps = linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=2000, positions=positions)
        logps.sum().backward()

    both()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_can_be_captured_in_a_cuda_graph() -> None:
    block = LARGE["a block as linear_log_probs has it"]
    inputs = block.make(GPU)
    out = torch.empty_like(inputs["logits"], dtype=torch.bfloat16)

    def both() -> None:
        statistics = inputs["statistics"]
        TRITON.add_to_statistics(statistics, inputs["logits"], inputs["targets"], first_column=block.first_column)
        TRITON.gradient(
            inputs["logits"],
            Tokens(inputs["targets"], statistics[:, 0], statistics[:, 1], inputs["upstream"]),
            out_nc=out,
            first_column=block.first_column,
        )

    both()  # compiles
    inputs["statistics"].copy_(block.make(GPU)["statistics"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    inputs["statistics"].copy_(block.make(GPU)["statistics"])
    out.zero_()
    graph.replay()
    assert torch.equal(inputs["statistics"].cpu(), of_block(block, TRITON, GPU)["statistics"])
    assert torch.equal(out.float().cpu(), of_block(block, TRITON, GPU)["gradient"])


def test_results_are_the_same_at_every_run() -> None:
    runs = []
    for _ in range(2):
        hidden, weight, targets = inputs_of(600, 256, 5000)
        logps = linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=5000, workspace_bytes=8_000_000)
        logps.sum().backward()
        runs.append((logps.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_besides_gradients_nothing_but_the_workspace_is_held() -> None:
    num_tokens, size, vocab_size, budget = 4096, 256, 32_000, 64 * 2**20
    hidden, weight, targets = inputs_of(num_tokens, size, vocab_size)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    assert num_tokens * vocab_size * 2 > 3 * budget, "the logits would be seen"
    for _ in range(2):  # the first loads libraries
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps = linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=vocab_size, workspace_bytes=budget)
        forward = torch.cuda.max_memory_allocated() - before
        logps.sum().backward()
        both = torch.cuda.max_memory_allocated() - before
    statistics = 200 * num_tokens
    placeholder = weight.numel() * 2
    assert forward <= budget + statistics
    assert both <= budget + statistics + num_tokens * size * (4 + 2 + 2) + placeholder
