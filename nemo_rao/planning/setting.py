"""Everything that decides what a run takes, in one record; advice is other records of the kind."""

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
COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")  # whose inputs are gathered where sequences are split


@dataclass(frozen=True)
class Lora:
    """Adapters: their rank, what gets one, whether their inputs go through dropout, and ``model.peft.scheme``."""

    dim: int
    targets: tuple[str, ...]
    dropout: bool = False
    scheme: str = "lora"

    def parts(self, name: str) -> list[str]:
        """What of a linear layer, by its name in the whole model, has an adapter: the layer, or parts of it."""
        before, dot, last = name.rpartition(".")
        parts = SPLIT.get(last, (last,)) if self.scheme == "canonical_lora" else (last,)
        return [part.rpartition(".")[2] for part in adapted(self.targets, [before + dot + part for part in parts])]

    def adapts(self, name: str) -> bool:
        """Whether a linear layer, or a part of it, has an adapter."""
        return bool(self.parts(name))

    def adapted(self, number: int) -> frozenset[str]:
        """What has adapters in the model's layer of this number, by its own name."""
        return _adapted(self, number)


@functools.lru_cache(maxsize=4096)
def _adapted(lora: Lora, number: int) -> frozenset[str]:
    return frozenset(
        part for inside in LINEAR_LAYERS.values() for part in lora.parts(f"decoder.layers.{number}.{inside}")
    )


