"""The value head and the mismatched log-ratio, under every parallelism, against Hugging Face's model on one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ModelOutput

from ..megatron_ranks import import_once, run_ranks
from . import tiny
from .tiny import Layout

SAMPLES = tiny.preferences(5)
REFERENCE = np.random.default_rng(3).normal(-20, 2, (sum(len(s.responses) for s in SAMPLES), 2)).astype(np.float32)
# For each layout, the micro-batches of each data-parallel rank.
LAYOUTS: dict[str, tuple[Layout, list[list[list[int]]]]] = {
    "TP 2": (Layout(tensor=2), [[[0, 1], [2, 3, 4]]]),
    "TP 2, sequence parallel": (Layout(tensor=2, sequence_parallel=True), [[[0, 1], [2, 3, 4]]]),
    "PP 2": (Layout(pipeline=2), [[[0], [1, 2], [3, 4]]]),
    "DP 2": (Layout(), [[[0, 1, 2], [3]], [[4], []]]),
    "DP 2, one rank without data": (Layout(), [[[0, 1, 2], [3, 4]], []]),
}


# Of the others, each row is a sequence of its own.
BATCHES = {
    "TP 2, sequence parallel": {"packed": True, "shared_prompts": True},
    "PP 2": {"shared_prompts": True},
    "DP 2": {"packed": True},
}


def head_weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, tiny.HIDDEN, generator=generator), torch.randn(1, generator=generator)


def on_ranks(weights: dict[str, Tensor]) -> dict[str, Any]:
    """For each layout: the last stage's values by response, the head's gradients, names in the checkpoint."""
    from megatron.core import parallel_state

    from nemo_rao.mcore.fingerprint import weights_fingerprint
    from nemo_rao.mcore.forward import evaluation_mode
    from nemo_rao.mcore.heads import add_value_head, heads
    from nemo_rao.mcore.mismatched import mean_log_ratio

    def loss(output: ModelOutput, batch: Any) -> tuple[Tensor, Tensor, dict]:
        """Half the sum of V^2; nothing of it may reach the policy."""
        assert output.values is not None and output.logits is not None
        reported = {"values": output.values.detach(), "responses": batch.response_ids}
        total = 0.5 * output.values.square().sum() + 0 * output.logits.float().sum()
        return total, torch.tensor(len(output.values), dtype=torch.int), reported

    found = {}
    for name, (layout, by_rank) in LAYOUTS.items():
        tiny.enter(layout)
        mine = [prompts for prompts in by_rank[parallel_state.get_data_parallel_rank()] if prompts]
        model = tiny.build(weights, layout)
        before = weights_fingerprint(model.sharded_state_dict(), vocab_size=tiny.VOCAB)
        log_ratio = mean_log_ratio(
            [model],
            mine,
            make_micro_batch=lambda prompts: tiny.micro_batch(SAMPLES, prompts, REFERENCE),
            vocab_size=tiny.VOCAB,
        )
        add_value_head(model)
        for head in heads(model):
            assert not head.weight.any() and not head.bias.any(), "V starts at 0"
            head.weight.data, head.bias.data = head_weights()
        with evaluation_mode([model]):
            state = model.sharded_state_dict()
        after = weights_fingerprint(state, vocab_size=tiny.VOCAB)
        gradients: dict[str, Tensor] = {}
        reported: list[dict[str, Tensor]] = []
        if len(by_rank[-1]):
            batches = [tiny.micro_batch(SAMPLES, prompts, **BATCHES.get(name, {})) for prompts in mine]
            gradients, reported = tiny.run_schedule(model, batches, loss)
        of_head = {key: value for key, value in gradients.items() if "value_head" in key}
        found[name] = {
            "log_ratio": float(log_ratio),
            "values": [(output["responses"], output["values"]) for output in reported],
            "head": of_head,
            "policy": max((float(g.abs().max()) for key, g in gradients.items() if key not in of_head), default=0.0),
            "stored": sorted(key for key in state if "value_head" in key),
            "has head": bool(list(heads(model))),
            "fingerprints": (before, after),
        }
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    import_once()
    return run_ranks(on_ranks, (tiny.whole_tensors(tiny.llama()),), num_ranks=2)


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    """Each response's last hidden state of its prompt ``[responses, H]``, its value, and the mean log-ratio."""
    import_once()
    model, states = tiny.llama(), []
    with torch.no_grad():
        for sample in SAMPLES:
            state = model.model(torch.from_numpy(sample.prompt.astype(np.int64))[None]).last_hidden_state[0, -1]
            states += [state] * len(sample.responses)
        sums = tiny.dense_sums(model, SAMPLES)
    weight, bias = head_weights()
    states = torch.stack(states)
    return {
        "states": states,
        "values": (states @ weight[0] + bias),
        "log_ratio": (sums[:, 1] - torch.from_numpy(REFERENCE[:, 1])).mean(),
    }


WITH_GRADIENTS = [name for name, (_, by_rank) in LAYOUTS.items() if len(by_rank[-1])]


@pytest.mark.parametrize("layout", WITH_GRADIENTS)
def test_values_are_those_of_the_prompts_last_hidden_state(
    ranks: list[dict[str, Any]], dense: dict[str, Tensor], layout: str
) -> None:
    seen = set()
    for rank in ranks:
        for responses, values in rank[layout]["values"]:
            torch.testing.assert_close(values, dense["values"][responses], rtol=1e-5, atol=1e-5)
            seen.update(responses.tolist())
    assert seen == set(range(len(REFERENCE)))


@pytest.mark.parametrize("layout", WITH_GRADIENTS)
def test_the_head_is_trained_and_the_policy_is_not(
    ranks: list[dict[str, Any]], dense: dict[str, Tensor], layout: str
) -> None:
    """The gradient of the mean over responses of V^2 / 2."""
    states, values = dense["states"], dense["values"]
    with_head = [rank[layout] for rank in ranks if rank[layout]["has head"]]
    assert len(with_head) == (1 if layout == "PP 2" else 2)
    for rank in with_head:
        expected = (values[:, None] * states).mean(0, keepdim=True)
        torch.testing.assert_close(rank["head"]["value_head.weight"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rank["head"]["value_head.bias"], values.mean()[None], rtol=1e-4, atol=1e-5)
    assert all(rank[layout]["policy"] == 0 for rank in ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_hold_the_head_and_fingerprints_leave_it_out(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        before, after = rank[layout]["fingerprints"]
        assert before == after
        stored = ["value_head.bias", "value_head.weight"] if rank[layout]["has head"] else []
        assert rank[layout]["stored"] == stored


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mean_log_ratio_is_that_of_all_ranks_rows(
    ranks: list[dict[str, Any]], dense: dict[str, Tensor], layout: str
) -> None:
    for rank in ranks:
        assert rank[layout]["log_ratio"] == pytest.approx(float(dense["log_ratio"]), rel=1e-5)
