"""Who divides by what: gradients of a split global batch are those of the batch in one piece.

The reference never meets Megatron's schedule: autograd through Hugging Face's model, every prompt in one batch, the
objective's sum divided by its count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_rao.batch import LossOutput, ModelOutput
from nemo_rao.objectives import registry

from ..megatron_ranks import import_once, run_ranks
from . import tiny
from .tiny import Layout

# Prompts 1 and 4 have equal rewards throughout, so no pair: DPO averages over five prompts, RAO over seven.
SAMPLES = tiny.preferences(7)
NUM_PAIRS = {"dpo": 5, "rao": 7}
OBJECTIVES: dict[str, dict[str, Any]] = {"dpo": {"beta": 0.2}, "rao": {"beta": 0.5, "log_z0": 0.0}}
REFERENCE = np.random.default_rng(3).normal(-20, 2, (sum(len(s.responses) for s in SAMPLES), 2)).astype(np.float32)

ONE_PIECE = [[[0, 1, 2, 3, 4, 5, 6]]]
# For each data-parallel rank, its micro-batches. The micro-batches [1] and [4] have no pair, nor has a whole rank once.
SPLITS: dict[str, tuple[Layout, list[list[list[int]]]]] = {
    "one piece": (Layout(), 2 * ONE_PIECE),
    "uneven micro-batches, DP 2": (Layout(), [[[0, 2, 3], [1]], [[4, 5], [6]]]),
    "all pairs on one of two data-parallel ranks": (Layout(), [[[0, 2], [3, 5, 6]], [[1], [4]]]),
    "uneven micro-batches, TP 2": (Layout(tensor=2, sequence_parallel=True), [[[1], [0, 2, 3, 4], [5, 6]]]),
    "uneven micro-batches, PP 2": (Layout(pipeline=2), [[[0, 2, 3], [1], [4, 5], [6]]]),
}


def make_config(name: str) -> Any:
    return registry.get(name).make_config(OBJECTIVES[name])


def split_on_ranks(wanted: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]) -> dict[tuple[str, str], Any]:
    from megatron.core import parallel_state

    from nemo_rao.mcore.loss import for_schedule, micro_batch_loss, reduce_statistics

    found = {}
    for split, (layout, by_rank) in SPLITS.items():
        tiny.enter(layout)
        mine = by_rank[parallel_state.get_data_parallel_rank()]
        batches = [tiny.micro_batch(SAMPLES, prompts, REFERENCE) for prompts in mine]
        for name, (weights, gradients) in wanted.items():
            objective, config = registry.get(name), make_config(name)

            def loss(output: ModelOutput, batch: Any, objective: Any = objective, config: Any = config) -> Any:
                return for_schedule(micro_batch_loss(output, batch, objective, config, vocab_size=tiny.VOCAB))

            computed, reported = tiny.run_schedule(tiny.build(weights, layout), batches, loss)
            found[split, name] = {
                "errors": tiny.gradient_errors(computed, gradients),
                "statistics": {key: pair.tolist() for key, pair in reduce_statistics(reported).items()},
                "reported": len(reported),
            }
    return found


def dense_output(name: str, model: Any) -> LossOutput:
    """The objective's sums over all prompts in one piece, from Hugging Face's log-probabilities."""
    from nemo_rao.mcore.loss import objective_batch

    sums = tiny.dense_sums(model, SAMPLES).float()
    batch = objective_batch(tiny.micro_batch(SAMPLES, range(len(SAMPLES)), REFERENCE), sums[:, 0], sums[:, 1])
    return registry.get(name).loss(batch, make_config(name))


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    import_once()
    results = {}
    for name in OBJECTIVES:
        model = tiny.llama()
        output = dense_output(name, model)
        (output.loss_sum / NUM_PAIRS[name]).backward()
        results[name] = {
            "weights": tiny.whole_tensors(model),
            "gradients": tiny.whole_tensors(model, gradients=True),
            "statistics": {"loss": [float(output.loss_sum.detach()), NUM_PAIRS[name]]}
            | {key: pair.tolist() for key, pair in output.metrics.items()},
        }
    return results


@pytest.fixture(scope="module")
def ranks(dense: dict[str, Any]) -> list[dict[tuple[str, str], Any]]:
    wanted = {name: (result["weights"], result["gradients"]) for name, result in dense.items()}
    return run_ranks(split_on_ranks, (wanted,), num_ranks=2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", [split for split in SPLITS if split != "one piece"])
def test_gradients_of_a_split_batch_are_the_mean_over_all_its_prompts(
    ranks: list[dict[tuple[str, str], Any]], split: str, objective: str
) -> None:
    for rank in ranks:
        errors = rank[split, objective]["errors"]
        assert max(errors.values()) < 3e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_prompt_counted_twice_weighs_the_same_as_once_when_all_are(
    ranks: list[dict[tuple[str, str], Any]], objective: str
) -> None:
    # Both data-parallel ranks hold the whole batch: twice the sum over twice the count.
    for rank in ranks:
        assert max(rank["one piece", objective]["errors"].values()) < 3e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", [split for split in SPLITS if split != "one piece"])
def test_statistics_are_those_of_the_whole_batch_on_every_rank(
    dense: dict[str, Any], ranks: list[dict[tuple[str, str], Any]], split: str, objective: str
) -> None:
    expected = dense[objective]["statistics"]
    for rank in ranks:
        found = rank[split, objective]["statistics"]
        assert list(found) == list(expected)
        for name, pair in found.items():
            assert pair == pytest.approx(expected[name], rel=2e-5, abs=2e-4), name
    if "PP" in split:
        assert [rank[split, objective]["reported"] for rank in ranks] == [0, 4]


def reduce_on_ranks() -> dict[str, Any]:
    from megatron.core import parallel_state

    from nemo_rao.mcore.loss import means, reduce_statistics

    def numbers(*pairs: float) -> dict[str, Tensor]:
        return {"loss": torch.tensor(pairs[:2]), "accuracy": torch.tensor(pairs[2:])}

    found: dict[str, Any] = {}
    tiny.enter(Layout())
    first = torch.distributed.get_rank() == 0
    found["data-parallel rank with nothing"] = [numbers(3, 2, 1, 1), numbers(0, 0, 0, 0)] if not first else []
    found["uneven"] = [numbers(1, 1, 2, 4)] if first else [numbers(3, 2, 1, 1), numbers(4, 1, 0, 0)]
    found["nobody has anything"] = []
    for name, outputs in found.items():
        found[name] = reduce_statistics(outputs)
    tiny.enter(Layout(pipeline=2))
    last = parallel_state.is_pipeline_last_stage()
    found["first stage"] = reduce_statistics([numbers(3, 2, 1, 1)] if last else [])
    tiny.enter(Layout(tensor=2))
    found["tensor-parallel copies"] = reduce_statistics([numbers(3, 2, 0, 0)])
    return {
        name: ({key: pair.tolist() for key, pair in reduced.items()}, means(reduced)) for name, reduced in found.items()
    }


def test_statistics_are_added_up_once_whoever_has_them() -> None:
    expected: dict[str, Any] = {
        "data-parallel rank with nothing": ({"loss": [3, 2], "accuracy": [1, 1]}, {"loss": 1.5, "accuracy": 1.0}),
        "uneven": ({"loss": [8, 4], "accuracy": [3, 5]}, {"loss": 2.0, "accuracy": 0.6}),
        "nobody has anything": ({}, {}),
        "first stage": ({"loss": [3, 2], "accuracy": [1, 1]}, {"loss": 1.5, "accuracy": 1.0}),
        "tensor-parallel copies": ({"loss": [3, 2], "accuracy": [0, 0]}, {"loss": 1.5}),
    }
    assert run_ranks(reduce_on_ranks, num_ranks=2) == [expected, expected]


def reduce_under_known_names_on_ranks() -> dict[str, Any]:
    from megatron.core import parallel_state

    from nemo_rao.mcore.loss import means, reduce_statistics

    def numbers(*pairs: float) -> dict[str, Tensor]:
        return {"loss": torch.tensor(pairs[:2]), "accuracy": torch.tensor(pairs[2:])}

    def refuse(*_: Any) -> None:
        raise AssertionError("names are gathered again")

    tiny.enter(Layout())
    rank, found = torch.distributed.get_rank(), {}
    names = list(reduce_statistics([] if rank == 0 else [numbers(3, 2, 1, 1)]))
    gather, torch.distributed.all_gather_object = torch.distributed.all_gather_object, refuse
    # The names' order is the first call's, whatever a mapping's own.
    turned = dict(reversed(numbers(4, 1, 0, 2).items()))
    found["rank 0 has something now"] = reduce_statistics(
        [numbers(1, 1, 2, 4), turned] if rank == 0 else [], names=names
    )
    found["nobody has anything"] = reduce_statistics([], names=names)
    own = {"tokens": (3 + rank, 10)}
    found["each rank has its own"] = reduce_statistics([numbers(1, 1, 2, 4)], names=names, of_rank=own)
    tiny.enter(Layout(pipeline=2))
    last = parallel_state.is_pipeline_last_stage()
    # Tokens are the first stage's to count, statistics the last one's.
    own = {"tokens": (0, 0) if last else (3, 10)}
    found["stages"] = reduce_statistics([numbers(3, 2, 1, 1)] if last else [], names=names, of_rank=own)
    tiny.enter(Layout(tensor=2))
    own = {"tokens": (3, 10) if rank == 0 else (0, 0)}
    found["tensor-parallel copies"] = reduce_statistics([numbers(3, 2, 0, 0)], names=names, of_rank=own)
    torch.distributed.all_gather_object = gather
    found["names not known, nobody has any"] = reduce_statistics([], names=[], of_rank={"tokens": (3, 10)})
    return {
        name: ({key: pair.tolist() for key, pair in reduced.items()}, means(reduced)) for name, reduced in found.items()
    }


def test_names_that_are_known_are_not_gathered_again_and_the_numbers_are_the_same() -> None:
    expected: dict[str, Any] = {
        "rank 0 has something now": ({"loss": [5, 2], "accuracy": [2, 6]}, {"loss": 2.5, "accuracy": 2 / 6}),
        "nobody has anything": ({"loss": [0, 0], "accuracy": [0, 0]}, {}),
        "each rank has its own": (
            {"loss": [2, 2], "accuracy": [4, 8], "tokens": [7, 20]},
            {"loss": 1.0, "accuracy": 0.5, "tokens": 0.35},
        ),
        "stages": (
            {"loss": [3, 2], "accuracy": [1, 1], "tokens": [3, 10]},
            {"loss": 1.5, "accuracy": 1.0, "tokens": 0.3},
        ),
        "tensor-parallel copies": (
            {"loss": [3, 2], "accuracy": [0, 0], "tokens": [3, 10]},
            {"loss": 1.5, "tokens": 0.3},
        ),
        "names not known, nobody has any": ({"tokens": [6, 20]}, {"tokens": 0.3}),
    }
    assert run_ranks(reduce_under_known_names_on_ranks, num_ranks=2) == [expected, expected]
