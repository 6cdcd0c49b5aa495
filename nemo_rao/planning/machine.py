"""The GPUs that a run is planned for: their memory, their peak throughput, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.config.gpu_models import GIB

_MEMORY_EFFICIENCY = 0.8  # assumed fraction of a GPU's memory bandwidth that is reached


@dataclass(frozen=True)
class Machine:
    """The GPUs that a run is planned for.

    Attributes:
        name: name to print.
        memory_gib: memory of a GPU.
        reserve_gib: assumed for the CUDA context, NCCL's buffers and fragmentation, and kept free.
        peak_tflops: peak of a GPU, in the run's number format.
        mfu: fraction of it that is reached while a GPU computes.
        intra_node_gbs, inter_node_gbs: GB/s that a GPU sends, to the others of its node and to other nodes.
        link_efficiency: fraction of these that is reached.
        memory_gbs: GB/s at which a GPU reads its memory.
        node_size: maximum GPUs of a node, for advice.
    """

    name: str
    memory_gib: float
    reserve_gib: float
    peak_tflops: float
    mfu: float
    intra_node_gbs: float
    inter_node_gbs: float
    link_efficiency: float
    memory_gbs: float
    node_size: int

    @property
    def limit(self) -> int:
        """Bytes available to a plan."""
        return int((self.memory_gib - self.reserve_gib) * GIB)

    @property
    def flops_per_second(self) -> float:
        """FLOP/s of one GPU while it computes."""
        return self.peak_tflops * 1e12 * self.mfu

    @property
    def memory_bytes_per_second(self) -> float:
        """Bytes per second that a GPU reads from its memory."""
        return self.memory_gbs * 1e9 * _MEMORY_EFFICIENCY

    @property
    def within_node(self) -> float:
        """Bytes per second that a GPU sends to the others of its node."""
        return self.intra_node_gbs * 1e9 * self.link_efficiency

    @property
    def between_nodes(self) -> float:
        """Bytes per second that a GPU sends to other nodes, through its own network card."""
        return self.inter_node_gbs * 1e9 * self.link_efficiency
