"""docs/performance.md, generated from the figures in benchmarks/results; a test compares the two.

python -m benchmarks.page > docs/performance.md      # what `make bench-page` does
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table

RESULTS = Path(__file__).parent / "results"
_Report = Mapping[str, Any]

BEFORE = """\
# Performance

`make bench` measures everything on this page on the current machine, `make bench BENCH=step` one part of it, and
`make bench-page` generates the page from the figures in `benchmarks/results/`. No figure is entered by hand.

**Method.** Compared variants run in one session, from the same weights, on the same rows in the same order, with the
same threads and precision. They alternate, one round each, and adjacent rounds are compared. *Ratio* is the median of
the ratios, *of minima* the ratio of the fastest rounds, *of CPU* the median ratio of processor time over all threads,
which other load on the same cores affects least. Below 1, nemo_rao is faster. A plus after a commit means that files
had been changed since that commit.
"""

NO_GPU = """\
**No GPU yet.** All figures are from a CPU, on models of a few million weights. They compare implementations of the same
mathematics and do not predict the performance of a large model on GPUs, where attention, communication and 16-bit
arithmetic have other costs. The same commands run on GPUs, in bf16.
"""

STEP_NOTES = """\
A *sample* is a prompt with all its K responses. *Memory* is the process's peak above its size before it reads data and
model: weights, optimizer, gradients and activations. *Reference pass*: in nemo_rao it runs once before the first step
and is cached on disk for later runs; TRL runs the reference policy in every step by default, or once with
`precompute_ref_log_probs=True`. *Of padded*: computed tokens as a fraction of tokens with padding. *Shared*: the
fraction of the rows' tokens that sharing prompts saves.

SFT uses the same rows as RAO with the same K: each row is a prompt with a single response, a step has K times as many
prompts, and the loss is on the responses. TRL uses its defaults except for the precision, the order of rows and the
schedule. Its `gradient_checkpointing`, on by default, computes every layer's forward pass twice to save memory.
nemo_rao has recomputation off by default, so TRL is also listed without checkpointing.

The differences have these causes. In addition to SFT, RAO computes the prompts' log-probabilities, forward only. This
is the output layer's forward pass over the prompts' tokens, a few percent of a step for these models and less for
larger ones. TRL's step includes the reference policy's forward pass and, with checkpointing, a second forward pass of
the policy, and it pads all rows of a batch to the longest. Neither side keeps logits. The gain from packing follows
from *of padded*: it grows with the variation in length and with the number of rows in a micro-batch. Memory on a CPU
includes freed memory that the C library retains.
"""

BOUNDS = """\
## What bounds a step

