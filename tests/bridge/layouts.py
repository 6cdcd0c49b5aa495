"""Parallelism and batch layouts of these tests."""

from __future__ import annotations

from typing import Any

# Arguments of tests/mcore/tiny.py's Layout.
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 1": {},
    "TP 2 x PP 2": {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1},
}
# Rows padded on the right, or segments of one sequence; and whether logits are ever whole.
VARIANTS: dict[str, dict[str, bool]] = {
    "rows": {},
    "packed": {"packed": True},
    "shared prompts": {"shared_prompts": True},
    "all, fused": {"packed": True, "shared_prompts": True, "fused": True},
}
