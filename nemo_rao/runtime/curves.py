"""Draw a run's curves as one image, from its ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rao.runtime.files import written_atomically
from nemo_rao.runtime.metrics_file import read_metrics

# Title, unit, and metrics with their labels; panels and lines that were not logged are left out.
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", "", (("loss", "training"), ("val/loss", "held-out"))),
    (
        "explicit and fitted reward",
        "reward",
        (
            ("data/reward_chosen", "explicit, chosen"),
            ("rao/r_hat_chosen", "fitted, chosen"),
            ("data/reward_rejected", "explicit, rejected"),
            ("rao/r_hat_rejected", "fitted, rejected"),
        ),
    ),
    (
        "held-out explicit and fitted reward",
        "reward",
        (
            ("val/data/reward_chosen", "explicit, chosen"),
            ("val/rao/r_hat_chosen", "fitted, chosen"),
            ("val/data/reward_rejected", "explicit, rejected"),
            ("val/rao/r_hat_rejected", "fitted, rejected"),
        ),
    ),
    ("implicit reward", "β · log-ratio", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    ("log-probability of responses", "nats", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    (
        "held-out log-probability",
        "nats",
        (("val/logps/chosen", "chosen"), ("val/logps/rejected", "rejected")),
    ),
    ("accuracy", "share of pairs", (("rewards/accuracies", "training"), ("val/rewards/accuracies", "held-out"))),
    ("target error", "|explicit − fitted|", (("rao/target_error", "training"), ("val/rao/target_error", "held-out"))),
    ("reward of samples", "", (("rollout/reward", "training"), ("val/reward", "held-out"))),
    ("log-ratio of samples (KL)", "nats", (("rollout/kl", "training"), ("val/kl", "held-out"))),
    ("entropy", "nats per token", (("rollout/entropy", "training"), ("val/entropy", "held-out"))),
    ("length of samples", "tokens", (("rollout/length", "training"), ("val/length", "held-out"))),
    ("gradient norm", "before clipping", (("grad_norm", "gradient norm"),)),
    (
        "time of a step",
        "seconds",
        tuple((f"seconds/{name}", name) for name in ("rollout", "reward", "reference", "old", "values", "update")),
    ),
)

_COLUMNS = 3


def is_dashed(label: str) -> bool:
    """Whether a line is drawn dashed: a value that is compared with, as opposed to a trained one."""
    return label.startswith(("held-out", "explicit"))


def draw_curves(run_dir: Path) -> Path | None:
    """Write ``curves.png`` to the run's directory; return ``None`` if nothing has been logged.

    The band around a line of samples spans 10 to 90 % of them.
    """
    records = read_metrics(run_dir / "metrics.jsonl")
    if not any("loss" in record for record in records):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if any(_series(records, name)[0] for name, _ in panel[2])]
    rows = math.ceil(len(panels) / _COLUMNS)
    figure, axes = pyplot.subplots(
        rows, _COLUMNS, figsize=(5 * _COLUMNS, 3.25 * rows), layout="constrained", squeeze=False
    )
    for axis, (title, unit, lines) in zip(axes.flat, panels, strict=False):
        for name, label in lines:
            _draw(axis, records, name, label)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(run_dir.name)
    path = run_dir / "curves.png"
    with written_atomically(path) as (file,):
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
    return path


def _draw(axis: Any, records: Sequence[dict[str, float]], name: str, label: str) -> None:
    steps, values = _series(records, name)
    if not values:
        return
    style, marker = "--" if is_dashed(label) else "-", "o" if len(values) < 12 else None
    (line,) = axis.plot(steps, values, style, label=label, marker=marker, markersize=3)
    (steps, low), (_, high) = _series(records, f"{name}_p10"), _series(records, f"{name}_p90")
    if low and not name.startswith("val/"):
        axis.fill_between(steps, low, high, alpha=0.15, color=line.get_color())


def _series(records: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of one metric, without the steps that did not log it."""
    found = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]
