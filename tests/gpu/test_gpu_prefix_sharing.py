"""Shared prompts on a GPU: compiled FlexAttention against SegmentAttention, and inside Transformer Engine's layers.

The oracle is SegmentAttention in float32, on the same inputs. FlexAttention runs in bf16 alone: each type is compiled
by itself. Tolerances: 2^-6 of the largest entry, for outputs and gradients, as weights and outputs are rounded to 8
bits. Of whole models in bf16, whose layers round everywhere: 0.01 nats a token, and 5 % of a gradient's norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, Sample
from nemo_rao.runtime.gpus import has_gpu

from ..mcore import tiny
from ..mcore.test_flex_attention import LAYOUTS, batch_of, long_table, table_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs a GPU")]
GPU = "cuda"
HEADS, GROUPS, HEAD_SIZE = 4, 2, 64


@pytest.fixture(scope="module", autouse=True)
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank's process groups, in this process."""
    import torch.distributed as dist

    if made := not dist.is_initialized():
        file = Path(tmp_path_factory.mktemp("rendezvous"), "store")
        dist.init_process_group("nccl", store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    tiny.enter(tiny.Layout())
    yield
    if made:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- attention


def attention(kind: str, window: int | None = None) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_rao.mcore.attention import SegmentAttention
    from nemo_rao.mcore.flex_attention import FlexSegmentAttention

    made = {"segments": SegmentAttention, "flex": FlexSegmentAttention}[kind]
    config = dataclasses.replace(
        tiny.config_for(tiny.Layout()),
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_SIZE,
        window_size=None if window is None else (window, 0),
    )
    return made(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")


def inputs_of(length: int, num_sequences: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values ``[T, B, heads or groups, D]``, and the output's gradient ``[T, B, heads * D]``."""
    generator = torch.Generator(GPU).manual_seed(seed)
    shapes = [(HEADS, HEAD_SIZE), (GROUPS, HEAD_SIZE), (GROUPS, HEAD_SIZE), (HEADS * HEAD_SIZE,)]
    return [torch.randn(length, num_sequences, *one, generator=generator, device=GPU).to(dtype) for one in shapes]


def passes(attend: Callable[..., Tensor], inputs: list[Tensor], table: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values; nothing of padding, which has no meaning."""
    leaves = [one.to(dtype).detach().requires_grad_() for one in inputs[:3]]
    output = attend(*leaves, table)
    length, num_sequences = inputs[0].shape[:2]
    padding = table[:, 2].bool().repeat_interleave(table[:, 0]).view(num_sequences, length).t()
    output.backward(inputs[3].to(dtype).masked_fill(padding[..., None], 0))
    grads = [leaf.grad for leaf in leaves]
    return [output.detach().masked_fill(padding[..., None], 0), *(one for one in grads if one is not None)]


def tables() -> dict[str, tuple[Tensor, int, int]]:
    """Name -> table, T, B."""
    made = {}
    for name in LAYOUTS:
        batch = batch_of(name)
        made[name] = table_of(batch), batch.tokens.shape[1], batch.tokens.shape[0]
    for seed in (1, 2, 3):
        table, num_tokens = long_table(seed)
        made[f"long {seed}"] = table, num_tokens, 1
    return made


@pytest.mark.parametrize("window", [None, 5, 200])
def test_values_and_gradients_are_those_of_segment_attention(window: int | None) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for name, (table, length, num_sequences) in tables().items():
        inputs = inputs_of(length, num_sequences, torch.bfloat16)
        with sdpa_kernel(SDPBackend.MATH):
            expected = passes(attention("segments", window), inputs, table.to(GPU), torch.float32)
        found = passes(attention("flex", window), inputs, table.to(GPU), torch.bfloat16)
        for what, one, wanted in zip(("output", "query", "key", "value"), found, expected, strict=True):
            error = (one.float() - wanted).abs().max() / wanted.abs().max()
            assert error <= 2**-6, (name, what, float(error))


def test_recomputed_activations_have_the_same_gradients() -> None:
    from megatron.core import tensor_parallel

    attend = attention("flex")
    table, length, _ = tables()["long 1"]
    inputs = inputs_of(length, 1, torch.bfloat16)
    plain = passes(attend, inputs, table.to(GPU), torch.bfloat16)
    again = passes(
        lambda *given: tensor_parallel.checkpoint(attend, False, *given), inputs, table.to(GPU), torch.bfloat16
    )
    for one, wanted in zip(again, plain, strict=True):
        torch.testing.assert_close(one, wanted)


def test_other_lengths_neither_compile_again_nor_wait_for_the_device() -> None:
    from torch._dynamo.utils import counters

    attend = attention("flex")
    given = []
    for seed in (1, 3, 5):
        table, num_tokens = long_table(seed)
        given.append((inputs_of(num_tokens, 1, torch.bfloat16), table.to(GPU)))

    def both(inputs: list[Tensor], table: Tensor) -> None:
        leaves = [one.requires_grad_() for one in inputs[:3]]
        attend(*leaves, table).backward(inputs[3])

    both(*given[0])
    both(*given[1])
    graphs = counters["stats"]["unique_graphs"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(*given[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == graphs


def test_weights_are_never_held() -> None:
    attend = attention("flex")
    table = torch.tensor([[2048, -1, 0], *[[1536, 0, 0]] * 4], device=GPU)
    length = int(table[:, 0].sum())
    inputs = inputs_of(length, 1, torch.bfloat16)
    passes(attend, inputs, table, torch.bfloat16)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    passes(attend, inputs, table, torch.bfloat16)
    held = torch.cuda.max_memory_allocated() - before
    assert held < HEADS * length**2 * 2 / 4, "a quarter of the weights in bf16"


# ------------------------------------------------------------------------- in Transformer Engine's layers

VOCAB = 512


def samples() -> list[Sample]:
    """Three prompts of up to two blocks with four responses each."""
    rng = np.random.default_rng(0)
    made = []
    for prompt in range(3):
        tokens = rng.integers(2, VOCAB, 60 + 90 * prompt).astype(np.int32)
        tokens[0] = 1
        responses = tuple(rng.integers(2, VOCAB, rng.integers(20, 150)).astype(np.int32) for _ in range(4))
        nothing = np.zeros((4, 0)), np.zeros(0)
        made.append(Sample(tokens, responses, rng.random(4), False, f"row {prompt}", *nothing))
    return made


def micro_batch(**layout: bool) -> MicroBatch:
    from nemo_rao.data.collate import collate
    from nemo_rao.mcore.forward import to_device

    return to_device(collate(samples(), [0, 4, 8], pad_token_id=0, pad_multiple=16, **layout))


def build(*, shared_prompts: bool, packed: bool, **fields: Any) -> Any:
    """A Llama of Transformer Engine's layers in bf16, its weights the same at each call."""
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemo_rao.mcore.finish import finish_config

    from ..mcore.gpt import GPT, LLAMA

    config = GPT(
        **LLAMA,
        num_layers=2,
        hidden_size=HEADS * HEAD_SIZE,
        ffn_hidden_size=512,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        vocab_size=VOCAB,
        seq_length=1024,
        init_method_std=0.05,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        apply_rope_fusion=True,
        transformer_layer_spec=lambda config, vp_stage=None: get_gpt_layer_with_transformer_engine_spec(),
        **fields,
    )
    finish_config(config, fp8_simulation=None, shared_prompts=shared_prompts, packed=packed)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    return config.build().cuda()


def log_probs_and_gradients(model: Any, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """``[R, 2]`` sums, and the gradients of the mean over tokens."""
    from nemo_rao.mcore.forward import forward_step
    from nemo_rao.mcore.loss import sequence_log_probs

    sums = torch.stack(sequence_log_probs(forward_step(model, batch), batch, vocab_size=VOCAB), -1)
    (sums[:, 1].sum() / batch.num_tokens).backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return sums.detach(), gradients


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, dict[str, Tensor]]:
    """By Transformer Engine's own attention, in its THD format."""
    batch = micro_batch(packed=True)
    sums, gradients = log_probs_and_gradients(build(shared_prompts=False, packed=True), batch)
    return sums, {name: gradient * batch.num_tokens for name, gradient in gradients.items()}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "a sequence a prompt"])
def test_a_model_with_shared_prompts_equals_transformer_engines_own_attention(
    rows: tuple[Tensor, dict[str, Tensor]], packed: bool, recompute: bool
) -> None:
    from nemo_rao.mcore.flex_attention import FlexSegmentAttention

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = build(shared_prompts=True, packed=packed, **(full if recompute else {}))
    kinds = {type(module).__name__ for module in model.decoder.modules()}
    assert FlexSegmentAttention.__name__ in kinds and "TEDotProductAttention" not in kinds
    assert "TELayerNormColumnParallelLinear" in kinds
    batch = micro_batch(shared_prompts=True, packed=packed)
    assert batch.num_tokens < batch.num_row_tokens
    sums, gradients = log_probs_and_gradients(model, batch)
    lengths = torch.stack([batch.prompt_lengths[batch.prompt_index], batch.response_lengths], -1)
    assert ((sums - rows[0]).abs() / lengths).max() <= 0.01
    assert gradients.keys() == rows[1].keys()
    for name, gradient in gradients.items():
        expected = rows[1][name]
        assert (gradient * batch.num_tokens - expected).norm() <= 0.05 * expected.norm(), name


def test_fp8_stays_transformer_engines() -> None:
    """Its linear layers quantize, with scales of their own; the attention computes in bf16."""
    model = build(shared_prompts=True, packed=True, fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=4)
    batch = micro_batch(shared_prompts=True, packed=True)
    in_bf16, _ = log_probs_and_gradients(build(shared_prompts=True, packed=True), batch)
    in_fp8, gradients = log_probs_and_gradients(model, batch)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    difference = (in_fp8 - in_bf16).abs().sum() / in_bf16.abs().sum()
    assert 0 < difference < 0.05
