"""Everything that decides what a run takes, in one record; advice is other records of the kind."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.planning.network import Network


@dataclass(frozen=True)
class Lora:
    """Adapters: their rank, and the linear layers that get one."""

    dim: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A run as the planner sees it. Field names are those of the recipe's keys where there is one.

    Attributes:
        network: the sizes.
        devices, nodes: GPUs of a node, and nodes.
        tensor, pipeline: parallel sizes; data-parallel is what remains of the ranks.
        micro_batch_size, global_batch_size: prompts.
        responses: of each prompt.
        tokens_per_row: tokens of prompt and response, padding included.
        param_bytes: of a weight or an activation, 2 (bf16) or 4 (fp32).
        grad_reduce_in_fp32: gradients are kept in fp32.
        lora: adapters alone are trained; ``None``: every weight.
        lora_offered: those that advice may propose.
        workspace_bytes: of the log-probabilities' blocks.
        value_head, scores: heads on the last stage (:mod:`nemo_rao.mcore.heads`).
        reference: log-probabilities of the reference policy are computed, once.
        mismatched: each step has a forward pass over one more response of each prompt.
        transformer_engine: its fused layers run, as on GPUs; else PyTorch's own, as on a CPU.
    """

    network: Network
    devices: int
    nodes: int
    tensor: int
    pipeline: int
    sequence_parallel: bool
    micro_batch_size: int
    global_batch_size: int
    responses: int
    tokens_per_row: int
    param_bytes: int
    grad_reduce_in_fp32: bool
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool
    recompute_granularity: str | None
    recompute_method: str
    recompute_num_layers: int
    lora: Lora | None
    lora_offered: Lora | None
    fused_log_probs: bool
    workspace_bytes: int
    value_head: bool
    scores: int
    reference: bool
    mismatched: bool
    transformer_engine: bool

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    @property
    def data(self) -> int:
        """Copies of the model."""
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def num_micro_batches(self) -> int:
        """Of a step, on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data)

    @property
    def length(self) -> int:
        """T: tokens of a row, with the padding that sequence parallelism needs."""
        multiple = self.tensor if self.sequence_parallel else 1
        return -(-self.tokens_per_row // multiple) * multiple

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch_size * self.responses

    @property
    def micro_batch_tokens(self) -> int:
        return self.rows * self.length

    @property
    def step_tokens(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch_size * self.responses * self.length

    @property
    def layers_of_stage(self) -> int:
        return self.network.layers // self.pipeline

    @property
    def grad_bytes(self) -> int:
        return 4 if self.grad_reduce_in_fp32 else self.param_bytes

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at most under 1F1B (Narayanan et al. 2021, section 2.2)."""
        return min(self.num_micro_batches, self.pipeline - stage)

    def possible(self) -> bool:
        """Whether everything divides; what else a run needs is for the recipe's own checks."""
        network, copy = self.network, self.tensor * self.pipeline
        split = (network.heads, network.groups, network.ffn, network.vocabulary(self.tensor))
        return (
            self.ranks % copy == 0
            and self.global_batch_size % (self.micro_batch_size * self.data) == 0
            and network.layers % self.pipeline == 0
            and all(size % self.tensor == 0 for size in split)
            and (self.lora is None or self.lora.dim % self.tensor == 0)
            and not (self.sequence_parallel and self.tensor == 1)
        )
