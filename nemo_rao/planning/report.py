"""A plan as a table of at most 100 columns, and as a record for ``--json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_rao.config.gpu_models import GIB
from nemo_rao.planning import activations
from nemo_rao.planning.advise import Advice
from nemo_rao.planning.buffers import stage_states
from nemo_rao.planning.communication import communication
from nemo_rao.planning.compute import bubble, flops
from nemo_rao.planning.log_probs import whole_logits
from nemo_rao.planning.machine import Machine
from nemo_rao.planning.memory import UNCERTAINTY, StageMemory, memory, peak, upper_peak
from nemo_rao.planning.parameters import model_parameters
from nemo_rao.planning.rollouts import cache_bytes, rollout_time
from nemo_rao.planning.setting import Rollouts, Setting
from nemo_rao.planning.step_time import StepTime, step_time
from nemo_rao.planning.whole_run import RunLength, reference_seconds, run_time

COLUMNS = 6  # stages shown side by side


def fits(setting: Setting, machine: Machine) -> bool:
    return peak(setting) <= machine.limit


def fits_surely(setting: Setting, machine: Machine) -> bool:
    """Whether the setting fits even with the uncertainty of activations."""
    return upper_peak(setting) <= machine.limit


def record(
    title: str, setting: Setting, machine: Machine, advice: Sequence[Advice], length: RunLength | None
) -> dict[str, Any]:
    """Return everything in the table, in bytes, seconds and FLOPs, for other programs.

    Args:
        length: length of the whole run; ``None``: unknown.
    """
    sent, work, time = communication(setting), flops(setting), step_time(setting, machine)
    stages = [
        {**dataclasses.asdict(stage_states(setting, number)), **dataclasses.asdict(stage), "total": stage.total}
        for number, stage in enumerate(memory(setting))
    ]
    return {
        "run": title,
        "fits": fits(setting, machine),
        "tight": fits(setting, machine) and not fits_surely(setting, machine),
        "margin_bytes": machine.limit - peak(setting),
        "uncertainty_bytes": upper_peak(setting) - peak(setting),
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
        "communication_bytes": {**dataclasses.asdict(sent), "data": sent.data, "total": sent.total},
        "bubble": bubble(setting),
        "flops": dataclasses.asdict(work),
        "seconds": time.total,
        "seconds_of": dataclasses.asdict(time),
        "mfu": _reached_mfu(setting, machine, time),
        "reference_seconds": _reference_seconds(setting, machine),
        "rollout": _rollout_record(setting, machine),
        "whole_run": None if length is None else _whole_run_record(length, setting, machine),
        "advice": [{"overrides": list(one.overrides), "bytes": one.bytes} for one in advice],
    }


def _rollout_record(setting: Setting, machine: Machine) -> dict[str, Any] | None:
    if setting.rollouts is None:
        return None
    time = rollout_time(setting, machine)
    return {
        "steps": setting.rollouts.steps,
        "seconds": time.total,
        "seconds_of": dataclasses.asdict(time),
        "cache_bytes": [cache_bytes(setting, stage) for stage in range(setting.pipeline)],
    }


def _whole_run_record(length: RunLength, setting: Setting, machine: Machine) -> dict[str, Any]:
    time = run_time(length, setting, machine)
    return {
        **dataclasses.asdict(length),
        "seconds": time.total,
        "seconds_of": dataclasses.asdict(time),
        "gpu_hours": time.gpu_hours(setting),
    }


def table(title: str, setting: Setting, machine: Machine, advice: Sequence[Advice], length: RunLength | None) -> str:
    """Format the plan for a terminal. See :func:`record`."""
    lines = [*_head(title, setting), "", *_memory(setting), "", *_work(setting, machine), ""]
    if setting.rollouts is not None:
        lines += [*_rollout(setting, setting.rollouts, machine), ""]
    lines += [*_whole_run(length, setting, machine), ""]
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
        yield _row("", f"{network.experts} experts per layer, {network.chosen} per token")
    if setting.lora is not None:
        yield _row("", f"adapters of rank {setting.lora.dim} are trained ({setting.lora.scheme})")
    yield _row(
        "ranks",
        f"{setting.ranks} = tensor {setting.tensor} x pipeline {setting.pipeline}"
        f"{f' x context {setting.context}' if setting.context > 1 else ''} x data {setting.data}"
        f"{', sequence parallel' if setting.sequence_parallel else ''}"
        f"{f', {setting.virtual} chunks per stage' if setting.virtual > 1 else ''}",
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
    if any(stage.reference == stage.passing for stage in stages):
        rows.append(("or a micro-batch of the reference **", [stages[n].reference for n in shown]))
    if setting.rollouts is not None:
        rows.append(("or sampling **", [stages[n].sampling for n in shown]))
    if setting.critic is not None:
        with_states = ", with its states" if setting.transformer_engine else ""
        rows.append((f"or the critic's step{with_states} **", [stages[n].critic for n in shown]))
    if any(stage.critic_states for stage in stages):
        rows.append(("the critic's states", [stages[n].critic_states for n in shown]))
    if not setting.transformer_engine:  # on a CPU
        rows.append(("process, without tensors", [stages[n].process for n in shown]))
    rows.append(("total", [stages[n].total for n in shown]))
    for name, values in rows:
        yield f"  {name:<32}" + "".join(f"{value / GIB:>11.2f}" for value in values)
    held = ", ".join(str(stages[n].in_flight) for n in shown)
    what = "micro-batches" if setting.virtual == 1 else "chunks of micro-batches"
    yield f"  {what} in flight: {held}; * only the larger of the two counts"
    if setting.rollouts is not None:
        critic = "" if setting.critic is None else ", the critic's step"
        yield f"  ** only the largest counts: a step's rows from activations on, sampling, the reference pass{critic}"
    elif any(stage.reference == stage.passing for stage in stages):
        yield "  ** the reference pass needs more than the rows from activations on; only the larger counts"
    if any(stage.host for stage in stages):
        of_node = max(stage.host for stage in stages) * setting.devices / GIB
        samples = setting.rollouts is not None
        in_host = {
            "optimizer states": setting.optimizer_in_host > 0,
            "reference weights": samples and setting.reference and setting.lora is None,
            "critic": samples and setting.critic is not None and setting.transformer_engine,
        }
        held = ", ".join(name for name, is_there in in_host.items() if is_there)
        yield f"  host memory of a node: at most {of_node:.2f} ({held})"
    logits = whole_logits(setting) / GIB
    if not setting.scores:
        held = "are held, and their gradient:" if setting.holds_logits else "are never held, and would take"
        yield f"  whole logits {held} {logits:.2f}"


def _work(setting: Setting, machine: Machine) -> Iterator[str]:
    sent, work, time = communication(setting), flops(setting), step_time(setting, machine)
    yield "a step"
    parts = {name: vars(sent)[name] for name in ("tensor", "context", "expert", "pipeline")}
    parts |= {"data": sent.data, "embedding": sent.embedding}
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    yield _row("  sent by a rank", f"{sent.total / GIB:.2f} GiB" + (f": {shown}" if shown else ""))
    more = 100 * (work.executed / work.model - 1)
    yield _row("  FLOPs", f"{work.model:.3e}; {more:.0f} % more are executed for recomputation")
    yield _row("  computation", f"{time.compute:.2f} s at {machine.mfu:g} of {machine.peak_tflops:g} TFLOPS per GPU")
    seconds = {name: vars(time)[name] for name in (*parts,)}
    shown = ", ".join(f"{name} {size:.2f}" for name, size in seconds.items() if size >= 0.005)
    yield _row("  communication", f"{time.communication:.2f} s" + (f": {shown}" if shown else "") + _hidden(time))
    if sent.total:
        yield _row(
            "",
            f"at {machine.link_efficiency:g} of {machine.intra_node_gbs:g} GB/s inside a node, "
            f"{machine.inter_node_gbs:g} GB/s between nodes",
        )
    yield _row("  pipeline bubble", f"{time.bubble:.2f} s, {100 * bubble(setting):.1f} % of the micro-batches' time")
    yield _row("  time", f"{time.total:.2f} s, MFU {_reached_mfu(setting, machine, time):.2f}")
    if setting.critic is not None:
        yield _row("  critic", f"its step {step_time(setting.critic, machine).total:.2f} s, before that of the policy")
    if setting.reference and setting.rollouts is None:
        extra = _reference_seconds(setting, machine)
        yield _row("  reference pass", f"once over the data: {extra:.2f} s for as many prompts as a step has")


def _rollout(setting: Setting, keys: Rollouts, machine: Machine) -> Iterator[str]:
    time = rollout_time(setting, machine)
    cache = max(cache_bytes(setting, stage) for stage in range(setting.pipeline)) / GIB
    yield f"a rollout, for {keys.steps} step{'s' * (keys.steps > 1)}"
    sampled = keys.mini_batches * setting.global_batch_size * keys.num_generations
    yield _row(
        "  samples", f"{sampled:,} of up to {keys.max_new_tokens:,} tokens; keys and values {cache:.2f} GiB per rank"
    )
    yield _row(
        "  sampling", f"{time.prompts + time.tokens:.2f} s: prompts {time.prompts:.2f}, tokens {time.tokens:.2f}"
    )
    if keys.passes:
        yield _row("  log-probabilities", f"{time.passes:.2f} s, {keys.passes} pass{'es' * (keys.passes > 1)}")
    if setting.critic is not None:
        yield _row("  values", f"{time.values:.2f} s, 1 pass of the critic")


def _hidden(time: StepTime) -> str:
    return f"; {time.hidden:.2f} hidden" if time.hidden >= 0.005 else ""


def _reached_mfu(setting: Setting, machine: Machine, time: StepTime) -> float:
    """Model FLOPs divided by the GPUs' peak over the whole step."""
    return flops(setting).model / (time.total * setting.ranks * machine.peak_tflops * 1e12)


