"""Bytes that a rank sends in one optimizer step, by ring collectives.

Of a tensor of S bytes over t ranks an all-gather or reduce-scatter sends (t - 1)/t S, an all-reduce twice that.
Tensor parallelism follows Shoeybi et al. 2019, with the sequence split Korthikanti et al. 2022, whose backward pass
gathers the inputs of linear_qkv and linear_fc1 once more.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.planning.activations import FP32, recomputed_layers, stream_tokens
from nemo_rao.planning.buffers import stage_states
from nemo_rao.planning.parameters import stage_parameters
from nemo_rao.planning.setting import Setting


@dataclass(frozen=True)
class Communication:
    """Bytes that a rank sends in a step; of the stage that sends most of each.

    Attributes:
        tensor: within layers, embedding and log-probabilities.
        pipeline: hidden states and their gradients to the neighbouring stages.
        data: gradients, and with the distributed optimizer the updated weights.
        embedding: gradients of tied embeddings between the first and last stage.
    """

    tensor: int
    pipeline: int
    data: int
    embedding: int

    @property
    def total(self) -> int:
        return self.tensor + self.pipeline + self.data + self.embedding


def communication(setting: Setting) -> Communication:
    return Communication(
        tensor=max(_tensor(setting, stage) for stage in range(setting.pipeline)),
        pipeline=_pipeline(setting),
        data=max(_data(setting, stage) for stage in range(setting.pipeline)),
        embedding=_embedding(setting),
    )


def _ring(size: int, ranks: int) -> int:
    """Bytes sent for an all-gather or a reduce-scatter of ``size`` bytes."""
    return size * (ranks - 1) // ranks


def _tensor(setting: Setting, stage: int) -> int:
    ranks, n = setting.tensor, setting.micro_batch_tokens
    one = _ring(n * setting.network.hidden * setting.param_bytes, ranks)
    forward = 4 * one  # two all-reduces, or two all-gathers and two reduce-scatters
    backward = 4 * one + (2 * one if setting.sequence_parallel else 0)
    found = setting.layers_of_stage * (forward + backward) + recomputed_layers(setting) * forward
    if stage == 0:
        # An all-reduce; with the sequence split a reduce-scatter, and an all-gather in backward.
        found += 2 * one
    if stage == setting.pipeline - 1:
        found += 12 * n * (ranks - 1)  # each rank's three numbers a token
        gradient = _ring(n * setting.network.hidden * (FP32 if setting.fused_log_probs else setting.param_bytes), ranks)
        found += (2 * one + gradient) if setting.sequence_parallel else 2 * gradient
    return found * setting.num_micro_batches


def _pipeline(setting: Setting) -> int:
    neighbours = min(setting.pipeline - 1, 2)  # a gradient back to one, hidden states on to the other
    tensor = stream_tokens(setting) * setting.network.hidden * setting.param_bytes
    return neighbours * tensor * setting.num_micro_batches


def _data(setting: Setting, stage: int) -> int:
    elements = stage_states(setting, stage).buffer
    gradients = _ring(elements * setting.grad_bytes, setting.data)
    if not setting.use_distributed_optimizer:
        return 2 * gradients
    return gradients + _ring(elements * setting.param_bytes, setting.data)


def _embedding(setting: Setting) -> int:
    shared = (one for one in stage_parameters(setting, 0) if one.shared_embedding and one.trained)
    return sum(2 * _ring(one.size * setting.grad_bytes, 2) for one in shared)
