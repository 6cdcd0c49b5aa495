"""Number formatting of reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def shown(value: float | None) -> str:
    """Format a number to four significant digits; empty for ``None`` and NaN."""
    if value is None or math.isnan(value):
        return ""
    if value == 0:
        return "0"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if abs(value) < 1e6 else 0
    return f"{value:,.{digits}f}" if 1e-4 <= abs(value) < 1e9 else f"{value:.3e}"


def with_interval(found: Mapping[str, Any]) -> str:
    """Format as ``0.7123 ± 0.0140``, both rounded to the same digit."""
    value, half_width = found["value"], found["half_width"]
    if value is None or math.isnan(value):
        return ""
    if math.isnan(half_width):
        return shown(value)
    if half_width == 0:
        return f"{shown(value)} ± 0"
    digits = min(8, max(0, 1 - math.floor(math.log10(half_width))))
    if abs(value) < 1e-4 and value != 0 and digits > 6:
        return f"{value:.2e} ± {half_width:.1e}"
    return f"{value:,.{digits}f} ± {half_width:,.{digits}f}"


def percent(found: Mapping[str, Any]) -> str:
    """Format a rate with its interval as percentages."""
    return with_interval({"value": 100 * found["value"], "half_width": 100 * found["half_width"]})
