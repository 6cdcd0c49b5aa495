"""Simulation of FP8 training without FP8 hardware: linear layers round their operands to 8 bits.

    forward    Y  = X~ W~^T         X, W in e4m3
    backward   dX = dY~ W~          dY in e5m2 (hybrid) or e4m3
               dW = dY~^T X~

Operands are rounded (:mod:`nemo_rao.ops.float8`), products are accumulated in fp32 and returned in the model's dtype,
as in Transformer Engine. What Transformer Engine does not compute in FP8 is not rounded: embedding, norms, attention,
output layer, log-probabilities. Recipes, by Megatron's names:

    delayed     one scale each for X, W, dY, from the largest values in a history. The values are reduced over tensor-
                and data-parallel ranks after each micro-batch's forward pass (X, W) and backward pass (dY)
    tensorwise  one scale per tensor, from its largest value
    blockwise   1 x 128 blocks of X and dY along the dimension that a product sums over, 128 x 128 blocks of W; scales
                are powers of 2
    mxfp8       blocks of 32 along the dimension that a product sums over; scales are powers of 2

Everything else is unchanged: Megatron's tensor and sequence parallelism, adapters, checkpoints. Differences from
Transformer Engine: weights are cast again in every micro-batch, even if delayed scales have changed since the step's
first; blocks along tokens are formed after gathering a split sequence, not before; full recomputation is rejected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from nemo_rao.mcore.layer_spec import layer_spec_without_te
from nemo_rao.mcore.norms import LayerNormColumnParallelLinear
from nemo_rao.ops.float8 import (
    E4M3,
    E5M2,
    LARGEST_SCALE,
    block_amax,
    e8m0_scale_of,
    largest,
    rounded,
    scale_of,
    spread,
)

INPUT, WEIGHT, GRADIENT = range(3)  # the operands of a linear layer's products: columns of the state below


@dataclass(frozen=True)
class Fp8Simulation:
    """Settings of the simulation. Fields are those of Megatron's ``TransformerConfig``, without ``fp8_``."""

    format: str = "hybrid"
    recipe: str = "delayed"
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    margin: int = 0
    wgrad: bool = True
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0

    def dtype(self, operand: int) -> torch.dtype:
        return E5M2 if self.format == "hybrid" and operand == GRADIENT else E4M3


# ----------------------------------------------------------------------------------------------------- scales


class DelayedScales:
    """Scales and amax histories of one linear layer, in Transformer Engine's layout.

    Attributes:
        state: ``[1 + L, 3]`` fp32 for input, weight, gradient. Row 0: scales. Row 1: the largest values seen since the
            last update. Further rows: those of earlier micro-batches, oldest first.
    """

    def __init__(self, simulation: Fp8Simulation) -> None:
        self._simulation = simulation
        self.state = torch.zeros(1 + simulation.amax_history_len, 3)
        self.state[0] = 1

    def round(self, values: Tensor, operand: int) -> tuple[Tensor, Tensor]:
        self.state = self.state.to(values.device)  # the model may have been moved since
        self.state[1, operand] = torch.maximum(self.state[1, operand], values.abs().max())
        same = rounded(values, self.state[0, operand].clone(), self._simulation.dtype(operand))
        return same, same

    def update(self, operands: slice) -> None:
        """Compute scales from the history with the newest values, and shift it by one row."""
        history = self.state[1:, operands]
        amax = history.amax(0) if self._simulation.amax_compute_algo == "max" else history[0].clone()
        limits = [largest(self._simulation.dtype(operand)) for operand in range(3)[operands]]
        scale = (amax.new_tensor(limits) / amax / 2**self._simulation.margin).clamp(max=LARGEST_SCALE)
        self.state[0, operands] = torch.where((amax > 0) & amax.isfinite(), scale, self.state[0, operands])
        history.copy_(history.roll(-1, 0))
        history[0] = 0


