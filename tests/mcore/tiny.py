"""A tiny GPT whose full weights are known, and any rank's part of it.

A randomly initialized Hugging Face model is the independent source: its weights, and its gradients, are rearranged into
megatron-core's whole tensors (:func:`whole_tensors`), of which every rank takes its part (:func:`part_of`). Both are
written here by hand and share nothing with Megatron's own sharding or NeMo's importers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, Sample
from nemo_rao.data.collate import collate

from ..megatron_ranks import init_megatron

NUM_LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB = 4, 32, 48, 4, 2, 90
EXPERTS, CHOSEN = 4, 2  # of the mixture, and of each token


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of a launch; the remaining factor is data-parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None  # model chunks on each rank
    expert: int = 1  # ranks that share the experts
    expert_tensor: int | None = None  # ranks that share each expert; None: as many as share a layer
    sequence_parallel: bool = False
    vocab_divisible_by: int = 4  # 90 tokens are padded to 92 at TP 1, to 96 at TP 2


def enter(layout: Layout) -> None:
    """Process groups and seeds of this layout, in place of those of the layout before. Inside a rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        init_megatron(tensor=layout.tensor, pipeline=layout.pipeline)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual_pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    model_parallel_cuda_manual_seed(1234)


# ------------------------------------------------------------------------------------------------ Hugging Face


def llama(seed: int = 0, *, tied: bool = False) -> Any:
    """A randomly initialized ``LlamaForCausalLM``: grouped queries, weights large enough to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _randomise(LlamaForCausalLM(LlamaConfig(**_sizes(tied))), seed)


def qwen2(seed: int = 0) -> Any:
    """A randomly initialized ``Qwen2ForCausalLM``, with its biases on queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _randomise(Qwen2ForCausalLM(Qwen2Config(**_sizes(tied=False))), seed)


def mixtral(seed: int = 0) -> Any:
    """A randomly initialized ``MixtralForCausalLM``: a router with marked choices in every layer, no token dropped."""
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "sliding_window": None}
    return _randomise(MixtralForCausalLM(MixtralConfig(**_sizes(tied=False), **experts)), seed)


def _sizes(tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "attn_implementation": "eager",
    }


