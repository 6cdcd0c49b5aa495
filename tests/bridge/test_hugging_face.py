"""Megatron-Bridge's families on layers without Transformer Engine, against transformers, with and without splitting."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from ..engines import BRIDGE, ENGINE, NO_BRIDGE

if ENGINE != BRIDGE:
    pytest.skip(NO_BRIDGE, allow_module_level=True)

from ..mcore import tiny
from ..mcore.tiny import Layout
from ..megatron_ranks import import_once, run_ranks
from .layouts import LAYOUTS, VARIANTS
from .models import MODELS, VOCAB, make_model

SAMPLES = tiny.preferences(4)


def import_bridge() -> None:
    """Once, before ranks are forked."""
    import_once()
    from nemo_rao.engines.bridge.seams import import_models

    import_models(on_cpu=True)
    import nemo_rao.engines.bridge.hugging_face  # noqa: F401


def converted(sources: dict[str, str], layout: Layout) -> dict[str, Any]:
    """Of each model, on each rank: log-probabilities in every variant, and which tensors did not come back the same."""
    from megatron.core import parallel_state
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from nemo_rao.engines.bridge.hugging_face import Conversion
    from nemo_rao.mcore.forward import evaluation_mode, forward_only
    from nemo_rao.mcore.loss import configure_loss_scaling, sequence_log_probs
    from nemo_rao.mcore.output_layer import fuse_output_layer

    def report(output: Any, batch: Any) -> dict[str, Any]:
        return {"sums": torch.stack(sequence_log_probs(output, batch, vocab_size=VOCAB), -1)}

    tiny.enter(layout)
    found = {}
    for name, source in sources.items():
        conversion = Conversion(AutoConfig.from_pretrained(source), source)
        configure_loss_scaling(conversion.provider)
        experts = conversion.provider.num_moe_experts is not None
        model = conversion.build(
            torch.float32,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            expert_model_parallel_size=layout.expert if experts else 1,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
        conversion.load(model, Path(source))
        before = load_file(Path(source) / "model.safetensors")
        after = dict(conversion.tensors(model))
        sums = {}
        for variant, how in VARIANTS.items():
            if how.get("fused"):
                fuse_output_layer(model[0])
            make = functools.partial(tiny.micro_batch, SAMPLES, **{k: v for k, v in how.items() if k != "fused"})
            with evaluation_mode(model):
                reports = forward_only(model, [range(len(SAMPLES))], make_micro_batch=make, report=report)
            sums[variant] = [one["sums"] for one in reports]
        found[name] = {
            "sums": sums,
            "changed": sorted(
                key
                for key in before.keys() | after.keys()
                if key not in before or key not in after or not torch.equal(before[key], after[key])
            ),
            "last stage": parallel_state.is_pipeline_last_stage(),
        }
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, torch.Tensor]]:
    """Folder of each model, and its log-probabilities in transformers, row by row."""
    import_bridge()
    made = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp("model")
        with torch.no_grad():
            made[name] = str(folder), tiny.dense_sums(make_model(name, folder), SAMPLES).float()
    return made


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, models: dict[str, tuple[str, torch.Tensor]]) -> list[dict[str, Any]]:
    layout = Layout(**LAYOUTS[request.param])
    sources = {name: folder for name, (folder, _) in models.items()}
    return run_ranks(converted, (sources, layout), num_ranks=layout.tensor * layout.pipeline)


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_transformers(
    ranks: list[dict[str, Any]], models: dict[str, tuple[str, torch.Tensor]], name: str
) -> None:
    for rank in ranks:
        for variant, sums in rank[name]["sums"].items():
            assert len(sums) == rank[name]["last stage"], variant
            for computed in sums:
                torch.testing.assert_close(computed, models[name][1], rtol=0, atol=1e-4, msg=variant)


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_give_back_every_weight_bit_for_bit(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["changed"] == []
