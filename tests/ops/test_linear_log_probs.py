"""linear_vocab_parallel_log_probs against log_softmax in float64, on one, two and three ranks, and inside Megatron."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_rao.ops import blocks
from nemo_rao.ops.linear_log_probs import linear_vocab_parallel_log_probs
from nemo_rao.ops.vocab_parallel import vocab_parallel_log_probs
from nemo_rao.ops.workspace import block_sizes

from .. import megatron_ranks
from .gloo_ranks import run_ranks
from .test_vocab_parallel import Watch, lay_out

PARTS = ("hidden", "weight", "u", "b")


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs over a whole vocabulary, which every rank makes alike and takes its own rows of."""

    shape: tuple[int, ...] = (6, 3)
    hidden_size: int = 8
    vocab_size: int = 24
    padded_size: int = 24
    rank: int = 0  # of LoRA; none where 0
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    masked: bool = False
    selected: bool = True  # any at all
    scale: float = 1.0
    sequence_parallel: bool = False
    frozen: tuple[str, ...] = ()
    workspace_bytes: int = 2500  # several blocks each way

    def make(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """:data:`PARTS`, targets, upstream gradient, mask."""
        generator = torch.Generator().manual_seed(7)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        parts = {"hidden": self.scale * random(*self.shape, self.hidden_size)}
        parts["weight"] = random(self.padded_size, self.hidden_size)
        if self.rank > 0:
            parts |= {"u": random(*self.shape, self.rank), "b": random(self.padded_size, self.rank)}
        targets = torch.randint(self.vocab_size, self.shape, generator=generator)
        upstream = random(*self.shape)
        mask = torch.rand(self.shape, generator=generator) < (0.6 if self.selected else 0) if self.masked else None
        if mask is not None:
            targets[~mask] = -100
        for name, part in parts.items():
            if name in ("weight", "b"):
                part[self.vocab_size :] = torch.nan  # padding must not even be looked at
            elif mask is not None:
                part[~mask] = torch.nan
        return {name: part.to(self.dtype) for name, part in parts.items()}, targets, upstream, mask


CASES = {
    "plain": Case(),
    "one token and one column a block": Case(workspace_bytes=1),
    "everything in one block": Case(workspace_bytes=2**20),
    "one dimension": Case(shape=(6,)),
    "four dimensions": Case(shape=(6, 1, 3, 2)),
    "no token": Case(shape=(6, 0)),
    "transposed, as Megatron returns it": Case(layout="transposed", shape=(6, 6)),
    "strided features": Case(layout="strided"),
    "padded": Case(vocab_size=23),
    "ranks with nothing but padding": Case(vocab_size=7, masked=True),
    "vocabulary of one": Case(vocab_size=1),
    "masked, NaN elsewhere": Case(masked=True, vocab_size=19, layout="transposed", shape=(6, 6)),
    "nothing selected": Case(masked=True, selected=False, rank=2),
    "nothing selected, sequence parallel": Case(masked=True, selected=False, rank=2, sequence_parallel=True),
    "low rank": Case(rank=3, vocab_size=22),
    "low rank, masked": Case(rank=1, vocab_size=22, masked=True),
    "low rank on a frozen weight": Case(rank=3, frozen=("weight",)),
    "low rank alone is trained": Case(rank=3, frozen=("weight", "hidden"), masked=True),
    "u alone is trained": Case(rank=3, frozen=("weight", "hidden", "b")),
    "b alone is trained": Case(rank=3, frozen=("weight", "hidden", "u")),
    "hidden alone is trained": Case(rank=3, frozen=("weight", "u", "b")),
    "the weight alone is trained": Case(frozen=("hidden",)),
    "sequence parallel": Case(sequence_parallel=True, vocab_size=23),
    "sequence parallel, masked": Case(sequence_parallel=True, masked=True, layout="transposed", shape=(6, 6)),
    "sequence parallel, low rank": Case(sequence_parallel=True, rank=2, masked=True, vocab_size=17),
    "sequence parallel, u alone": Case(sequence_parallel=True, rank=2, frozen=("hidden", "weight", "b")),
    "float32": Case(dtype=torch.float32, masked=True, vocab_size=23),
    "bfloat16": Case(dtype=torch.bfloat16, vocab_size=23),
    "bfloat16, low rank": Case(dtype=torch.bfloat16, rank=2, masked=True),
    "float16, sequence parallel": Case(dtype=torch.float16, sequence_parallel=True),
    "large logits": Case(scale=1e4),
    "large logits, float32": Case(scale=1e4, dtype=torch.float32),
}
# Of the result and of each gradient, relative to the largest entry. A 16-bit gradient is rounded once, at the end.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def leaves(case: Case) -> dict[str, torch.Tensor]:
    """This rank's part of the inputs."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    parts, *_ = case.make()
    for name in ("weight", "b"):
        if name in parts:
            parts[name] = parts[name].chunk(num_ranks)[rank].clone()
    if case.sequence_parallel:
        parts["hidden"] = parts["hidden"].chunk(num_ranks)[rank]
    parts["hidden"] = lay_out(parts["hidden"], case.layout)
    return {name: part.detach().requires_grad_(name not in case.frozen) for name, part in parts.items()}


def compute_all() -> dict[str, dict[str, Any]]:
    """Every case on this rank."""
    results = {}
    for name, case in CASES.items():
        _, targets, upstream, mask = case.make()
        inputs = leaves(case)
        before = {part: tensor.detach().clone() for part, tensor in inputs.items()}
        with Watch() as forward:
            logps = linear_vocab_parallel_log_probs(
                inputs["hidden"],
                inputs["weight"],
                targets,
                vocab_size=case.vocab_size,
                group=dist.group.WORLD,
                mask=mask,
                low_rank=(inputs["u"], inputs["b"]) if case.rank > 0 else None,
                sequence_parallel=case.sequence_parallel,
                workspace_bytes=case.workspace_bytes,
            )
        with Watch() as backward:
            logps.backward(upstream.to(logps.dtype))
        results[name] = {
            "logps": logps.detach(),
            "grads": {part: tensor.grad for part, tensor in inputs.items()},
            "unchanged": all(torch.equal(inputs[part].nan_to_num(), before[part].nan_to_num()) for part in inputs),
            "collectives": (forward.collectives, backward.collectives),
        }
    return results


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda size: f"tp{size}")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(compute_all, request.param)


def dense(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """log-probs and gradients in float64 by log_softmax over the whole vocabulary."""
    parts, targets, upstream, mask = case.make()
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    wide = {
        name: part.double().masked_fill(part.isnan(), 0).requires_grad_()  # autograd makes 0 * NaN of a NaN
        for name, part in parts.items()
    }
    logits = wide["hidden"] @ wide["weight"].T
    if case.rank > 0:
        logits = logits + wide["u"] @ wide["b"].T
    log_probs = logits[..., : case.vocab_size].log_softmax(-1)
    logps = log_probs.gather(-1, targets.where(keep, 0)[..., None])[..., 0].where(keep, 0)
    logps.backward(upstream)
    return logps.detach(), {name: part.grad for name, part in wide.items() if part.grad is not None}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.shape == expected.shape
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)) if value.numel() else 0.0


@pytest.mark.parametrize("name", CASES)
def test_log_probs_equal_dense_float64(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    case, (expected, _) = CASES[name], dense(CASES[name])
    for results in ranks:
        logps = results[name]["logps"]
        assert logps.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        assert torch.equal(logps, ranks[0][name]["logps"]), "ranks agree bitwise"
        assert relative_error(logps, expected) <= min(TOLERANCES[case.dtype], 2e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_dense_float64(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    case, (_, expected) = CASES[name], dense(CASES[name])
    for part in PARTS[: 4 if case.rank > 0 else 2]:
        by_rank = [results[name]["grads"][part] for results in ranks]
        if part in case.frozen:
            assert by_rank == [None] * len(ranks)
            continue
        assert all(grad.dtype == case.dtype for grad in by_rank)
        if part in ("weight", "b") or (part == "hidden" and case.sequence_parallel):
            grad = torch.cat(by_rank)
        else:
            assert all(torch.equal(grad, by_rank[0]) for grad in by_rank), "ranks agree bitwise"
            grad = by_rank[0]
        assert relative_error(grad.double(), expected[part]) <= TOLERANCES[case.dtype]


def test_unselected_positions_and_padding_get_exactly_zero(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for name, case in CASES.items():
        *_, mask = case.make()
        if mask is not None:
            assert all(results[name]["logps"][~mask].eq(0).all() for results in ranks)
            if "hidden" not in case.frozen:
                grads = [results[name]["grads"]["hidden"] for results in ranks]
                assert (torch.cat(grads) if case.sequence_parallel else grads[0])[~mask].eq(0).all()
        if "weight" not in case.frozen:
            whole = torch.cat([results[name]["grads"]["weight"] for results in ranks])
            assert whole[case.vocab_size :].eq(0).all()


def test_inputs_are_never_changed(ranks: list[dict[str, dict[str, Any]]]) -> None:
    assert all(result["unchanged"] for results in ranks for result in results.values())


def test_ranks_exchange_once_each_way(ranks: list[dict[str, dict[str, Any]]]) -> None:
    def kinds(name: str) -> tuple[list[str], list[str]]:
        forward, backward = ranks[-1][name]["collectives"]
        return [kind.split(".")[0] for kind in forward], [kind.split(".")[0] for kind in backward]

    if len(ranks) == 1:
        assert all(results["collectives"] == ([], []) for results in ranks[0].values())
        return
    gather, reduce, scatter = "_allgather_base_", "allreduce_", "_reduce_scatter_base_"
    assert kinds("low rank") == ([gather], [reduce])
    assert kinds("the weight alone is trained") == ([gather], [])
    assert kinds("sequence parallel") == ([gather, gather], [gather, scatter])


def single(case: Case, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """log-probs and gradients of a case on one rank without a process group."""
    parts, targets, upstream, mask = case.make()
    inputs = {name: part.requires_grad_() for name, part in parts.items()}
    arguments = {"vocab_size": case.vocab_size, "mask": mask, "workspace_bytes": case.workspace_bytes} | options
    low_rank = (inputs["u"], inputs["b"]) if case.rank > 0 else None
    logps = linear_vocab_parallel_log_probs(inputs["hidden"], inputs["weight"], targets, low_rank=low_rank, **arguments)
    logps.backward(upstream.to(logps.dtype))
    return logps.detach(), {name: part.grad for name, part in inputs.items()}


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    case = Case(shape=(3, 2), hidden_size=4, vocab_size=6, padded_size=7, rank=2, masked=masked, workspace_bytes=800)
    parts, targets, _, mask = case.make()
    inputs = [part.nan_to_num().requires_grad_() for part in parts.values()]

    def function(hidden: torch.Tensor, weight: torch.Tensor, *low_rank: torch.Tensor) -> torch.Tensor:
        return linear_vocab_parallel_log_probs(
            hidden, weight, targets, vocab_size=6, mask=mask, low_rank=low_rank, workspace_bytes=800
        )

    assert torch.autograd.gradcheck(function, inputs, atol=1e-9)


@pytest.mark.parametrize("workspace_bytes", [1, 700, 3000, 10_000, None])
def test_the_budget_does_not_change_the_result(workspace_bytes: int | None) -> None:
    case = Case(shape=(11, 3), vocab_size=97, padded_size=104, rank=2, masked=True)
    expected_logps, expected = single(case, workspace_bytes=2**22)
    logps, grads = single(case, workspace_bytes=workspace_bytes)
    assert relative_error(logps, expected_logps) < 1e-13
    for name, grad in grads.items():
        assert grad is not None and relative_error(grad, expected[name]) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_no_worse_than_those_through_logits(dtype: torch.dtype) -> None:
    case = Case(shape=(64, 8), hidden_size=32, vocab_size=500, padded_size=512, dtype=dtype, workspace_bytes=200_000)
    parts, targets, upstream, _ = case.make()
    inputs = {name: part.nan_to_num().requires_grad_() for name, part in parts.items()}
    logits = inputs["hidden"] @ inputs["weight"].T
    through_logits = vocab_parallel_log_probs(logits, targets, vocab_size=500)
    through_logits.backward(upstream.float())
    expected_logps, expected = dense(case)
    logps, grads = single(case)

    def distance(value: torch.Tensor | None, truth: torch.Tensor) -> float:
        assert value is not None
        return float((value.double() - truth).norm())

    assert distance(logps, expected_logps) <= distance(through_logits.detach(), expected_logps)
    for name, leaf in inputs.items():
        assert distance(grads[name], expected[name]) <= distance(leaf.grad, expected[name])


def _mm_into_another_type(
    left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``torch.mm``, with the ``out_dtype`` that it has on a GPU alone."""
    assert (out_dtype is None) == (left.dtype == torch.float32) and left.dtype == right.dtype
    product = left.to(out_dtype).matmul(right.to(out_dtype)) if out_dtype else left.matmul(right)
    return product if out is None else out.copy_(product)


def test_16_bit_factors_as_a_gpu_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in blocks that are whole tiles, whose rows are further apart where the vocabulary ends."""
    monkeypatch.setattr(blocks, "read_dtype_of", lambda hidden: hidden.dtype)
    monkeypatch.setattr(blocks, "tile_of", lambda hidden: 32)
    monkeypatch.setattr(torch, "mm", _mm_into_another_type)
    for case in (
        Case(dtype=torch.bfloat16, shape=(9, 5), hidden_size=64, vocab_size=230, padded_size=240, rank=8, masked=True),
        Case(
            dtype=torch.float16, shape=(9, 5), hidden_size=64, vocab_size=240, padded_size=240, workspace_bytes=20_000
        ),
    ):
        expected_logps, expected = dense(case)
        logps, grads = single(case)
        assert relative_error(logps, expected_logps) < 1e-5
        for name, grad in grads.items():
            assert grad is not None
            assert relative_error(grad.double(), expected[name]) < 2 * TOLERANCES[case.dtype], name


def test_features_are_gathered_once_in_each_pass_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weight's gradient in Megatron's float32 sum, whose slabs are added to where they are."""
    gathered: list[int] = []
    side_by_side = blocks._side_by_side

    def counted(parts: list[torch.Tensor], memory: torch.Tensor) -> torch.Tensor:
        gathered.append(len(parts[0]))
        return side_by_side(parts, memory)

    monkeypatch.setattr(blocks, "read_dtype_of", lambda hidden: hidden.dtype)
    monkeypatch.setattr(blocks, "tile_of", lambda hidden: 16)
    monkeypatch.setattr(blocks, "_side_by_side", counted)
    monkeypatch.setattr(torch, "mm", _mm_into_another_type)
    case = Case(dtype=torch.bfloat16, shape=(45,), hidden_size=64, vocab_size=230, padded_size=240)
    parts, targets, upstream, _ = case.make()
    hidden, weight = parts["hidden"].requires_grad_(), torch.nn.Parameter(parts["weight"])
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    logps = linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=230, workspace_bytes=40_000)
    assert len(gathered) > 1 and sum(gathered) == 45
    logps.backward(upstream.float())
    assert sum(gathered) == 2 * 45
    expected_logps, expected = dense(case)
    assert hidden.grad is not None
    assert relative_error(logps.detach(), expected_logps) < 1e-5
    assert relative_error(hidden.grad.double(), expected["hidden"]) < 2 * TOLERANCES[torch.bfloat16]
    assert relative_error(weight.main_grad.double(), expected["weight"]) < 2 * TOLERANCES[torch.bfloat16]