Shares of an RAO step's time under PyTorch's profiler. Matrix products and attention are required by the mathematics;
the rest is overhead that could be reduced. The profiler itself adds to the time between operators.
"""


def page() -> str:
    others = ("precision", "online")  # these have separate pages
    paths = [path for path in sorted(RESULTS.glob("*.json")) if not path.stem.startswith(others)]
    reports = {path.stem: json.loads(path.read_text()) for path in paths}
    parts = [BEFORE]
    if not any(_on_gpu(report) for report in reports.values()):
        parts.append(NO_GPU)
    parts.append(_where(reports))
    steps = {name: report for name, report in reports.items() if report.get("benchmark", name).startswith("step")}
    parts.append(_goals(reports))
    for number, (name, report) in enumerate(steps.items()):
        parts.append(_step(name, report, notes=number == 0))
    if "profile_step" in reports:
        parts.append(BOUNDS)
        parts.append(_profile(reports["profile_step"]))
    if "log_probs" in reports:
        parts.append(_log_probs(reports["log_probs"]))
    if "scaling" in reports:
        parts.append(_scaling(reports["scaling"]))
    if "rollouts" in reports:
        parts.append(_rollouts(reports["rollouts"]))
    if "start_up" in reports:
        parts.append(_start_up(reports["start_up"]))
    return "\n".join(part.strip() + "\n" for part in parts if part)


def _on_gpu(report: _Report) -> bool:
    return "NVIDIA" in report["device"]


def _where(reports: Mapping[str, _Report]) -> str:
    def versions(report: _Report) -> str:
        return ", ".join(f"{name} {version}" for name, version in report["versions"].items())

    rows = [
        [
            f"`{name}`",
            f"{report['device']} ({report['cpus']} cores), threads: {report['threads']}",
            report.get("date", ""),
            report.get("commit", ""),
            versions(report),
        ]
        for name, report in reports.items()
    ]
    return "## Where\n\n" + markdown_table(["result", "device", "date", "commit", "versions"], rows)


# ------------------------------------------------------------------------------------------------- steps


def _goals(reports: Mapping[str, _Report]) -> str:
    """The project's goals with all their measurements."""
    goals = (
        ("RAO takes at most 1.05 times SFT over the same rows", "rao", " / sft", 1.05),
        ("RAO makes at least 1.5 times the samples of TRL's DPO at its defaults", "rao", " / trl_dpo", 1 / 1.5),
        ("DPO makes at least 1.5 times the samples of TRL's DPO at its defaults", "dpo", " / trl_dpo", 1 / 1.5),
        ("packing and sharing make at least 1.4 times the samples of rows", "rao, packed+shared", " / rao", 1 / 1.4),
    )
    found = [
        (goal, limit, result, name, ratio)
        for goal, start, baseline, limit in goals
        for result, report in reports.items()
        for name, ratio in report.get("ratios", {}).items()
        if name.startswith(start) and baseline in name and ", " not in name.partition(" / trl_dpo")[2]
    ]
    # RAO computes everything that SFT does and more, so a ratio below 1 is measurement error.
    errors = {
        result: max(
            0.0, *(1 - min(ratio.values()) for *_, of, name, ratio in found if of == result and "/ sft" in name)
        )
        for result in dict.fromkeys(result for _, _, result, _, _ in found)
    }
    rows = [
        [goal, result, f"`{name}`", *_ratio(ratio), f"{limit:.2f}", _reached(ratio.values(), limit, errors[result])]
        for goal, limit, result, name, ratio in found
    ]
    header = ["goal", "result", "times compared", "ratio", "of minima", "of CPU", "at most", "reached"]
    margins = ", ".join(f"up to {error:.0%} in `{result}`" for result, error in errors.items())
    note = (
        f"RAO computes everything that SFT does and more, so a ratio of the two below 1 is measurement error: {margins}"
        ". A goal is *reached* if all three figures meet it, and *just* reached if the margin is smaller than that "
        "error."
    )
    return f"## Goals\n\n{note}\n\n{markdown_table(header, rows)}\n\n{_log_prob_goals(reports)}"


def _reached(ratios: Iterable[float], limit: float, error: float) -> str:
    low, high = min(values := list(ratios)), max(values)
    if high <= limit:
        return "yes" if high * (1 + error) <= limit else "yes, just"
    return "**no**" if low > limit else "undecided"


def _log_prob_goals(reports: Mapping[str, _Report]) -> str:
    rows = [
        [
            f"{row['tokens']} × {row['hidden']} × {row['vocab']}, TP {row['tp']}, {row['dtype']}",
            f"{(memory := figures['peak_over_logits']['forward_and_backward']):.2f}",
            f"{(ratio := figures['time_over_megatron']['median']):.2f}",
            f"{figures['time_over_megatron']['of_minima']:.2f}",
            "yes" if max(ratio, figures["time_over_megatron"]["of_minima"]) <= 1.2 and memory <= 0.3 else "**no**",
        ]
        for row in reports.get("log_probs", {}).get("rows", [])
        if row["tokens"] >= 1024  # for fewer tokens, the logits themselves are small
        for figures in [row["variants"]["fused"]]
    ]
    goal = (
        "Log-probabilities without logits: beyond inputs and the weight's gradient, at most 0.3 of the memory of "
        "16-bit logits, in at most 1.2 times the time of Megatron's cross-entropy, including the projection."
    )
    header = ["T × H × V", "memory over logits", "time over Megatron's", "of minima", "reached"]
    return f"{goal}\n\n{markdown_table(header, rows)}" if rows else ""


def _ratio(ratio: Mapping[str, float]) -> list[str]:
    return [f"{ratio[name]:.2f}" for name in ("median", "of_minima", "of_cpu")]


