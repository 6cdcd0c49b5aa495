"""Random numbers of a step: shared where ranks hold the same activations, and nowhere else; a function of the step."""

from __future__ import annotations

from typing import Any

import pytest

from ..megatron_ranks import init_megatron, run_ranks

LAYOUTS = {
    "PP 2": {"pipeline_model_parallel_size": 2},
    "TP 2": {"tensor_model_parallel_size": 2},
    "DP 2": {},
    "CP 2": {"context_parallel_size": 2},
    "EP 2": {"expert_model_parallel_size": 2},
}


def draws(layouts: dict[str, dict[str, int]]) -> dict[str, dict[str, tuple[float, ...]]]:
    """For each layout, what each of this rank's streams draws in steps 0, 1 and again 0."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name

    from nemo_rao.mcore.seeds import seed_step

    init_megatron()
    found: dict[str, dict[str, Any]] = {}
    for name, sizes in layouts.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**sizes)
        drawn: dict[str, list[float]] = {"default": [], "tensor": [], "expert": []}
        for step in (0, 1, 0):
            seed_step(7, step)
            drawn["default"].append(torch.rand(()).item())
            with get_cuda_rng_tracker().fork():
                drawn["tensor"].append(torch.rand(()).item())
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                drawn["expert"].append(torch.rand(()).item())
        found[name] = {stream: tuple(values) for stream, values in drawn.items()}
    return found


@pytest.fixture(scope="module")
def drawn() -> list[dict[str, dict[str, tuple[float, ...]]]]:
    return run_ranks(draws, (LAYOUTS,), num_ranks=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_tensor_parallel_ranks_share_a_stream_and_only_the_default_one(drawn: Any, layout: str) -> None:
    first, second = drawn[0][layout], drawn[1][layout]
    assert (first["default"] == second["default"]) == (layout == "TP 2")
    assert first["tensor"] != second["tensor"]
    assert first["expert"] != second["expert"]
    for rank in (first, second):
        assert len({values[0] for values in rank.values()}) == 3  # nor do the streams of a rank agree


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_draws_the_same_whenever_it_is_computed_and_no_two_steps_do(drawn: Any, layout: str) -> None:
    for rank in drawn:
        for before, other, again in rank[layout].values():
            assert again == before != other
