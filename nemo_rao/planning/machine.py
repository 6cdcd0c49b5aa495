"""The GPUs that a run is planned for: their memory, their peak throughput, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.config.gpu_models import GIB

_MEMORY_EFFICIENCY = 0.8  # share of a GPU's memory bandwidth that is reached; assumed


@dataclass(frozen=True)
class Machine:
    """What the run is to fit on.

    Attributes:
        name: as it is printed.
        memory_gib: of a GPU.
        reserve_gib: kept free for the CUDA context, NCCL's buffers and fragmentation; not planned, assumed.
        peak_tflops: of a GPU, in the run's number format.
        mfu: share of it that is reached while a GPU computes.
        intra_node_gbs, inter_node_gbs: GB/s that a GPU sends, to the others of its node and to other nodes.
        link_efficiency: share of these that is reached.
        memory_gbs: GB/s at which a GPU reads its memory.
        node_size: GPUs that a node may have, for advice.
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
        """Bytes that a plan may take."""
        return int((self.memory_gib - self.reserve_gib) * GIB)

    @property
    def flops_per_second(self) -> float:
        """Of one GPU while it computes."""
        return self.peak_tflops * 1e12 * self.mfu

    @property
    def memory_bytes_per_second(self) -> float:
        """Bytes that a GPU reads of its memory."""
        return self.memory_gbs * 1e9 * _MEMORY_EFFICIENCY

    @property
    def within_node(self) -> float:
        """Bytes per second that a GPU sends to the others of its node."""
        return self.intra_node_gbs * 1e9 * self.link_efficiency

    @property
    def between_nodes(self) -> float:
        """Bytes per second that a GPU sends to other nodes, through a network card of its own."""
        return self.inter_node_gbs * 1e9 * self.link_efficiency