def _step(name: str, report: _Report, *, notes: bool) -> str:
    arguments, lengths = report["arguments"], report["lengths"]
    data = arguments["data"] or "generated answers whose lengths vary as in real data"
    rows = []
    for variant, figures in report["variants"].items():
        reference, efficiency = figures.get("reference_seconds"), figures.get("data/token_efficiency")
        rows.append(
            [
                variant,
                f"{figures['samples_per_second']['median']:.2f}",
                f"{figures['samples_per_second']['max']:.2f}",
                f"{figures['cpu_seconds']['min']:.2f}",
                f"{figures['peak_bytes'] / 2**20:.0f} MiB",
                f"{reference:.2f} s" if reference else "",
                f"{efficiency:.2f}" if efficiency is not None else "",
                f"{figures['data/tokens_shared']:.2f}" if efficiency is not None else "",
            ]
        )
    header = ["step", "samples/s", "best", "CPU s a round", "memory", "reference pass", "of padded", "shared"]
    ratios = [[f"`{compared}`", *_ratio(ratio)] for compared, ratio in report["ratios"].items()]
    return "\n".join(
        [
            f"## Steps: {'generated answers' if name == 'step' else name.removeprefix('step_').replace('_', ' ')}\n",
            f"`python -m benchmarks.step{'' if name == 'step' else f' --name {name} --data FILE'}`: {data}; "
            f"{arguments['prompts']} prompts, {arguments['batch']} in a step, in {arguments['micro_batches']} "
            f"micro-batch{'es' if arguments['micro_batches'] > 1 else ''}; rows of {lengths['row_mean']:.0f} tokens, "
            f"at most {lengths['row_longest']:.0f}, prompts of {lengths['prompt_mean']:.0f}. A Llama of "
            f"{arguments['layers']} layers, {arguments['hidden']} channels and {arguments['vocab']} tokens; "
            f"{len(next(iter(report['variants'].values()))['seconds'])} rounds.\n",
            *([STEP_NOTES] if notes else []),
            markdown_table(header, rows),
            "",
            markdown_table(["times compared", "ratio", "of minima", "of CPU"], ratios),
        ]
    )


def _profile(report: _Report) -> str:
    layouts = report["layouts"]
    kinds = sorted(
        {kind for layout in layouts.values() for kind in layout["shares"]},
        key=lambda kind: -max(layout["shares"].get(kind, 0) for layout in layouts.values()),
    )
    shares = [[kind, *(f"{layout['shares'].get(kind, 0):.1%}" for layout in layouts.values())] for kind in kinds]
    waits = [
        [f"`{one['operator']}`", name, f"{one['calls']}", f"`{one['line'].replace('|', chr(92) + '|')}`"]
        for name, layout in layouts.items()
        for one in layout["waits"]
        if one["calls"] > 1
    ]
    micro_batches = report["arguments"]["micro_batches"]
    return "\n".join(
        [
            markdown_table(["share of the step", *layouts], shares),
            "",
            "Calls of PyTorch from Python in a step: "
            + ", ".join(f"{layout['torch_calls']} ({name})" for name, layout in layouts.items())
            + ".\n",
            f"Operations that make the host wait for the device in a step of {micro_batches} micro-batches (free on a "
            "CPU; on a GPU each drains the queue). Source lines refer to the measured commit:\n",
            markdown_table(["operator", "layout", "calls", "line"], waits),
        ]
    )


# --------------------------------------------------------------------------------------- further results


def _log_probs(report: _Report) -> str:
    rows = [
        [
            f"{row['tokens']} × {row['hidden']} × {row['vocab']}, TP {row['tp']}, {row['dtype']}",
            name.replace("_", " "),
            f"{figures['seconds']['forward_and_backward']['min']:.3f}",
            f"{figures['time_over_megatron']['median']:.2f}",
            f"{figures['peak_bytes']['forward_and_backward'] / 2**20:.0f} MiB",
            f"{figures['peak_over_logits']['forward_and_backward']:.2f}",
        ]
        for row in report["rows"]
        for name, figures in row["variants"].items()
    ]
    header = ["T × H × V", "variant", "seconds", "over Megatron's", "memory", "over 16-bit logits"]
    return (
        "## Log-probabilities\n\n`python -m benchmarks.log_probs`: forward and backward from hidden states and the "
        "output weight.\n\n" + markdown_table(header, rows)
    )


