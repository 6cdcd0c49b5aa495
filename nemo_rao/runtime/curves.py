"""A run's curves as one picture, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_rao.runtime.files import written_atomically
from nemo_rao.runtime.metrics_file import read_metrics

# Panels: title, unit, and the metrics in it with their labels; "mean" stands for the mean of the two before it.
_Panels = tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
_PANELS: _Panels = (
    ("rewards (implicit)", "β · log-ratio", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    ("log-probability of responses", "nats", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    ("loss", "", (("loss", "training"), ("val/loss", "validation"))),
    ("gradient norm", "", (("grad_norm", "before clipping"),)),
)
# Of runs that sample; the band around a metric is that of its _p10 and _p90.
_PANELS_OF_SAMPLES: _Panels = (
    ("reward of samples", "", (("rollout/reward", "training, 10 to 90 %"), ("val/reward", "validation"))),
    ("log-ratio to the reference", "nats per response", (("rollout/kl", "training"), ("val/kl", "validation"))),
    ("entropy", "nats per token", (("rollout/entropy", "training"), ("val/entropy", "validation"))),
    ("response", "tokens", (("rollout/length", "training"), ("val/length", "validation"))),
    ("gradient norm", "", (("grad_norm", "before clipping"),)),
    (
        "time of a step",
        "seconds",
        tuple((f"seconds/{name}", name) for name in ("rollout", "reward", "reference", "old", "values", "update")),
    ),
)


def draw_curves(run_dir: Path) -> Path | None:
    """Write ``curves.png`` into the run folder; ``None`` where nothing has been logged."""
    records = read_metrics(run_dir / "metrics.jsonl")
    if not any("loss" in record for record in records):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _PANELS_OF_SAMPLES if any("rollout/reward" in record for record in records) else _PANELS
    columns = len(panels) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(5 * columns, 6.5), layout="constrained")
    for axis, (title, unit, lines) in zip(axes.flat, panels, strict=True):
        series = [(label, _series(records, name)) for name, label in lines]
        if title.startswith("rewards") and all(values for _, (_, values) in series):
            (chosen_steps, chosen), (_, rejected) = series[0][1], series[1][1]
            means = [(a + b) / 2 for a, b in zip(chosen, rejected, strict=False)]
            series.append(("mean", (chosen_steps[: len(means)], means)))
        for label, (steps, values) in series:
            if values:
                style = {"linestyle": "--", "color": "gray"} if label == "mean" else {}
                axis.plot(steps, values, label=label, marker="o" if len(values) < 12 else None, markersize=3, **style)
        for name, _ in lines:
            (steps, low), (_, high) = _series(records, f"{name}_p10"), _series(records, f"{name}_p90")
            if low and not name.startswith("val/"):
                axis.fill_between(steps, low, high, alpha=0.15)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
    figure.suptitle(run_dir.name)
    path = run_dir / "curves.png"
    with written_atomically(path) as (file,):
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
    return path


def _series(records: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, without its outliers' absence: steps that did not log it are left out."""
    found = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]
