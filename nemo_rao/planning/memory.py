"""Peak memory of a step on a rank of each pipeline stage.

    states + micro-batches in flight x what each keeps + the larger of: log-probabilities; a layer's backward pass

The last two never coexist: log-probabilities are finished when the last layer's backward pass begins, and recomputation
does not begin earlier. If the reference pass has larger micro-batches, rows are sampled, or a critic takes its step,
the states and the memory of these may exceed that sum. On a CPU the process shares the memory with its tensors and is
added.

States are exact. The rest is within ``UNCERTAINTY`` of measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.planning import activations
from nemo_rao.planning.buffers import stage_states
from nemo_rao.planning.log_probs import forward_log_prob_bytes, log_prob_bytes
from nemo_rao.planning.rollouts import host_bytes, sampling_bytes
from nemo_rao.planning.setting import Setting

UNCERTAINTY = 0.1  # of activations and temporaries; tests/planning/test_plan_activations.py

PROCESS_BYTES = 3 * 2**28
"""Bytes of a rank's process on a CPU without tensors, once PyTorch, Megatron and NeMo are imported
(docs/guides/planning.md)."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes needed by a rank of one pipeline stage.

    Attributes:
        weights, gradients, optimizer: held throughout, exact.
        in_flight: number of micro-batches whose activations are held at once; of chunks in an interleaved pipeline.
        activations: activations of all of these.
        log_probs: log-probabilities at the loss, on the last stage.
        backward: backward pass of one layer, recomputed activations included.
        process: imported code, on a CPU; 0 on GPUs.
        reference: a micro-batch of the reference pass, which keeps nothing for a backward pass.
        sampling: keys, values and temporaries while tokens are sampled; 0 without sampling.
        critic: the critic's step: its micro-batches and, with GPUs, its states, which are otherwise in host memory; 0
            without a critic.
        critic_states: its weights, gradients and optimizer states on a CPU, held throughout.
        host: host memory: offloaded optimizer states and, if the run samples, a rank's reference weights and critic;
            not part of the total.
    """

    weights: int
    gradients: int
    optimizer: int
    in_flight: int
    activations: int
    log_probs: int
    backward: int
    reference: int
    sampling: int
    critic: int
    critic_states: int
    host: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.critic_states + self.passing + self.process

    @property
    def passing(self) -> int:
        """Bytes of micro-batches, in addition to the states."""
        return max(self.activations + max(self.log_probs, self.backward), self.reference, self.sampling, self.critic)

    @property
    def uncertainty(self) -> int:
        """Error bound of the total, in bytes."""
        return int(UNCERTAINTY * self.passing)


def stage_memory(setting: Setting, stage: int) -> StageMemory:
    """Compute the peak of this stage's ranks."""
    states = stage_states(setting, stage)
    kept = activations.stored_layers(setting, stage) + activations.stored_ends(setting, stage)
    in_flight = setting.in_flight(stage)
    critic = None if setting.critic is None else stage_memory(setting.critic, stage)
    of_critic = 0 if critic is None else critic.weights + critic.gradients + critic.optimizer
    with_gpus = setting.transformer_engine
    optimizer_in_host = int(states.optimizer * setting.optimizer_in_host)
    return StageMemory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer - optimizer_in_host,
        in_flight=in_flight,
        activations=-(-in_flight * kept // setting.virtual),
        log_probs=log_prob_bytes(setting) if stage == setting.pipeline - 1 else 0,
        backward=activations.recomputed_unit(setting, stage) + activations.layer_gradients(setting),
        reference=_reference(setting.of_reference_pass(), stage) if setting.reference else 0,
        sampling=0 if setting.rollouts is None else sampling_bytes(setting, stage),
        critic=0 if critic is None else critic.passing + (of_critic if with_gpus else 0),
        critic_states=0 if with_gpus else of_critic,
        host=optimizer_in_host + (0 if setting.rollouts is None else host_bytes(setting, stage)),
        process=0 if with_gpus else PROCESS_BYTES,
    )


def _reference(setting: Setting, stage: int) -> int:
    """Bytes of a forward-only pass: a feed-forward part with its input and the residual stream, or the loss."""
    found = activations.forward_layer(setting)
    return max(found, forward_log_prob_bytes(setting)) if stage == setting.pipeline - 1 else found


def memory(setting: Setting) -> list[StageMemory]:
    """Return the memory of every stage."""
    return [stage_memory(setting, stage) for stage in range(setting.pipeline)]


def peak(setting: Setting) -> int:
    """Peak bytes of the rank that needs most."""
    return max(stage.total for stage in memory(setting))


def upper_peak(setting: Setting) -> int:
    """Peak bytes including the uncertainty of activations."""
    return max(stage.total + stage.uncertainty for stage in memory(setting))
