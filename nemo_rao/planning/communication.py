"""Bytes that a rank sends in one optimizer step, or in a forward-only pass over the same prompts, by ring collectives.

For a tensor of S bytes over t ranks an all-gather or reduce-scatter sends (t - 1)/t S, an all-reduce twice that.
Tensor parallelism follows Shoeybi et al. 2019; sequence parallelism Korthikanti et al. 2022, whose backward pass
gathers the inputs of linear_qkv and linear_fc1 again for the weights' gradients; context parallelism Liu et al. 2023
(Ring Attention), where keys and values circulate, and in the backward pass once more with their gradients; experts
Lepikhin et al. 2020 (GShard), where tokens are exchanged by all-to-all, to their experts and back, assumed to be
spread evenly over ranks. Communication of adapters, a few percent of a layer's, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.planning.activations import FP32, recomputed_layers, routed_tokens, stream_tokens
from nemo_rao.planning.buffers import stage_states
from nemo_rao.planning.parameters import stage_parameters
from nemo_rao.planning.setting import Setting


@dataclass(frozen=True)
class Communication:
    """Bytes that a rank sends in a step; each entry is from the stage that sends most of it.

    Attributes:
        tensor: within layers, embedding and log-probabilities, and between the ranks that split an expert.
        context: keys, values and their gradients.
        expert: tokens to their experts and back.
        pipeline: hidden states and their gradients to the neighbouring stages.
        gradients, weights: between the copies of the model; with the distributed optimizer the gradients are scattered
            and the updated weights gathered, without it the gradients are summed on every rank.
        expert_gradients, expert_weights: the same for experts that are split over ranks, between their copies.
        embedding: gradients of tied embeddings between the first and last stage.
    """

    tensor: int
    context: int
    expert: int
    pipeline: int
    gradients: int
    weights: int
    expert_gradients: int
    expert_weights: int
    embedding: int

    @property
    def data(self) -> int:
        """Bytes between data-parallel ranks, once per step."""
        return self.gradients + self.weights + self.expert_gradients + self.expert_weights

    @property
    def total(self) -> int:
        return self.tensor + self.context + self.expert + self.pipeline + self.data + self.embedding


def communication(setting: Setting) -> Communication:
    """Compute the communication of an optimizer step."""
    passes, stages = _training(setting), range(setting.pipeline)
    states = [stage_states(setting, stage) for stage in stages]
    gradients, weights = _data(setting, max(one.buffer for one in states), setting.shards)
    of_experts = _data(setting, max(one.expert_buffer for one in states), setting.expert_shards)
    return Communication(
        tensor=max(_tensor(setting, stage, passes) for stage in stages),
        context=max(_context(setting, stage, passes) for stage in stages),
        expert=max(_expert(setting, stage, passes) for stage in stages),
        pipeline=_pipeline(setting, passes),
        gradients=gradients,
        weights=weights,
        expert_gradients=of_experts[0],
        expert_weights=of_experts[1],
        embedding=_embedding(setting),
    )


def forward_communication(setting: Setting) -> Communication:
    """Compute the communication of a forward-only pass over as many prompts as a step has."""
    passes, stages = _Passes(forward=setting.num_micro_batches, again=0, backward=0), range(setting.pipeline)
    return Communication(
        tensor=max(_tensor(setting, stage, passes) for stage in stages),
        context=max(_context(setting, stage, passes) for stage in stages),
        expert=max(_expert(setting, stage, passes) for stage in stages),
        pipeline=_pipeline(setting, passes),
        gradients=0,
        weights=0,
        expert_gradients=0,
        expert_weights=0,
        embedding=0,
    )


@dataclass(frozen=True)
class _Passes:
    """Numbers of micro-batches that go forward, forward again for recomputation, and backward.

    A fractional micro-batch has proportionally fewer rows.
    """

    forward: float
    again: int
    backward: int

    def of_layers(self, setting: Setting, stage: int) -> tuple[float, int]:
        """Passes of a stage's layers: forward ones, recomputation included, and backward ones."""
        layers, again = setting.layers_of_stage(stage), recomputed_layers(setting, stage)
        return layers * self.forward + again * self.again, layers * self.backward


