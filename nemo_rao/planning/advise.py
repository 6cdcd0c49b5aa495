"""Propose the nearest settings that fit: with as few changed keys as possible, and the cheapest of those.

Every combination of the changes below is a candidate; its cost is the sum of theirs. Changes are ordered by their
effect on a run: first those that affect only memory, then those that cost time, then those that need more GPUs or
train something else. GPUs are first added to existing nodes, up to the size of a node.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_rao.planning.memory import peak
from nemo_rao.planning.setting import Setting

# Field of the setting -> key of the recipe.
KEYS = {
    "fused_log_probs": "model.fused_log_probs",
    "use_distributed_optimizer": "model.optim.use_distributed_optimizer",
    "sequence_parallel": "model.sequence_parallel",
    "micro_batch_size": "model.micro_batch_size",
    "recompute_granularity": "model.recompute_granularity",
    "tensor": "model.tensor_model_parallel_size",
    "pipeline": "model.pipeline_model_parallel_size",
    "context": "model.context_parallel_size",
    "expert": "model.expert_model_parallel_size",
    "devices": "trainer.devices",
    "nodes": "trainer.num_nodes",
    "reference_micro_batch_size": "reference.micro_batch_size",
    "param_bytes": "precision.params",
    "lora": "model.peft.scheme",
}
MOST = 4096  # largest size reached by doubling, so that the search ends
LONG = 4096  # minimum tokens of a row that may be split over two ranks


@dataclass(frozen=True)
class Advice:
    """A setting that fits.

    Attributes:
        overrides: ``key=value``, overrides to add to the command.
        setting: the setting with these overrides.
        bytes: peak bytes of the rank that needs most.
    """

    overrides: tuple[str, ...]
    setting: Setting
    bytes: int


def advise(
    setting: Setting, limit: int, *, node_size: int | None = None, need: Callable[[Setting], int] = peak
) -> Iterator[Advice]:
    """Yield settings that need at most ``limit`` bytes, nearest first, without supersets of earlier ones.

    Args:
        node_size: maximum GPUs of a node; ``None``: its current number.
        need: computes the bytes of a setting that must be within the limit.
    """
    node_size = max(node_size or 1, setting.devices)
    changes = _changes(setting, node_size)
    combinations = [
        (sum(cost for cost, _ in chosen), {name: value for _, own in chosen for name, value in own.items()})
        for chosen in itertools.product(*changes)
    ]
    combinations.sort(key=lambda one: (one[0], len(one[1])))
    found: list[Mapping[str, Any]] = []
    for _, values in combinations:
        if not values or any(before.keys() <= values.keys() for before in found):
            continue
        candidate = dataclasses.replace(setting, **values)
        over_nodes = candidate.tensor > max(candidate.devices, setting.tensor)
        if not over_nodes and candidate.possible() and need(candidate) <= limit:
            found.append(values)
            shown = {name: value for name, value in values.items() if name in KEYS}
            yield Advice(tuple(f"{KEYS[n]}={_shown(n, v)}" for n, v in shown.items()), candidate, peak(candidate))


def _changes(setting: Setting, node_size: int) -> list[list[tuple[float, dict[str, Any]]]]:
    """List the possible values of each key with their costs; keeping a value costs nothing."""
    changes: list[list[tuple[float, dict[str, Any]]]] = []

    def add(*options: tuple[float, dict[str, Any]]) -> None:
        changes.append([(0.0, {}), *options])

    if setting.holds_logits and not dataclasses.replace(setting, fused_log_probs=True).holds_logits:
        add((1, {"fused_log_probs": True}))
    if not setting.use_distributed_optimizer:
        add((1, {"use_distributed_optimizer": True}))
    if not setting.sequence_parallel:
        add((1, {"sequence_parallel": True}))
    batch = setting.micro_batch_size
    sizes = [batch // times for times in _doubled(batch) if batch % times == 0]
    add(*((1 + 0.1 * number, {"micro_batch_size": size}) for number, size in enumerate(sizes)))
    if setting.reference_micro_batch_size is not None:
        add((0.5, {"reference_micro_batch_size": None}))
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if setting.recompute_granularity is None:
        add((1, {"recompute_granularity": "selective"}), (2, full))
    elif setting.recompute_granularity == "selective":
        add((2, full))
    sizes = [setting.tensor * n for n in _doubled(node_size // setting.tensor)]
    add(*((3 + number, {"tensor": size}) for number, size in enumerate(sizes)))
    sizes = [setting.pipeline * n for n in _doubled(setting.network.layers // setting.pipeline)]
    add(*((4 + number, {"pipeline": size}) for number, size in enumerate(sizes)))
    # Only for sequences so long that their tokens dominate the memory of a rank.
    sizes = [setting.context * n for n in _doubled(min(8, setting.tokens_per_row // LONG))]
    add(*((4 + number, {"context": size}) for number, size in enumerate(sizes)))
    if setting.network.experts:
        sizes = [setting.expert * n for n in _doubled(setting.network.experts // setting.expert)]
        add(*((3 + number, {"expert": size}) for number, size in enumerate(sizes)))
    add(*_more_gpus(setting, node_size))
    if setting.param_bytes == 4:
        add((5, {"param_bytes": 2}))
    if setting.lora is None and setting.lora_offered is not None:
        add((8, {"lora": setting.lora_offered}))
    return changes


def _more_gpus(setting: Setting, node_size: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield larger nodes, up to ``node_size``, then more of the largest, with costs; see :func:`_changes`."""
    devices = [setting.devices * n for n in _doubled(node_size // setting.devices)]
    yield from ((6 + number, {"devices": size}) for number, size in enumerate(devices))
    largest = {"devices": devices[-1]} if devices else {}
    first = 10 if devices else 6  # fill a node and save memory on it before adding nodes
    nodes = _doubled(min(64, MOST // (setting.nodes * max([setting.devices, *devices]))))
    yield from ((first + 2 * number, {**largest, "nodes": setting.nodes * n}) for number, n in enumerate(nodes))


def _doubled(most: int) -> list[int]:
    """Return 2, 4, 8, ... up to ``most``."""
    return list(itertools.takewhile(lambda size: size <= most, (2**power for power in range(1, 32))))


def _shown(name: str, value: Any) -> str:
    if name == "param_bytes":
        return "bf16"
    if name == "lora":
        return "lora"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
