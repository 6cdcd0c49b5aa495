"""FlexAttention over segments against SegmentAttention: the mask, its blocks, the forward pass, and the layer spec.

FlexAttention has no backward pass on a CPU; tests/gpu/test_gpu_prefix_sharing.py has gradients.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch
from nemo_rao.mcore.segment_masks import BLOCK, block_mask, seen_by

from ..login_node import write_packages
from ..megatron_ranks import import_once, run_ranks
from . import tiny

SAMPLES = tiny.preferences(5)
LAYOUTS: dict[str, dict[str, bool]] = {
    "packed": {"packed": True},
    "shared": {"shared_prompts": True},
    "packed, shared": {"packed": True, "shared_prompts": True},
}
WINDOWS = (None, 0, 4)


def batch_of(layout: str) -> MicroBatch:
    return tiny.micro_batch(SAMPLES, range(len(SAMPLES)), **LAYOUTS[layout])


def table_of(batch: MicroBatch) -> Tensor:
    assert batch.segments is not None
    return batch.segments


def dense(table: Tensor, num_tokens: int, window: int | None = None) -> Tensor:
    """``[L, L]``: which keys (columns) a query sees."""
    token = torch.arange(num_tokens)
    nothing = torch.zeros((), dtype=torch.int64)
    return seen_by(table, num_tokens, window=window).mask_mod()(nothing, nothing, token[:, None], token)


# ------------------------------------------------------------------------------ against SegmentAttention


def compare(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Masks and outputs of both, and log-probabilities of a model with FlexAttention. Inside a rank, at TP 2."""
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_rao.mcore.attention import SegmentAttention
    from nemo_rao.mcore.flex_attention import FlexSegmentAttention
    from nemo_rao.mcore.forward import evaluation_mode, forward_step
    from nemo_rao.mcore.loss import sequence_log_probs

    layout = tiny.Layout(tensor=2)
    tiny.enter(layout)
    found: dict[str, Any] = {"masks": {}, "outputs": {}, "sums": {}}
    generator = torch.Generator().manual_seed(0)
    for name, window in itertools.product(LAYOUTS, WINDOWS):
        batch = batch_of(name)
        table, (num_sequences, length) = table_of(batch), batch.tokens.shape
        config = dataclasses.replace(tiny.config_for(layout), window_size=None if window is None else (window, 0))

        def made(kind: Any, config: Any = config) -> Any:
            attention = kind(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
            return attention.eval()

        heads, groups, size = tiny.HEADS // 2, tiny.GROUPS // 2, tiny.HIDDEN // tiny.HEADS
        queries, keys, values = (
            torch.randn(length, num_sequences, count, size, generator=generator) for count in (heads, groups, groups)
        )
        with torch.no_grad():
            # Of equal logits, each value one-hot: the weights, and so what is seen.
            marks = torch.eye(length * num_sequences).view(num_sequences, length, 1, -1).transpose(0, 1)
            plain = made(SegmentAttention)
            weights_of = plain(torch.zeros_like(marks), torch.zeros_like(marks), marks, table)
            found["masks"][name, window] = weights_of.transpose(0, 1).flatten(0, 1) > 0  # [B T, B T]
            found["outputs"][name, window] = [
                attention(queries, keys, values, table).transpose(0, 1).flatten(0, 1)
                for attention in (plain, made(FlexSegmentAttention))
            ]
    model = tiny.build(weights, layout)
    for layer in model.decoder.layers:
        of_layer = layer.self_attention
        of_layer.core_attention = FlexSegmentAttention(
            model.config, layer.layer_number, attn_mask_type=AttnMaskType.causal, attention_type="self"
        )
    for name in LAYOUTS:
        batch = batch_of(name)
        with evaluation_mode([model]):
            output = forward_step(model, batch)
            found["sums"][name] = torch.stack(sequence_log_probs(output, batch, vocab_size=tiny.VOCAB), -1)
    return found


@pytest.fixture(scope="module")
def llama() -> tuple[dict[str, Tensor], Tensor]:
    import_once()
    model = tiny.llama()
    with torch.no_grad():
        return tiny.whole_tensors(model), tiny.dense_sums(model, SAMPLES).float()


@pytest.fixture(scope="module")
def found(llama: tuple[dict[str, Tensor], Tensor]) -> dict[str, Any]:
    return run_ranks(compare, (llama[0],), num_ranks=2)[0]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_is_that_of_segment_attention(found: dict[str, Any], layout: str, window: int | None) -> None:
    table, expected = table_of(batch_of(layout)), found["masks"][layout, window]
    mask = dense(table, len(expected), window)
    padding = table[:, 2].bool().repeat_interleave(table[:, 0])
    assert torch.equal(mask[~padding], expected[~padding])
    assert torch.equal(mask[padding], torch.eye(len(mask), dtype=torch.bool)[padding]), "padding sees itself"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_forward_pass_is_that_of_segment_attention(found: dict[str, Any], layout: str, window: int | None) -> None:
    table, (plain, flex) = table_of(batch_of(layout)), found["outputs"][layout, window]
    padding = table[:, 2].bool().repeat_interleave(table[:, 0])
    torch.testing.assert_close(flex[~padding], plain[~padding], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_are_those_of_hugging_face(
    found: dict[str, Any], llama: tuple[dict[str, Tensor], Tensor], layout: str
) -> None:
    torch.testing.assert_close(found["sums"][layout], llama[1], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ blocks


def long_table(seed: int) -> tuple[Tensor, int]:
    """Prompts and responses of up to three blocks, in an order that sharing makes, padding last."""
    generator = torch.Generator().manual_seed(seed)

    def size() -> int:
        return int(torch.randint(1, 3 * BLOCK if seed % 2 else 40, (), generator=generator))

    rows: list[list[int]] = []
    for _ in range(4):
        prompt = len(rows)
        rows.append([size(), -1, 0])
        rows += [[size(), prompt, 0] for _ in range(3)]
    rows.append([size(), -1, 1])
    table = torch.tensor(rows)
    return table, int(table[:, 0].sum())


@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_those_that_pytorch_finds_token_by_token(seed: int, window: int | None) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    table, num_tokens = long_table(seed)
    seen = seen_by(table, num_tokens, window=window)
    made = block_mask(table, num_tokens, window=window)
    expected = create_block_mask(seen.mask_mod(), 1, 1, num_tokens, num_tokens, device="cpu", BLOCK_SIZE=BLOCK)
    assert made.shape == expected.shape
    for one in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = getattr(made, f"{one}_num_blocks"), getattr(expected, f"{one}_num_blocks")
        assert torch.equal(counts, wanted), one
        listed = torch.arange(counts.shape[-1]) < counts[..., None]
        numbers, wanted = getattr(made, f"{one}_indices"), getattr(expected, f"{one}_indices")
        assert torch.equal(numbers[listed], wanted[listed]), one
    if window is None and seed % 2:
        assert made.full_kv_num_blocks.any() and made.sparsity() > 30


def test_layers_share_a_mask_and_another_table_never_has_it() -> None:
    import_once()
    from nemo_rao.mcore.flex_attention import _Masks

    masks = _Masks(2)
    table, num_tokens = long_table(0)
    first = masks.of(table, num_tokens, None)
    again = table.detach()  # as recomputation brings it back
    assert masks.of(again, num_tokens, None) is first
    assert masks.of(table, num_tokens, 5) is not first
    other = table.clone()
    assert masks.of(other, num_tokens, None) is not first
    assert masks.of(table, num_tokens, None) is not first, "the oldest of three made room"


# -------------------------------------------------------------------------------------------- layer spec


OF_MEGATRON = """
from megatron.core.models.gpt import gpt_layer_specs
from nemo_rao.mcore.flex_attention import layer_spec_with_flex_attention

spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
made = layer_spec_with_flex_attention(None, spec=spec)
for one in (spec, made):
    attention = one.submodules.self_attention.submodules
    print(attention.linear_qkv.__name__, attention.core_attention.__name__)
"""


@pytest.mark.slow
def test_megatrons_own_spec_with_transformer_engine_is_understood(tmp_path: Path) -> None:
    """That of the installed megatron-core, over a package whose names can be imported and not used."""
    write_packages(tmp_path)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OF_MEGATRON],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-3:-1] == [
        "TELayerNormColumnParallelLinear TEDotProductAttention",
        "TELayerNormColumnParallelLinear FlexSegmentAttention",
    ]


class TEDotProductAttention:
    """Stands for Transformer Engine's, which needs a GPU to be imported."""


def engine_spec(kind: type, *, block: bool) -> Any:
    """As engines make them: of a layer, or of each layer."""
    import_once()
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    submodules = SelfAttentionSubmodules(linear_qkv=IdentityOp, core_attention=kind, linear_proj=IdentityOp)
    attention = ModuleSpec(module=SelfAttention, submodules=submodules)
    layer = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(self_attention=attention))
    return TransformerBlockSubmodules(layer_specs=[layer, layer]) if block else layer