def _training(setting: Setting) -> _Passes:
    mismatched = 1 / setting.responses if setting.kl_estimate else 0  # one response per prompt
    number = setting.num_micro_batches
    return _Passes(forward=number * (1 + mismatched), again=number, backward=number)


def _ring(size: int, ranks: int) -> int:
    """Bytes that each rank sends in an all-gather or a reduce-scatter of ``size`` bytes."""
    return size * (ranks - 1) // ranks


def _tensor(setting: Setting, stage: int, passes: _Passes) -> int:
    network, ranks, n = setting.network, setting.tensor, setting.micro_batch_tokens
    one = _ring(n * network.hidden * setting.param_bytes, ranks)
    parts = 1 if network.experts else 2  # parts of a layer: attention, and a dense feed-forward part
    within = 2 * parts * one  # an all-reduce for each, or an all-gather and a reduce-scatter
    gathered = parts * one if setting.sequence_parallel and setting.lora is None else 0
    if network.experts:  # tokens are gathered over the ranks that split an expert, and its outputs scattered
        within += 2 * _ring(routed_tokens(setting) * network.hidden * setting.param_bytes, setting.of_expert)
    forward, backward = passes.of_layers(setting, stage)
    found = forward * within + backward * (within + gathered)
    if stage == 0:
        # An all-reduce; with sequence parallelism a reduce-scatter, and an all-gather in the backward pass.
        split = setting.sequence_parallel
        found += (1 if split else 2) * one * passes.forward + (one if split else 0) * passes.backward
    if stage == setting.pipeline - 1 and not setting.scores:
        found += 12 * n * (ranks - 1) * passes.forward  # each rank's three numbers per token
        gradient = _ring(n * network.hidden * (setting.param_bytes if setting.holds_logits else FP32), ranks)
        if setting.sequence_parallel:
            found += one * passes.forward + (one + gradient) * passes.backward
        else:
            found += 2 * gradient * passes.backward
    return int(found)


def _context(setting: Setting, stage: int, passes: _Passes) -> int:
    ranks = setting.context
    if ranks == 1:
        return 0
    own = setting.micro_batch_tokens * 2 * (setting.network.key // setting.tensor) * setting.param_bytes
    forward, backward = passes.of_layers(setting, stage)
    # Gradients need one more step around the ring.
    return int(own * (forward * (ranks - 1) + backward * (2 * ranks - 1)))


def _expert(setting: Setting, stage: int, passes: _Passes) -> int:
    if not setting.network.experts:
        return 0
    copies = stream_tokens(setting) * setting.network.chosen
    one = _ring(copies * setting.network.hidden * setting.param_bytes, setting.expert)
    return int(2 * one * sum(passes.of_layers(setting, stage)))


def _pipeline(setting: Setting, passes: _Passes) -> int:
    if setting.pipeline == 1:
        return 0
    # Each chunk sends hidden states forward and a gradient back, except at the two ends of the pipeline.
    tensor = stream_tokens(setting) * setting.network.hidden * setting.param_bytes
    back = setting.virtual - (setting.pipeline == 2)
    return int(tensor * (setting.virtual * passes.forward + back * passes.backward))


def _data(setting: Setting, elements: int, ranks: int) -> tuple[int, int]:
    """Bytes of gradients, and of updated weights, between the copies of a buffer."""
    gradients = _ring(elements * setting.grad_bytes, ranks)
    if not setting.use_distributed_optimizer:
        return 2 * gradients, 0
    return gradients, _ring(elements * setting.param_bytes, ranks)


def _embedding(setting: Setting) -> int:
    shared = (one for one in stage_parameters(setting, 0) if one.shared_embedding and one.trained)
    return sum(2 * _ring(one.size * setting.grad_bytes, 2) for one in shared)
