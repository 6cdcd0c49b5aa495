"""Rollouts of a run that samples its own responses: memory of sampling on a rank, and duration of a rollout.

Weights, gradients and optimizer states stay in place. In addition a rank holds the keys and values of the rows that it
decodes together (:mod:`nemo_rao.rollout.decode`), and a layer's forward pass over their prompts, or on the last stage
their logits while tokens are drawn.

For a token of all rows, each stage needs the longer of computing its products and of reading its weights, keys and
values, and waits for the previous stage: stages do not work concurrently. Every response is assumed to reach
``max_new_tokens``, an upper bound. Kernel launch latency is not counted; with few rows it may dominate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nemo_rao.planning import links
from nemo_rao.planning.activations import forward_layer
from nemo_rao.planning.buffers import stage_states
from nemo_rao.planning.communication import forward_communication
from nemo_rao.planning.compute import flops
from nemo_rao.planning.machine import Machine
from nemo_rao.planning.setting import Rollouts, Setting
from nemo_rao.planning.step_time import forward_seconds

# Bytes per logit while a token is drawn: fp32, scaled fp32, and in fp64 its probability and the cumulative sum.
_DRAWING = 4 + 4 + 8 + 8
_NUCLEUS = 4 * 8  # with top_p: probabilities in order, their order, its inverse, and sums


@dataclass(frozen=True)
class RolloutTime:
    """Seconds of a rollout.

    Attributes:
        prompts: prefill of the prompts.
        tokens: decoding.
        passes: passes over the sampled rows for log-probabilities.
        values: the critic's pass over them; 0 without a critic.
    """

    prompts: float
    tokens: float
    passes: float
    values: float

    @property
    def total(self) -> float:
        return self.prompts + self.tokens + self.passes + self.values


def cache_bytes(setting: Setting, stage: int) -> int:
    """Bytes of keys and values of the rows that a rank of this stage decodes together."""
    rows = _rollouts(setting).num_generations * _prompts_at_once(setting)
    width = setting.network.key // setting.tensor
    return 2 * setting.layers_of_stage(stage) * setting.tokens_per_row * rows * width * setting.param_bytes


def sampling_bytes(setting: Setting, stage: int) -> int:
    """Peak bytes of sampling, in addition to the states: a prompt is read once for all its responses."""
    keys, cache = _rollouts(setting), cache_bytes(setting, stage)
    reading = cache // keys.num_generations + forward_layer(_reading(setting))
    if stage < setting.pipeline - 1:
        return max(reading, cache)
    logits = keys.num_generations * _prompts_at_once(setting) * setting.network.vocabulary(setting.tensor)
    return max(reading, cache + logits * (setting.param_bytes + _DRAWING + (_NUCLEUS if keys.nucleus else 0)))


def host_bytes(setting: Setting, stage: int) -> int:
    """Host memory of a rank: the reference weights, unless adapters are switched off instead, and with GPUs the
    critic's weights and optimizer state."""
    reference = stage_states(setting, stage).weights if setting.reference and setting.lora is None else 0
    if setting.critic is None or not setting.transformer_engine:
        return reference
    critic = stage_states(setting.critic, stage)
    return reference + critic.weights + critic.optimizer


def rollout_time(setting: Setting, machine: Machine) -> RolloutTime:
    keys = _rollouts(setting)
    of_copy = machine.flops_per_second * setting.ranks / setting.pipeline  # stages work sequentially
    reading, decoding = _reading(setting), _decoding(setting)
    batches = decoding.num_micro_batches
    products = flops(decoding).forward / of_copy / setting.pipeline / batches  # for one token of a batch, on a stage
    filled = 1 - keys.max_new_tokens / (2 * setting.tokens_per_row)  # average fraction of the cache that is filled
    reads = (
        (_read_weights(setting, stage) + filled * cache_bytes(setting, stage)) / machine.memory_bytes_per_second
        for stage in range(setting.pipeline)
    )
    token = batches * sum(max(products, read) for read in reads) + _messages(decoding, machine)
    sampled = keys.mini_batches * setting.global_batch_size
    return RolloutTime(
        prompts=flops(reading).forward / of_copy + _messages(reading, machine),
        tokens=keys.max_new_tokens * token,
        passes=keys.passes * forward_seconds(setting, machine, prompts=sampled, responses=keys.num_generations),
        values=0.0
        if setting.critic is None
        else forward_seconds(setting.critic, machine, prompts=sampled, responses=keys.num_generations),
    )


def _rollouts(setting: Setting) -> Rollouts:
    assert setting.rollouts is not None, "the run samples"
    return setting.rollouts


def _prompts_of_rank(setting: Setting) -> int:
    return _rollouts(setting).mini_batches * setting.global_batch_size // setting.data


def _prompts_at_once(setting: Setting) -> int:
    keys = _rollouts(setting)
    return min(max(keys.rows_at_once // keys.num_generations, 1), _prompts_of_rank(setting))


def _reading(setting: Setting) -> Setting:
    """Return a forward pass over the prompts of a rollout, with logits of their last tokens only."""
    tokens = max(setting.tokens_per_row - _rollouts(setting).max_new_tokens, 1)
    return replace(_sampling(setting, responses=1, tokens=tokens), scores=1)


def _decoding(setting: Setting) -> Setting:
    """Return a forward pass over one token of each row of a rollout."""
    return _sampling(setting, responses=_rollouts(setting).num_generations, tokens=1)


def _sampling(setting: Setting, *, responses: int, tokens: int) -> Setting:
    at_once = _prompts_at_once(setting)
    return replace(
        setting,
        sequence_parallel=False,
        micro_batch_size=at_once,
        global_batch_size=math.ceil(_prompts_of_rank(setting) / at_once) * at_once * setting.data,
        responses=responses,
        tokens_per_row=tokens,
        pad_to_multiple_of=1,
        part_multiple=1,
        packed=False,
        kl_estimate=False,
    )


def _read_weights(setting: Setting, stage: int) -> int:
    """Bytes of a rank's weights that are read; of the embedding, only one row per token is."""
    network = setting.network
    embedding = network.vocabulary(setting.tensor) // setting.tensor * network.hidden * setting.param_bytes
    is_output = network.tied and setting.pipeline == 1
    return stage_states(setting, stage).weights - (embedding if stage == 0 and not is_output else 0)


def _messages(passing: Setting, machine: Machine) -> float:
    sent = forward_communication(passing)
    return (
        links.tensor_group(passing).ring_seconds(sent.tensor, machine)
        + links.expert_group(passing).all_to_all_seconds(sent.expert, machine)
        + links.pipeline_group(passing).neighbour_seconds(sent.pipeline, machine)
    )