def _scaling(report: _Report) -> str:
    base, parts = report["base"], []
    names = {"K": "responses", "T": "tokens of a row", "m": "micro-batches of the same batch", "ranks": "ranks"}
    for table, rows in report["tables"].items():
        if table != "bubble":
            parts.append(_growth(table, names[table], rows))
    text = ", ".join(f"{name} = {value}" for name, value in base.items())
    return (
        f"## Scaling\n\n`python -m benchmarks.scaling`: an RAO step, changing one parameter at a time from {text}. "
        "Rows have equal length, without padding. Each rank has one thread; all ranks share one machine's memory.\n\n"
        + "\n\n".join(parts)
        + ("\n\n" + _bubble(report["tables"]["bubble"]) if "bubble" in report["tables"] else "")
    )


def _rollouts(report: _Report) -> str:
    base, parts = report["base"], []
    names = {"K": "responses", "N": "tokens of a response, at most", "ranks": "ranks"}
    phases = ("rollout", "reward", "reference", "update")
    for table, rows in report["tables"].items():
        first = rows[0]["seconds"]["rollout"]["min"]
        cells = [
            [
                f"TP {row['tp']}, PP {row['pp']}" if table == "ranks" else str(row[table]),
                *(f"{row['seconds'][phase]['min']:.2f}" for phase in phases),
                f"{row['seconds']['rollout']['min'] / first:.2f}",
                f"{row['length']:.0f}",
            ]
            for row in rows
        ]
        head = f"{table}, {names[table]}" if table != "ranks" else table
        parts.append(markdown_table([head, *phases, "rollout over the first", "tokens"], cells))
    text = ", ".join(f"{name} = {value}" for name, value in base.items())
    return (
        "## Rollouts\n\n`python -m benchmarks.rollouts`: seconds of a step of `gpt_rloo` by phase, changing one "
        f"parameter at a time from {text}. Prompts have 64 tokens; *tokens* is the mean length of the responses. In "
        "the table of ranks, each rank has one thread.\n\n" + "\n\n".join(parts)
    )


def _growth(table: str, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    def label(row: Mapping[str, Any]) -> str:
        return f"TP {row['tp']}, PP {row['pp']}" if table == "ranks" else str(row[table])

    first = rows[0]
    cells = [
        [
            label(row),
            f"{row['seconds']['min']:.2f}",
            f"{row['seconds']['min'] / first['seconds']['min']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f} MiB",
        ]
        for row in rows
    ]
    header = [name if table == "ranks" else f"{table}, {name}", "seconds", "over the first", "memory of a rank"]
    return markdown_table(header, cells)


def _bubble(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            str(row["m"]),
            f"{row['idle']['measured']['median']:.3f}",
            f"{row['idle']['measured']['min']:.3f}",
            f"{row['idle']['formula']:.3f}",
            f"{row['idle']['of_these_stages']:.3f}",
        ]
        for row in rows
    ]
    return (
        "**The pipeline bubble**, PP 2: the fraction of the schedule in which a stage is idle, from the stages' "
        "measured busy times. *Formula*: (p − 1) / (m + p − 1), which assumes equal stages. *Of these stages*: the "
        "same schedule simulated with the times of each stage and no communication.\n\n"
        + markdown_table(["micro-batches m", "measured", "least", "formula", "of these stages"], cells)
    )


def _start_up(report: _Report) -> str:
    first, again = (report["runs"][which] for which in ("first", "again"))
    rows = [[part, f"{first[part]['min']:.2f}", f"{again[part]['min']:.2f}"] for part in first]
    found = "the reference pass and the tokenized data" if report["data_cache"] else "the reference pass"
    return (
        "## Start-up\n\n`python -m benchmarks.start_up`: seconds from the command to the end of the first step, the "
        f"fastest of {report['arguments']['repeats']} runs. *Again*: another run from the same weights on the same "
        f"data, {report['arguments']['prompts']} prompts, which finds {found} cached. With few runs on busy cores, "
        "parts that do the same work in both columns differ only by noise, and so may the totals.\n\n"
        + markdown_table(["part", "first", "again"], rows)
    )


if __name__ == "__main__":
    print(page(), end="")
