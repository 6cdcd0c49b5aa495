"""Bridge's adapter schemes for one linear layer: LoRA, canonical LoRA and DoRA.

    lora             W x + s B A x                      one adapter; W may be several fused matrices
    canonical_lora   W x + s B A x                      separate B and A for each of the fused matrices
    dora             m * (W + s B A) x / |W + s B A|    norms and m row by row (https://arxiv.org/abs/2402.09353, eq. 5)

with ``s = alpha / dim``. Adapters and their names in checkpoints are Bridge's. Its wrappers' computation is replaced
where it is not correct for every run: canonical LoRA of some parts of a layer, or with an odd number of tokens on
several TP ranks; DoRA if TP ranks share a layer's input, or if the layer has a bias. So is the checkpoint layout of
both schemes for gated feed-forward layers, whose row order would depend on TP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.bridge.peft.canonical_lora import CanonicalLoRA, LoRALinearSplitFC1UpGate, LoRALinearSplitQKV
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.dora_layers import DoRALinear, ParallelLinearDoRAAdapter
from megatron.bridge.peft.lora import LoRA
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor, nn

from nemo_rao.config.lora_targets import SPLIT
from nemo_rao.config.model_config import LoraConfig

# A wrapped layer, and its adapters by the name of the layer, or part of a layer, that they apply to.
Wrapped = tuple[Any, Mapping[str, Any]]


def _lora(layer: nn.Module, name: str, wanted: set[str], keys: LoraConfig) -> Wrapped:
    wrapper = _NamedLoRA(**_sizes(keys)).transform(layer, name)
    return wrapper, {name: wrapper.adapter}


def _canonical_lora(layer: nn.Module, name: str, wanted: set[str], keys: LoraConfig) -> Wrapped:
    before, _, last = name.rpartition(".")
    parts = [part for part in SPLIT.get(last, ()) if f"{before}.{part}" in wanted]
    made = _NamedCanonicalLoRA(**_sizes(keys))
    made.canonical_mapping[name] = set(parts or [last])
    wrapper = made.transform(layer, last, before)
    if not parts:
        return wrapper, {name: wrapper.adapter}
    wrapper.__class__ = _SplitQKV if last == "linear_qkv" else _SplitFC1
    found = {}
    for key, adapter in list(wrapper.adapter.items()):
        if adapter is None:
            del wrapper.adapter[key]
            continue
        part = f"{before}.{next(one for one in parts if one.endswith(key.removeprefix('adapter')))}"
        # Under the layer's name, checkpoints would store the rows of this part as if they belonged to two matrices.
        adapter.base_linear_name = part.replace("linear_fc1_", "linear_")
        found[part] = adapter
    return wrapper, found


def _dora(layer: nn.Module, name: str, wanted: set[str], keys: LoraConfig) -> Wrapped:
    wrapper = _NamedDoRA(**_sizes(keys)).transform(layer, name)
    wrapper.__class__, wrapper.adapter.__class__ = _DoRALinear, _DoRAAdapter
    wrapper.start_magnitude()
    return wrapper, {name: wrapper.adapter}


FORMS: Mapping[str, Callable[[nn.Module, str, set[str], LoraConfig], Wrapped]] = {
    "lora": _lora,
    "canonical_lora": _canonical_lora,
    "dora": _dora,
}


def _sizes(keys: LoraConfig) -> dict[str, Any]:
    return {"dim": keys.dim, "alpha": keys.alpha, "dropout": keys.dropout, "target_modules": []}


class _Chosen:
    """Bridge's transforms, applied to layers that are already selected."""

    def match(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        whole = f"{prefix}.{name}" if prefix else name
        return None if whole is None else (whole, whole)


class _NamedLoRA(_Chosen, LoRA): ...


class _NamedCanonicalLoRA(_Chosen, CanonicalLoRA): ...


class _NamedDoRA(_Chosen, DoRA): ...


class _SplitQKV(LoRALinearSplitQKV):
    """Queries, keys and values, interleaved by group: a group's queries, its key, its value."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output, bias
        config = self.to_wrap.config
        groups = config.num_query_groups // config.tensor_model_parallel_size  # on this rank
        of_query = config.num_attention_heads // config.num_query_groups * config.kv_channels
        by_group = output.unflatten(-1, (groups, of_query + 2 * config.kv_channels))
        sizes = (of_query, config.kv_channels, config.kv_channels)
        changed = [
            part + self.adapter[key](normed).unflatten(-1, (groups, size)) if key in self.adapter else part
            for key, part, size in zip(
                ("adapter_q", "adapter_k", "adapter_v"), by_group.split(sizes, dim=-1), sizes, strict=True
            )
        ]
        return torch.cat(changed, dim=-1).flatten(-2), bias


class _SplitFC1(LoRALinearSplitFC1UpGate):
    """The gate and the up projection, concatenated."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output, bias
        changed = [
            part + self.adapter[key](normed) if key in self.adapter else part
            for key, part in zip(("adapter_gate", "adapter_up"), output.chunk(2, dim=-1), strict=True)
        ]
        return torch.cat(changed, dim=-1), bias


class _DoRAAdapter(ParallelLinearDoRAAdapter):
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **further: Any
    ) -> Any:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata, **further)
        if "linear_fc1" in self.base_linear_name and self.config.gated_linear_unit:
            name = f"{prefix}weight_magnitude"  # of two matrices, each with rows on every TP rank
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state


class _DoRALinear(DoRALinear):
    def start_magnitude(self) -> None:
        """Initialize the magnitude with the norms of the initial weight's rows, split over TP ranks."""
        config, magnitude = self.to_wrap.config, self.adapter.weight_magnitude
        magnitude.data.copy_(self._get_weight_norm())
        if not self.adapter.input_is_parallel:
            set_tensor_model_parallel_attributes(magnitude, True, 0, 1)
        elif config.sequence_parallel:
            magnitude.sequence_parallel = True  # each rank has the gradient of its tokens only

    @torch.no_grad()
    def _get_weight_norm(self) -> Tensor:
        adapter, weight = self.adapter, self.to_wrap.weight
        into, out = adapter.linear_in.weight, adapter.linear_out.weight
        if adapter.input_is_parallel:
            out = gather_from_tensor_model_parallel_region(out.T).T
        else:
            into = gather_from_tensor_model_parallel_region(into.T).T
        squares = (weight + self.scaling * out @ into).float().square().sum(dim=1)
        if adapter.input_is_parallel:
            torch.distributed.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
        return squares.sqrt().to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output, bias
        scale = self.adapter.weight_magnitude / self._get_weight_norm()
        product = output + self.adapter(normed.contiguous())
        added = self.to_wrap.bias
        # The output then includes the bias, which must not be divided by the norm.
        if bias is None and added is not None and added.numel():
            return scale * (product - added) + added, bias
        return scale * product, bias
