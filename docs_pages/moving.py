"""docs/guides/moving.md: configuration files of other tools, key by key.

TRL's keys are those of its 1.16 ``DPOConfig`` and ``GRPOConfig``, NeMo-Aligner's of ``gpt_dpo.yaml``, NeMo-RL's of
``dpo.yaml`` and ``grpo_math_1B.yaml``. A test compares nemo_rao's side with the existing keys, and TRL's with its
classes.
"""

from __future__ import annotations

from collections.abc import Iterator

# Each row: the other tool's key; nemo_rao's key, or "" if there is none; the difference.
TRL: tuple[tuple[str, str, str], ...] = (
    ("per_device_train_batch_size", "model.micro_batch_size", "prompts, each with all its responses"),
    ("gradient_accumulation_steps", "", "follows from `model.global_batch_size`, the prompts per step over all ranks"),
    ("learning_rate", "model.optim.lr", "5e-7 by default, not 1e-6"),
    ("lr_scheduler_type", "model.optim.sched.name", "`cosine` or `constant`; TRL's default is linear"),
    ("warmup_ratio", "model.optim.sched.warmup_steps", "steps, not a ratio"),
    ("warmup_steps", "model.optim.sched.warmup_steps", ""),
    ("weight_decay", "model.optim.weight_decay", "0 in both"),
    ("adam_beta1", "model.optim.betas", "the first of two"),
    ("adam_beta2", "model.optim.betas", "the second of two: 0.98, not 0.999"),
    ("adam_epsilon", "model.optim.eps", "1e-8 in both"),
    ("max_grad_norm", "trainer.gradient_clip_val", "1 in both; over all ranks"),
    ("num_train_epochs", "trainer.max_epochs", "1 unless the recipe sets it"),
    ("max_steps", "trainer.max_steps", "`null`, not -1, for no limit"),
    ("beta", "model.dpo.beta", "0.1 in both; each objective has its own key"),
    ("loss_type", "model.objective", "see [Names in other tools](../reference/other_names.md#losses-and-trainers)"),
    ("label_smoothing", "model.dpo.label_smoothing", "TRL's `sigmoid` ignores it"),
    ("max_length", "model.seq_length", "longer rows are dropped and counted, not cut"),
    ("precompute_ref_log_probs", "", "always on: the reference is computed once and cached"),
    ("padding_free", "data.packing", ""),
    ("pad_to_multiple_of", "data.pad_to_multiple_of", ""),
    ("dataset_num_proc", "", "data is tokenized once and memory-mapped"),
    ("gradient_checkpointing", "model.recompute_granularity", "`full`; off by default"),
    ("bf16", "precision.params", "`precision=bf16_mixed` on the command line; fp32 by default"),
    ("logging_steps", "trainer.log_every_n_steps", "1 by default"),
    ("eval_steps", "trainer.val_check_interval", ""),
    ("save_steps", "exp_manager.checkpoint_callback_params.every_n_train_steps", ""),
    ("save_total_limit", "exp_manager.checkpoint_callback_params.save_top_k", ""),
    ("metric_for_best_model", "exp_manager.checkpoint_callback_params.monitor", "such as `val/loss`"),
    ("output_dir", "exp_manager.exp_dir", "and `exp_manager.name`"),
    ("resume_from_checkpoint", "exp_manager.resume_if_exists", "on by default: the same command continues"),
    ("report_to", "exp_manager.create_wandb_logger", "TensorBoard is always written"),
    ("seed", "trainer.seed", "`data.seed` orders the data"),
)
TRL_ONLINE: tuple[tuple[str, str, str], ...] = (
    ("num_generations", "online.num_generations", ""),
    ("max_completion_length", "online.max_new_tokens", ""),
    ("temperature", "online.temperature", ""),
    ("top_p", "online.top_p", ""),
    ("top_k", "online.top_k", ""),
    ("beta", "model.grpo.beta", "0 in both"),
    ("epsilon", "model.grpo.clip_low", "0.2 in both"),
    ("epsilon_high", "model.grpo.clip_high", ""),
    ("scale_rewards", "model.grpo.scale", "`std` or `none`; TRL's `group` is `std`"),
    ("loss_type", "model.grpo.normalize", "`grpo` is `sequence`, `dapo` `token`, `dr_grpo` `constant`"),
    ("num_iterations", "online.epochs", ""),
    ("reward_weights", "online.reward_weights", "by name of the scorer"),
    ("mask_truncated_completions", "online.cut_responses", "`drop`"),
    ("use_vllm", "online.sampler", "`vllm`; otherwise the training model samples"),
)
NEMO_ALIGNER: tuple[tuple[str, str, str], ...] = (
    ("trainer.num_nodes", "trainer.num_nodes", ""),
    ("trainer.devices", "trainer.devices", ""),
    ("trainer.precision", "precision.params", "`precision=bf16_mixed` on the command line"),
    ("trainer.dpo.max_epochs", "trainer.max_epochs", ""),
    ("trainer.dpo.max_steps", "trainer.max_steps", "`null`, not -1, for no limit"),
    ("trainer.dpo.val_check_interval", "trainer.val_check_interval", "steps, not a fraction"),
    ("trainer.dpo.save_interval", "exp_manager.checkpoint_callback_params.every_n_train_steps", ""),
    ("trainer.dpo.gradient_clip_val", "trainer.gradient_clip_val", ""),
    ("exp_manager.explicit_log_dir", "exp_manager.exp_dir", "and `exp_manager.name`"),
    (
        "exp_manager.checkpoint_callback_params.monitor",
        "exp_manager.checkpoint_callback_params.monitor",
        "`val/loss`, not `val_loss`",
    ),
    ("exp_manager.checkpoint_callback_params.save_top_k", "exp_manager.checkpoint_callback_params.save_top_k", ""),
    (
        "pretrained_checkpoint.restore_from_path",
        "model.restore_from_path",
        "a checkpoint in `torch_dist` format, not a .nemo file; `nemo-rao import-hf` writes one",
    ),
    ("model.micro_batch_size", "model.micro_batch_size", "prompts in both"),
    ("model.global_batch_size", "model.global_batch_size", "prompts in both"),
    ("model.encoder_seq_length", "model.seq_length", "longer rows are dropped"),
    ("model.dpo.ref_policy_kl_penalty", "model.dpo.beta", "0.1 by default, not 0.2"),
    (
        "model.dpo.preference_loss",
        "model.objective",
        "`dpo`, `ipo`; `rpo_bwd_kl`, `rpo_fwd_kl` and `rpo_sq` are `rpo` with `model.rpo.distance`",
    ),
    ("model.dpo.gt_reward_scale", "model.rpo.eta", ""),
    ("model.dpo.sft_loss_weight", "model.dpo.sft_weight", "per token"),
    ("model.dpo.preference_average_log_probs", "model.rpo.length_normalized", "also of `ipo`"),
    ("model.dpo.log_prob_forward_micro_batch_size", "reference.micro_batch_size", ""),
    ("model.seed", "trainer.seed", ""),
    ("model.peft.peft_scheme", "model.peft.scheme", ""),
    ("model.peft.lora_tuning.adapter_dim", "model.peft.lora.dim", "16 by default, not 32"),
    ("model.peft.lora_tuning.adapter_dropout", "model.peft.lora.dropout", ""),
    (
        "model.peft.lora_tuning.target_modules",
        "model.peft.lora.target_modules",
        "`attention_qkv` is `linear_qkv`, `attention_dense` `linear_proj`, `mlp_fc1` `linear_fc1`, `mlp_fc2` "
        "`linear_fc2`",
    ),
    ("model.optim.lr", "model.optim.lr", ""),
    ("model.optim.weight_decay", "model.optim.weight_decay", "0 by default, not 0.1"),
    ("model.optim.betas", "model.optim.betas", "0.9 and 0.98 in both"),
    ("model.optim.sched.name", "model.optim.sched.name", "`CosineAnnealing` is `cosine`"),
    ("model.optim.sched.warmup_steps", "model.optim.sched.warmup_steps", ""),
    ("model.optim.sched.constant_steps", "model.optim.sched.constant_steps", "0 by default, not 1000"),
    ("model.optim.sched.min_lr", "model.optim.sched.min_lr", ""),
    (
        "model.data.data_prefix",
        "data.train_path",
        "`data.validation_path` for held-out data; its rows are read unchanged",
    ),
)
NEMO_RL: tuple[tuple[str, str, str], ...] = (
    ("dpo.max_num_epochs", "trainer.max_epochs", ""),
    ("dpo.max_num_steps", "trainer.max_steps", ""),
    ("dpo.val_period", "trainer.val_check_interval", ""),
    ("dpo.seed", "trainer.seed", ""),
    ("dpo.reference_policy_kl_penalty", "model.dpo.beta", "0.1 by default, not 0.05"),
    ("dpo.sft_loss_weight", "model.dpo.sft_weight", "per token"),
    ("checkpointing.checkpoint_dir", "exp_manager.exp_dir", "and `exp_manager.name`"),
    ("checkpointing.metric_name", "exp_manager.checkpoint_callback_params.monitor", "such as `val/loss`"),
    ("checkpointing.higher_is_better", "exp_manager.checkpoint_callback_params.mode", "`max` or `min`"),
    ("checkpointing.keep_top_k", "exp_manager.checkpoint_callback_params.save_top_k", ""),
    ("checkpointing.save_period", "exp_manager.checkpoint_callback_params.every_n_train_steps", ""),
    ("policy.model_name", "model.restore_from_path", "of an imported model, with `model=imported` for its sizes"),
    ("policy.tokenizer.name", "data.tokenizer", ""),
    ("policy.tokenizer.chat_template_kwargs", "data.template_arguments", ""),
    (
        "policy.train_global_batch_size",
        "model.global_batch_size",
        "DPO: pairs there, prompts here. GRPO: responses there, prompts here",
    ),
    ("policy.train_micro_batch_size", "model.micro_batch_size", "the same"),
    ("policy.logprob_batch_size", "reference.micro_batch_size", ""),
    ("policy.max_total_sequence_length", "model.seq_length", "longer rows are dropped"),
    ("policy.precision", "precision.params", "`precision=bf16_mixed` on the command line"),
    ("policy.max_grad_norm", "trainer.gradient_clip_val", ""),
    ("policy.sequence_packing.enabled", "data.packing", ""),
    (
        "policy.make_sequence_length_divisible_by",
        "data.pad_to_multiple_of",
        "the multiples that parallelism needs are added automatically",
    ),
    ("policy.optimizer.kwargs.lr", "model.optim.lr", "also `policy.megatron_cfg.optimizer.lr`"),
    ("policy.optimizer.kwargs.betas", "model.optim.betas", ""),
    ("policy.dtensor_cfg.lora_cfg.dim", "model.peft.lora.dim", "16 by default, not 8"),
    ("policy.dtensor_cfg.lora_cfg.alpha", "model.peft.lora.alpha", "32 in both"),
    (
        "policy.megatron_cfg.tensor_model_parallel_size",
        "model.tensor_model_parallel_size",
        "and so on for other sizes",
    ),
    ("policy.megatron_cfg.sequence_parallel", "model.sequence_parallel", ""),
    ("policy.megatron_cfg.activation_checkpointing", "model.recompute_granularity", "`full`"),
    ("policy.megatron_cfg.moe_router_load_balancing_type", "", "no load-balancing loss is added"),
    ("grpo.num_prompts_per_step", "model.global_batch_size", "times `online.mini_batches`: the prompts of a rollout"),
    ("grpo.num_generations_per_prompt", "online.num_generations", ""),
    ("grpo.overlong_filtering", "online.cut_responses", "`drop`"),
    ("grpo.normalize_rewards", "model.grpo.scale", "`std` or `none`"),
    ("loss_fn.reference_policy_kl_penalty", "model.grpo.beta", "0 by default, not 0.01"),
    ("loss_fn.ratio_clip_min", "model.grpo.clip_low", ""),
    ("loss_fn.ratio_clip_max", "model.grpo.clip_high", ""),
    ("loss_fn.token_level_loss", "model.grpo.normalize", "`token` or `sequence`; `sequence` by default"),
    ("policy.generation.backend", "online.sampler", "`vllm` or `megatron`"),
    ("policy.generation.max_new_tokens", "online.max_new_tokens", ""),
    ("policy.generation.temperature", "online.temperature", ""),
    ("policy.generation.vllm_cfg.gpu_memory_utilization", "online.vllm_memory", ""),
    ("data.train.data_path", "data.train_path", ""),
    ("data.prompt_key", "data.columns", "such as `{prompt: question}`"),
    ("data.shuffle", "data.shuffle", ""),
    ("cluster.gpus_per_node", "trainer.devices", ""),
    ("cluster.num_nodes", "trainer.num_nodes", "no Ray: `nemo-rao launch`, `srun` or `torchrun` start the ranks"),
)
TOOLS = {"TRL": TRL, "TRL, online": TRL_ONLINE, "NeMo-Aligner": NEMO_ALIGNER, "NeMo-RL": NEMO_RL}