class CurrentScales:
    """Scales per tensor, or per block of it, from its current largest values."""

    def __init__(self, simulation: Fp8Simulation) -> None:
        self._simulation = simulation

    def round(self, values: Tensor, operand: int) -> tuple[Tensor, Tensor]:
        """Return ``[M, K]`` rounded for a product that sums over K, and for one that sums over M."""
        dtype = self._simulation.dtype(operand)
        if self._simulation.recipe == "tensorwise":
            same = rounded(values, scale_of(values.abs().max(), dtype), dtype)
            return same, same
        if self._simulation.recipe == "blockwise" and operand == WEIGHT:
            same = self._blocks(values, (128, 128), dtype)
            return same, same
        size = 128 if self._simulation.recipe == "blockwise" else 32
        return self._blocks(values, (1, size), dtype), self._blocks(values, (size, 1), dtype)

    def _blocks(self, values: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
        amax = block_amax(values, block)
        mx = self._simulation.recipe == "mxfp8"
        scales = e8m0_scale_of(amax, dtype) if mx else scale_of(amax, dtype, power_of_2=True)
        return rounded(values, spread(scales, block, values.shape), dtype)


class ScaleUpdates:
    """Update of the scales of one model chunk's layers with delayed scaling.

    Forward values are used when the chunk's last layer has run, gradients when the backward pass has reached the first
    layer that has one. Both only with gradients enabled. Largest values are reduced over the ranks that hold parts of
    the same layers or see other data, in one collective.
    """

    def __init__(self, layers: Iterable[Fp8Linear], decoder: torch.nn.Module) -> None:
        self._scales = [layer.scales for layer in layers if isinstance(layer.scales, DelayedScales)]
        self._first_is_ahead = False
        decoder.register_forward_pre_hook(self._before_forward)
        decoder.register_forward_hook(self._after_forward)

    def _before_forward(self, *_: Any) -> None:
        self._first_is_ahead = True

    def _after_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._update(slice(INPUT, GRADIENT))

    def is_first(self) -> bool:
        """Whether this is the first layer of this forward pass to call it, so that its backward pass is the last."""
        first, self._first_is_ahead = self._first_is_ahead, False
        return first

    def after_backward(self) -> None:
        self._update(slice(GRADIENT, None))

    def _update(self, operands: slice) -> None:
        newest = torch.stack([scales.state[1, operands] for scales in self._scales])
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        torch.distributed.all_reduce(newest, op=torch.distributed.ReduceOp.MAX, group=group)
        for scales, amax in zip(self._scales, newest, strict=True):
            scales.state[1, operands] = amax
            scales.update(operands)


# ----------------------------------------------------------------------------------------------------- layers


class _Product(torch.autograd.Function):
    """``[M, K]`` x ``[N, K]`` -> ``[M, N]``, with rounded operands, also of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Fp8Linear, updates: ScaleUpdates | None) -> Tensor:
        x_by_k, x_by_m = layer.scales.round(x.float(), INPUT)
        weight_by_k, weight_by_n = layer.scales.round(weight.float(), WEIGHT)
        ctx.layer, ctx.updates = layer, updates
        ctx.save_for_backward(x_by_m if layer.simulation.wgrad else x, weight_by_n, weight)
        return (x_by_k @ weight_by_k.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight_by_n, weight = ctx.saved_tensors
        by_n, by_m = ctx.layer.scales.round(gradient.float(), GRADIENT)
        if not ctx.layer.simulation.wgrad:
            by_m = gradient.float()
        of_x = (by_n @ weight_by_n).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (by_m.t() @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if ctx.updates is not None:
            ctx.updates.after_backward()
        return of_x, of_weight, None, None


class Fp8Linear(torch.nn.Module):
    """Mixin for Megatron's parallel linear layers that rounds the operands of their products."""

    simulation: Fp8Simulation
    scales: DelayedScales | CurrentScales
    updates: ScaleUpdates | None

    def simulate(self, simulation: Fp8Simulation) -> None:
        self.simulation = simulation
        self.updates = None
        delayed = simulation.recipe == "delayed"
        self.scales = DelayedScales(simulation) if delayed else CurrentScales(simulation)

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, **arguments: Any) -> Tensor:
        """Compute the product of Megatron's layers, including its communication."""
        if arguments["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=arguments["tp_group"])
        elif arguments["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=arguments["tp_group"])
        counts = self.updates is not None and torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        updates = self.updates if counts and self.updates is not None and self.updates.is_first() else None
        output = _Product.apply(input.flatten(0, -2), weight, self, updates).unflatten(0, input.shape[:-1])
        return output if arguments["bias"] is None else output + arguments["bias"]

    def get_extra_state(self) -> Tensor | None:
        """Return a layer's state for checkpoints: :attr:`DelayedScales.state`."""
        return self.scales.state.clone() if isinstance(self.scales, DelayedScales) else None

    def set_extra_state(self, state: Any) -> None:
        """Set a state from a checkpoint; without one, or with one of another length, keep the initial state."""
        if isinstance(self.scales, DelayedScales) and isinstance(state, Tensor):
            own = self.scales.state
            own.copy_(state if state.shape == own.shape else own)


class Fp8LayerNormColumnParallelLinear(Fp8Linear, LayerNormColumnParallelLinear):
    def __init__(self, *arguments: Any, simulation: Fp8Simulation, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.simulate(simulation)


class Fp8RowParallelLinear(Fp8Linear, RowParallelLinear):
    def __init__(self, *arguments: Any, simulation: Fp8Simulation, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.simulate(simulation)


_ROUNDED = {LayerNormColumnParallelLinear: Fp8LayerNormColumnParallelLinear, RowParallelLinear: Fp8RowParallelLinear}


def layer_spec_with_simulated_fp8(
    config: TransformerConfig, vp_stage: int | None = None, *, simulation: Fp8Simulation
) -> ModuleSpec:
    """Return :func:`layer_spec_without_te` with rounding linear layers, except first and last layers kept in bf16."""
    spec = layer_spec_without_te(config, vp_stage)
    first = get_transformer_layer_offset(config, vp_stage)
    start, end = simulation.num_layers_at_start_in_bf16, simulation.num_layers_at_end_in_bf16
    layers = [
        layer if number < start or number >= config.num_layers - end else _with_rounded(layer, simulation)
        for number, layer in enumerate(spec.submodules.layer_specs, start=first)
    ]
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, layer_specs=layers))


def _with_rounded(spec: Any, simulation: Fp8Simulation) -> Any:
    """Return a spec, or a part of one, with every linear layer replaced by a rounding one."""
    if isinstance(spec, type) and spec in _ROUNDED:
        return ModuleSpec(module=_ROUNDED[spec], params={"simulation": simulation})
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        return spec
    parts = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return dataclasses.replace(spec, **{name: _with_rounded(part, simulation) for name, part in parts.items()})


def keep_scales_up_to_date(model: Any) -> None:
    """Register updates of the delayed scales of a Megatron GPT model chunk; no effect with other recipes."""
    layers = [module for module in model.decoder.modules() if isinstance(module, Fp8Linear)]
    if any(isinstance(layer.scales, DelayedScales) for layer in layers):
        updates = ScaleUpdates(layers, model.decoder)
        for layer in layers:
            layer.updates = updates
