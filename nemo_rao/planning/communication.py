"""Bytes that a rank sends in one optimizer step, by ring collectives.

Of a tensor of S bytes over t ranks an all-gather or reduce-scatter sends (t - 1)/t S, an all-reduce twice that.
Tensor parallelism follows Shoeybi et al. 2019, with the sequence split Korthikanti et al. 2022, whose backward pass
gathers the inputs of linear_qkv and linear_fc1 once more; context parallelism Liu et al. 2023 (Ring Attention), where
keys and values go round, in the backward pass once more and with their gradients; experts Lepikhin et al. 2020
(GShard), where tokens are exchanged by all-to-all, to their experts and back, taken to be equally many on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.planning.activations import FP32, recomputed_layers, routed_tokens, stream_tokens
from nemo_rao.planning.buffers import stage_states
from nemo_rao.planning.parameters import stage_parameters
from nemo_rao.planning.setting import Setting


@dataclass(frozen=True)
class Communication:
    """Bytes that a rank sends in a step; of the stage that sends most of each.

    Attributes:
        tensor: within layers, embedding and log-probabilities, and among the ranks that share an expert.
        context: keys, values and their gradients.
        expert: tokens to their experts and back.
        pipeline: hidden states and their gradients to the neighbouring stages.
        data: gradients, and with the distributed optimizer the updated weights.
        embedding: gradients of tied embeddings between the first and last stage.
    """

    tensor: int
    context: int
    expert: int
    pipeline: int
    data: int
    embedding: int

    @property
    def total(self) -> int:
        return self.tensor + self.context + self.expert + self.pipeline + self.data + self.embedding


def communication(setting: Setting) -> Communication:
    stages = range(setting.pipeline)
    return Communication(
        tensor=max(_tensor(setting, stage) for stage in stages),
        context=max(_context(setting, stage) for stage in stages),
        expert=max(_expert(setting, stage) for stage in stages),
        pipeline=_pipeline(setting),
        data=max(_data(setting, stage) for stage in stages),
        embedding=_embedding(setting),
    )


def _ring(size: int, ranks: int) -> int:
    """Bytes sent for an all-gather or a reduce-scatter of ``size`` bytes."""
    return size * (ranks - 1) // ranks


def _passes(setting: Setting, stage: int) -> tuple[int, int]:
    """Of a stage's layers in a step: forward passes, those that are computed again included, and backward ones."""
    layers, again = setting.layers_of_stage(stage), recomputed_layers(setting, stage)
    return (layers + again) * setting.num_micro_batches, layers * setting.num_micro_batches


def _tensor(setting: Setting, stage: int) -> int:
    network, ranks, n = setting.network, setting.tensor, setting.micro_batch_tokens
    one = _ring(n * network.hidden * setting.param_bytes, ranks)
    parts = 1 if network.experts else 2  # of a layer: attention, and a feed-forward part that is not of experts
    within = 2 * parts * one  # an all-reduce for each, or an all-gather and a reduce-scatter
    gathered = parts * one if setting.sequence_parallel else 0
    if network.experts:  # the tokens of all ranks that share an expert are gathered there, and its outputs scattered
        within += 2 * _ring(routed_tokens(setting) * network.hidden * setting.param_bytes, setting.of_expert)
    forward, backward = _passes(setting, stage)
    found = forward * within + backward * (within + gathered)
    ends = 0
    if stage == 0:
        # An all-reduce; with the sequence split a reduce-scatter, and an all-gather in backward.
        ends += 2 * one
    if stage == setting.pipeline - 1:
        ends += 12 * n * (ranks - 1)  # each rank's three numbers a token
        gradient = _ring(n * network.hidden * (FP32 if setting.fused_log_probs else setting.param_bytes), ranks)
        ends += (2 * one + gradient) if setting.sequence_parallel else 2 * gradient
    return found + ends * setting.num_micro_batches


def _context(setting: Setting, stage: int) -> int:
    ranks = setting.context
    if ranks == 1:
        return 0
    own = setting.micro_batch_tokens * 2 * (setting.network.key // setting.tensor) * setting.param_bytes
    forward, backward = _passes(setting, stage)
    # Gradients come home in one step more.
    return own * (forward * (ranks - 1) + backward * (2 * ranks - 1))


def _expert(setting: Setting, stage: int) -> int:
    if not setting.network.experts:
        return 0
    copies = stream_tokens(setting) * setting.network.chosen
    one = _ring(copies * setting.network.hidden * setting.param_bytes, setting.expert)
    return 2 * one * sum(_passes(setting, stage))


def _pipeline(setting: Setting) -> int:
    # Each chunk sends hidden states on and a gradient back, but for the first and last of all.
    messages = 2 * setting.virtual - (setting.pipeline <= 2) if setting.pipeline > 1 else 0
    tensor = stream_tokens(setting) * setting.network.hidden * setting.param_bytes
    return messages * tensor * setting.num_micro_batches


def _data(setting: Setting, stage: int) -> int:
    states = stage_states(setting, stage)
    found = 0
    for elements, ranks in ((states.buffer, setting.shards), (states.expert_buffer, setting.expert_shards)):
        gradients = _ring(elements * setting.grad_bytes, ranks)
        weights = _ring(elements * setting.param_bytes, ranks)
        found += gradients + (weights if setting.use_distributed_optimizer else gradients)
    return found


def _embedding(setting: Setting) -> int:
    shared = (one for one in stage_parameters(setting, 0) if one.shared_embedding and one.trained)
    return sum(2 * _ring(one.size * setting.grad_bytes, 2) for one in shared)
