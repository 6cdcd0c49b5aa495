"""The value of every token of a response, under every parallelism, against Hugging Face's model on one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ModelOutput

from ..megatron_ranks import import_once, run_ranks
from . import tiny
from .test_value_head import head_weights
from .tiny import Layout

SAMPLES = tiny.preferences(5)
LAYOUTS: dict[str, tuple[Layout, list[list[list[int]]]]] = {
    "TP 2, sequence parallel": (Layout(tensor=2, sequence_parallel=True), [[[0, 1], [2, 3, 4]]]),
    "TP 2": (Layout(tensor=2), [[[0, 1], [2, 3, 4]]]),
    "PP 2": (Layout(pipeline=2), [[[0], [1, 2], [3, 4]]]),
    "DP 2": (Layout(), [[[0, 1, 2], [3]], [[4]]]),
}
# Of the others, each row is a sequence of its own.
BATCHES = {"TP 2": {"packed": True, "shared_prompts": True}, "PP 2": {"shared_prompts": True}, "DP 2": {"packed": True}}


# Of a head: whether it reads detached states, and whether it stands in the place of the output layer, as a critic's.
HEADS = {"detached": (True, False), "shared": (False, False), "alone": (False, True)}


def on_ranks(wanted: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[tuple[str, str], Any]:
    """For each layout and kind of head: values by response, gradients."""
    from megatron.core import parallel_state

    from nemo_rao.mcore.heads import add_value_head, heads

    def loss(output: ModelOutput, batch: Any) -> tuple[Tensor, Tensor, dict]:
        assert output.values is not None
        assert not output.values[batch.response_positions < 0].any(), "nothing behind a response's last token"
        reported = {"values": output.values.detach(), "responses": batch.response_ids}
        total = 0.5 * output.values.square().sum()
        if output.logits is not None:
            total = total + 0 * output.logits.float().sum()
        return total, torch.tensor(len(output.values), dtype=torch.int), reported

    found = {}
    for name, (layout, by_rank) in LAYOUTS.items():
        tiny.enter(layout)
        mine = by_rank[parallel_state.get_data_parallel_rank()]
        for kind, (detached, alone) in HEADS.items():
            model = tiny.build(wanted[0], layout)
            add_value_head(model, position="tokens", detached=detached, alone=alone)
            for head in heads(model):
                head.weight.data, head.bias.data = head_weights()
            batches = [tiny.micro_batch(SAMPLES, prompts, **BATCHES.get(name, {})) for prompts in mine]
            gradients, reported = tiny.run_schedule(model, batches, loss)
            of_head = {key: gradients.pop(key) for key in list(gradients) if "value_head" in key}
            found[name, kind] = {
                "values": [(output["responses"], output["values"]) for output in reported],
                "head": of_head,
                "errors": tiny.gradient_errors(gradients, wanted[1]),
                "policy": max(float(gradient.abs().max()) for gradient in gradients.values()),
            }
    return found


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    """Of the mean over responses of the sum over tokens of V^2 / 2."""
    import_once()
    model, (weight, bias) = tiny.llama(), (tensor.requires_grad_() for tensor in head_weights())
    values = []
    for sample in SAMPLES:
        for response in sample.responses:
            row = torch.from_numpy(np.concatenate([sample.prompt, response]).astype(np.int64))
            states = model.model(row[None]).last_hidden_state[0]
            values.append(states[len(sample.prompt) - 1 : -1] @ weight[0] + bias)
    (sum(0.5 * of_response.square().sum() for of_response in values) / len(values)).backward()  # type: ignore[union-attr]
    for parameter in model.parameters():
        if parameter.grad is None:  # the output layer's
            parameter.grad = torch.zeros_like(parameter)
    return {
        "values": [of_response.detach() for of_response in values],
        "weights": tiny.whole_tensors(model),
        "gradients": tiny.whole_tensors(model, gradients=True),
        "head": {"value_head.weight": weight.grad, "value_head.bias": bias.grad},
    }


@pytest.fixture(scope="module")
def ranks(dense: dict[str, Any]) -> list[dict[tuple[str, str], Any]]:
    return run_ranks(on_ranks, ((dense["weights"], dense["gradients"]),), num_ranks=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_the_states_that_predict_each_token(
    ranks: list[dict[tuple[str, str], Any]], dense: dict[str, Any], layout: str
) -> None:
    seen = set()
    for rank in ranks:
        for responses, values in rank[layout, "alone"]["values"]:
            for number, own in zip(responses.tolist(), values, strict=True):
                expected = dense["values"][number]
                torch.testing.assert_close(own[: len(expected)], expected, rtol=1e-5, atol=1e-5)
                seen.add(number)
    assert seen == set(range(len(dense["values"])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_is_trained_and_the_policy_where_its_states_are_not_detached(
    ranks: list[dict[tuple[str, str], Any]], dense: dict[str, Any], layout: str
) -> None:
    for kind in HEADS:
        with_head = [rank[layout, kind]["head"] for rank in ranks if rank[layout, kind]["head"]]
        assert len(with_head) == (1 if layout == "PP 2" else 2)
        for gradients in with_head:
            for name, expected in dense["head"].items():
                torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        assert rank[layout, "detached"]["policy"] == 0
        for kind in ("shared", "alone"):
            errors = rank[layout, kind]["errors"]
            assert max(errors[name] for name in errors if name != "output_layer.weight") < 3e-5, errors
        assert "output_layer.weight" not in rank[layout, "alone"]["errors"], "it is skipped"
