"""docs/online_results.md, from benchmarks/results/online.json: `python -m benchmarks.online_page`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.online import CONTROL, GENERATIONS, ONLINE, RECIPES, rise
from benchmarks.results import FOLDER

_TEXT = """\
# What online runs learn

`python -m benchmarks.online` fine-tunes the model of `nemo-rao demo` (two layers, 128 channels, letter puzzles) as in
the demo, then trains it with each [online recipe](guides/online.md) on TP 2 × PP 2, for {steps} optimizer steps and
with {seeds} seeds. Before the first step and after the last, it samples {generations} responses to each of 160 held-out
prompts, with the same draws, and scores them by the puzzles' ground truth. `python -m benchmarks.online_page` generates
this page.

{table}

*Rise*: mean over seeds of after − before, with its 95 % confidence interval (Student's t). *KL*:
log π(y) − log π_ref(y) of the samples, in nats per response. The last row is a control: the same run with a random
number as the reward of each response. The learning rate was chosen by trial on another seed; it is the same for all
recipes and far higher than for a pretrained model. The table compares each recipe with its start, not the recipes with
each other.

Measured on {device}, commit {commit}, {versions}.

Keys of all runs: {common}.

{keys}
"""


def page() -> str:
    report = json.loads((FOLDER / "online.json").read_text())
    return _TEXT.format(
        steps=report["arguments"]["steps"],
        seeds=len(report["arguments"]["seeds"]),
        generations=GENERATIONS,
        table=_table(report["runs"]),
        device=report["device"],
        commit=report["commit"],
        versions=", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        common=" ".join(f"`{key}`" for key in ONLINE),
        keys="\n".join(f"- `{name}`: {' '.join(f'`{key}`' for key in keys)}" for name, keys in RECIPES.items() if keys),
    )


def _table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = ["| recipe | before | after | rise | KL | tokens before, after |", "|---|---:|---:|---:|---:|---:|"]
    for name in (*RECIPES, CONTROL):
        before, after = ([one[when] for one in runs[name]] for when in ("before", "after"))

        def mean(of: Sequence[Mapping[str, float]], key: str) -> float:
            return statistics.fmean(one[key] for one in of)

        middle, half = rise(runs[name])
        interval = "" if math.isinf(half) else f" ± {half:.3f}"
        lengths = f"{mean(before, 'length'):.1f}, {mean(after, 'length'):.1f}"
        label = f"`{name}`" if name in RECIPES else name
        lines.append(
            f"| {label} | {mean(before, 'reward'):.3f} | {mean(after, 'reward'):.3f} | {middle:+.3f}{interval} | "
            f"{mean(after, 'kl'):.2f} | {lengths} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