def _randomise(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


def whole_tensors(model: Any, *, gradients: bool = False) -> dict[str, Tensor]:
    """A Hugging Face model's weights, or their gradients, as megatron-core's whole tensors by Megatron's names."""
    named = {name: p.grad if gradients else p.detach() for name, p in model.named_parameters()}
    whole = {
        "embedding.word_embeddings.weight": named["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": named["model.norm.weight"],
        # Tied: the last pipeline stage holds a copy, and both gradients are those of the one weight.
        "output_layer.weight": named.get("lm_head.weight", named["model.embed_tokens.weight"]),
    }
    for layer in range(NUM_LAYERS):
        source, target = f"model.layers.{layer}", f"decoder.layers.{layer}"
        for kind in ("weight", "bias"):
            if f"{source}.self_attn.q_proj.{kind}" in named:
                # For every group: its queries, its key, its value.
                by_group = [
                    named[f"{source}.self_attn.{part}_proj.{kind}"].unflatten(0, (GROUPS, -1)) for part in "qkv"
                ]
                whole[f"{target}.self_attention.linear_qkv.{kind}"] = torch.cat(by_group, dim=1).flatten(0, 1)
        whole |= {
            f"{target}.self_attention.linear_qkv.layer_norm_weight": named[f"{source}.input_layernorm.weight"],
            f"{target}.self_attention.linear_proj.weight": named[f"{source}.self_attn.o_proj.weight"],
        }
        whole |= _feed_forward(named, source, target)
    return {name: tensor.clone() for name, tensor in whole.items()}


def _feed_forward(named: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """Of one layer: dense, or its router and experts."""
    norm = named[f"{source}.post_attention_layernorm.weight"]
    mlp = f"{source}.mlp"
    if f"{mlp}.gate_proj.weight" in named:
        gate_and_up = torch.cat([named[f"{mlp}.gate_proj.weight"], named[f"{mlp}.up_proj.weight"]])
        return {
            f"{target}.mlp.linear_fc1.layer_norm_weight": norm,
            f"{target}.mlp.linear_fc1.weight": gate_and_up,
            f"{target}.mlp.linear_fc2.weight": named[f"{mlp}.down_proj.weight"],
        }
    router, experts = _mixture(named, source)
    whole = {f"{target}.pre_mlp_layernorm.weight": norm, f"{target}.mlp.router.weight": router}
    for expert, (gate_and_up, down) in enumerate(experts):
        own = f"{target}.mlp.experts.local_experts.{expert}"
        whole |= {f"{own}.linear_fc1.weight": gate_and_up, f"{own}.linear_fc2.weight": down}
    return whole


def _mixture(named: Mapping[str, Tensor], source: str) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The router, and each expert's gate and up, and down; transformers 5 has them in one, 4 one by one."""
    if (in_one := named.get(f"{source}.mlp.experts.gate_up_proj")) is not None:
        down = named[f"{source}.mlp.experts.down_proj"]
        return named[f"{source}.mlp.gate.weight"], list(zip(in_one, down, strict=True))
    before = f"{source}.block_sparse_moe"
    parts = [
        [named[f"{before}.experts.{expert}.{name}.weight"] for name in ("w1", "w3", "w2")] for expert in range(EXPERTS)
    ]
    return named[f"{before}.gate.weight"], [(torch.cat([gate, up]), down) for gate, up, down in parts]


# --------------------------------------------------------------------------------------------------- Megatron


def config_for(
    layout: Layout,
    *,
    qkv_bias: bool = False,
    tied: bool = False,
    experts: bool = False,
    dtype: Any = torch.float32,
) -> Any:
    """A Llama, a Qwen2 or a mixture of experts in the sizes of this module, as the project prepares it."""
    from nemo_rao.mcore.layer_spec import layer_spec_without_te
    from nemo_rao.mcore.loss import configure_loss_scaling

    from .gpt import GPT, LLAMA

    mixture = {"num_moe_experts": EXPERTS, "moe_router_topk": CHOSEN} if experts else {}
    config = GPT(
        **LLAMA,
        **mixture,
        add_qkv_bias=qkv_bias,
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=layout.vocab_divisible_by,
        seq_length=64,
        layernorm_epsilon=1e-5,
        rotary_base=10000.0,
        share_embeddings_and_output_weights=tied,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        transformer_layer_spec=layer_spec_without_te,
    )
    configure_loss_scaling(config)
    return config


def build(
    whole: Mapping[str, Tensor], layout: Layout, vp_stage: int | None = None, *, fused: bool = False, **variant: Any
) -> Any:
    """This rank's model chunk with its part of the weights. After :func:`enter`.

    Args:
        fused: without logits.
    """
    from nemo_rao.mcore.output_layer import fuse_output_layer

    config = config_for(layout, **variant)
    model = config.build(vp_stage)
    with torch.no_grad():
        for name, parameter in whole_names(model):
            part = part_of(name, whole[name], tuple(parameter.shape))
            # What stands in the padding of the vocabulary must not matter.
            parameter.fill_(7.0)
            parameter[: part.shape[0]].copy_(part)
    if fused:
        fuse_output_layer(model)
    return model


def whole_names(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a model chunk, by name, layers and experts numbered from the whole model's first."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            layer = model.decoder.layers[int(parts[2])]
            parts[2] = str(layer.layer_number - 1)
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                parts[at] = str(layer.mlp.local_expert_indices[int(parts[at])])
        yield ".".join(parts), parameter


def part_of(name: str, whole: Tensor, shape: tuple[int, ...]) -> Tensor:
    """This tensor-parallel rank's part of a whole tensor; of the vocabulary, only the rows that are tokens."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if "local_experts" in name:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
    if "layer_norm" in name or "layernorm" in name or "router" in name:
        return whole
    if "word_embeddings" in name or "output_layer" in name:
        return whole[rank * shape[0] : (rank + 1) * shape[0]]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    if "linear_qkv" in name:
        return whole.chunk(size)[rank]
    assert name.endswith(("linear_proj.weight", "linear_fc2.weight")), name
    return whole.chunk(size, dim=1)[rank]


def run_schedule(
    model: Any, micro_batches: Sequence[MicroBatch], loss: Callable[[Tensor, MicroBatch], Any]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """One step of Megatron's own schedule, DDP and ``finalize_model_grads``, without the optimizer.

    Args:
        loss: (output, micro-batch) -> what the schedule's loss function returns.

    Returns:
        this rank's gradients by :func:`whole_names`, and what the micro-batches reported.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_rao.mcore.forward import forward_step

    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.config.finalize_model_grads_func = finalize_model_grads

    def step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable]:
        batch = next(iterator)
        return forward_step(chunk, batch), lambda output: loss(output, batch)

    reported = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=[wrapped],
        num_microbatches=len(micro_batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    trained = ((name, parameter) for name, parameter in whole_names(model) if parameter.requires_grad)
    return {name: parameter.main_grad.clone() for name, parameter in trained}, reported


def gradient_errors(gradients: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, float]:
    """For each parameter, its gradient's largest error relative to its largest entry; padding must have none."""
    errors = {}
    for name, gradient in gradients.items():
        expected = torch.zeros_like(gradient)
        part = part_of(name, whole[name], tuple(gradient.shape))
        expected[: part.shape[0]] = part
        errors[name] = float((gradient - expected).abs().max() / whole[name].abs().max())
    return errors


# ------------------------------------------------------------------------------------------------------- data


def preferences(num_prompts: int = 7, seed: int = 0) -> list[Sample]:
    """Prompts with two to four responses of different lengths; every third prompt's rewards are all the same."""
    rng = np.random.default_rng(seed)
    samples = []
    for prompt in range(num_prompts):
        count = 2 + prompt % 3
        tokens = rng.integers(2, VOCAB, rng.integers(2, 9)).astype(np.int32)
        tokens[0] = 1
        responses = tuple(rng.integers(2, VOCAB, rng.integers(1, 12)).astype(np.int32) for _ in range(count))
        rewards = np.full(count, 0.5) if prompt % 3 == 1 else rng.random(count)
        nothing = np.zeros((len(responses), 0)), np.zeros(0)
        samples.append(Sample(tokens, responses, rewards, False, f"row {prompt}", *nothing))
    return samples


def response_numbers(samples: Sequence[Sample]) -> list[list[int]]:
    """For each prompt, its responses' numbers in the whole data set."""
    numbers, first = [], 0
    for sample in samples:
        numbers.append(list(range(first, first + len(sample.responses))))
        first += len(sample.responses)
    return numbers


def micro_batch(
    samples: Sequence[Sample], prompts: Sequence[int], reference: np.ndarray | None = None, **layout: bool
) -> MicroBatch:
    """The micro-batch of these prompts, its length even, as sequence parallelism needs."""
    numbers = response_numbers(samples)
    return collate(
        [samples[i] for i in prompts],
        [numbers[i][0] for i in prompts],
        pad_token_id=0,
        pad_multiple=2,
        reference=reference,
        **layout,
    )


def dense_sums(model: Any, samples: Sequence[Sample]) -> Tensor:
    """``[responses, 2]`` log-probabilities of prompt (without t0) and response by a Hugging Face model.

    One row at a time and without padding; carries a gradient.
    """
    sums = []
    for sample in samples:
        for response in sample.responses:
            tokens = torch.from_numpy(np.concatenate([sample.prompt, response]).astype(np.int64))
            logps = model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
            chosen = logps.gather(-1, tokens[1:, None])[:, 0]
            prompt_end = len(sample.prompt) - 1
            sums.append(torch.stack([chosen[:prompt_end].sum(), chosen[prompt_end:].sum()]))
    return torch.stack(sums)
