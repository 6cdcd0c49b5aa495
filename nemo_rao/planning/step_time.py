"""Time of a step, and of forward-only passes: computation, exposed communication, and the pipeline bubble.

    micro-batches = executed FLOPs / (ranks x peak x MFU) + tensor-, context-, expert- and pipeline-parallel messages
    step          = micro-batches / (1 - bubble) + exposed data-parallel messages + tied embeddings

Messages within micro-batches are assumed to be exposed, which is true of tensor parallelism without Transformer
Engine's overlap, and an upper bound for the others. Data-parallel messages occur once per step. With
``overlap_grad_reduce`` gradients are reduced during the backward pass of the last micro-batch, with
``overlap_param_gather`` weights are gathered during the forward pass of the first: only what takes longer than that
pass's computation is exposed. Later pipeline stages have one bucket and hide it in the bubble, which is as long.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from nemo_rao.planning import links
from nemo_rao.planning.communication import Communication, communication, forward_communication
from nemo_rao.planning.compute import bubble, flops
from nemo_rao.planning.machine import Machine
from nemo_rao.planning.setting import Setting


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: computation of a rank, recomputation included.
        tensor, context, expert, pipeline: messages within micro-batches.
        bubble: time in which a stage waits for others.
        data: exposed communication of gradients and weights between the copies of the model.
        hidden: data-parallel communication hidden behind computation; not part of the step's time.
        embedding: gradients of tied embeddings between stages.
    """

    compute: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    bubble: float
    data: float
    hidden: float
    embedding: float

    @property
    def communication(self) -> float:
        """Exposed communication, in seconds."""
        return self.tensor + self.context + self.expert + self.pipeline + self.data + self.embedding

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble


def step_time(setting: Setting, machine: Machine) -> StepTime:
    """Estimate the time of an optimizer step."""
    sent, work = communication(setting), flops(setting)
    compute = work.executed / (setting.ranks * machine.flops_per_second)
    within = _within_micro_batches(sent, setting, machine)
    wait = bubble(setting)
    one = setting.ranks * machine.flops_per_second * setting.num_micro_batches  # FLOPs -> seconds of a micro-batch
    forward, backward = work.forward / one, (work.executed - work.in_forward) / one
    copies, of_experts = links.shards_group(setting), links.expert_shards_group(setting)
    gradients = copies.ring_seconds(sent.gradients, machine) + of_experts.ring_seconds(sent.expert_gradients, machine)
    weights = copies.ring_seconds(sent.weights, machine) + of_experts.ring_seconds(sent.expert_weights, machine)
    hidden = (min(gradients, backward) if setting.overlap_grad_reduce else 0.0) + (
        min(weights, forward) if setting.overlap_param_gather else 0.0
    )
    return StepTime(
        compute=compute,
        **within,
        bubble=(compute + sum(within.values())) * wait / (1 - wait),
        data=gradients + weights - hidden,
        hidden=hidden,
        embedding=links.pipeline_group(setting).neighbour_seconds(sent.embedding, machine),
    )


def forward_seconds(
    setting: Setting,
    machine: Machine,
    *,
    prompts: int,
    responses: int | None = None,
    in_a_row: int | None = None,
) -> float:
    """Estimate the time of a forward-only pass over ``prompts``, in the setting's micro-batches.

    Args:
        responses: responses per prompt; ``None``: the setting's.
        in_a_row: micro-batches after which the pipeline is refilled; ``None``: never.
    """
    if prompts == 0:
        return 0.0
    at_once = setting.micro_batch_size * setting.data
    most = math.ceil(prompts / setting.data)  # per data-parallel rank; its last micro-batch may be smaller
    rounds = math.ceil(most / setting.micro_batch_size)
    passing = dataclasses.replace(
        setting,
        global_batch_size=rounds * at_once,
        responses=setting.responses if responses is None else responses,
        kl_estimate=False,
    )
    compute = flops(passing).forward / (setting.ranks * machine.flops_per_second)
    messages = sum(_within_micro_batches(forward_communication(passing), passing, machine).values())
    number = min(rounds, in_a_row or rounds)
    waits = setting.pipeline - 1
    filled = most / (rounds * setting.micro_batch_size)
    return filled * (compute + messages) * (1 + waits / (setting.virtual * number))


def _within_micro_batches(sent: Communication, setting: Setting, machine: Machine) -> dict[str, float]:
    return {
        "tensor": links.tensor_group(setting).ring_seconds(sent.tensor, machine),
        "context": links.context_group(setting).neighbour_seconds(sent.context, machine),
        "expert": links.expert_group(setting).all_to_all_seconds(sent.expert, machine),
        "pipeline": links.pipeline_group(setting).neighbour_seconds(sent.pipeline, machine),
    }