@dataclass(frozen=True)
class Rollouts:
    """What a run samples, by the names of ``online``.

    Attributes:
        num_generations: responses of each prompt.
        max_new_tokens: of a response, at most.
        rows_at_once: responses that a rank decodes together.
        mini_batches, epochs: global batches that a rollout fills, and passes over it.
        nucleus: tokens are drawn from the most probable ones (``top_p``).
        passes: over the sampled rows before the first step on them, for log-probabilities.
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
        """Optimizer steps on each rollout."""
        return self.mini_batches * self.epochs


@dataclass(frozen=True)
class Setting:
    """A run as the planner sees it. Field names are those of the recipe's keys where there is one.

    Attributes:
        network: the sizes.
        devices, nodes: GPUs of a node, and nodes.
        tensor, pipeline, context: parallel sizes; data-parallel is what remains of the ranks.
        virtual: layer groups of each pipeline rank.
        expert, expert_tensor: ranks that share the experts, and each of them; ``None``: as many as ``tensor``.
        micro_batch_size, global_batch_size: prompts.
        responses: of each prompt.
        tokens_per_row: tokens of prompt and response.
        pad_to_multiple_of: tokens; what the recipe asks for.
        part_multiple: tokens; each rank's part of a split sequence is a multiple of it, as 8-bit products need.
        packed: a micro-batch is one sequence, padded once.
        param_bytes: of a weight or an activation, 2 (bf16) or 4 (fp32).
        grad_reduce_in_fp32: gradients are kept in fp32.
        overlap_grad_reduce, overlap_param_gather: gradients are reduced during the backward pass, weights gathered
            during the forward pass.
        optimizer_in_host: fraction of the optimizer's state that is held in host memory.
        lora: adapters alone are trained; ``None``: every weight.
        lora_offered: those that advice may propose.
        workspace_bytes: of the log-probabilities' blocks.
        value_head, scores: heads on the last stage (:mod:`nemo_rao.mcore.heads`).
        reference: log-probabilities of the reference policy are computed, once; for samples, once a rollout.
        reference_micro_batch_size: prompts of that pass; ``None``: ``micro_batch_size``.
        reference_in_a_row: micro-batches of that pass between two writes, after which the pipeline is filled anew.
        kl_estimate: each step has a forward pass over one more response of each prompt.
        rollouts: what the run samples; ``None``: it trains on responses that lie there.
        critic_network: sizes of a critic that is a separate model; ``None``: there is none.
        transformer_engine: its fused layers run, as on GPUs; else PyTorch's own, as on a CPU.
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
        """Copy of the model."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def shards(self) -> int:
        """Ranks with the same weights, over which gradients are added up and the optimizer's state is split."""
        return self.data * self.context

    @property
    def of_expert(self) -> int:
        """Ranks that share each expert."""
        return self.expert_tensor or self.tensor

    @property
    def expert_shards(self) -> int:
        """Ranks with the same experts' weights."""
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
        """Of a step, on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data)

    @property
    def length(self) -> int:
        """Tokens of a row that attend to each other, with the row's own padding, of which packed rows have none."""
        return self.tokens_per_row if self.packed else self._padded(self.tokens_per_row)

    def _padded(self, tokens: int) -> int:
        """Rounded up as a run does (``nemo_rao.engines.nemo.build.pad_multiple``)."""
        split = self.context * (self.tensor if self.sequence_parallel else 1)
        chunks = 2 * self.context if self.context > 1 else 1
        multiple = math.lcm(self.pad_to_multiple_of, self.part_multiple * split, chunks)
        return -(-tokens // multiple) * multiple

    @property
    def sequence(self) -> int:
        """T of the model's tensors on a context-parallel rank."""
        return self.micro_batch_tokens if self.packed else self.length // self.context

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch_size * self.responses

    @property
    def micro_batch_tokens(self) -> int:
        """Of a micro-batch, those that a context-parallel rank computes."""
        tokens = self._padded(self.rows * self.tokens_per_row) if self.packed else self.rows * self.length
        return tokens // self.context

    @property
    def step_tokens(self) -> int:
        """Tokens of a global batch."""
        return self.num_micro_batches * self.data * self.context * self.micro_batch_tokens

    def adapted(self, stage: int) -> Counter[frozenset[str]]:
        """What has adapters in a layer, by its own name -> the stage's layers of which that is so."""
        found: Counter[frozenset[str]] = Counter()
        for chunk in range(self.virtual):
            first, layers = self.layers_before(stage, chunk), self.layers_of_chunk(stage, chunk)
            numbers = range(first, first + layers)
            found.update(frozenset() if self.lora is None else self.lora.adapted(number) for number in numbers)
        return found

    @property
    def holds_logits(self) -> bool:
        """Log-probabilities are computed from whole logits: an adapter on the output layer adds its part to these."""
        adapted = self.lora is not None and self.lora.adapts("output_layer")
        return not self.scores and (adapted or not self.fused_log_probs)

    def of_reference_pass(self) -> Setting:
        """The setting with the reference pass's micro-batches, before adapters are added."""
        size = self.reference_micro_batch_size or self.micro_batch_size
        return replace(self, micro_batch_size=size, lora=None)

    def layers_of_chunk(self, stage: int, chunk: int) -> int:
        """Layers of one of a stage's parts of the model, of which there are ``virtual``."""
        network = self.network
        layers = network.dealt_layers // (self.pipeline * self.virtual)
        if network.embedding_is_layer and stage == chunk == 0:
            layers -= 1
        if network.loss_is_layer and (stage, chunk) == (self.pipeline - 1, self.virtual - 1):
            layers -= 1
        return layers

    def layers_before(self, stage: int, chunk: int) -> int:
        """Layers of the whole model before those of a part of it."""
        parts = [(c, s) for c in range(self.virtual) for s in range(self.pipeline)]
        return sum(self.layers_of_chunk(s, c) for c, s in parts if (c, s) < (chunk, stage))

    def layers_of_stage(self, stage: int) -> int:
        return sum(self.layers_of_chunk(stage, chunk) for chunk in range(self.virtual))

    @property
    def grad_bytes(self) -> int:
        return 4 if self.grad_reduce_in_fp32 else self.param_bytes

    def in_flight(self, stage: int) -> int:
        """Chunks of micro-batches whose activations a stage holds at most; with one chunk a stage, micro-batches.

        Under 1F1B those of the stages that follow; interleaved, twice as many, and a round of all earlier chunks
        (Narayanan et al. 2021, section 2.2; Korthikanti et al. 2022, section 4.2.3).
        """
        follow = self.pipeline - 1 - stage
        warm_up = follow if self.virtual == 1 else 2 * follow + (self.virtual - 1) * self.pipeline
        return min(self.num_micro_batches * self.virtual, warm_up + 1)

    def possible(self) -> bool:
        """Whether everything divides; what else a run needs is for the recipe's own checks."""
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
