"""The layers without Transformer Engine against Hugging Face's models, under several parallelisms.

Rows of their own or packed, prompts shared or not, with logits or without: the same log-probabilities and gradients.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ModelOutput

from ..megatron_ranks import import_once, run_ranks
from ..slow import OnDemand, slow_but
from . import tiny
from .tiny import Layout

LAYOUTS = {
    "TP 1": Layout(),
    "TP 2": Layout(tensor=2),
    "TP 2 with sequence parallelism": Layout(tensor=2, sequence_parallel=True),
    "PP 2": Layout(pipeline=2),
}
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"qkv_bias": True}, "tied llama": {"tied": True}}

# How the batch is laid out, and whether log-probabilities are fused with the output layer.
VARIANTS = [
    {"fused": fused, "packed": packed, "shared_prompts": shared}
    for fused, packed, shared in itertools.product((False, True), repeat=3)
]

SAMPLES = tiny.preferences(4)
NUM_RESPONSES = sum(len(sample.responses) for sample in SAMPLES)

# As Transformer Engine's layers name them: what NeMo's importers look for, and what a GPU's checkpoints hold.
LAYER_NAMES = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}


def hugging_face(name: str) -> Any:
    if name == "mixtral":
        return tiny.mixtral()
    return tiny.qwen2() if name == "qwen2" else tiny.llama(tied=name == "tied llama")


def on_ranks(
    wanted: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]],
    layouts: dict[str, Layout],
    models: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """For each layout, model and variant: log-probabilities of all rows, gradients' errors, parameter names."""
    from megatron.core import parallel_state

    from nemo_rao.mcore.forward import evaluation_mode, forward_only
    from nemo_rao.mcore.loss import sequence_log_probs

    def report(output: ModelOutput, batch: Any) -> dict[str, Tensor]:
        return {"sums": torch.stack(sequence_log_probs(output, batch, vocab_size=tiny.VOCAB), -1)}

    def loss(output: ModelOutput, batch: Any) -> tuple[Tensor, Tensor, dict]:
        prompt, response = sequence_log_probs(output, batch, vocab_size=tiny.VOCAB)
        return -(prompt + response).sum(), torch.tensor(len(response), dtype=torch.int), {}

    found = {}
    for layout_name, layout in layouts.items():
        tiny.enter(layout)
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine = range(rank, len(SAMPLES), size)
        for (model_name, (weights, gradients)), variant in itertools.product(wanted.items(), VARIANTS):
            model = tiny.build(weights, layout, fused=variant["fused"], **models[model_name])
            make = functools.partial(tiny.micro_batch, SAMPLES, **{k: v for k, v in variant.items() if k != "fused"})
            with evaluation_mode([model]):
                outputs = forward_only(
                    [model],
                    [range(len(SAMPLES))],
                    make_micro_batch=make,
                    report=report,
                )
            # The last micro-batch of two prompts, where there are so many.
            split = [[i] for i in mine[:-2]] + [list(mine[-2:])]
            computed, _ = tiny.run_schedule(model, [make(prompts) for prompts in split], loss)
            found[f"{layout_name}, {model_name}, {VARIANTS.index(variant)}"] = {
                "sums": [output["sums"] for output in outputs],
                "errors": tiny.gradient_errors(computed, gradients),
                "names": sorted(name for name, _ in tiny.whole_names(model)),
            }
    return found


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    """By model, of Hugging Face."""
    return OnDemand(dense_result)


def dense_result(name: str) -> dict[str, Any]:
    """Hugging Face's weights, sums and gradients of the mean over rows."""
    import_once()
    model = hugging_face(name)
    sums = tiny.dense_sums(model, SAMPLES)
    (-sums.sum() / NUM_RESPONSES).backward()
    return {
        "weights": tiny.whole_tensors(model),
        "gradients": tiny.whole_tensors(model, gradients=True),
        "sums": sums.detach().float(),
    }