def _reference_seconds(setting: Setting, machine: Machine) -> float:
    """Seconds of the reference pass for as many prompts as a step has."""
    return reference_seconds(setting, machine, setting.global_batch_size) if setting.reference else 0.0


def _whole_run(length: RunLength | None, setting: Setting, machine: Machine) -> Iterator[str]:
    if length is None:
        yield _row("the run", "its length is unknown: set --prompts N, or trainer.max_steps")
        return
    time = run_time(length, setting, machine)
    yield "the run"
    prompts = "" if length.prompts is None else f", on {length.prompts:,} prompts"
    yield _row("  steps", f"{length.steps:,} of {setting.global_batch_size} prompts{prompts}")
    parts = {
        "training": time.training,
        "rollouts": time.rollouts,
        "reference pass": time.reference,
        "validation": time.validation,
    }
    shown = ", ".join(f"{name} {_hours(seconds / 3600)}" for name, seconds in parts.items() if seconds)
    yield _row("  hours", f"{_hours(time.total / 3600)}: {shown}")
    yield _row("  GPU-hours", f"{_hours(time.gpu_hours(setting))} on {setting.ranks} GPU{'s' * (setting.ranks > 1)}")
    if time.reference is None:
        yield _row("", "without the reference pass: set --prompts N")
    if time.validation is None:
        yield _row("", "without validation: data.validation_path is not on this machine")


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def _verdict(setting: Setting, machine: Machine, advice: Sequence[Advice]) -> Iterator[str]:
    needed, most, limit = (size / GIB for size in (peak(setting), upper_peak(setting), machine.limit))
    room = f"  {machine.name}: {machine.memory_gib:g} GiB, of which {machine.reserve_gib:g} GiB is reserved"
    percent = f"{100 * UNCERTAINTY:g} %"
    if fits(setting, machine):
        tight = not fits_surely(setting, machine)
        yield f"fits{', tightly' * tight}: {needed:.2f} GiB at the peak, {limit - needed:.2f} GiB to spare"
        yield room
        over = f", {most - limit:.2f} GiB too much" if tight else ""
        yield f"  activations are known to within {percent}: the peak may be {most:.2f} GiB{over}"
        if advice:
            yield "the nearest settings that fit even then; add one line to the command:"
    else:
        stages = memory(setting)
        largest = max(range(len(stages)), key=lambda number: stages[number].total)
        where = f" on stage {largest}" if len(stages) > 1 else ""
        yield f"does not fit: {needed:.2f} GiB at the peak{where}, {needed - limit:.2f} GiB too much"
        yield room
        yield f"  most of it: {_largest_part(stages[largest])}"
        if advice:
            yield "the nearest settings that fit; add one line to the command:"
        else:
            yield "no change of parallelism, recomputation or batch size makes it fit; use larger or more GPUs"
    for one in advice:
        close = "" if fits_surely(one.setting, machine) else f"; tight, as activations are known to within {percent}"
        yield f"  # {one.bytes / GIB:.2f} GiB, {step_time(one.setting, machine).total:.2f} s per step{close}"
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
        "the reference pass": stage.reference if stage.reference == stage.passing else 0,
    }
    if stage.sampling == stage.passing:
        parts["sampling"] = stage.sampling
    if stage.critic == stage.passing:
        parts["the critic's step"] = stage.critic
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {parts[name] / GIB:.2f} GiB"


def _wrapped(overrides: Sequence[str]) -> Iterator[str]:
    """Wrap overrides as lines of a shell command."""
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