_BEFORE = """\
# Moving from other tools

This page maps the configuration files of TRL, NeMo-Aligner and NeMo-RL, key by key.
[Coming from TRL](../start/coming_from_trl.md) describes the differences that affect results.
[Names in other tools](../reference/other_names.md) also covers Megatron-SWIFT and axolotl, losses and commands. If you
use a name of another tool on the command line, the error names the key to use.

Four things differ from most tools:

- Batch sizes count **prompts**, each with all its responses.
- Rows that are too long are **dropped** and counted, never cut.
- The log-probabilities of the reference are **computed once**. There is no reference model to configure.
- Rewards are **part of the data**, added by [`nemo-rao score`](rewards.md), except in [online runs](online.md).

Keys are set as `key=value`, without dashes. This page is generated by `python -m docs_pages`.
"""
_TEXTS = {
    "TRL": "Keys of `DPOConfig`, including those inherited from `TrainingArguments`:",
    "TRL, online": "Further keys of `GRPOConfig`. `reward_funcs` become `online.reward=rule:MODULE:FUNCTION`.",
    "NeMo-Aligner": "Keys of `gpt_dpo.yaml`. Recipes have the same structure; NeMo-Aligner's data is read unchanged.",
    "NeMo-RL": "Keys of `dpo.yaml` and `grpo_math_1B.yaml`. Models are imported once, not loaded from the Hub.",
}


def page() -> str:
    return "\n".join([_BEFORE, *(line for name in TOOLS for line in _section(name))]) + "\n"


def _section(name: str) -> Iterator[str]:
    yield f"## {name}\n\n{_TEXTS[name]}\n"
    yield f"| {name.partition(',')[0]} | nemo_rao | |\n|---|---|---|"
    for theirs, ours, remark in TOOLS[name]:
        yield f"| `{theirs}` | {f'`{ours}`' if ours else '—'} | {remark} |"
    yield ""