@pytest.fixture(scope="module")
def ranks(dense: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By model, of each rank."""
    return OnDemand(lambda model: rank_results(dense[model], LAYOUTS, model, **MODELS[model]))


def rank_results(dense: dict[str, Any], layouts: dict[str, Layout], model: str, **keys: Any) -> list[dict[str, Any]]:
    wanted = {model: (dense["weights"], dense["gradients"])}
    return run_ranks(on_ranks, (wanted, layouts, {model: keys}), num_ranks=2)


CASES = [(layout, model, variant) for layout in LAYOUTS for model in MODELS for variant in range(len(VARIANTS))]
QUICK = [case for case in CASES if "llama" in case]


def name_of(case: Any) -> str:
    return "+".join(key for key, on in VARIANTS[case].items() if on) or "rows" if isinstance(case, int) else case


@pytest.mark.parametrize(("layout", "model", "variant"), slow_but(QUICK, CASES), ids=name_of)
def test_log_probabilities_are_those_of_hugging_face(
    dense: dict[str, Any], ranks: dict[str, list[dict[str, Any]]], layout: str, model: str, variant: int
) -> None:
    computed = [sums for rank in ranks[model] for sums in rank[f"{layout}, {model}, {variant}"]["sums"]]
    assert len(computed) == (1 if layout == "PP 2" else 2)  # the last stage's ranks
    for sums in computed:
        torch.testing.assert_close(sums, dense[model]["sums"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "model", "variant"), slow_but(QUICK, CASES), ids=name_of)
def test_gradients_are_those_of_hugging_face_norms_included(
    ranks: dict[str, list[dict[str, Any]]], layout: str, model: str, variant: int
) -> None:
    errors = [error for rank in ranks[model] for error in rank[f"{layout}, {model}, {variant}"]["errors"].items()]
    norms = [name for name, _ in errors if name.endswith("layer_norm_weight")]
    assert len(norms) == 2 * tiny.NUM_LAYERS * (1 if layout == "PP 2" else 2)
    assert max(error for _, error in errors) < 2e-5, sorted(errors, key=lambda item: -item[1])[:5]


def in_thd(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Sums of packed rows by their table of segments, and in the format that Transformer Engine takes."""
    from nemo_rao.mcore import attention
    from nemo_rao.mcore.forward import evaluation_mode, forward_step
    from nemo_rao.mcore.loss import sequence_log_probs

    tiny.enter(Layout(tensor=2))
    model = tiny.build(weights, Layout(tensor=2))
    batch = tiny.micro_batch(SAMPLES, range(len(SAMPLES)), packed=True)
    found, received = {}, []
    for name in ("segments", "thd"):
        with evaluation_mode([model]):
            output = forward_step(model, batch)
            found[name] = torch.stack(sequence_log_probs(output, batch, vocab_size=tiny.VOCAB), -1)
        attention._attends_to_segments = lambda model: False  # as of a model of Transformer Engine's layers
        with attention.segment_kwargs(model, batch) as arguments:
            received.append(sorted(arguments))
    return {**found, "received": received}


def test_packed_rows_in_the_thd_format_are_the_same(dense: dict[str, Any]) -> None:
    """Megatron's own handling of it: rotary positions, shapes. Its attention, on a GPU, is Transformer Engine's."""
    for found in run_ranks(in_thd, (dense["llama"]["weights"],), num_ranks=2):
        assert found["received"] == [["attention_mask", "packed_seq_params"]] * 2
        for name in ("segments", "thd"):
            torch.testing.assert_close(found[name], dense["llama"]["sums"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", slow_but(["llama"], MODELS))
def test_parameters_have_transformer_engines_names(ranks: dict[str, list[dict[str, Any]]], model: str) -> None:
    in_layers = LAYER_NAMES | ({"self_attention.linear_qkv.bias"} if model == "qwen2" else set())
    expected = {f"decoder.layers.{layer}.{name}" for layer in range(tiny.NUM_LAYERS) for name in in_layers}
    expected |= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    if model != "tied llama":
        expected.add("output_layer.weight")
    for variant in range(len(VARIANTS)):
        assert ranks[model][0][f"TP 1, {model}, {variant}"]["names"] == sorted(expected)
