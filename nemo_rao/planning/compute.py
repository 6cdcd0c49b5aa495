"""FLOPs of a step, and the pipeline's bubble.

A multiplication and an addition are two. Model FLOPs are those of the network's own matrix products (Chowdhery et al.
2022, appendix B; attention over all T x T pairs): forward once; backward once for inputs and once for weights that are
trained. Executed FLOPs add what is computed again: recomputed layers, attention's scores in its backward pass, logits
that were left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_rao.planning.activations import recomputed_layers
from nemo_rao.planning.network import linear_widths
from nemo_rao.planning.setting import LINEAR_LAYERS, Setting


@dataclass(frozen=True)
class Flops:
    """Of a whole step, over all ranks.

    Attributes:
        model: by which MFU is measured.
        executed: with what is computed again.
        forward: of one forward pass over the same prompts, such as the reference pass.
        mismatched: of the pass over responses to other prompts, where a step has one; a part of the first two.
    """

    model: int
    executed: int
    forward: int
    mismatched: int

    @property
    def in_forward(self) -> int:
        """Of a step's forward passes."""
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
    """FLOPs of a step.

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
    trained = 2 if setting.lora is None else 1  # products of a backward pass: of the inputs alone where frozen
    model = forward + trained * (layers + output) + 2 * (attention + adapters)
    again = attention // 2  # the scores, one of two products
    if not setting.holds_logits:
        again += output
    if setting.recompute_granularity == "selective":
        again += attention
    share = sum(recomputed_layers(setting, stage) for stage in range(setting.pipeline))
    of_layers = adapters - _output_adapter(setting) * tokens
    again += (layers + of_layers + attention) * share // network.layers
    if setting.lora is not None:  # the embedding is frozen: nobody asks for the gradient of the first layer's input
        inputs, outputs = linear_widths(network)["linear_qkv"]
        model -= 2 * inputs * outputs * tokens
    mismatched = forward // setting.responses if setting.kl_estimate else 0
    return Flops(model + mismatched, model + mismatched + again, forward, mismatched)


def bubble(setting: Setting) -> float:
    """Share of a step in which a stage waits: (p - 1) / (v m + p - 1) with v chunks a stage (Narayanan et al. 2021)."""
    waits = setting.pipeline - 1
    return waits / (setting.virtual * setting.num_micro_batches + waits)


def _linear(setting: Setting) -> int:
    """FLOPs a token of a layer's linear layers, forward: of the experts that it has, and of the router."""
    network, times = setting.network, {}
    if network.experts:
        times = {"linear_fc1": network.chosen, "linear_fc2": network.chosen}
    widths = linear_widths(network)
    products = sum(2 * math.prod(widths[name]) * times.get(name, 1) for name in LINEAR_LAYERS)
    return products + 2 * network.hidden * network.experts


def _adapters(setting: Setting) -> int:
    """FLOPs a token of all adapters, forward."""
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
