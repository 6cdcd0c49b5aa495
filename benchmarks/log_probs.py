"""Time and peak memory of log-probabilities from hidden states: ours, fused and through logits, Megatron's, and dense.

    python -m benchmarks.log_probs                                   # a few minutes on two cores
    python -m benchmarks.log_probs --tokens 4096 --hidden 4096 --vocab 32000 128256 --dtype bfloat16 float32 --tp 1 2

On a GPU the default is Llama 3's head with T = 8192 and 32,768. Every variant computes log p(target) ``[T]`` from
hidden states ``[T, H]`` and the output weight ``[V/TP, H]``, of the same dtype, and the gradients of both for an
upstream gradient of ones:

- dense: ``log_softmax`` of all logits in float32, and ``gather``; on one rank only, and if they fit.
- megatron: megatron-core's column-parallel projection and ``vocab_parallel_cross_entropy``.
- through_logits: the same projection, and ``nemo_rao.ops.vocab_parallel``.
- fused: ``nemo_rao.ops.linear_log_probs``.
- fused_pytorch: the same without Triton kernels; on a GPU only.
- liger, cut_cross_entropy: those packages, if installed; on one GPU only. Neither adds to ``main_grad``.

Time: all variants in turn in one process, on the same inputs. Memory: the peak in forward and backward, beyond inputs
and the two resulting gradients. On a CPU, each variant runs in a separate process, as libraries retain memory.

Each row also times the three bare matrix products that every variant needs, with 16-bit results: the logits, and the
gradients of hidden states and weight. ``rate_over_products`` is the FLOP/s of a variant over theirs, counting three
products for both. A variant that keeps no logits computes them twice, so 0.75 is its upper bound;
``rate_over_products_done`` counts the four products that it computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import PeakMemory, clock, device, on_ranks, paired_ratio, times_in_turn
from benchmarks.results import parser, write_result

VARIANTS = ("dense", "megatron", "through_logits", "fused", "fused_pytorch", "liger", "cut_cross_entropy")
BASELINE, OURS = "megatron", "fused"
PACKAGES = {"liger": "liger_kernel", "cut_cross_entropy": "cut_cross_entropy"}
# Matrix products of variants that do not keep the logits; Liger's computes gradients in forward, and so logits once.
NUM_PRODUCTS = {"fused": 4, "fused_pytorch": 4, "cut_cross_entropy": 4}


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of the table.

    Attributes:
        tokens: T.
        hidden: H.
        vocab: V, a multiple of tp.
        tp: tensor-parallel ranks.
        dtype: of hidden states and weight.
    """

    tokens: int
    hidden: int
    vocab: int
    tp: int
    dtype: str

    @property
    def logits_bytes(self) -> int:
        """Bytes of one rank's logits in 16 bits, the unit of all memory figures."""
        return self.tokens * self.vocab // self.tp * 2

    @property
    def product_flops(self) -> float:
        """FLOPs of one matrix product on one rank."""
        return 2.0 * self.tokens * self.hidden * self.vocab / self.tp

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and targets, the same on each rank, and this rank's rows of the weight."""
        generator = torch.Generator(device()).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": device(), "dtype": getattr(torch, self.dtype)}
        hidden = torch.randn(self.tokens, self.hidden, **options)
        targets = torch.randint(self.vocab, (self.tokens,), generator=generator, device=device())
        generator.manual_seed(1 + dist.get_rank())
        weight = torch.randn(self.vocab // self.tp, self.hidden, **options).mul_(self.hidden**-0.5)
        return hidden.requires_grad_(), weight.requires_grad_(), targets

    @property
    def warm_up(self) -> Size:
        """The same at a small size, which loads libraries whose memory must not be counted."""
        return dataclasses.replace(self, tokens=32, vocab=128 * self.tp)


# --------------------------------------------------------------------------------------------- variants


def log_probs(variant: str, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """``[T]`` log p(target) by one of :data:`VARIANTS`; for Liger, which returns only the sum, ``[]``."""
    if variant == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    if variant == "cut_cross_entropy":
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, targets, reduction="none")
    if variant in ("fused", "fused_pytorch"):
        from nemo_rao.ops.linear_log_probs import linear_vocab_parallel_log_probs

        return linear_vocab_parallel_log_probs(hidden, weight, targets, vocab_size=vocab_size, group=dist.group.WORLD)
    if variant == "dense":
        return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    logits = _project(hidden, weight)
    if variant == "through_logits":
        from nemo_rao.ops.vocab_parallel import vocab_parallel_log_probs

        return vocab_parallel_log_probs(logits, targets, vocab_size=vocab_size, group=dist.group.WORLD)
    assert variant == "megatron", variant
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    # As GPTModel.compute_language_model_loss calls it, on logits [T, R, V/TP] of the compute type.
    return -vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]


