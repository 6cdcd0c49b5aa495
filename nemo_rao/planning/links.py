"""Communication speed of a group of ranks, inside a node or across nodes.

Megatron numbers ranks tensor-parallel first, then context, data and pipeline (order ``tp-cp-ep-dp-pp``), and nodes
hold consecutive ranks. So a group has ``size`` ranks that are ``stride`` apart, and its blocks of ``stride x size``
consecutive ranks begin at multiples of that:

    tensor      stride 1                              context   stride TP
    data        stride TP, over context and data      pipeline  stride TP x CP x DP
    expert      stride ETP                            copies of experts   stride ETP x EP

Latency is not modeled; it matters for small messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.planning.machine import Machine
from nemo_rao.planning.setting import Setting


@dataclass(frozen=True)
class Group:
    """A group of communicating ranks.

    Attributes:
        size: number of ranks.
        stride: distance between consecutive ranks.
        devices, nodes: GPUs per node, and number of nodes.
    """

    size: int
    stride: int
    devices: int
    nodes: int

    @property
    def within_node(self) -> bool:
        """Whether every such group is inside one node."""
        return self.nodes == 1 or self.devices % (self.size * self.stride) == 0

    @property
    def of_node(self) -> int:
        """Number of the group's ranks on the same node."""
        return self.size if self.within_node else max(1, min(self.size, self.devices // self.stride))

    def ring_seconds(self, sent: int, machine: Machine) -> float:
        """Seconds of ring collectives in which each rank sends ``sent`` bytes.

        Across nodes NCCL has one ring per network card: the group's ranks on a node use their cards together, up to
        the bandwidth of the links inside the node.
        """
        if self.within_node:
            return sent / machine.within_node
        return sent / min(machine.within_node, self.of_node * machine.between_nodes)

    def neighbour_seconds(self, sent: int, machine: Machine) -> float:
        """Seconds of messages from each rank to the next; all wait for those to another node."""
        return sent / (machine.within_node if self.within_node else min(machine.within_node, machine.between_nodes))

    def all_to_all_seconds(self, sent: int, machine: Machine) -> float:
        """Seconds of exchanges in which each rank sends ``sent`` bytes, split evenly, over both links at once."""
        if self.size == 1:
            return 0.0
        outside = sent * (self.size - self.of_node) / (self.size - 1)
        return max((sent - outside) / machine.within_node, outside / machine.between_nodes)


def tensor_group(setting: Setting) -> Group:
    return _group(setting, max(setting.tensor, setting.of_expert), 1)


def context_group(setting: Setting) -> Group:
    return _group(setting, setting.context, setting.tensor)


def shards_group(setting: Setting) -> Group:
    """Group of the ranks with the same weights, context-parallel ranks included."""
    return _group(setting, setting.shards, setting.tensor)


def pipeline_group(setting: Setting) -> Group:
    return _group(setting, setting.pipeline, setting.tensor * setting.shards)


def expert_group(setting: Setting) -> Group:
    return _group(setting, setting.expert, setting.of_expert)


def expert_shards_group(setting: Setting) -> Group:
    """Group of the ranks with the same experts."""
    return _group(setting, setting.expert_shards, setting.of_expert * setting.expert)


def _group(setting: Setting, size: int, stride: int) -> Group:
    return Group(size, stride, setting.devices, setting.nodes)