def test_results_under_autocast_are_those_without() -> None:
    case = Case(dtype=torch.float32)
    expected_logps, expected = single(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, grads = single(case)
    assert torch.equal(logps, expected_logps)
    assert all(torch.equal(grads[name], expected[name]) for name in ("hidden", "weight"))


@pytest.mark.parametrize("target", [-1, 6, 7])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    with pytest.raises(AssertionError, match=r"outside \[0, 6\)"):
        linear_vocab_parallel_log_probs(torch.zeros(2, 3), torch.zeros(8, 3), torch.tensor([0, target]), vocab_size=6)


# ------------------------------------------------------------------------------------------------- memory


def checked_block(
    num_tokens: int, num_columns: int, num_features: int, budget: int, read_itemsize: int, *, multiple: int = 1
) -> tuple[int, int]:
    """The size of a block that fits into the budget: chunks of tokens and slabs of columns are even and as few as can
    be. Of numbers of 4 bytes."""
    cell, side = {4: (4, 8), 2: (6, 10)}[read_itemsize]  # bytes a logit, and a feature of a token or of a column

    def fits(rows: int, width: int) -> bool:
        return rows * width * cell + (rows + width) * num_features * side <= budget

    def even(length: int, parts: int) -> int:
        return min(length, math.ceil(math.ceil(length / parts) / multiple) * multiple)

    rows, width = block_sizes(num_tokens, num_columns, num_features, budget, 4, read_itemsize, multiple=multiple)
    assert fits(rows, width)
    num_chunks, num_slabs = math.ceil(num_tokens / rows), math.ceil(num_columns / width)
    assert (rows, width) == (even(num_tokens, num_chunks), even(num_columns, num_slabs))
    # Tokens come first: as many as fit beside the columns of a square block.
    square = bisect.bisect(range(1, budget), False, key=lambda size: not fits(size, size))
    beside = bisect.bisect(range(1, budget), False, key=lambda size: not fits(min(square, num_tokens), size))
    assert num_chunks == 1 or not fits(even(num_tokens, num_chunks - 1), min(beside, num_columns))
    assert num_slabs == 1 or not fits(rows, even(num_columns, num_slabs - 1))
    return rows, width


@pytest.mark.parametrize("read_itemsize", [4, 2])
@pytest.mark.parametrize("budget", [2**20, 2**25, 2**29])
def test_blocks_fill_the_budget_evenly(read_itemsize: int, budget: int) -> None:
    for num_tokens, num_columns, num_features in (
        (1000, 128_256, 512),
        (1030, 10**6, 64),
        (100_000, 16_032, 4096),
        (50, 300, 64),
    ):
        checked_block(num_tokens, num_columns, num_features, budget, read_itemsize)


@pytest.mark.parametrize("num_tokens", [700, 8192, 32_768, 32_000])
def test_blocks_are_whole_tiles_within_the_budget(num_tokens: int) -> None:
    """Of Llama 3's head; the last of a row may be smaller."""
    for num_columns in (128_256, 32_064, 300):
        rows, width = checked_block(num_tokens, num_columns, 4096, 2**29, 2, multiple=256)
        assert rows == num_tokens or rows % 256 == 0
        assert width == num_columns or width % 256 == 0
    assert block_sizes(10**5, 10**5, 64, 100_000, 4, 2, multiple=256)[0] < 256, "a small budget comes first"


def peak_bytes(function: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes that PyTorch's CPU allocator held at a time on top of what it held before, and the result."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


@pytest.mark.parametrize("num_tokens", [256, 1024])
@pytest.mark.parametrize("main_grad", [None, torch.float32, torch.bfloat16])
def test_besides_gradients_nothing_but_the_workspace_is_held(num_tokens: int, main_grad: torch.dtype | None) -> None:
    size, vocab_size, budget = 128, 6000, 1_000_000
    hidden = torch.randn(num_tokens, size, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab_size, size, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocab_size, (num_tokens,))
    if main_grad is not None:
        weight.main_grad = torch.zeros(vocab_size, size, dtype=main_grad)

    def forward() -> torch.Tensor:
        return linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=vocab_size, workspace_bytes=budget)

    assert num_tokens * vocab_size * 2 > 3 * budget, "the logits would be seen"
    with Watch() as watch:
        logps = forward()
    assert max(nbytes for nbytes, _ in watch.allocated) <= budget
    upstream = torch.ones_like(logps)
    with Watch() as watch:
        logps.backward(upstream)
    large = [entry for entry in watch.allocated if entry[0] > budget]
    # Hidden's gradient is smaller here, in float32, too; with main_grad not even the weight's is made.
    assert large == ([(weight.numel() * 2, torch.bfloat16)] if main_grad is None else [])

    statistics = 100 * num_tokens
    peak, logps = peak_bytes(forward)
    assert peak <= budget + statistics
    hidden.grad = weight.grad = None
    peak, _ = peak_bytes(lambda: logps.backward(upstream))
    gradients = num_tokens * size * 4 + (weight.numel() * 2 if main_grad is None else 0)
    assert peak <= budget + statistics + gradients


def test_saved_for_backward_are_the_inputs_and_a_few_numbers_a_token() -> None:
    hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_vocab_parallel_log_probs(hidden, weight, torch.zeros(64).long(), vocab_size=1000)
    own = [tensor for tensor in saved if tensor.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
    assert len(own) == len(saved) - 2
    assert all(tensor.numel() == 64 for tensor in own)


# ------------------------------------------------------------------------------------ Megatron's main_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_micro_batches_add_up_in_main_grad(dtype: torch.dtype) -> None:
    case = Case(dtype=torch.bfloat16, vocab_size=23, masked=True)
    _, expected = dense(case)
    parts, targets, upstream, mask = case.make()
    weight = torch.nn.Parameter(parts["weight"])
    weight.main_grad = torch.ones_like(weight, dtype=dtype)
    weight.grad_added_to_main_grad = False
    for _ in range(3):
        logps = linear_vocab_parallel_log_probs(
            parts["hidden"], weight, targets, vocab_size=23, mask=mask, workspace_bytes=case.workspace_bytes
        )
        logps.backward(upstream.float())
        assert weight.grad_added_to_main_grad
        assert weight.grad is not None and weight.grad.shape == weight.shape
        weight.grad = None  # as Megatron's hook does: a placeholder
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        weight.main_grad.double(),
        1 + 3 * expected["weight"],
        rtol=tolerance,
        atol=tolerance,
    )


def test_the_placeholder_is_zero_where_the_embedding_shares_the_weight_and_absent_where_none_asks_for_it() -> None:
    case = Case(dtype=torch.float32)
    for attributes in ({"grad_added_to_main_grad": False, "zero_out_wgrad": True}, {}):
        parts, targets, *_ = case.make()
        weight = torch.nn.Parameter(parts["weight"])
        weight.main_grad = torch.zeros_like(weight)
        for name, value in attributes.items():
            setattr(weight, name, value)
        linear_vocab_parallel_log_probs(parts["hidden"], weight, targets, vocab_size=24).sum().backward()
        assert weight.main_grad.ne(0).any()
        assert weight.grad is None if not attributes else weight.grad.eq(0).all()


def _main_grads(tensor: int, sequence_parallel: bool, tied: bool, overlap: bool) -> dict[str, list[float]]:
    """Relative differences of all main_grads, of two steps of several micro-batches, fused against through logits."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from ..mcore import tiny

    layout = tiny.Layout(tensor=tensor, sequence_parallel=sequence_parallel)
    tiny.enter(layout)
    whole = tiny.whole_tensors(tiny.llama(tied=tied))
    samples = tiny.preferences()
    steps = [[[0, 1], [2, 3], [4]], [[5], [6, 0]]]  # micro-batches of prompts
    group = parallel_state.get_tensor_model_parallel_group()

    def run(fused: bool) -> list[dict[str, torch.Tensor]]:
        model = tiny.build(whole, layout, tied=tied)
        weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        if fused:  # the model returns its hidden states, as the output layer gets them
            model.output_layer.forward = lambda hidden, **_: (hidden, None)
        wrapped = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap), model
        )
        main_grads = []
        for micro_batches in steps:
            wrapped.zero_grad_buffer()
            for index, prompts in enumerate(micro_batches):
                batch = tiny.micro_batch(samples, prompts)
                positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
                output = wrapped(input_ids=batch.tokens, position_ids=positions, attention_mask=None, labels=None)
                mask = torch.zeros(batch.tokens.shape, dtype=torch.bool)
                mask.view(-1)[torch.cat([batch.all_prompt_positions, batch.all_response_positions])] = True
                if fused:
                    logps = linear_vocab_parallel_log_probs(
                        output.transpose(0, 1),
                        weight,
                        batch.labels.T,
                        vocab_size=tiny.VOCAB,
                        group=group,
                        mask=mask.T,
                        sequence_parallel=sequence_parallel,
                        workspace_bytes=10_000,
                    )
                else:
                    logps = vocab_parallel_log_probs(
                        output, batch.labels, vocab_size=tiny.VOCAB, group=group, mask=mask
                    )
                is_last = index == len(micro_batches) - 1
                with contextlib.nullcontext() if is_last else wrapped.no_sync():
                    (-logps.sum()).backward()
            finalize_model_grads([wrapped], None)
            main_grads.append({name: parameter.main_grad.clone() for name, parameter in model.named_parameters()})
        return main_grads

    differences: dict[str, list[float]] = {}
    for fused, through_logits in zip(run(True), run(False), strict=True):
        for name, expected in through_logits.items():
            assert expected.ne(0).any()
            differences.setdefault(name, []).append(relative_error(fused[name], expected))
    return differences


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "overlap"),
    [(1, False, False), (1, False, True), (2, False, False), (2, True, False), (2, True, True)],
)
def test_every_main_grad_of_a_megatron_model_is_that_through_logits(
    tensor: int, sequence_parallel: bool, overlap: bool, tied: bool
) -> None:
    arguments = (tensor, sequence_parallel, tied, overlap)
    for differences in megatron_ranks.run_ranks(_main_grads, arguments, num_ranks=tensor):
        assert any("word_embeddings" in name for name in differences)
        assert all(difference < 2e-5 for per_step in differences.values() for difference in per_step), differences
