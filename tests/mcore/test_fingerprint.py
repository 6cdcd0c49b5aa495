"""The weights' fingerprint: the same however they are distributed, another one as soon as a weight changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ..megatron_ranks import import_once, run_ranks
from . import tiny
from .tiny import Layout

Weights = dict[str, Tensor]

ON_ONE = {"one rank": Layout()}
ON_TWO = {
    "DP 2": Layout(),
    "TP 2": Layout(tensor=2),
    "TP 2 with sequence parallelism": Layout(tensor=2, sequence_parallel=True),
    "PP 2": Layout(pipeline=2),
    "more padding": Layout(vocab_divisible_by=64),
    "no token on the second rank's last rows": Layout(tensor=2, vocab_divisible_by=64),
}
ON_FOUR = {
    "TP 2 x PP 2": Layout(tensor=2, pipeline=2),
    "DP 2 x TP 2": Layout(tensor=2),
    "DP 2 x PP 2": Layout(pipeline=2),
}

QKV = "decoder.layers.2.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
NORM = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"


def unchanged(weights: Weights) -> None: ...


def one_bit(weights: Weights) -> None:
    weights[QKV].view(torch.int32)[5, 7] ^= 1


def negate_zero(weights: Weights) -> None:
    weights[QKV][0, 0] = -0.0


def last_token(weights: Weights) -> None:
    weights["output_layer.weight"][tiny.VOCAB - 1, -1] += 1


def swap_in_a_row(weights: Weights) -> None:
    weights[QKV][3, [0, 1]] = weights[QKV][3, [1, 0]]


def swap_in_a_column(weights: Weights) -> None:
    weights[QKV][[0, 9], 4] = weights[QKV][[9, 0], 4]


def swap_in_a_vector(weights: Weights) -> None:
    weights[NORM][[0, 31]] = weights[NORM][[31, 0]]


def swap_gate_and_up(weights: Weights) -> None:
    weights[FC1][[0, tiny.FFN]] = weights[FC1][[tiny.FFN, 0]]


def swap_tensors(weights: Weights) -> None:
    other = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    weights[NORM], weights[other] = weights[other], weights[NORM]


def swap_layers(weights: Weights) -> None:
    for name in [name for name in weights if name.startswith("decoder.layers.0.")]:
        other = name.replace("layers.0", "layers.3")
        weights[name], weights[other] = weights[other], weights[name]


CHANGES: dict[str, Callable[[Weights], None]] = {
    change.__name__: change
    for change in (
        one_bit,
        negate_zero,
        last_token,
        swap_in_a_row,
        swap_in_a_column,
        swap_in_a_vector,
        swap_gate_and_up,
        swap_tensors,
        swap_layers,
    )
}


def fingerprints(
    weights: Weights, layouts: dict[str, Layout], changes: dict[str, Callable[[Weights], None]]
) -> dict[tuple[str, str], str]:
    from nemo_rao.mcore.fingerprint import weights_fingerprint

    found = {}
    for layout_name, layout in layouts.items():
        tiny.enter(layout)
        for change_name, change in {"unchanged": unchanged, **changes}.items():
            changed = {name: tensor.clone() for name, tensor in weights.items()}
            change(changed)
            model = tiny.build(changed, layout)
            found[layout_name, change_name] = weights_fingerprint(model.sharded_state_dict(), vocab_size=tiny.VOCAB)
        model = tiny.build(weights, layout, dtype=torch.bfloat16)
        found[layout_name, "bf16"] = weights_fingerprint(model.sharded_state_dict(), vocab_size=tiny.VOCAB)
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], list[str]]:
    """(layout, change) -> the fingerprint on each rank."""
    import_once()
    weights = tiny.whole_tensors(tiny.llama())
    weights[QKV][0, 0] = 0.0
    some = {name: CHANGES[name] for name in ("swap_gate_and_up", "swap_layers")}
    merged: dict[tuple[str, str], list[str]] = {}
    for layouts, changes, num_ranks in ((ON_ONE, CHANGES, 1), (ON_TWO, some, 2), (ON_FOUR, some, 4)):
        for by_rank in run_ranks(fingerprints, (weights, layouts, changes), num_ranks=num_ranks):
            for key, value in by_rank.items():
                merged.setdefault(key, []).append(value)
    return merged


@pytest.mark.parametrize("change", ["unchanged", "swap_gate_and_up", "swap_layers", "bf16"])
@pytest.mark.parametrize("layout", [*ON_TWO, *ON_FOUR])
def test_fingerprint_does_not_depend_on_parallelism_or_padding(
    found: dict[tuple[str, str], list[str]], layout: str, change: str
) -> None:
    assert set(found[layout, change]) == set(found["one rank", change])
    assert len(found[layout, change]) == (2 if layout in ON_TWO else 4)


@pytest.mark.parametrize("change", [*CHANGES, "bf16"])
def test_fingerprint_changes_with_the_weights(found: dict[tuple[str, str], list[str]], change: str) -> None:
    assert found["one rank", change] != found["one rank", "unchanged"]


def test_every_change_has_a_fingerprint_of_its_own(found: dict[tuple[str, str], list[str]]) -> None:
    of_changes = [tuple(value) for (layout, _), value in found.items() if layout == "one rank"]
    assert len(set(of_changes)) == len(of_changes)


def hashes_of_many(num_swaps: int) -> tuple[int, int]:
    """Fingerprints of a tensor of few different values with two of them swapped: how many there are and should be."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from nemo_rao.mcore.fingerprint import weights_fingerprint

    generator = torch.Generator().manual_seed(0)
    # bf16 weights close to each other, as in a norm: the hardest case for a sum of hashes.
    weights = (1 + torch.randint(0, 4, (64, 64), generator=generator) / 128).bfloat16()

    def fingerprint(tensor: Tensor) -> str:
        shard = ShardedTensor.from_rank_offsets("weight", tensor, replica_id=0)
        return weights_fingerprint({"weight": shard}, vocab_size=64)

    seen, different = {fingerprint(weights)}, 1
    for _ in range(num_swaps):
        changed = weights.flatten().clone()
        places = torch.randperm(changed.numel(), generator=generator)[:2]
        changed[places] = changed[places.flip(0)]
        if changed.equal(weights.flatten()):
            continue
        different += 1
        seen.add(fingerprint(changed.view_as(weights)))
    return len(seen), different


def test_swaps_of_nearly_equal_weights_do_not_collide() -> None:
    import_once()
    found, different = hashes_of_many(2000)
    # Each swap is of another pair but for chance repetitions, of which 2000 draws of 8 million hardly have any.
    assert different > 1000
    assert found >= different - 2
