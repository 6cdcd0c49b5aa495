"""A reward model's loss and gradients under every parallelism, against Hugging Face's model on one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..megatron_ranks import import_once, run_ranks
from . import tiny
from .tiny import Layout

SAMPLES = tiny.preferences(7)  # prompts 1 and 4 have equal rewards throughout, so no pair
LAYOUTS: dict[str, tuple[Layout, list[list[list[int]]]]] = {
    "TP 2": (Layout(tensor=2), [[[0, 1], [2, 3, 4, 5, 6]]]),
    "TP 2, sequence parallel": (Layout(tensor=2, sequence_parallel=True), [[[0, 1, 2], [3, 4, 5, 6]]]),
    "PP 2": (Layout(pipeline=2), [[[0], [1, 2], [3, 4, 5], [6]]]),
    "DP 2": (Layout(), [[[0, 1, 2], [3]], [[4, 5], [6]]]),
}
# Of the others, each row is a sequence of its own.
BATCHES = {
    "TP 2, sequence parallel": {"packed": True, "shared_prompts": True},
    "PP 2": {"shared_prompts": True},
    "DP 2": {"packed": True},
}
TIED = {"llama": False, "tied llama": True}
CENTER = 0.01


def head_weight() -> Tensor:
    return 0.3 * torch.randn(1, tiny.HIDDEN, generator=torch.Generator().manual_seed(5))


def on_ranks(wanted: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]) -> dict[tuple[str, str], Any]:
    from megatron.core import parallel_state

    from nemo_rao.mcore.heads import add_score_head, heads
    from nemo_rao.mcore.loss import for_schedule, micro_batch_loss, reduce_statistics
    from nemo_rao.objectives.reward_model import RM

    def loss(output: Any, batch: Any) -> Any:
        config = RM.make_config({"center": CENTER})
        return for_schedule(micro_batch_loss(output, batch, RM, config, vocab_size=tiny.VOCAB))

    found: dict[tuple[str, str], Any] = {}
    starts: list[Tensor] = []
    for layout_name, (layout, by_rank) in LAYOUTS.items():
        tiny.enter(layout)
        batches = [
            tiny.micro_batch(SAMPLES, prompts, **BATCHES.get(layout_name, {}))
            for prompts in by_rank[parallel_state.get_data_parallel_rank()]
        ]
        for model_name, (weights, gradients) in wanted.items():
            model = tiny.build(weights, layout, tied=TIED[model_name])
            add_score_head(model, 1, seed=len(found))
            for head in heads(model):
                starts.append(head.weight.detach().clone())
                head.weight.data.copy_(head_weight())
            computed, reported = tiny.run_schedule(model, batches, loss)
            of_head = {name: computed.pop(name) for name in list(computed) if "score_head" in name}
            found[layout_name, model_name] = {
                "errors": tiny.gradient_errors(computed, gradients),
                "head": of_head,
                "statistics": {key: pair.tolist() for key, pair in reduce_statistics(reported).items()},
            }
    found["starts", "of heads"] = starts
    return found


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    """The mean over prompts of the mean over pairs, from the hidden states of end tokens."""
    import_once()
    results = {}
    for name, tied in TIED.items():
        model, weight = tiny.llama(tied=tied), head_weight().requires_grad_()
        of_prompts, right = [], 0.0
        for sample in SAMPLES:
            rows = [np.concatenate([sample.prompt, response]).astype(np.int64) for response in sample.responses]
            states = [model.model(torch.from_numpy(row)[None]).last_hidden_state[0, -1] for row in rows]
            scores = [state @ weight[0] for state in states]
            numbers = range(len(scores))
            pairs = [(i, j) for i in numbers for j in numbers if sample.rewards[i] > sample.rewards[j]]
            losses = [-logsigmoid(scores[i] - scores[j]) + CENTER * (scores[i] + scores[j]) ** 2 for i, j in pairs]
            if losses:
                of_prompts.append(torch.stack(losses).mean())
                right += sum(float(scores[i] > scores[j]) for i, j in pairs) / len(pairs)
        torch.stack(of_prompts).mean().backward()
        for parameter in model.parameters():
            if parameter.grad is None:  # the output layer's
                parameter.grad = torch.zeros_like(parameter)
        results[name] = {
            "weights": tiny.whole_tensors(model),
            "gradients": tiny.whole_tensors(model, gradients=True),
            "head": weight.grad,
            "loss": [float(torch.stack(of_prompts).sum().detach()), len(of_prompts)],
            "accuracy": [right, len(of_prompts)],
        }
    return results


@pytest.fixture(scope="module")
def ranks(dense: dict[str, Any]) -> list[dict[tuple[str, str], Any]]:
    wanted = {name: (result["weights"], result["gradients"]) for name, result in dense.items()}
    return run_ranks(on_ranks, (wanted,), num_ranks=2)


@pytest.mark.parametrize("model", TIED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_accuracy_are_those_of_one_process(
    ranks: list[dict[tuple[str, str], Any]], dense: dict[str, Any], layout: str, model: str
) -> None:
    assert dense[model]["loss"][1] == 5
    for rank in ranks:
        statistics = rank[layout, model]["statistics"]
        assert statistics["loss"] == pytest.approx(dense[model]["loss"], rel=1e-5)
        assert statistics["rm/accuracy"] == pytest.approx(dense[model]["accuracy"])


@pytest.mark.parametrize("model", TIED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(
    ranks: list[dict[tuple[str, str], Any]], dense: dict[str, Any], layout: str, model: str
) -> None:
    heads = 0
    for rank in ranks:
        errors = rank[layout, model]["errors"]
        assert max(errors.values()) < 3e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]
        for gradient in rank[layout, model]["head"].values():
            torch.testing.assert_close(gradient, dense[model]["head"], rtol=1e-4, atol=1e-6)
            heads += 1
    assert heads == (1 if layout == "PP 2" else 2)


def test_the_seed_decides_a_heads_start(ranks: list[dict[tuple[str, str], Any]]) -> None:
    """A seed for each network: all differ, and ranks that hold the same head hold the same start of it."""
    whole = max((rank["starts", "of heads"] for rank in ranks), key=len)
    for rank in ranks:
        for start in rank["starts", "of heads"]:
            assert sum(torch.equal(start, other) for other in whole) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_output_layer_of_its_own_takes_no_part(ranks: list[dict[tuple[str, str], Any]], layout: str) -> None:
    for rank in ranks:
        assert "output_layer.weight" not in rank[layout, "llama"]["errors"]
