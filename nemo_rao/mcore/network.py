"""Fingerprint of what a network computes with its weights: with another rotary base, number of heads or window, the
same weights are another policy, though no tensor differs.

Every field of Megatron's config, and of the framework's subclass, is included, unless it is listed here as one that
cannot change a forward pass without dropout. A field added by a later version is therefore included: at worst, the
reference is recomputed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

# How work is split and ordered, and how ranks communicate.
_LAYOUT = """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size
    hierarchical_context_parallel_sizes expert_model_parallel_size expert_tensor_parallel_size sequence_parallel
    moe_extended_tp num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split pipeline_model_parallel_layout
    microbatch_group_size_per_vp_stage pipeline_model_parallel_comm_backend cp_comm_type symmetric_ar_type
    parallel_output scatter_embedding_sequence_parallel clone_scatter_output_in_embedding variable_seq_lengths
    overlap_p2p_comm batch_p2p_comm batch_p2p_sync overlap_p2p_comm_warmup_flush use_ring_exchange_p2p
    deallocate_pipeline_outputs async_tensor_model_parallel_allreduce tp_comm_overlap tp_comm_overlap_cfg
    tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
    tp_comm_split_ag tp_comm_split_rs tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_overlap_disable_qkv
    tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend overlap_moe_expert_parallel_comm moe_token_dispatcher_type
    moe_enable_deepep moe_deepep_num_sms moe_shared_expert_overlap _pg_collection
"""
# Only for the backward pass, the optimizer, the loss, or logging.
_TRAINING = """
    timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func
    gradient_accumulation_fusion defer_embedding_wgrad_compute wgrad_deferral_limit delay_wgrad_compute
    calculate_per_token_loss cross_entropy_loss_fusion cross_entropy_fusion_impl fp16_lm_cross_entropy
    mtp_loss_scaling_factor moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate moe_per_layer_logging
    barrier_with_L1_time config_logger_dir data_step_fn generation_config
"""
# Dropout is disabled in a reference pass.
_DROPOUT = "hidden_dropout attention_dropout use_te_rng_tracker inference_rng_tracker inference_sampling_seed"
# Weights are loaded, and hashed separately; padding of the vocabulary does not affect log-probabilities, and rows
# longer than seq_length are not in the data.
_WEIGHTS = """
    init_method output_layer_init_method embedding_init_method init_method_std embedding_init_method_std
    perform_initialization use_cpu_initialization init_model_with_meta_device make_vocab_size_divisible_by seq_length
    hetereogenous_dist_checkpoint hf_model_id hf_model_revision should_pad_vocab restore_modelopt_state
"""
# What is kept in memory, and what is recomputed.
_MEMORY = """
    recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations
    num_microbatches_with_partial_activation_checkpoints moe_layer_recompute activation_func_fp8_input_store
    cpu_offloading cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights
    cpu_offloading_double_buffering disable_parameter_transpose_cache memory_efficient_layer_norm
"""
# Which kernel computes the same function: it may round differently, like another GPU.
_KERNELS = """
    bias_activation_fusion masked_softmax_fusion persist_layer_norm bias_dropout_fusion apply_rope_fusion
    use_fused_weighted_squared_relu fused_single_qkv_rope attention_backend transformer_impl flash_decode
    use_te_activation_func use_transformer_engine_full_layer_spec use_transformer_engine_op_fuser moe_grouped_gemm
    moe_use_legacy_grouped_gemm moe_permute_fusion moe_router_fusion moe_router_padding_for_fp8 use_mamba_mem_eff_path
    mlp_chunks_for_prefill deterministic_mode test_mode enable_cuda_graph external_cuda_graph cuda_graph_impl
    cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
    dense_grouped_gemm use_arbitrary_attention_mask
"""
# Number formats, which are a separate part of the key (nemo_rao.config.precision_checks.quantization).
_PRECISION = """
    fp16 bf16 params_dtype pipeline_dtype enable_autocast autocast_dtype fp8 fp8_recipe fp8_param fp8_margin
    fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 disable_bf16_reduced_precision_matmul
"""
NO_EFFECT = frozenset(" ".join((_LAYOUT, _TRAINING, _DROPOUT, _WEIGHTS, _MEMORY, _KERNELS, _PRECISION)).split())

# Replaces the attention kernel in the layers of another spec, its argument ``spec``.
_KERNEL_ONLY = "nemo_rao.mcore.flex_attention.layer_spec_with_flex_attention"

# Variants of the same layers, with and without Transformer Engine. A class with layers of another kind defines its own
# spec.
_OF_ENGINES = (
    "default_layer_spec",
    "local_layer_spec",
    "transformer_engine_layer_spec",
    "transformer_engine_full_layer_spec",
)
_USUAL_LAYERS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "nemo.collections.llm.gpt.model.base": _OF_ENGINES,
        "megatron.bridge.models.gpt_provider": _OF_ENGINES,
        "nemo_rao.mcore.layer_spec": ("layer_spec_without_te",),
        "nemo_rao.mcore.fp8_simulation": ("layer_spec_with_simulated_fp8",),
    }.items()
    for name in names
)


def network_fingerprint(config: TransformerConfig) -> str:
    """Hash what a forward pass depends on besides weights, rows and number formats.

    The same for any parallelism and micro-batch size, with and without Transformer Engine.

    Returns:
        16 hexadecimal digits.
    """
    text = json.dumps(network_description(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def network_description(config: TransformerConfig) -> dict[str, Any]:
    """Return what is hashed: field -> value, as JSON types."""
    described = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in NO_EFFECT
    }
    # A class may override how it is built: NeMo's Llama 3.1 scales its rotary frequencies there. The method has one
    # name in NeMo and another in Megatron-Bridge.
    methods = (inspect.getattr_static(type(config), name, None) for name in ("configure_model", "provide"))
    described["built by"] = next((_plain(method) for method in methods if method is not None), None)
    return described


def _plain(value: Any) -> Any:
    """Convert a value to JSON, deterministically: functions and classes by name, objects by their contents."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value  # 10000 and 10000.0 are the same rotary base
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, (torch.dtype, torch.Size)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, map(_plain, value)))
    if isinstance(value, functools.partial):
        if _plain(value.func) == _KERNEL_ONLY:
            return _plain(value.keywords["spec"])
        if _plain(value.func) == "the usual layers":
            return "the usual layers"  # its arguments are kernels and number formats
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, types.FunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        if name in _USUAL_LAYERS:
            return "the usual layers"
        held = [_plain(cell.cell_contents) for cell in value.__closure__ or ()]
        return [name, held] if held else name
    if isinstance(value, (type, types.BuiltinFunctionType, types.MethodType)):
        return f"{value.__module__}.{value.__qualname__}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return [kind, {name: _plain(item) for name, item in getattr(value, "__dict__", {}).items()}]
