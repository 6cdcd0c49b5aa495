"""A second model that trains: its steps against torch's AdamW on Hugging Face's, also where other ranks go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput

from ..megatron_ranks import import_once, run_ranks
from . import tiny
from .test_value_head import head_weights
from .tiny import Layout

SAMPLES = tiny.preferences(5)
NUM_STEPS, TARGET, CLIP = 3, 0.5, 1.0
ADAM: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
# Layout, and each data-parallel rank's micro-batches.
BEGINS = (Layout(tensor=2, sequence_parallel=True), [[[0, 1], [2, 3, 4]]])
GOES_ON = {
    "TP 2": (Layout(tensor=2), [[[0, 1, 2], [3, 4]]]),
    "PP 2": (Layout(pipeline=2), [[[0], [1, 2], [3, 4]]]),
    "DP 2": (Layout(), [[[0, 1], [2]], [[3], [4]]]),
}


def loss(output: ModelOutput, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(V - target)^2 / 2, summed, and the number of tokens."""
    assert output.values is not None and output.logits is None
    mask = batch.response_positions >= 0
    total = torch.where(mask, 0.5 * (output.values - TARGET).square(), 0).sum()
    return total, mask.sum().int(), {"values": output.values.detach(), "responses": batch.response_ids}


def on_ranks(whole: dict[str, Tensor], folder: Path, *, distributed: bool) -> dict[str, Any]:
    """For each layout that goes on: the norms of the steps' gradients, and values by response behind the last."""
    from megatron.core import parallel_state

    from nemo_rao.mcore.forward import evaluation_mode, forward_only
    from nemo_rao.mcore.heads import add_value_head, heads
    from nemo_rao.mcore.trained_model import TrainedModel

    def made(layout: Layout) -> TrainedModel:
        tiny.enter(layout)
        chunk = tiny.build(whole, layout)
        add_value_head(chunk, position="tokens", detached=False, alone=True)
        for head in heads(chunk):
            head.weight.data, head.bias.data = head_weights()
        optimizer = {"adam_beta1": ADAM["betas"][0], "adam_beta2": ADAM["betas"][1], "adam_eps": ADAM["eps"]}
        split = {"use_distributed_optimizer": distributed}
        optimizer |= {"lr": 1.0, "weight_decay": ADAM["weight_decay"], "clip_grad": CLIP, **split}
        return TrainedModel([chunk], gradients={"grad_reduce_in_fp32": True, **split}, optimizer=optimizer)

    def batch(prompts: Any) -> MicroBatch:
        return tiny.micro_batch(SAMPLES, prompts, packed=True, shared_prompts=True)

    def steps(model: TrainedModel, by_rank: list[list[list[int]]], number: int) -> list[float | None]:
        mine = by_rank[parallel_state.get_data_parallel_rank()]
        return [model.step(mine, make_micro_batch=batch, loss=loss, rate=ADAM["lr"]) for _ in range(number)]

    begun = made(BEGINS[0])
    norms = steps(begun, BEGINS[1], NUM_STEPS - 1)
    begun.save(folder)
    found = {}
    for name, (layout, by_rank) in GOES_ON.items():
        model = made(layout)
        model.load(folder)
        last = steps(model, by_rank, 1)
        mine = by_rank[parallel_state.get_data_parallel_rank()]
        with model.on_device(), evaluation_mode(model.chunks):
            reported = forward_only(
                model.chunks,
                mine,
                make_micro_batch=batch,
                report=lambda output, batch: loss(output, batch)[2],
            )
        values = [(one["responses"].tolist(), one["values"]) for one in reported]
        found[name] = {"norms": [*norms, *last], "values": values}
    return found


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    import_once()
    model, (weight, bias) = tiny.llama(), (torch.nn.Parameter(tensor) for tensor in head_weights())
    whole = tiny.whole_tensors(model)
    trained = [one for name, one in model.named_parameters() if name != "lm_head.weight"] + [weight, bias]
    decayed = [one for one in trained if one.ndim > 1]
    others = [one for one in trained if one.ndim == 1]
    keys = {name: value for name, value in ADAM.items() if name != "weight_decay"}
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": ADAM["weight_decay"]}, {"params": others, "weight_decay": 0.0}], **keys
    )

    def values() -> list[Tensor]:
        found = []
        for sample in SAMPLES:
            for response in sample.responses:
                row = torch.from_numpy(np.concatenate([sample.prompt, response]).astype(np.int64))
                states = model.model(row[None]).last_hidden_state[0]
                found.append(states[len(sample.prompt) - 1 : -1] @ weight[0] + bias)
        return found

    norms = []
    for _ in range(NUM_STEPS):
        adam.zero_grad()
        (0.5 * (torch.cat(values()) - TARGET).square()).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        adam.step()
    return {"whole": whole, "norms": norms, "values": [one.detach() for one in values()]}


@pytest.mark.parametrize("distributed", [True, False])
def test_steps_are_those_of_the_whole_model_on_one_process(
    dense: dict[str, Any], tmp_path: Path, distributed: bool
) -> None:
    def run(whole: dict[str, Tensor]) -> dict[str, Any]:
        return on_ranks(whole, tmp_path / "critic", distributed=distributed)

    ranks = run_ranks(run, (dense["whole"],), num_ranks=2)
    assert max(dense["norms"]) > CLIP
    for name in GOES_ON:
        seen = set()
        for rank in ranks:
            assert rank[name]["norms"] == pytest.approx(dense["norms"], rel=1e-5), name
            for responses, values in rank[name]["values"]:
                for number, own in zip(responses, values, strict=True):
                    expected = dense["values"][number]
                    torch.testing.assert_close(own[: len(expected)], expected, rtol=1e-4, atol=1e-4)
                    seen.add(number)
        assert seen == set(range(len(dense["values"]))), name
