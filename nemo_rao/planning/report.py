"""A plan as a table of at most 100 columns, and as a record for ``--json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rao.planning import activations
from nemo_rao.planning.advise import Advice
from nemo_rao.planning.buffers import stage_states
from nemo_rao.planning.communication import communication
from nemo_rao.planning.compute import bubble, flops, seconds
from nemo_rao.planning.gpus import GIB
from nemo_rao.planning.log_probs import whole_logits
from nemo_rao.planning.memory import StageMemory, memory
from nemo_rao.planning.parameters import model_parameters
from nemo_rao.planning.setting import Setting

COLUMNS = 6  # stages that are shown beside each other


@dataclass(frozen=True)
class Machine:
    """What the run is to fit on.

    Attributes:
        name: as it is printed.
        memory_gib: of a GPU.
        reserve_gib: kept free for the CUDA context, NCCL's buffers and fragmentation; not planned, assumed.
        peak_tflops: of a GPU, in the run's number format.
        mfu: share of it that is reached.
    """

    name: str
    memory_gib: float
    reserve_gib: float
    peak_tflops: float
    mfu: float

    @property
    def limit(self) -> int:
        """Bytes that a plan may take."""
        return int((self.memory_gib - self.reserve_gib) * GIB)


def fits(setting: Setting, machine: Machine) -> bool:
    return max(stage.total for stage in memory(setting)) <= machine.limit


def record(title: str, setting: Setting, machine: Machine, advice: Sequence[Advice]) -> dict[str, Any]:
    """Everything in the table, in bytes, seconds and FLOPs, for another program."""
    work = flops(setting)
    stages = [
        {**dataclasses.asdict(stage), "total": stage.total, **dataclasses.asdict(stage_states(setting, number))}
        for number, stage in enumerate(memory(setting))
    ]
    return {
        "run": title,
        "fits": fits(setting, machine),
        "machine": {**dataclasses.asdict(machine), "limit_bytes": machine.limit},
        "setting": dataclasses.asdict(setting),
        "ranks": {
            "tensor": setting.tensor,
            "pipeline": setting.pipeline,
            "context": setting.context,
            "data": setting.data,
            "expert": setting.expert,
            "of_expert": setting.of_expert,
        },
        "num_micro_batches": setting.num_micro_batches,
        "step_tokens": setting.step_tokens,
        "parameters": model_parameters(setting),
        "memory_bytes": stages,
        "layer_activation_bytes": activations.layer_items(setting),
        "whole_logits_bytes": whole_logits(setting),
        "communication_bytes": dataclasses.asdict(communication(setting)),
        "bubble": bubble(setting),
        "flops": dataclasses.asdict(work),
        "seconds": _seconds(work.model, setting, machine),
        "reference_seconds": _seconds(work.reference, setting, machine),
        "advice": [{"overrides": list(one.overrides), "bytes": one.bytes} for one in advice],
    }


def table(title: str, setting: Setting, machine: Machine, advice: Sequence[Advice]) -> str:
    """The plan for a terminal."""
    lines = [*_head(title, setting), "", *_memory(setting), "", *_work(setting, machine), ""]
    return "\n".join([*lines, *_verdict(setting, machine, advice)]) + "\n"


def _head(title: str, setting: Setting) -> Iterator[str]:
    network = setting.network
    positions = "" if not network.positions else ", learned positions"
    yield title
    yield _row(
        "network",
        f"{model_parameters(setting) / 1e9:.3f} B parameters: {network.layers} layers, hidden {network.hidden}, "
        f"ffn {network.ffn},",
    )
    yield _row(
        "",
        f"{network.heads} heads in {network.groups} groups, vocabulary {network.vocabulary(setting.tensor):,}"
        f"{' (tied)' if network.tied else ''}{positions}",
    )
    if network.experts:
        yield _row("", f"{network.experts} experts in each layer, {network.chosen} for each token")
    if setting.lora is not None:
        yield _row("", f"adapters of rank {setting.lora.dim} are trained")
    yield _row(
        "ranks",
        f"{setting.ranks} = tensor {setting.tensor} x pipeline {setting.pipeline}"
        f"{f' x context {setting.context}' if setting.context > 1 else ''} x data {setting.data}"
        f"{', sequence parallel' if setting.sequence_parallel else ''}"
        f"{f', {setting.virtual} chunks a stage' if setting.virtual > 1 else ''}",
    )
    if network.experts:
        yield _row(
            "",
            f"experts over {setting.expert * setting.of_expert} ranks: expert {setting.expert} x tensor "
            f"{setting.of_expert}, in {setting.expert_shards} copies",
        )
    yield _row(
        "step",
        f"{setting.global_batch_size} prompts x {setting.responses} responses x {setting.length} tokens = "
        f"{setting.step_tokens:,} tokens",
    )
    yield _row(
        "",
        f"{setting.num_micro_batches} micro-batches of {setting.micro_batch_tokens:,} tokens on each copy; "
        f"recomputation: {setting.recompute_granularity or 'none'}",
    )


def _memory(setting: Setting) -> Iterator[str]:
    stages = memory(setting)
    shown = list(range(len(stages)))
    if len(stages) > COLUMNS:
        largest = max(shown, key=lambda number: stages[number].total)
        shown = sorted({0, 1, largest, len(stages) - 2, len(stages) - 1})
    names = [f"stage {number}" if len(stages) > 1 else "" for number in shown]
    yield (f"{'memory of a rank, GiB':<34}" + "".join(f"{name:>11}" for name in names)).rstrip()
    rows: list[tuple[str, list[float]]] = [
        (f"weights ({_format(setting.param_bytes)})", [stages[n].weights for n in shown]),
        (f"gradients ({_format(setting.grad_bytes)})", [stages[n].gradients for n in shown]),
        ("optimizer states", [stages[n].optimizer for n in shown]),
        ("activations", [stages[n].activations for n in shown]),
        ("a layer's backward pass *", [stages[n].backward for n in shown]),
        ("log-probabilities at the loss *", [stages[n].log_probs for n in shown]),
    ]
    if not setting.transformer_engine:  # on a CPU
        rows.append(("process, without tensors", [stages[n].process for n in shown]))
    rows.append(("total", [stages[n].total for n in shown]))
    for name, values in rows:
        yield f"  {name:<32}" + "".join(f"{value / GIB:>11.2f}" for value in values)
    held = ", ".join(str(stages[n].in_flight) for n in shown)
    what = "micro-batches" if setting.virtual == 1 else "chunks of micro-batches"
    yield f"  {what} in flight: {held}; * the larger of the two counts"
    logits = whole_logits(setting) / GIB
    if not setting.scores:
        held = "are never held, and would take" if setting.fused_log_probs else "are held, and their gradient:"
        yield f"  whole logits {held} {logits:.2f}"


def _work(setting: Setting, machine: Machine) -> Iterator[str]:
    sent, work = communication(setting), flops(setting)
    yield "a step"
    parts = dataclasses.asdict(sent).items()
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size)
    yield _row("  sent by a rank", f"{sent.total / GIB:.2f} GiB" + (f": {told}" if told else ""))
    yield _row("  pipeline bubble", f"{100 * bubble(setting):.1f} % of the step")
    more = 100 * (work.executed / work.model - 1)
    yield _row("  FLOPs", f"{work.model:.3e}; {more:.0f} % more are executed, for what is computed again")
    time = _seconds(work.model, setting, machine)
    yield _row("  time", f"{time:.2f} s at MFU {machine.mfu:g} of {machine.peak_tflops:g} TFLOPS a GPU")
    if work.reference:
        extra = _seconds(work.reference, setting, machine)
        yield _row("  reference pass", f"once over the data: {extra:.2f} s for as many prompts as a step has")


def _verdict(setting: Setting, machine: Machine, advice: Sequence[Advice]) -> Iterator[str]:
    stages = memory(setting)
    largest = max(range(len(stages)), key=lambda number: stages[number].total)
    needed = stages[largest].total / GIB
    room = f"{machine.memory_gib:g} GiB of {machine.name}, {machine.reserve_gib:g} GiB kept free"
    if fits(setting, machine):
        yield f"fits: {needed:.2f} GiB at the peak, on {room}"
        return
    where = f" on stage {largest}" if len(stages) > 1 else ""
    yield f"does not fit: {needed:.2f} GiB at the peak{where}, on {room}"
    yield f"most of it: {_largest_part(stages[largest])}"
    if not advice:
        yield "no change of parallelism, recomputation or batch makes it fit; take larger or more GPUs"
        return
    yield "the nearest settings that fit; add one line to the command:"
    for one in advice:
        yield f"  # {one.bytes / GIB:.2f} GiB, {seconds_of(one.setting, machine):.2f} s a step"
        yield from _wrapped(one.overrides)


def _largest_part(stage: StageMemory) -> str:
    parts = {
        "weights": stage.weights,
        "gradients": stage.gradients,
        "optimizer states": stage.optimizer,
        "activations": stage.activations,
        "log-probabilities": stage.log_probs,
        "a layer's backward pass": stage.backward,
        "the process without tensors": stage.process,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {parts[name] / GIB:.2f} GiB"


def seconds_of(setting: Setting, machine: Machine) -> float:
    return _seconds(flops(setting).model, setting, machine)


def _seconds(count: int, setting: Setting, machine: Machine) -> float:
    return seconds(count, setting, peak_tflops=machine.peak_tflops, mfu=machine.mfu)


def _wrapped(overrides: Sequence[str]) -> Iterator[str]:
    """Overrides on lines of a shell command."""
    line = " "
    for text in overrides:
        if len(line) + len(text) > 95:
            yield f"{line} \\"
            line = "   "
        line += f" {text}"
    yield line


def _row(name: str, text: str) -> str:
    return f"{name:<20}{text}"


def _format(size: int) -> str:
    return {2: "bf16", 4: "fp32"}[size]
