"""A mixture of experts against Hugging Face's Mixtral: the same log-probabilities and gradients however it is split.

NeMo's Mixtral asks for a load-balancing loss, and Hugging Face's model is trained without one: equal gradients are
those without it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ..megatron_ranks import run_ranks
from ..slow import OnDemand, slow_but
from . import tiny
from .test_layer_spec import SAMPLES, VARIANTS, dense_result, name_of, rank_results
from .tiny import Layout

EXPERTS_SHARED = Layout(expert=2)
LAYOUTS = {
    "DP 2": Layout(),
    "EP 2": EXPERTS_SHARED,
    "TP 2": Layout(tensor=2, sequence_parallel=True),
    "TP 2, EP 2, whole experts": Layout(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
    "PP 2": Layout(pipeline=2),
}
CASES = [(layout, variant) for layout in LAYOUTS for variant in range(len(VARIANTS))]
QUICK = [case for case in CASES if case[0] in ("EP 2", "TP 2, EP 2, whole experts")]

# As NeMo's Mixtral importer names them, and Transformer Engine's layers without grouped products.
LAYER_NAMES = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    *(f"mlp.experts.local_experts.{n}.linear_fc{part}.weight" for n in range(tiny.EXPERTS) for part in (1, 2)),
}


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    """Of Hugging Face."""
    return dense_result("mixtral")


@pytest.fixture(scope="module")
def ranks(dense: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By layout, of each rank."""
    return OnDemand(lambda layout: rank_results(dense, {layout: LAYOUTS[layout]}, "mixtral", experts=True))


@pytest.mark.parametrize(("layout", "variant"), slow_but(QUICK, CASES), ids=name_of)
def test_log_probabilities_are_those_of_hugging_face(
    dense: dict[str, Any], ranks: dict[str, list[dict[str, Any]]], layout: str, variant: int
) -> None:
    computed = [sums for rank in ranks[layout] for sums in rank[f"{layout}, mixtral, {variant}"]["sums"]]
    assert len(computed) == (1 if layout == "PP 2" else 2)  # the last stage's ranks
    for sums in computed:
        torch.testing.assert_close(sums, dense["sums"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "variant"), slow_but(QUICK, CASES), ids=name_of)
def test_gradients_are_those_of_hugging_face_router_and_experts_included(
    ranks: dict[str, list[dict[str, Any]]], layout: str, variant: int
) -> None:
    errors = [error for rank in ranks[layout] for error in rank[f"{layout}, mixtral, {variant}"]["errors"].items()]
    experts = {name for name, _ in errors if "local_experts" in name}
    assert len(experts) == 2 * tiny.EXPERTS * tiny.NUM_LAYERS
    assert {name for name, _ in errors if "router" in name} == {
        f"decoder.layers.{layer}.mlp.router.weight" for layer in range(tiny.NUM_LAYERS)
    }
    assert max(error for _, error in errors) < 2e-5, sorted(errors, key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("layout", slow_but(["EP 2"], ["DP 2", "EP 2"]))
def test_parameters_have_the_importers_names(ranks: dict[str, list[dict[str, Any]]], layout: str) -> None:
    expected = {f"decoder.layers.{layer}.{name}" for layer in range(tiny.NUM_LAYERS) for name in LAYER_NAMES}
    expected |= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    # Experts that are shared are, together, all of them.
    on_each = expected if layout == "DP 2" else {name for name in expected if "local_experts" not in name}
    for variant in range(len(VARIANTS)):
        first, second = (set(rank[f"{layout}, mixtral, {variant}"]["names"]) for rank in ranks[layout])
        assert first | second == expected and first & second == on_each


def unevenly(weights: dict[str, Tensor]) -> list[Tensor]:
    """Sums of a pass in which the second rank has one micro-batch, or none, for the first one's three."""
    from megatron.core import parallel_state

    from nemo_rao.batch import MicroBatch, ModelOutput
    from nemo_rao.mcore.forward import evaluation_mode, forward_only
    from nemo_rao.mcore.loss import sequence_log_probs

    def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        return {"sums": torch.stack(sequence_log_probs(output, batch, vocab_size=tiny.VOCAB), -1)}

    tiny.enter(EXPERTS_SHARED)
    first = parallel_state.get_data_parallel_rank() == 0
    model, found = tiny.build(weights, EXPERTS_SHARED, experts=True), []
    for mine in ([[0], [1], [2]] if first else [[3]], [[0], [1], [2]] if first else []):
        with evaluation_mode([model]):
            outputs = forward_only(
                [model], mine, make_micro_batch=lambda prompts: tiny.micro_batch(SAMPLES, prompts), report=report
            )
        found.append(torch.cat([torch.zeros(0, 2), *(output["sums"] for output in outputs)]))
    return found


def test_ranks_that_share_experts_may_have_different_numbers_of_micro_batches(dense: dict[str, Any]) -> None:
    first, second = run_ranks(unevenly, (dense["weights"],), num_ranks=2)
    sums: Tensor = dense["sums"]
    for found in first:
        torch.testing.assert_close(found, sums[: len(found)], rtol=1e-5, atol=1e-5)
    assert len(first[0]) == tiny.response_numbers(SAMPLES)[3][0]
    torch.testing.assert_close(second[0], sums[len(first[0]) :], rtol=1e-5, atol=1e-5)
    assert len(second[1]) == 0