@pytest.mark.parametrize("block", [False, True])
def test_the_core_attention_alone_is_replaced(block: bool) -> None:
    spec = engine_spec(TEDotProductAttention, block=block)
    from nemo_rao.mcore.flex_attention import FlexSegmentAttention, layer_spec_with_flex_attention

    config = tiny.config_for(tiny.Layout())
    stages = []

    def of_engine(config: Any, vp_stage: int | None = None) -> Any:
        stages.append(vp_stage)
        return spec

    made = layer_spec_with_flex_attention(config, vp_stage=1, spec=of_engine)
    assert stages == [1]
    for new, old in zip(made.layer_specs if block else [made], spec.layer_specs if block else [spec], strict=False):
        core = new.submodules.self_attention.submodules
        assert core.core_attention is FlexSegmentAttention
        assert dataclasses.replace(core, core_attention=TEDotProductAttention) == (
            old.submodules.self_attention.submodules
        ), "nothing else, and the engine's own is as it was"
    again = layer_spec_with_flex_attention(config, spec=made)
    assert again == made, "a config that is finished twice"


def test_attention_of_another_kind_is_refused() -> None:
    spec = engine_spec(int, block=False)
    from nemo_rao.errors import UserError
    from nemo_rao.mcore.flex_attention import layer_spec_with_flex_attention

    config = tiny.config_for(tiny.Layout())
    with pytest.raises(UserError, match=r"prefix_sharing=true: this model's attention, int, cannot share prompts"):
        layer_spec_with_flex_attention(config, spec=spec)
    with pytest.raises(UserError, match="no attention that can share prompts"):
        layer_spec_with_flex_attention(config, spec=spec.submodules.mlp)


def test_fields_that_flex_attention_does_not_have_are_refused_and_rotary_fusion_goes_where_rows_are_apart() -> None:
    import_once()
    from nemo_rao.errors import UserError
    from nemo_rao.mcore.flex_attention import share_prompts

    for field, value in {"attention_dropout": 0.1, "context_parallel_size": 2, "softmax_type": "learnable"}.items():
        config = tiny.config_for(tiny.Layout())
        setattr(config, field, value)
        with pytest.raises(UserError, match=f"data.prefix_sharing=true: not supported with .*{field}={value}"):
            share_prompts(config, packed=True)
    for packed in (True, False):
        config = tiny.config_for(tiny.Layout())
        config.apply_rope_fusion = True
        share_prompts(config, packed=packed)
        assert config.apply_rope_fusion is packed