def variants_of(size: Size) -> list[str]:
    """The variants that can be measured on this machine."""
    gpu, one = torch.cuda.is_available(), size.tp == 1
    possible = dict.fromkeys(VARIANTS, True)
    possible["fused_pytorch"] = gpu
    for name, package in PACKAGES.items():
        possible[name] = gpu and one and importlib.util.find_spec(package) is not None
    # Logits, log-softmax and the gradients of both in float32, and two copies in 16 bits.
    fits = not gpu or 10 * size.logits_bytes < torch.cuda.get_device_properties(0).total_memory
    possible["dense"] = one and fits
    return [name for name, can in possible.items() if can]


@contextlib.contextmanager
def switched(variant: str) -> Iterator[None]:
    """Disable the Triton kernels for the variant without them."""
    from nemo_rao.ops.logit_blocks import SWITCH

    before = os.environ.get(SWITCH)
    if variant == "fused_pytorch":
        os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if variant == "fused_pytorch":
            os.environ.pop(SWITCH) if before is None else os.environ.update({SWITCH: before})


def products(hidden: Tensor, weight: Tensor) -> Mapping[str, float]:
    """Seconds of the bare products: logits forward; gradients of hidden states and of the weight backward."""
    with torch.no_grad():
        start = clock()
        logits = hidden @ weight.T
        middle = clock()
        _ = logits @ weight
        _ = logits.T @ hidden
        end = clock()
    return {"forward": middle - start, "backward": end - middle, "forward_and_backward": end - start}


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear

    return linear(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=dist.get_world_size() > 1,
        sequence_parallel=False,
        tp_group=dist.group.WORLD,
    )


def _enter_megatron(size: Size) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Transformer Engine and apex, which are not used here
        from megatron.core import parallel_state

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(size.tp)


# -------------------------------------------------------------------------------------------- measuring


def measure_memory(variant: str, size: Size) -> dict[str, int]:
    """Peak bytes of this rank above inputs and gradients. Inside a rank."""
    if variant in ("megatron", "through_logits"):
        _enter_megatron(size)
    for each in (size.warm_up, size):
        hidden, weight, targets = each.inputs()
        with switched(variant), PeakMemory() as peak:
            logps = log_probs(variant, hidden, weight, targets, each.vocab)
            forward = peak.so_far()
            logps.sum().backward()
    gradients = hidden.nbytes + weight.nbytes
    return {"forward": forward, "forward_and_backward": peak.num_bytes - gradients}


