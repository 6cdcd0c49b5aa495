"""docs/gpu.md, generated from the results of `make gpu`; a test compares the two.

python -m benchmarks.gpu_page > docs/gpu.md      # what `make gpu-page` does
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS, RESULTS
from benchmarks.markdown import markdown_table

GIB = 2**30

_Reports = Mapping[str, Mapping[str, Any]]

BEFORE = """\
# On a GPU

`make gpu`, or `python -m benchmarks.gpu` without `make`, runs all tests and benchmarks on this page on one GPU, in an
estimated time of under 7 minutes on an H100. The most important parts run first. Each has a time limit and writes its
result when it ends. `--parts steps,fp8` selects some of them; `--dry-run` runs all of them on a CPU at toy size.
`make gpu-page` generates this page from the results in `benchmarks/results/gpu/`; no figure is entered by hand.
"""

NOTHING = """\
**Nothing has been run on a GPU yet.** There are no results in `benchmarks/results/gpu/`. Until there are, every
statement in these pages about speed on GPUs, and about Transformer Engine's layers in this project, is untested. To
produce results, run `make gpu` on a machine with a GPU, and then `make gpu-page`.
"""

DRY = """\
**Dry run on a CPU, at toy size.** Its figures only show that the commands work.
"""

STEP_NOTES = """\
The model has {size}, {layers} layers and random weights; micro-batches are packed and
have {tokens} tokens, and a step has {batch} prompts. *MFU*: model FLOPs of the computed tokens, as `nemo-rao plan`
counts them, over the GPU's dense bf16 peak. *Planned*: the planner's peak memory for the same rows.
"""


@dataclass(frozen=True)
class Goal:
    """A goal of the project.

    Attributes:
        text: description of the goal.
        value: returns the figure to compare, ``None`` if it was not measured.
        low, high: bounds of the figure, ``None`` for none.
        form: format of the figure.
    """

    text: str
    value: Callable[[_Reports], float | None]
    low: float | None = None
    high: float | None = None
    form: str = ".2f"

    def row(self, reports: _Reports) -> list[str]:
        value = self.value(reports)
        if value is None:
            return [self.text, "not measured", ""]
        if _is_dry(reports):
            return [self.text, format(value, self.form), "not compared"]
        reached = "yes"
        if self.low is not None and value < self.low:
            reached = f"**no**, {1 - value / self.low:.0%} below"
        elif self.high is not None and value > self.high:
            reached = f"**no**, {value / self.high - 1:.0%} above"
        return [self.text, format(value, self.form), reached]


def _is_dry(reports: _Reports) -> bool:
    return any(report.get("dry_run", False) for report in reports.values())


def _runs(reports: _Reports, part: str) -> Mapping[str, Any]:
    """The runs of a part that did not fail."""
    runs = reports.get(part, {}).get("figures", {}).get("runs", {})
    return {name: figures for name, figures in runs.items() if "failed" not in figures}


def _seconds(figures: Mapping[str, Any]) -> float:
    return statistics.median(figures["seconds"])


def _faster(reports: _Reports, part: str, baseline: str, names: Iterable[str]) -> float | None:
    """Speed of the fastest of some runs relative to the baseline."""
    runs = _runs(reports, part)
    found = [_seconds(runs[baseline]) / _seconds(runs[name]) for name in names if name in runs and baseline in runs]
    return max(found, default=None)


def _of_rao(name: str) -> Callable[[_Reports], float | None]:
    """A figure of the RAO steps in bf16."""

    def value(reports: _Reports) -> float | None:
        figure: float | None = _runs(reports, "steps").get("rao, bf16", {}).get(name)
        return figure

    return value


def _over_sft(reports: _Reports) -> float | None:
    return _faster(reports, "steps", "rao, bf16", ["sft, bf16"])


def _fp8(reports: _Reports) -> float | None:
    return _faster(reports, "fp8", "rao, bf16", [name for name in _runs(reports, "fp8") if "fp8" in name])


def _shared(reports: _Reports) -> float | None:
    return _faster(reports, "prefix_sharing", "packed", ["packed, shared prompts"])


def _log_prob_rate(reports: _Reports) -> float | None:
    """The lowest over all sizes."""
    rows = reports.get("log_probs", {}).get("figures", {}).get("rows", [])
    rates = [rate["median"] for row in rows if (rate := row["variants"]["fused"].get("rate_over_products_done"))]
    return min(rates, default=None)


GOALS = (
    Goal("MFU of an RAO step in bf16: at least 45 %", _of_rao("mfu"), low=0.45, form=".1%"),
    Goal("RAO steps in FP8, the fastest recipe: at least 1.3 times as fast as in bf16", _fp8, low=1.3),
    Goal(
        "time of an RAO step over that of an SFT step on the same rows: at most 1.03", _over_sft, high=1.03, form=".3f"
    ),
    Goal(
        "shared prompts (1,024 tokens, 4 responses of 256): at least 1.8 times the samples of packed rows",
        _shared,
        low=1.8,
    ),
    Goal("peak memory over the planner's: 0.9 to 1.1", _of_rao("peak_over_planned"), low=0.9, high=1.1),
    Goal(
        "log-probabilities: rate of the matrix products that they do over that of bare ones: at least 0.75",
        _log_prob_rate,
        low=0.75,
    ),
)


def page(folder: Path = RESULTS) -> str:
    """The page for the results in a directory."""
    paths = {part.name: folder / f"{part.name}.json" for part in PARTS}
    reports = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    parts = [BEFORE, _parts()]
    if not reports:
        parts.append(NOTHING)
    elif _is_dry(reports):
        parts.append(DRY)
    if reports:
        parts.append(_where(reports))
    parts.append(
        "## Goals\n\n" + markdown_table(["on one H100", "measured", "reached"], [goal.row(reports) for goal in GOALS])
    )
    parts += _sections(reports)
    return "\n".join(part.strip() + "\n" for part in parts)


def _parts() -> str:
    lines = ["| part | shows |", "| --- | --- |", *(f"| `{part.name}` | {part.shows} |" for part in PARTS)]
    return "\n".join(lines)


def _where(reports: _Reports) -> str:
    rows = [
        [
            f"`{name}`",
            report["device"],
            report["commit"],
            report["date"],
            f"{report['status']}{' (' + report['reason'] + ')' if 'reason' in report else ''}",
            f"{report.get('seconds', 0):.0f} of {report['limit_seconds']:.0f}",
        ]
        for name, report in reports.items()
    ]
    versions = dict(next(iter(reports.values()))["versions"])
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    header = ["part", "device", "commit", "date", "status", "seconds"]
    return f"## Where\n\n{markdown_table(header, rows)}\n\nVersions: {listed}."


def _sections(reports: _Reports) -> Iterator[str]:
    if (tests := reports.get("tests", {}).get("figures")) is not None:
        yield _tests(tests)
    titles = (("steps", "Steps in bf16"), ("fp8", "FP8"), ("prefix_sharing", "Shared prompts"))
    for name, title in titles:
        if (figures := reports.get(name, {}).get("figures")) is not None:
            size = "a toy size" if _is_dry(reports) else "the width and output layer of Llama 3 8B"
            yield _steps(title, figures, size)
    if (figures := reports.get("log_probs", {}).get("figures")) is not None:
        yield _log_probs(figures)


def _tests(figures: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{number} {outcome}" for outcome, number in figures["counts"].items())
    failed = [
        [f"`{name}`", test["outcome"], test["message"].splitlines()[0].replace("|", "\\|") if test["message"] else ""]
        for name, test in figures["tests"].items()
        if test["outcome"] != "passed"
    ]
    table = f"\n\n{markdown_table(['test', 'outcome', 'why'], failed)}" if failed else ""
    return f"## Tests\n\n{counts}.{table}"


def _steps(title: str, figures: Mapping[str, Any], size: str) -> str:
    rows, baseline = [], None
    for name, run in figures["runs"].items():
        if "failed" in run:
            rows.append([name, f"failed: {run['failed']}".replace("|", "\\|"), *[""] * 5])
            continue
        baseline = baseline or _seconds(run)
        rows.append(
            [
                name,
                f"{_seconds(run):.3f}",
                f"{baseline / _seconds(run):.2f}",
                f"{run['tokens_per_second']:,.0f}",
                f"{run['tflops']:.0f}" + ("" if run["mfu"] is None else f" ({run['mfu']:.1%})"),
                f"{run['peak_bytes'] / GIB:.1f} GiB",
                f"{run['planned_bytes'] / GIB:.1f} GiB",
            ]
        )
    header = ["run", "seconds a step", "times as fast", "tokens/s of rows", "TFLOP/s (MFU)", "peak memory", "planned"]
    scale = figures["scale"]
    tokens = scale["row"] * 2 if title != "Shared prompts" else scale["shared_prompt"] + 4 * scale["shared_response"]
    notes = STEP_NOTES.format(size=size, layers=figures["layers"], tokens=f"up to {tokens:,}", batch=scale["batch"])
    return f"## {title}\n\n{notes}\n{markdown_table(header, rows)}"


def _log_probs(figures: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{row['tokens']} × {row['hidden']} × {row['vocab']}",
            name.replace("_", " "),
            f"{variant['seconds']['forward']['min'] * 1e3:.2f} ms",
            f"{variant['seconds']['forward_and_backward']['min'] * 1e3:.2f} ms",
            f"{variant['peak_bytes']['forward_and_backward'] / 2**20:.0f} MiB",
            f"{rate['median']:.2f}" if (rate := variant.get("rate_over_products")) else "",
        ]
        for row in figures["rows"]
        for name, variant in row["variants"].items()
    ]
    header = ["T × H × V", "variant", "forward", "with backward", "memory", "rate over products"]
    note = (
        "*Rate over products*: the rate of the three matrix products that every variant needs, over that of bare "
        "products. A variant that keeps no logits computes a fourth product and can reach 0.75.\n\n"
    )
    return f"## Log-probabilities\n\n{note}" + markdown_table(header, rows)


if __name__ == "__main__":
    print(page(), end="")
