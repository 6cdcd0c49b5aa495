"""vocab_parallel_log_probs against log_softmax in float64, on one, two and four ranks."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_rao.ops.linear_log_probs import linear_vocab_parallel_log_probs
from nemo_rao.ops.vocab_parallel import vocab_parallel_log_probs

from .gloo_ranks import run_ranks


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits of a whole vocabulary, which every rank makes alike and takes its own columns of."""

    shape: tuple[int, ...] = (3, 5)
    vocab_size: int = 24
    padded_size: int = 24
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    masked: bool = False
    scale: float = 3.0
    offset: float = 0.0
    chunk_bytes: int = 300  # a few tokens, so that there are several chunks and a last one that is shorter

    def make(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """logits ``[..., padded]``, targets, upstream gradient, mask."""
        generator = torch.Generator().manual_seed(7)
        logits = torch.randn(*self.shape, self.padded_size, generator=generator, dtype=torch.float64)
        logits = (logits * self.scale + self.offset).to(self.dtype)
        targets = torch.randint(self.vocab_size, self.shape, generator=generator)
        upstream = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        mask = torch.rand(self.shape, generator=generator) < 0.6 if self.masked else None
        if self.masked:
            logits[~mask] = torch.nan
            targets[~mask] = -100
        logits[..., self.vocab_size :] = torch.nan  # padding must not even be looked at
        return logits, targets, upstream, mask


CASES = {
    "plain": Case(),
    "one token a chunk": Case(chunk_bytes=1),
    "all tokens in one chunk": Case(chunk_bytes=2**20),
    "one dimension": Case(shape=(7,)),
    "four dimensions": Case(shape=(2, 1, 3, 2)),
    "no token": Case(shape=(0, 4)),
    "transposed, as Megatron returns it": Case(layout="transposed"),
    "strided vocabulary": Case(layout="strided"),
    "padded": Case(vocab_size=21),
    "padded, transposed, masked": Case(vocab_size=19, layout="transposed", masked=True),
    "ranks with nothing but padding": Case(vocab_size=5),
    "vocabulary of one": Case(vocab_size=1),
    "masked": Case(masked=True),
    "float64": Case(dtype=torch.float64, vocab_size=23, masked=True),
    "bfloat16": Case(dtype=torch.bfloat16, vocab_size=23),
    "float16": Case(dtype=torch.float16, layout="transposed"),
    "extreme": Case(scale=1e4),
    "far from zero": Case(offset=1e4, dtype=torch.float32),
}


class Watch(TorchDispatchMode):
    """Counts collectives, and records each new tensor's (bytes, type), views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.allocated: list[tuple[int, torch.dtype]] = []
        self.storages: set[int] = set()
        self.kept: list[torch.Tensor] = []  # a freed storage's address would be given out again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for tensor in self._tensors((args, kwargs)):
            self._is_new(tensor)
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives.append(func.__name__)
            return result
        for tensor in self._tensors(result):
            if self._is_new(tensor):
                self.allocated.append((tensor.untyped_storage().nbytes(), tensor.dtype))
        return result

    def _is_new(self, tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage()._cdata
        if address in self.storages:
            return False
        self.storages.add(address)
        self.kept.append(tensor)
        return True

    @staticmethod
    def _tensors(tree: object) -> Iterator[torch.Tensor]:
        return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def lay_out(logits: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        spaced = torch.zeros(*logits.shape[:-1], 2 * logits.shape[-1], dtype=logits.dtype)[..., ::2]
        return spaced.copy_(logits)
    return logits.contiguous()


def compute_all() -> dict[str, dict]:
    """Every case on this rank."""
    results = {}
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    for name, case in CASES.items():
        logits, targets, upstream, mask = case.make()
        local = lay_out(logits.chunk(num_ranks, -1)[rank], case.layout).requires_grad_()
        before = local.detach().clone()
        arguments = {"vocab_size": case.vocab_size, "mask": mask, "chunk_bytes": case.chunk_bytes}
        with Watch() as forward:
            logps = vocab_parallel_log_probs(local, targets, group=dist.group.WORLD, **arguments)
        with Watch() as backward:
            logps.backward(upstream.to(logps.dtype))
        assert local.grad is not None
        results[name] = {
            "logps": logps.detach(),
            "grad": local.grad,
            "unchanged": torch.equal(local.detach().nan_to_num(nan=-1), before.nan_to_num(nan=-1)),
            "collectives": (forward.collectives, backward.collectives),
            "strides": (local.stride(), local.grad.stride()),
        }
    return results


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"tp{size}")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict]]:
    return run_ranks(compute_all, request.param)


def dense(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probs and gradient ``[..., padded]`` in float64 by log_softmax over the whole vocabulary."""
    logits, targets, upstream, mask = case.make()
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    wide = logits.double()[..., : case.vocab_size].masked_fill(~keep[..., None], 0).requires_grad_()
    logps = wide.log_softmax(-1).gather(-1, targets.where(keep, 0)[..., None])[..., 0].where(keep, 0)
    logps.backward(upstream)
    assert wide.grad is not None
    grad = torch.zeros(logits.shape, dtype=torch.float64)
    grad[..., : case.vocab_size] = wide.grad
    return logps.detach(), grad


@pytest.mark.parametrize("name", CASES)
def test_log_probs_equal_dense_float64(ranks: list[dict[str, dict]], name: str) -> None:
    case, (expected, _) = CASES[name], dense(CASES[name])
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-6
    for result in ranks:
        logps = result[name]["logps"]
        assert logps.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(logps.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(logps, ranks[0][name]["logps"]), "ranks disagree"


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_dense_float64(ranks: list[dict[str, dict]], name: str) -> None:
    case, (_, expected) = CASES[name], dense(CASES[name])
    grad = torch.cat([result[name]["grad"] for result in ranks], -1)
    assert grad.dtype == case.dtype
    rtol = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[case.dtype]
    atol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-7}[case.dtype]
    torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_padding_and_masked_positions_get_exactly_zero(ranks: list[dict[str, dict]], name: str) -> None:
    case = CASES[name]
    *_, mask = case.make()
    grad = torch.cat([result[name]["grad"] for result in ranks], -1)
    assert not grad[..., case.vocab_size :].any()
    if mask is not None:
        assert not grad[~mask].any()
        assert not ranks[0][name]["logps"][~mask].any()


@pytest.mark.parametrize("name", CASES)
def test_one_collective_forward_none_backward(ranks: list[dict[str, dict]], name: str) -> None:
    for result in ranks:
        forward, backward = result[name]["collectives"]
        assert len(forward) == (0 if len(ranks) == 1 else 1), forward
        assert not backward


@pytest.mark.parametrize("name", CASES)
def test_logits_are_not_changed(ranks: list[dict[str, dict]], name: str) -> None:
    assert all(result[name]["unchanged"] for result in ranks)


def test_gradient_has_the_layout_of_transposed_logits(ranks: list[dict[str, dict]]) -> None:
    """So that the transpose before this function is undone without a copy."""
    for result in ranks:
        logits_stride, grad_stride = result["transposed, as Megatron returns it"]["strides"]
        assert logits_stride == grad_stride


def test_a_failing_rank_shows_its_traceback() -> None:
    def fail_on_one() -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("the reason")

    with pytest.raises(Exception, match=r"(?s)fail_on_one.*the reason"):
        run_ranks(fail_on_one, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_no_second_copy_of_the_logits_exists(dtype: torch.dtype, masked: bool) -> None:
    shape, vocab_size, chunk_bytes = (256, 4), 1000, 100_000
    logits = torch.randn(*shape, vocab_size, dtype=dtype).transpose(0, 1).requires_grad_()
    targets = torch.randint(999, (4, 256))
    mask = torch.rand(4, 256) < 0.9 if masked else None
    with Watch() as forward:
        logps = vocab_parallel_log_probs(logits, targets, vocab_size=999, mask=mask, chunk_bytes=chunk_bytes)
    assert max(size for size, _ in forward.allocated) <= chunk_bytes
    with Watch() as backward:
        logps.backward(torch.ones_like(logps))
    whole = logits.numel() * logits.element_size()
    large = [entry for entry in backward.allocated if entry[0] > chunk_bytes]
    assert large == [(whole, dtype)], "the gradient alone, in the logits' type"


def test_saved_for_backward_are_the_logits_and_a_few_numbers_a_token() -> None:
    logits = torch.randn(64, 1000, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        vocab_parallel_log_probs(logits, torch.zeros(64, dtype=torch.long), vocab_size=1000, chunk_bytes=4000)
    own = [tensor for tensor in saved if tensor.data_ptr() != logits.data_ptr()]
    assert len(own) < len(saved)
    assert all(tensor.numel() == 64 for tensor in own)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    logits = torch.randn(4, 3, 7, dtype=torch.float64).transpose(0, 1).requires_grad_()
    targets = torch.randint(6, (3, 4))
    mask = torch.rand(3, 4) < 0.5 if masked else None
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_log_probs(x, targets, vocab_size=6, mask=mask, chunk_bytes=100), (logits,), atol=1e-10
    )


def test_impossible_tokens_do_not_disturb_the_others() -> None:
    logits = torch.randn(4, 9)
    logits[:, 2] = -torch.inf
    logits[1, :5] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([0, 6, 8, 3])
    logps = vocab_parallel_log_probs(logits, targets, vocab_size=9)
    logps.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    torch.testing.assert_close(logps, logits.detach().log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    assert vocab_parallel_log_probs(logits, torch.full((4,), 2), vocab_size=9).eq(-torch.inf).all()


@pytest.mark.parametrize("target", [-1, 6, 7])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    with pytest.raises(AssertionError, match=r"outside \[0, 6\)"):
        vocab_parallel_log_probs(torch.zeros(2, 8), torch.tensor([0, target]), vocab_size=6)


def test_log_probs_without_gradient_need_no_graph() -> None:
    with torch.no_grad():
        logps = vocab_parallel_log_probs(torch.zeros(2, 8, requires_grad=True), torch.zeros(2).long(), vocab_size=8)
    assert not logps.requires_grad
    torch.testing.assert_close(logps, torch.full((2,), -math.log(8)))


def test_listed_positions_are_those_of_a_mask_in_any_order() -> None:
    """Here and in the fused function, value and gradient."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (5, 3), generator=generator)
    mask = torch.rand(5, 3, generator=generator) < 0.6
    upstream = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(int(mask.sum()), generator=generator)
    listed = tuple(index[order] for index in mask.nonzero(as_tuple=True))
    for function, inputs in (
        (
            lambda **where: vocab_parallel_log_probs(hidden @ weight.T, targets, vocab_size=11, **where),
            (hidden, weight),
        ),
        (
            lambda **where: linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=11, **where),
            (hidden, weight),
        ),
    ):
        expected, got = function(mask=mask), function(positions=listed)
        assert expected.any() and torch.equal(got, expected)
        for wanted, have in zip(
            torch.autograd.grad(expected, inputs, upstream), torch.autograd.grad(got, inputs, upstream), strict=True
        ):
            torch.testing.assert_close(have, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("num_trained", [0, 4])
def test_constants_have_their_value_and_no_gradient(num_trained: int) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (9,), generator=generator)
    upstream = torch.randn(9, generator=generator, dtype=torch.float64)
    order = torch.randperm(9, generator=generator)
    kept = torch.zeros(9, dtype=torch.bool).index_fill(0, order[:num_trained], True)
    for function in (
        lambda **where: vocab_parallel_log_probs(hidden @ weight.T, targets, vocab_size=11, **where),
        lambda **where: linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=11, **where),
    ):
        everything, got = function(), function(positions=(order,), num_trained=num_trained)
        torch.testing.assert_close(got, everything, rtol=1e-13, atol=1e-13)
        expected = torch.autograd.grad(everything, (hidden, weight), upstream * kept)
        for wanted, have in zip(expected, torch.autograd.grad(got, (hidden, weight), upstream), strict=True):
            torch.testing.assert_close(have, wanted, rtol=1e-12, atol=1e-13)
