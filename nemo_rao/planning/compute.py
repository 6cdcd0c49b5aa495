"""FLOPs of a step, and the pipeline bubble.

A multiplication and an addition count as two. Model FLOPs are those of the network's matrix products (Chowdhery et al.
2022, appendix B; attention over all T x T pairs): once forward; once backward for inputs and once for trained weights.
Executed FLOPs add recomputation: recomputed layers, attention's scores in its backward pass, and logits that are not
stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_rao.planning.activations import recomputed_layers
from nemo_rao.planning.network import linear_widths
from nemo_rao.planning.setting import LINEAR_LAYERS, Setting


@dataclass(frozen=True)
class Flops:
    """FLOPs of a whole step, over all ranks.

    Attributes:
        model: the count by which MFU is measured.
        executed: includes recomputation.
        forward: one forward pass over the same prompts, such as the reference pass.
        mismatched: the pass over responses to other prompts, if a step has one; part of the first two.
    """

    model: int
    executed: int
    forward: int
    mismatched: int

    @property
    def in_forward(self) -> int:
        """FLOPs of a step's forward passes."""
        return self.forward + self.mismatched


@dataclass(frozen=True)
class Work:
    """What a step computes, over all ranks.

    Attributes:
        tokens: tokens of all micro-batches.
        pairs: pairs of a query and a key: the sum of the rows' squared lengths, as if attention were not causal.
    """

    tokens: int
    pairs: int


def flops(setting: Setting, work: Work | None = None) -> Flops:
    """Count the FLOPs of a step.

    Args:
        work: what the step computes; ``None``: rows of the planned length, including padding.
    """
    if work is None:
        work = Work(setting.step_tokens, setting.length * setting.step_tokens)
    network, tokens = setting.network, work.tokens
    layers = network.layers * _linear(setting) * tokens
    adapters = _adapters(setting) * tokens
    attention = network.layers * 4 * network.query * work.pairs
    output = 0 if setting.scores else 2 * network.hidden * network.vocabulary(setting.tensor) * tokens
    forward = layers + adapters + attention + output
    # Products of a backward pass: for frozen weights only the inputs' gradients.
    trained = 2 if setting.lora is None else 1
    model = forward + trained * (layers + output) + 2 * (attention + adapters)
    again = attention // 2  # the scores, one of two products
    if not setting.holds_logits:
        again += output
    if setting.recompute_granularity == "selective":
        again += attention
    share = sum(recomputed_layers(setting, stage) for stage in range(setting.pipeline))
    of_layers = adapters - _output_adapter(setting) * tokens
    again += (layers + of_layers + attention) * share // network.layers
    if setting.lora is not None:  # the embedding is frozen: the first layer's input needs no gradient
        inputs, outputs = linear_widths(network)["linear_qkv"]
        model -= 2 * inputs * outputs * tokens
    mismatched = forward // setting.responses if setting.kl_estimate else 0
    return Flops(model + mismatched, model + mismatched + again, forward, mismatched)


def bubble(setting: Setting) -> float:
    """Fraction of a step that a stage waits: (p - 1) / (v m + p - 1), v chunks per stage (Narayanan et al. 2021)."""
    waits = setting.pipeline - 1
    return waits / (setting.virtual * setting.num_micro_batches + waits)


def _linear(setting: Setting) -> int:
    """Forward FLOPs per token of a layer's linear layers, including its experts and the router."""
    network, times = setting.network, {}
    if network.experts:
        times = {"linear_fc1": network.chosen, "linear_fc2": network.chosen}
    widths = linear_widths(network)
    products = sum(2 * math.prod(widths[name]) * times.get(name, 1) for name in LINEAR_LAYERS)
    return products + 2 * network.hidden * network.experts


def _adapters(setting: Setting) -> int:
    """Forward FLOPs per token of all adapters."""
    lora = setting.lora
    if lora is None:
        return 0
    sides = {name: sum(widths) for name, widths in linear_widths(setting.network).items()}
    found = 0
    for stage in range(setting.pipeline):
        for names, layers in setting.adapted(stage).items():
            found += layers * sum(2 * lora.dim * sides[name] for name in names)
    return found + _output_adapter(setting)


def _output_adapter(setting: Setting) -> int:
    lora, network = setting.lora, setting.network
    if lora is None or not lora.adapts("output_layer"):
        return 0
    return 2 * lora.dim * (network.hidden + network.vocabulary(setting.tensor))
