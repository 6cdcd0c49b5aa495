"""Everything that determines the cost of a run, in one record; advice consists of other such records."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace

from nemo_rao.config.lora_targets import SPLIT, adapted
from nemo_rao.planning.network import Network

# Linear layers of a transformer layer, by Megatron's names inside it.
LINEAR_LAYERS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")  # their inputs are gathered if sequences are split


@dataclass(frozen=True)
class Lora:
    """Adapters: their rank, their targets, whether their inputs have dropout, and ``model.peft.scheme``."""

    dim: int
    targets: tuple[str, ...]
    dropout: bool = False
    scheme: str = "lora"

    def parts(self, name: str) -> list[str]:
        """Parts of a linear layer, named as in the whole model, that have adapters, or the layer itself."""
        before, dot, last = name.rpartition(".")
        parts = SPLIT.get(last, (last,)) if self.scheme == "canonical_lora" else (last,)
        return [part.rpartition(".")[2] for part in adapted(self.targets, [before + dot + part for part in parts])]

    def adapts(self, name: str) -> bool:
        """Whether a linear layer, or a part of it, has an adapter."""
        return bool(self.parts(name))

    def adapted(self, number: int) -> frozenset[str]:
        """Names of the modules with adapters in the model's layer of this number."""
        return _adapted(self, number)


@functools.lru_cache(maxsize=4096)
def _adapted(lora: Lora, number: int) -> frozenset[str]:
    return frozenset(
        part for inside in LINEAR_LAYERS.values() for part in lora.parts(f"decoder.layers.{number}.{inside}")
    )


@dataclass(frozen=True)
class Rollouts:
    """Sampling of a run, with the names of ``online``.

    Attributes:
        num_generations: responses per prompt.
        max_new_tokens: maximum tokens of a response.
        rows_at_once: responses that a rank decodes together.
        mini_batches, epochs: global batches per rollout, and passes over it.
        nucleus: tokens are drawn from the most probable ones (``top_p``).
        passes: passes over the sampled rows for log-probabilities, before the first step on them.
    """

    num_generations: int
    max_new_tokens: int
    rows_at_once: int
    mini_batches: int
    epochs: int
    nucleus: bool
    passes: int

    @property
    def steps(self) -> int:
        """Optimizer steps per rollout."""
        return self.mini_batches * self.epochs