def measure_times(variants: list[str], size: Size, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each variant, and of the bare ``products``, in each round. Inside a rank."""
    _enter_megatron(size)
    hidden, weight, targets = size.inputs()

    def run(variant: str) -> Mapping[str, float]:
        hidden.grad = weight.grad = None
        dist.barrier()
        with switched(variant):
            start = clock()
            logps = log_probs(variant, hidden, weight, targets, size.vocab)
            middle = clock()
            logps.sum().backward()
            end = clock()
        return {"forward": middle - start, "backward": end - middle, "forward_and_backward": end - start}

    work: dict[str, Callable[[], Mapping[str, float]]] = {name: functools.partial(run, name) for name in variants}
    return times_in_turn({**work, "products": functools.partial(products, hidden, weight)}, repeats=repeats)


def measure_both(
    variants: list[str], size: Size, repeats: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, dict[str, int]]]:
    """Times and memory in one process, for GPUs, whose allocator counts each variant's memory. Inside a rank."""
    times = measure_times(variants, size, repeats)
    return times, {name: measure_memory(name, size) for name in variants}


def measure(size: Size, *, repeats: int, threads: int, one_process: bool) -> dict[str, Any]:
    """One row: seconds, ratios to :data:`BASELINE`'s and to the products', bytes, ratios to the logits'."""
    variants = variants_of(size)
    on = functools.partial(on_ranks, num_ranks=size.tp, threads=threads)
    if one_process:
        rounds, memories = on(measure_both, (variants, size, repeats))
    else:
        rounds = on(measure_times, (variants, size, repeats))
        memories = {name: on(measure_memory, (name, size)) for name in variants}
    of_products = [seconds["forward_and_backward"] for seconds in rounds["products"]]
    row: dict[str, Any] = {
        **dataclasses.asdict(size),
        "logits_bytes": size.logits_bytes,
        "products": {
            "seconds": _seconds(rounds["products"]),
            "tflops": 3 * size.product_flops / min(of_products) / 1e12,
        },
        "variants": {},
    }
    for name in variants:
        both = [seconds["forward_and_backward"] for seconds in rounds[name]]
        baseline = [seconds["forward_and_backward"] for seconds in rounds[BASELINE]]
        rate = paired_ratio(of_products, both)
        row["variants"][name] = {
            "seconds": _seconds(rounds[name]),
            f"time_over_{BASELINE}": paired_ratio(both, baseline),
            "tflops": 3 * size.product_flops / min(both) / 1e12,
            "rate_over_products": rate,
            "rate_over_products_done": {key: value * NUM_PRODUCTS.get(name, 3) / 3 for key, value in rate.items()},
            "peak_bytes": memories[name],
            "peak_over_logits": {phase: peak / size.logits_bytes for phase, peak in memories[name].items()},
        }
    return row


def _seconds(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    by_phase = {phase: [seconds[phase] for seconds in rounds] for phase in rounds[0]}
    return {phase: {"min": min(seconds), "median": statistics.median(seconds)} for phase, seconds in by_phase.items()}


def print_header() -> None:
    print(f"{'T':>6} {'H':>5} {'V':>7} {'TP':>2} {'dtype':>8}  {'variant':<17}", end=" ")
    print(f"{'seconds':>8} {'x ' + BASELINE:>10} {'rate/products':>13} {'MiB':>8} {'x logits':>8}", flush=True)


def print_row(row: Mapping[str, Any]) -> None:
    for name, figures in row["variants"].items():
        both = "forward_and_backward"
        print(f"{row['tokens']:>6} {row['hidden']:>5} {row['vocab']:>7} {row['tp']:>2} {row['dtype']:>8}", end="  ")
        print(f"{name:<17} {figures['seconds'][both]['min']:>8.3f}", end=" ")
        print(f"{figures[f'time_over_{BASELINE}']['median']:>10.2f}", end=" ")
        print(f"{figures['rate_over_products']['median']:>13.2f}", end=" ")
        print(f"{figures['peak_bytes'][both] / 2**20:>8.0f} {figures['peak_over_logits'][both]:>8.2f}", flush=True)


def main() -> None:
    command = parser(__doc__, repeats=3)
    gpu = torch.cuda.is_available()
    tokens, hidden, tp = ([8192, 32_768], [4096], [1]) if gpu else ([256, 1024], [512], [1, 2])
    command.add_argument("--tokens", type=int, nargs="+", default=tokens, help="T")
    command.add_argument("--hidden", type=int, nargs="+", default=hidden, help="H")
    command.add_argument("--vocab", type=int, nargs="+", default=[128_256], help="V")
    command.add_argument("--tp", type=int, nargs="+", default=tp, help="tensor-parallel ranks")
    command.add_argument("--dtype", nargs="+", default=["bfloat16"], help="of hidden states and weight")
    command.add_argument(
        "--one-process", action="store_true", default=gpu, help="measure memory in the process of the times, as on GPUs"
    )
    arguments = command.parse_args()

    rows = []
    print_header()
    keys = ("tokens", "hidden", "vocab", "tp", "dtype")
    options = {name: getattr(arguments, name) for name in ("repeats", "threads", "one_process")}
    for values in itertools.product(*(getattr(arguments, key) for key in keys)):
        rows.append(measure(Size(*values), **options))
        print_row(rows[-1])
        write_result("log_probs", arguments, {"rows": rows})  # after each size, as a later one may not end


if __name__ == "__main__":
    main()
