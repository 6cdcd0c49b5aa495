"""Shared prompts with Transformer Engine's layers: PyTorch's FlexAttention replaces their core attention.

Linear layers, norms, their fusions and FP8 remain Transformer Engine's. The core attention, which is computed in 16
bits, is one compiled kernel each for forward and backward, which skips the blocks that the table of segments excludes
(:mod:`nemo_rao.mcore.segment_masks`). The first layer of a micro-batch creates the mask for all of them.
:class:`~nemo_rao.mcore.attention.SegmentAttention` is used on CPUs, where FlexAttention has no backward pass, and is
the reference in tests.

Alternative considered: two calls of a variable-length kernel (FlashAttention, cuDNN), one from all responses to their
prompts without a causal mask and one from each segment to itself, merged by their log-sum-exp. On Hopper each call is
faster than FlexAttention. But merging takes further passes over ``[T, heads, D]`` in float32 in both directions;
backward needs the kernels' backward functions with an external log-sum-exp, which are private in both packages; prompts
would have to be copied next to each other, as responses lie between them; and a window that reaches from a response
back into its prompt depends on the query, which a call without a causal mask cannot express. FlexAttention needs only
PyTorch.

Not run on a GPU yet. Tested on a CPU: the mask for every layout, the forward pass, and the layer spec.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nemo_rao.errors import UserError
from nemo_rao.mcore.attention import SegmentAttention
from nemo_rao.mcore.segment_masks import block_mask

KEY = "data.prefix_sharing=true"

# Short sequences without a gradient would use the kernel for decoding, which rounds differently.
_KERNEL_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}


class FlexSegmentAttention(SegmentAttention):
    """:class:`SegmentAttention` with FlexAttention for tables of segments.

    Raises:
        UserError: the config requires a feature that FlexAttention lacks, such as dropout.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        _check(config)

    def _attend_to_table(self, query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        """Return ``[T, B, heads * D]``, computed as one sequence: no segment sees another sequence."""
        length, num_sequences = query.shape[:2]
        earlier = None if self._window is None else self._window[0]
        mask = _MASKS.of(table, length * num_sequences, earlier)
        attended = _flex_attention(query.device.type)(
            *(_as_one(part) for part in (query, key, value)),
            block_mask=mask,
            scale=self.softmax_scale * (self.scale_mask_softmax.scale or 1),
            enable_gqa=query.shape[2] != key.shape[2],
            kernel_options=_KERNEL_OPTIONS,
        )
        return attended[0].transpose(0, 1).reshape(num_sequences, length, -1).transpose(0, 1).contiguous()


def _as_one(part: Tensor) -> Tensor:
    """Reshape ``[T, B, heads, D]`` to ``[1, heads, B T, D]``; a view for one sequence."""
    return part.transpose(0, 1).flatten(0, 1).transpose(0, 1)[None]


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled on a GPU. The uncompiled form, for tests on a CPU, holds all attention weights.

    PyTorch compiles for the first length, and for all lengths once a second one occurs; separately with and without
    gradients, and for short sequences. ``dynamic=True`` would compile for all lengths at once, but also turn the scale
    and the block size into variables of the kernel.
    """
    if device_type != "cuda":
        return flex_attention
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 32)  # beyond it, fullgraph=True raises
    return torch.compile(flex_attention, fullgraph=True)


class _Masks:
    """Cache of the masks of the last ``size`` tables, shared by all layers, also when activations are recomputed.

    Recomputation passes the table as another tensor on the same memory. An entry keeps its table alive, so this
    memory cannot be given to another table.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: dict[tuple[Any, ...], tuple[Tensor, BlockMask]] = {}  # oldest first

    def of(self, table: Tensor, num_tokens: int, window: int | None) -> BlockMask:
        key = (table.device, table.data_ptr(), table.shape, num_tokens, window)
        if key not in self._held:
            self._held[key] = table, block_mask(table, num_tokens, window=window)
            if len(self._held) > self._size:
                del self._held[next(iter(self._held))]
        return self._held[key][1]


_MASKS = _Masks(32)  # enough for a pipeline's micro-batches in flight, with and without a window


# ------------------------------------------------------------------------------------------------ layer spec


def share_prompts(config: TransformerConfig, *, packed: bool) -> None:
    """Replace Transformer Engine's core attention by :class:`FlexSegmentAttention` in a model's layer spec.

    Args:
        config: an engine's config, with a ``transformer_layer_spec``. Modified in place.
        packed: micro-batches are one sequence. Otherwise rotary angles differ between sequences, which Transformer
            Engine's fused kernel cannot apply.

    Raises:
        UserError: the config requires a feature that FlexAttention lacks. A spec whose attention cannot be
            replaced is reported when the model is built.
    """
    _check(config)
    spec = config.transformer_layer_spec
    config.transformer_layer_spec = functools.partial(layer_spec_with_flex_attention, spec=spec)
    if not packed:
        config.apply_rope_fusion = False


def layer_spec_with_flex_attention(config: TransformerConfig, vp_stage: int | None = None, *, spec: Any) -> Any:
    """Return an engine's layer spec with :class:`FlexSegmentAttention` as its core attention.

    Args:
        spec: the engine's layer spec, or the function that creates it.

    Raises:
        UserError: the layers have no attention, or one that FlexAttention does not replace.
    """
    if callable(spec) and not isinstance(spec, ModuleSpec):
        takes_stage = "vp_stage" in inspect.signature(spec).parameters
        spec = spec(config, vp_stage=vp_stage) if takes_stage else spec(config)
    replaced, found = _replaced(spec)
    if not found:
        raise UserError(f"{KEY}: this model's layers have no attention that can share prompts. Set it to false.")
    return replaced


def _replaced(part: Any) -> tuple[Any, bool]:
    """Return a copy of a part of a spec with its core attention replaced, and whether it has one."""
    if isinstance(part, (list, tuple)):
        each = [_replaced(one) for one in part]
        return type(part)(one for one, _ in each), any(found for _, found in each)
    if isinstance(part, functools.partial):
        keywords, found = _replaced_fields(part.keywords)
        return (functools.partial(part.func, *part.args, **keywords), True) if found else (part, False)
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part, False
    names = [field.name for field in dataclasses.fields(part)]
    values, found = _replaced_fields({name: getattr(part, name) for name in names})
    if not found:
        return part, False
    made = copy.copy(part)
    for name, value in values.items():
        setattr(made, name, value)
    return made, True


def _replaced_fields(fields: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    values, any_found = {}, False
    for name, value in fields.items():
        if name == "core_attention":
            values[name], found = _flex_for(value), True
        else:
            values[name], found = _replaced(value)
        any_found |= found
    return values, any_found


def _flex_for(core: Any) -> type[FlexSegmentAttention]:
    kind = core.module if isinstance(core, ModuleSpec) else core
    if kind is FlexSegmentAttention:  # the config has been processed already
        return FlexSegmentAttention
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    if name != "TEDotProductAttention":
        raise UserError(f"{KEY}: this model's attention, {name}, cannot share prompts. Set it to false.")
    return FlexSegmentAttention


# Field of Megatron's config -> (supported values, meaning of the others). Some releases lack some fields.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "context_parallel_size": ((1,), "context parallelism"),
    "attention_dropout": ((0, 0.0), "attention dropout"),
    "multi_latent_attention": ((False,), "multi-latent attention"),
    "softmax_type": (("vanilla",), "a softmax offset"),
    "attn_logit_softcapping": ((None, 0, 0.0), "attention logit soft-capping"),
}


def _check(config: TransformerConfig) -> None:
    fields = vars(config)
    for name, (values, meaning) in _REFUSED.items():
        if fields.get(name, values[0]) not in values:
            raise UserError(
                f"{KEY}: not supported with {meaning} ({name}={fields[name]}) and Transformer Engine. Set it to false."
            )