@dataclass(frozen=True)
class Setting:
    """A run as the planner sees it. Fields are named after the recipe's keys where possible.

    Attributes:
        network: sizes of the model.
        devices, nodes: GPUs per node, and number of nodes.
        tensor, pipeline, context: parallel sizes; data-parallel is what remains of the ranks.
        virtual: model chunks per pipeline rank.
        expert, expert_tensor: ranks that split the experts, and ranks that split each expert; ``None``: ``tensor``.
        micro_batch_size, global_batch_size: prompts.
        responses: responses per prompt.
        tokens_per_row: mean tokens of prompt and response.
        pad_to_multiple_of: tokens, as set in the recipe.
        part_multiple: tokens; each rank's part of a split sequence is a multiple of it, as FP8 requires.
        packed: a micro-batch is one sequence, padded once.
        param_bytes: bytes of a weight or an activation, 2 (bf16) or 4 (fp32).
        grad_reduce_in_fp32: gradients are kept in fp32.
        overlap_grad_reduce, overlap_param_gather: gradients are reduced during the backward pass, weights gathered
            during the forward pass.
        optimizer_in_host: fraction of the optimizer's state held in host memory.
        lora: only adapters are trained; ``None``: all weights.
        lora_offered: adapters that advice may propose.
        workspace_bytes: workspace of the log-probabilities' blocks.
        value_head, scores: heads on the last stage (:mod:`nemo_rao.mcore.heads`).
        reference: log-probabilities of the reference policy are computed, once; with sampling, once per rollout.
        reference_micro_batch_size: prompts of that pass; ``None``: ``micro_batch_size``.
        reference_in_a_row: micro-batches of that pass between two writes, after which the pipeline is refilled.
        kl_estimate: each step has a forward pass over one more response per prompt.
        rollouts: sampling of the run; ``None``: it trains on existing responses.
        critic_network: sizes of a critic that is a separate model; ``None``: no such critic.
        transformer_engine: its fused layers are used, as on GPUs; else PyTorch's, as on a CPU.
    """

    network: Network
    devices: int
    nodes: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int | None
    sequence_parallel: bool
    micro_batch_size: int
    global_batch_size: int
    responses: int
    tokens_per_row: int
    pad_to_multiple_of: int
    part_multiple: int
    packed: bool
    param_bytes: int
    grad_reduce_in_fp32: bool
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    optimizer_in_host: float
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
    reference_micro_batch_size: int | None
    reference_in_a_row: int
    kl_estimate: bool
    rollouts: Rollouts | None
    critic_network: Network | None
    transformer_engine: bool

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    @property
    def data(self) -> int:
        """Number of copies of the model."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def shards(self) -> int:
        """Number of ranks with the same weights, over which gradients are reduced and the optimizer is sharded."""
        return self.data * self.context

    @property
    def of_expert(self) -> int:
        """Number of ranks that split each expert."""
        return self.expert_tensor or self.tensor

    @property
    def expert_shards(self) -> int:
        """Number of ranks with the same experts."""
        return self.ranks // (self.pipeline * self.expert * self.of_expert)

    @property
    def critic(self) -> Setting | None:
        """The critic, trained as the policy is, with a value head instead of an output layer."""
        if self.critic_network is None:
            return None
        return replace(
            self,
            network=self.critic_network,
            expert=self.expert if self.critic_network.experts else 1,
            expert_tensor=self.expert_tensor if self.critic_network.experts else None,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
            lora=None,
            value_head=True,
            scores=1,
            reference=False,
            rollouts=None,
            critic_network=None,
        )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data)

    @property
    def length(self) -> int:
        """Tokens of a row that attend to each other, including its padding; packed rows have none."""
        return self.tokens_per_row if self.packed else self._padded(self.tokens_per_row)

    def _padded(self, tokens: int) -> int:
        """Round up as a run does (``nemo_rao.engines.nemo.build.pad_multiple``)."""
        split = self.context * (self.tensor if self.sequence_parallel else 1)
        chunks = 2 * self.context if self.context > 1 else 1
        multiple = math.lcm(self.pad_to_multiple_of, self.part_multiple * split, chunks)
        return -(-tokens // multiple) * multiple

    @property
    def sequence(self) -> int:
        """Sequence dimension T of the model's tensors on a context-parallel rank."""
        return self.micro_batch_tokens if self.packed else self.length // self.context

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.micro_batch_size * self.responses

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch on a context-parallel rank."""
        tokens = self._padded(self.rows * self.tokens_per_row) if self.packed else self.rows * self.length
        return tokens // self.context

    @property
    def step_tokens(self) -> int:
        """Tokens of a global batch."""
        return self.num_micro_batches * self.data * self.context * self.micro_batch_tokens

    def adapted(self, stage: int) -> Counter[frozenset[str]]:
        """Count the stage's layers by the set of their modules that have adapters."""
        found: Counter[frozenset[str]] = Counter()
        for chunk in range(self.virtual):
            first, layers = self.layers_before(stage, chunk), self.layers_of_chunk(stage, chunk)
            numbers = range(first, first + layers)
            found.update(frozenset() if self.lora is None else self.lora.adapted(number) for number in numbers)
        return found

    @property
    def holds_logits(self) -> bool:
        """Whether log-probabilities need whole logits, because an adapter on the output layer adds to them."""
        adapted = self.lora is not None and self.lora.adapts("output_layer")
        return not self.scores and (adapted or not self.fused_log_probs)

    def of_reference_pass(self) -> Setting:
        """Return the setting with the reference pass's micro-batches, before adapters are added."""
        size = self.reference_micro_batch_size or self.micro_batch_size
        return replace(self, micro_batch_size=size, lora=None)

    def layers_of_chunk(self, stage: int, chunk: int) -> int:
        """Number of layers of one of a stage's ``virtual`` model chunks."""
        network = self.network
        layers = network.dealt_layers // (self.pipeline * self.virtual)
        if network.embedding_is_layer and stage == chunk == 0:
            layers -= 1
        if network.loss_is_layer and (stage, chunk) == (self.pipeline - 1, self.virtual - 1):
            layers -= 1
        return layers

    def layers_before(self, stage: int, chunk: int) -> int:
        """Number of layers of the whole model before a chunk."""
        parts = [(c, s) for c in range(self.virtual) for s in range(self.pipeline)]
        return sum(self.layers_of_chunk(s, c) for c, s in parts if (c, s) < (chunk, stage))

    def layers_of_stage(self, stage: int) -> int:
        return sum(self.layers_of_chunk(stage, chunk) for chunk in range(self.virtual))

    @property
    def grad_bytes(self) -> int:
        return 4 if self.grad_reduce_in_fp32 else self.param_bytes

    def in_flight(self, stage: int) -> int:
        """Maximum number of micro-batches whose activations a stage holds; counted in chunks if there are several.

        Under 1F1B it is the number of following stages; interleaved, twice that, and a round of all earlier chunks
        (Narayanan et al. 2021, section 2.2; Korthikanti et al. 2022, section 4.2.3).
        """
        follow = self.pipeline - 1 - stage
        warm_up = follow if self.virtual == 1 else 2 * follow + (self.virtual - 1) * self.pipeline
        return min(self.num_micro_batches * self.virtual, warm_up + 1)

    def possible(self) -> bool:
        """Whether all sizes divide; the recipe's checks cover other requirements."""
        network, copy = self.network, self.tensor * self.pipeline * self.context
        split = (network.heads, network.groups, network.vocabulary(self.tensor))
        return (
            self.ranks % copy == 0
            and self.data > 0
            and self.global_batch_size % (self.micro_batch_size * self.data) == 0
            and network.dealt_layers % (self.pipeline * self.virtual) == 0
            and (self.virtual == 1 or (self.pipeline > 1 and self.num_micro_batches % self.pipeline == 0))
            and all(size % self.tensor == 0 for size in split)
            and network.ffn % (self.of_expert if network.experts else self.tensor) == 0
            and (self.lora is None or self.lora.dim % self.tensor == 0)
            and not (self.sequence_parallel and self.tensor == 1)
            and self._experts_possible()
            and (self.critic is None or self.critic.possible())
        )

    def _experts_possible(self) -> bool:
        if not self.network.experts:
            return self.expert == 1
        return (
            self.ranks % (self.pipeline * self.expert * self.of_expert) == 0
            and self.network.experts % self.expert == 0
            and (self.sequence_parallel or self.tensor == 1)
        )
