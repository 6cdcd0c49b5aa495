"""A run's numbers, from its ``metrics.jsonl``.

A measure is a linear combination of metrics: the last value of each, or its change from the first. Held-out metrics
begin with ``val/``; their first value is that of the policy before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from nemo_rao.study.schema import Measure

Records = Sequence[Mapping[str, float]]

# Default measures of a study that names none; those whose metrics no run has logged are left out.
USUAL_MEASURES: Mapping[str, Measure] = {
    "held-out loss": Measure("val/loss"),
    "held-out accuracy": Measure("val/rewards/accuracies", better="higher"),
    "log-prob of chosen, change": Measure("val/logps/chosen", of="change"),
    "log-prob of rejected, change": Measure("val/logps/rejected", of="change"),
    "target error": Measure("val/rao/target_error", better="lower"),
    "reward of samples": Measure("val/reward", better="higher"),
    "log-ratio of samples (KL)": Measure("val/kl", better="lower"),
}
# Metric -> title and unit of its curve, drawn if any run has logged it; the held-out metric ``val/...`` is preferred.
USUAL_CURVES: Mapping[str, tuple[str, str]] = {
    "val/loss": ("held-out loss", ""),
    "val/rewards/accuracies": ("held-out accuracy", "share of pairs"),
    "logps/chosen": ("log-probability of chosen", "nats"),
    "logps/rejected": ("log-probability of rejected", "nats"),
    "rewards/margins": ("implicit reward, chosen minus rejected", "β · log-ratio"),
    "rao/target_error": ("target error", "|explicit − fitted reward|"),
    "rollout/reward": ("reward of samples", ""),
    "rollout/kl": ("log-ratio of samples to the reference (KL)", "nats"),
    "rollout/length": ("length of samples", "tokens"),
}


def coefficients(measure: Measure) -> Mapping[str, float]:
    """Map each metric to its coefficient."""
    return {measure.metric: 1.0} if isinstance(measure.metric, str) else measure.metric


def value_of(measure: Measure, records: Records) -> float:
    """Compute the measure of a run; NaN if a metric was not logged, or for a change, was logged only once.

    Args:
        records: the lines of its ``metrics.jsonl``.
    """
    total = 0.0
    for name, coefficient in coefficients(measure).items():
        _, values = series(records, name)
        if len(values) < (2 if measure.of == "change" else 1):
            return math.nan
        total += coefficient * (values[-1] - values[0] if measure.of == "change" else values[-1])
    return total


def series(records: Records, name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of a metric, without the steps that did not log it."""
    found = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]


def logged(runs: Iterable[Records]) -> set[str]:
    """Return the names of the metrics that any run has logged."""
    return {name for records in runs for record in records for name in record}
