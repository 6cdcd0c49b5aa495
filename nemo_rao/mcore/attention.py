"""Attention over segments: tokens of a packed sequence see only their row, and a shared prompt is computed once.

What a token may see is given by a table of segments (:class:`nemo_rao.batch.MicroBatch`), not by a mask of T x T: each
segment is attended to separately, so neither other rows nor padding cost anything. The table takes the place of
Megatron's attention mask, which its layers pass on unchanged, and which activation recomputation keeps.

    without Transformer Engine    :class:`SegmentAttention`, with PyTorch's scaled dot product attention
    with it, rows                 its attention, in THD format (``PackedSeqParams``)
    with it, shared prompts       PyTorch's FlexAttention within its layers (:mod:`nemo_rao.mcore.flex_attention`)

Rotary embeddings use the positions within the row.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_rao.batch import MicroBatch
from nemo_rao.mcore.causal_masks import causal_mask
from nemo_rao.mcore.context_parallel import chunks_of_rank, size_and_rank, whole_sequences

# Before megatron-core 0.15 its attention rejects windows, and has no softmax offset.
_KNOWS_WINDOWS = "softmax_type" in TransformerConfig.__dataclass_fields__


@dataclass(frozen=True)
class LocalLayers:
    """Layers with a sliding window; every ``period``-th layer is global and sees all tokens.

    Attributes:
        window: number of previous tokens that a token sees.
        period: number of layers from one global layer to the next.
    """

    window: int
    period: int

    def has(self, layer_number: int) -> bool:
        """Whether a layer, counted from 1 through the whole model, is local."""
        return layer_number % self.period != 0


@contextlib.contextmanager
def segment_kwargs(model: Any, batch: MicroBatch) -> Iterator[dict[str, Any]]:
    """Yield the arguments that pass a micro-batch's segments to a Megatron GPT model chunk, for one forward pass."""
    if batch.segments is None:
        yield {"attention_mask": None}
        return
    if not _attends_to_segments(model):
        yield {"attention_mask": None, "packed_seq_params": _thd(batch)}
        return

    def of_all_ranks(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep the positions of other context-parallel ranks, which Megatron drops unless its own packing is used."""
        return arguments, {**keywords, "packed_seq": True}

    def of_rows(module: Any, arguments: Any, output: Any) -> Any:
        """Select ``[..., T/CP, B, 1, D]`` angles of each token's position from ``[..., T, 1, 1, D]`` of all positions.

        YaRN returns them with a factor for attention's logits.
        """
        if isinstance(output, tuple):
            return of_rows(module, arguments, output[0]), *output[1:]
        return output.squeeze(-2)[..., batch.position_ids.t(), :, :]

    rotary = model.rotary_pos_emb
    hooks = [rotary.register_forward_pre_hook(of_all_ranks, with_kwargs=True), rotary.register_forward_hook(of_rows)]
    try:
        yield {"attention_mask": batch.segments}
    finally:
        for hook in hooks:
            hook.remove()


def _attends_to_segments(model: Any) -> bool:
    return any(isinstance(module, SegmentAttention) for module in model.modules())


def _thd(batch: MicroBatch) -> PackedSeqParams:
    """Describe concatenated rows, the padding being the last one, in Transformer Engine's format."""
    assert batch.segments is not None and batch.tokens.shape[0] == 1, "THD is one sequence"
    assert batch.num_tokens == batch.num_row_tokens, "THD has no shared prompts"
    lengths = batch.segments[:, 0]
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = batch.longest_segment
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _pieces_of_rank(sizes: Sequence[int], num_sequences: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (segment, first, end) of the tokens on this context-parallel rank, in its order."""
    starts = list(itertools.accumulate(sizes, initial=0))
    for sequence in range(num_sequences):
        for start, end in chunks_of_rank(length, *size_and_rank()):
            start, end = sequence * length + start, sequence * length + end
            for number in range(bisect.bisect_right(starts, start) - 1, bisect.bisect_left(starts, end)):
                yield number, max(start - starts[number], 0), min(end - starts[number], sizes[number])


class SegmentAttention(DotProductAttention):
    """Megatron's attention with PyTorch's fused kernels, which never hold T x T weights, and tables of segments.

    Under context parallelism each rank gathers the keys and values of its group and attends to them with its queries
    (:mod:`nemo_rao.mcore.context_parallel`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *arguments: Any,
        local_layers: LocalLayers | None = None,
        **keywords: Any,
    ) -> None:
        # The constructor of Megatron's attention, without what it rejects and what is done here.
        bare = copy.copy(config)
        bare.context_parallel_size = 1
        if local_layers is not None:
            bare.window_size = (local_layers.window, 0) if local_layers.has(layer_number) else None
            bare.window_attn_skip_freq = None
        window = bare.window_size
        if not _KNOWS_WINDOWS:
            bare.window_size = None
        super().__init__(bare, layer_number, *arguments, **keywords)
        self._window = self.scale_mask_softmax.window_size if _KNOWS_WINDOWS else window
        self.config = config

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *arguments: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Compute ``[T, B, heads * D]`` from queries ``[T, B, heads, D]``, keys and values ``[T, B, groups, D]``.

        With context parallelism T is the rank's part.

        Args:
            attention_mask: ``None`` for causal attention, a table of segments ``[S, 3]`` int64, or any other argument
                of Megatron's attention, which is then used.
            packed_seq_params: instead of both, segments in THD format; then tensors are ``[T, heads, D]`` and the
                result is ``[T, heads * D]``.
        """
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().to(torch.int64)
            segments = F.pad(torch.stack([lengths, torch.full_like(lengths, -1)], dim=-1), (0, 1))
            return self.forward(query[:, None], key[:, None], value[:, None], segments)[:, 0]
        if attention_mask is not None and attention_mask.dtype != torch.int64:
            return super().forward(query, key, value, attention_mask, *arguments, **keywords)
        if attention_mask is None:
            return self._attend_to_rows(query, whole_sequences(key), whole_sequences(value))
        return self._attend_to_table(query, whole_sequences(key), whole_sequences(value), attention_mask)

    def _attend_to_rows(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return ``[T/CP, B, heads * D]``; keys and values are those of all T tokens.

        While decoding, queries are the last of T tokens, whose keys and values are cached; CP is then 1.
        """
        if size_and_rank()[0] == 1:
            return self._attend(query, key, value).flatten(2)
        chunks = chunks_of_rank(len(key), *size_and_rank())
        queries = query.split([end - start for start, end in chunks])
        attended = [self._attend(own, key[:end], value[:end]) for own, (_, end) in zip(queries, chunks, strict=True)]
        return torch.cat(attended).flatten(2)

    def _attend_to_table(self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
        """Return ``[T/CP, B, heads * D]``; keys and values are those of all T tokens."""
        table: list[tuple[int, int, int]] = segments.tolist()
        length, num_sequences = query.shape[:2]
        sizes = [size for size, _, _ in table]
        pieces = list(_pieces_of_rank(sizes, num_sequences, len(key)))
        # [B * T, 1, heads, D], split at the ends of segments: one copy, and one in backward.
        queries, keys, values = (
            part.transpose(0, 1).reshape(-1, 1, *part.shape[2:]).split(split)
            for part, split in ((query, [end - start for _, start, end in pieces]), (key, sizes), (value, sizes))
        )
        attended = []
        for own, (number, _, end) in zip(queries, pieces, strict=True):
            size, continued, is_padding = table[number]
            if is_padding:
                attended.append(torch.zeros_like(own))
                continue
            of_segment = keys[number], values[number]
            if end < size:
                of_segment = keys[number][:end], values[number][:end]
            if continued >= 0:
                of_segment = torch.cat([keys[continued], of_segment[0]]), torch.cat([values[continued], of_segment[1]])
            attended.append(self._attend(own, *of_segment))
        merged = torch.cat(attended).view(num_sequences, length, -1)
        return merged.transpose(0, 1).contiguous()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return ``[n, B, heads, D]`` for n queries, the last of m keys and values ``[m, B, groups, D]``."""
        num_queries, num_keys = len(query), len(key)
        window = self._window
        mask = None
        if num_queries < num_keys or window is not None or self._sinks is not None:
            earlier = None if window is None else window[0]
            mask = causal_mask(num_queries, num_keys, dtype=query.dtype, device=query.device, window=earlier)
        dropout = self.attention_dropout.p if self.training else 0.0
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
        # Without sequence parallelism each rank drops weights of its heads, with a separate generator.
        forked = dropout and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forked else contextlib.nullcontext():
            if self._sinks is not None:
                assert mask is not None
                return _attend_with_sinks(query, key, value, self._sinks, scale=scale, mask=mask, dropout=dropout)
            attended = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return attended.permute(2, 0, 1, 3)

    @property
    def _sinks(self) -> Tensor | None:
        """Return ``[heads]`` of this rank: the logit of a key with value zero that every query sees; or ``None``."""
        return self.softmax_offset if _KNOWS_WINDOWS else None


def _attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, scale: float, mask: Tensor, dropout: float
) -> Tensor:
    """``[n, B, heads, D]``; see :meth:`SegmentAttention._attend`. Holds all weights, because no fused kernel supports
    sinks.

    Args:
        mask: ``[n, m]``, added to the logits.
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
    logits = torch.einsum("nbhd,mbhd->bhnm", query, key).float() * scale + mask.float()
    sink = sinks.float()[:, None, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1].to(value.dtype)
    return torch.einsum("bhnm,mbhd->nbhd", F.dropout(weights, dropout), value)
