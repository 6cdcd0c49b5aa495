"""Names of other tools and their counterparts here: for hints on unknown names, and docs/reference/other_names.md.

Tools: TRL (and transformers' ``TrainingArguments``), NeMo-Aligner, NeMo-RL, Megatron-SWIFT, axolotl. ``python -m
nemo_rao.other_names`` prints the page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Counterpart:
    """The counterpart of another tool's name.

    Attributes:
        what: a noun phrase, such as "the learning rate".
        keys: its keys here; empty where there is no direct counterpart.
        note: further information, a clause.
    """

    what: str
    keys: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if not self.keys:
            return f"{self.what} {self.note}"
        return f"{self.what} is {' and '.join(self.keys)}" + (f" ({self.note})" if self.note else "")


_ACCUMULATION = Counterpart(
    "gradient accumulation",
    note="follows from model.global_batch_size / (model.micro_batch_size x data-parallel ranks)",
)
_LENGTH = Counterpart(
    "the longest row, prompt and response together,", ("model.seq_length",), "longer rows are dropped, not cut"
)
_PROMPT_LENGTH = Counterpart(
    "a separate limit on prompts or responses",
    note="does not exist: rows longer than model.seq_length are dropped whole",
)
_MODEL = Counterpart(
    "the checkpoint to start from", ("model.restore_from_path",), "nemo-rao import-hf makes one of a Hugging Face model"
)
_MICRO = Counterpart("the batch of one forward pass, in prompts,", ("model.micro_batch_size",))
_PRECISION = Counterpart("the number format", ("precision.params",), "precision=bf16_mixed on the command line")
_REFERENCE = Counterpart(
    "the reference policy", note="is the model at the start of the run, model.restore_from_path; its log-probabilities "
    "are computed once"
)  # fmt: skip
_BETA = Counterpart("beta", note="is a key of the objective: model.<objective>.beta, such as model.dpo.beta")
_OBJECTIVE = Counterpart("the objective", ("model.objective",), "or a recipe, --config-name gpt_<objective>")
_ATTENTION = Counterpart(
    "the attention kernel",
    note="is chosen by Megatron: Transformer Engine's on GPUs, PyTorch's without it or with `data.prefix_sharing=true`",
)
_PPO_KL = Counterpart("the weight of PPO's KL to the reference", ("model.ppo.kl_coef",))
_ZERO = Counterpart(
    "splitting optimizer states over ranks", ("model.optim.use_distributed_optimizer",), "on by default; no DeepSpeed"
)
_WANDB = Counterpart("logging to Weights & Biases", ("exp_manager.create_wandb_logger",))
_DATA = Counterpart("the training data", ("data.train_path",))
_TEMPLATE = Counterpart("the chat template", note="is the tokenizer's own: data.tokenizer, data.chat_template")
_ONLINE = Counterpart(
    "an objective that samples while it trains",
    note="is ppo, rloo or grpo here, or rpo or rao with online.num_generations",
)

_COLUMNS = Counterpart("a name of the data's fields", ("data.columns",), "such as {prompt: question}")
_TRUNCATED = Counterpart("the treatment of truncated samples", ("data.truncated",))
_WORKERS = Counterpart("worker processes", note="are not needed: data is tokenized once and memory-mapped")
_LIKELIHOOD = Counterpart("the weight of the chosen response's likelihood", ("model.dpo.sft_weight",))

# Names of keys, without the groups in front of them.
KEYS: dict[str, Counterpart] = {
    "learning_rate": Counterpart("the learning rate", ("model.optim.lr",)),
    "lr": Counterpart("the learning rate", ("model.optim.lr",)),
    "lr_scheduler_type": Counterpart("the learning rate's schedule", ("model.optim.sched.name",)),
    "lr_scheduler": Counterpart("the learning rate's schedule", ("model.optim.sched.name",)),
    "warmup_ratio": Counterpart("warm-up, in steps,", ("model.optim.sched.warmup_steps",), "a ratio is not supported"),
    "lr_warmup_fraction": Counterpart(
        "warm-up, in steps,", ("model.optim.sched.warmup_steps",), "a fraction is not supported"
    ),
    "warmup_steps": Counterpart("warm-up", ("model.optim.sched.warmup_steps",)),
    "weight_decay": Counterpart("weight decay", ("model.optim.weight_decay",)),
    "adam_beta1": Counterpart("Adam's first decay rate", ("model.optim.betas",), "a list of two"),
    "adam_beta2": Counterpart("Adam's second decay rate", ("model.optim.betas",), "a list of two"),
    "adam_epsilon": Counterpart("Adam's epsilon", ("model.optim.eps",)),
    "max_grad_norm": Counterpart("the maximum gradient norm", ("trainer.gradient_clip_val",)),
    "clip_grad": Counterpart("the maximum gradient norm", ("trainer.gradient_clip_val",)),
    "optimizer": Counterpart("the optimizer", ("model.optim.name",)),
    "gradient_accumulation_steps": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "per_device_train_batch_size": _MICRO,
    "per_device_eval_batch_size": _MICRO,
    "train_micro_batch_size": _MICRO,
    "train_global_batch_size": Counterpart("the batch of one step, in prompts,", ("model.global_batch_size",)),
    "train_batch_size": Counterpart("the batch of one step, in prompts,", ("model.global_batch_size",)),
    "num_prompts_per_step": Counterpart("the batch of one step, in prompts,", ("model.global_batch_size",)),
    "num_train_epochs": Counterpart("the number of epochs", ("trainer.max_epochs",)),
    "num_epochs": Counterpart("the number of epochs", ("trainer.max_epochs",)),
    "max_num_epochs": Counterpart("the number of epochs", ("trainer.max_epochs",)),
    "max_num_steps": Counterpart("the number of steps", ("trainer.max_steps",)),
    "train_iters": Counterpart("the number of steps", ("trainer.max_steps",)),
    "eval_steps": Counterpart("steps from one validation to the next", ("trainer.val_check_interval",)),
    "val_period": Counterpart("steps from one validation to the next", ("trainer.val_check_interval",)),
    "eval_interval": Counterpart("steps from one validation to the next", ("trainer.val_check_interval",)),
    "save_steps": Counterpart(
        "steps from one checkpoint to the next", ("exp_manager.checkpoint_callback_params.every_n_train_steps",)
    ),
    "save_interval": Counterpart(
        "steps from one checkpoint to the next", ("exp_manager.checkpoint_callback_params.every_n_train_steps",)
    ),
    "save_total_limit": Counterpart(
        "the number of checkpoints kept", ("exp_manager.checkpoint_callback_params.save_top_k",)
    ),
    "metric_for_best_model": Counterpart(
        "the metric that ranks checkpoints", ("exp_manager.checkpoint_callback_params.monitor",)
    ),
    "logging_steps": Counterpart("steps from one line of metrics to the next", ("trainer.log_every_n_steps",)),
    "log_interval": Counterpart("steps from one line of metrics to the next", ("trainer.log_every_n_steps",)),
    "report_to": _WANDB,
    "wandb_enabled": _WANDB,
    "wandb_project": Counterpart("the project on Weights & Biases", ("exp_manager.wandb_logger_kwargs.project",)),
    "run_name": Counterpart("the run's name", ("exp_manager.name",)),
    "output_dir": Counterpart("the output directory", ("exp_manager.exp_dir", "exp_manager.name")),
    "checkpoint_dir": Counterpart("the output directory", ("exp_manager.exp_dir", "exp_manager.name")),
    "explicit_log_dir": Counterpart("the output directory", ("exp_manager.exp_dir", "exp_manager.name")),
    "resume_from_checkpoint": Counterpart(
        "resuming", ("exp_manager.resume_if_exists",), "on by default: the same command continues"
    ),
    "model_type": Counterpart("the model's architecture", ("model.family",), "with the model's sizes in model.arch"),
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "base_model": _MODEL,
    "pretrained_checkpoint": _MODEL,
    "ref_model": _REFERENCE,
    "ref_policy": _REFERENCE,
    "precompute_ref_log_probs": _REFERENCE,
    "tokenizer_name_or_path": Counterpart("the tokenizer", ("data.tokenizer",)),
    "max_length": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "max_total_sequence_length": _LENGTH,
    "sequence_len": _LENGTH,
    "encoder_seq_length": _LENGTH,
    "max_prompt_length": _PROMPT_LENGTH,
    "max_completion_length": _PROMPT_LENGTH,
    "dataset": _DATA,
    "dataset_name": _DATA,
    "datasets": _DATA,
    "data_prefix": _DATA,
    "train_file": _DATA,
    "val_dataset": Counterpart("the validation data", ("data.validation_path",)),
    "eval_dataset": Counterpart("the validation data", ("data.validation_path",)),
    "max_train_samples": Counterpart("the number of training prompts", ("data.num_prompts",)),
    "prompt_key": _COLUMNS,
    "input_key": _COLUMNS,
    "chosen_key": _COLUMNS,
    "field_messages": _COLUMNS,
    "mask_truncated_completions": _TRUNCATED,
    "overlong_filter": _TRUNCATED,
    "num_generations": Counterpart("the number of responses of each prompt", ("data.num_responses",)),
    "num_generations_per_prompt": Counterpart("the number of responses of each prompt", ("data.num_responses",)),
    "template": _TEMPLATE,
    "chat_template_path": _TEMPLATE,
    "sample_packing": Counterpart("packing", ("data.packing",)),
    "pad_to_sequence_len": Counterpart(
        "padding", ("data.pad_to_multiple_of",), "micro-batches are padded to their longest row"
    ),
    "use_peft": Counterpart("LoRA", ("model.peft.scheme",), "lora"),
    "peft_scheme": Counterpart("LoRA", ("model.peft.scheme",), "lora"),
    "adapter": Counterpart("LoRA", ("model.peft.scheme",), "lora"),
    "train_type": Counterpart("LoRA", ("model.peft.scheme",), "lora"),
    "use_dora": Counterpart("DoRA", ("model.peft.scheme",), "dora"),
    "lora_r": Counterpart("the rank of LoRA's adapters", ("model.peft.lora.dim",)),
    "lora_rank": Counterpart("the rank of LoRA's adapters", ("model.peft.lora.dim",)),
    "adapter_dim": Counterpart("the rank of LoRA's adapters", ("model.peft.lora.dim",)),
    "lora_alpha": Counterpart("LoRA's alpha", ("model.peft.lora.alpha",)),
    "lora_dropout": Counterpart("LoRA's dropout", ("model.peft.lora.dropout",)),
    "lora_target_modules": Counterpart(
        "the list of layers with an adapter",
        ("model.peft.lora.target_modules",),
        "Megatron's names or Hugging Face's",
    ),
    "load_in_4bit": Counterpart("quantized base weights (QLoRA)", note="are not supported; LoRA trains over bf16 ones"),
    "load_in_8bit": Counterpart("quantized base weights (QLoRA)", note="are not supported; LoRA trains over bf16 ones"),
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "precision": _PRECISION,
    "torch_dtype": _PRECISION,
    "dtype": _PRECISION,
    "gradient_checkpointing": Counterpart("recomputing activations", ("model.recompute_granularity",), "full"),
    "activation_checkpointing": Counterpart("recomputing activations", ("model.recompute_granularity",), "full"),
    "activations_checkpoint_granularity": Counterpart("recomputing activations", ("model.recompute_granularity",)),
    "deepspeed": _ZERO,
    "fsdp": _ZERO,
    "attn_implementation": _ATTENTION,
    "attn_impl": _ATTENTION,
    "attention_backend": _ATTENTION,
    "flash_attention": _ATTENTION,
    "tensor_parallel_size": Counterpart("tensor parallelism", ("model.tensor_model_parallel_size",)),
    "pipeline_parallel_size": Counterpart("pipeline parallelism", ("model.pipeline_model_parallel_size",)),
    "expert_parallel_size": Counterpart("expert parallelism", ("model.expert_model_parallel_size",)),
    "gpus_per_node": Counterpart("the number of ranks on a node", ("trainer.devices",)),
    "nproc_per_node": Counterpart("the number of ranks on a node", ("trainer.devices",)),
    "nnodes": Counterpart("the number of nodes", ("trainer.num_nodes",)),
    "use_cpu": Counterpart("training on the CPU", ("trainer.accelerator",), "cpu"),
    "loss_type": _OBJECTIVE,
    "preference_loss": _OBJECTIVE,
    "rlhf_type": _OBJECTIVE,
    "rl": _OBJECTIVE,
    "beta": _BETA,
    "ref_policy_kl_penalty": _BETA,
    "reference_policy_kl_penalty": _BETA,
    "kl_coef": _PPO_KL,
    "init_kl_coef": _PPO_KL,
    "cliprange": Counterpart("the bound on PPO's ratio", ("model.ppo.clip",)),
    "cliprange_value": Counterpart("the bound on PPO's values", ("model.ppo.value_clip",)),
    "vf_coef": Counterpart("the weight of PPO's value loss", ("model.ppo.value_weight",)),
    "critic_pretrain": Counterpart("the run that PPO's critic starts from", ("model.ppo.critic_path",)),
    "critic_learning_rate": Counterpart("the learning rate of PPO's critic", ("model.ppo.value_lr",)),
    "num_ppo_epochs": Counterpart("passes over each rollout", ("online.epochs",)),
    "num_mini_batches": Counterpart("optimizer steps in each pass over a rollout", ("online.mini_batches",)),
    "simpo_gamma": Counterpart("SimPO's margin", ("model.simpo.gamma",)),
    "cpo_alpha": Counterpart("the weight of the chosen response's likelihood", ("model.simpo.sft_weight",)),
    "rpo_alpha": _LIKELIHOOD,
    "sft_loss_weight": _LIKELIHOOD,
    "label_smoothing": Counterpart("label smoothing", ("model.dpo.label_smoothing",)),
    "gt_reward_scale": Counterpart("the scale of explicit rewards", ("model.rpo.eta",)),
    "desirable_weight": Counterpart("the weight of desirable responses", ("model.kto.desirable_weight",)),
    "undesirable_weight": Counterpart("the weight of undesirable responses", ("model.kto.undesirable_weight",)),
    "center_rewards_coefficient": Counterpart("the weight that centers scores", ("model.rm.center",)),
    "reward_model": Counterpart(
        "rewards of a model",
        note="are computed before training, by nemo-rao score --scorer model:RUN; online, by online.reward=model:RUN",
    ),
    "reward_funcs": Counterpart(
        "rewards of a function",
        note="are computed before training, by nemo-rao score --scorer rule:MODULE:FUNCTION; online, by "
        "online.reward=rule:MODULE:FUNCTION",
    ),
    "num_workers": _WORKERS,
    "dataset_num_proc": _WORKERS,
}

# Names of objectives or trainers. A value without spaces names an objective here; others are explanations.
OBJECTIVES: dict[str, str] = {
    **{name: str(_ONLINE) for name in ("reinforce", "gspo", "online_dpo", "xpo")},
    "dapo": "DAPO is grpo with model.grpo.normalize=token and model.grpo.clip_high=0.28",
    "dr_grpo": "Dr. GRPO is grpo with model.grpo.normalize=constant and model.grpo.scale=none",
    **dict.fromkeys(("reward", "reward_model", "bradley_terry", "bt"), "rm"),
    **dict.fromkeys(("finetune", "instruct", "pretrain"), "sft"),
    "regression": "rm_regression",
    "sigmoid": "dpo",
    "cdpo": "cDPO is dpo with model.dpo.label_smoothing",
    "robust": "robust DPO is dpo with model.dpo.robust=true and model.dpo.label_smoothing",
    "rso": "hinge",
    "cpo": "CPO's losses are slic and simpo, with model.<objective>.sft_weight for its likelihood term",
    "kto_pair": "kto",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
    "infonca": "InfoNCA is rpo with model.rpo.distance=bwd, its default",
    "rpo_bwd_kl": "rpo",
    "rpo_fwd_kl": "that loss is rpo with model.rpo.distance=fwd",
    "rpo_sq": "that loss is rpo with model.rpo.distance=sq",
    "steerlm": "a regression reward model is rm_regression",
}

# Commands of other tools, and the ones to use here.
COMMANDS: dict[str, str] = {
    **{name: f"train --config-name gpt_{name}" for name in ("sft", "dpo", "kto", "orpo", "simpo", "rao", "rpo")},
    "finetune": "train --config-name gpt_sft",
    "reward": "train --config-name gpt_rm",
    "rlhf": "train",
    "align": "train",
    "sweep": "train --multirun",
    "sbatch": "launch",
    "convert": "import-hf or nemo-rao export-hf",
    "export": "export-hf",
    "merge": "export-hf",
    "merge_lora": "export-hf",
    "import": "import-hf",
    "infer": "generate",
    "inference": "generate",
    "sample": "generate",
    "eval": "evaluate",
    "estimate": "plan",
    "preprocess": "show",
    "inspect": "show",
}

# Files of recipe groups that a command writes.
MADE_FILES: dict[tuple[str, str], str] = {
    ("model", "imported"): "nemo-rao import-hf MODEL DIR writes it; then add --config-dir DIR",
}


def counterpart(name: str) -> Counterpart | None:
    """The counterpart of a key of another tool; ``None`` if its name is not in the table.

    Args:
        name: as given, with groups in front, or as a command-line option with dashes.
    """
    plain = name.lstrip("-").partition("=")[0].replace("-", "_").lower()
    return KEYS.get(plain) or KEYS.get(plain.rpartition(".")[2])


def objective_hint(name: str) -> str | None:
    """The counterpart of another tool's objective, or of a recipe's name such as ``gpt_grpo_llama3_8b``."""
    plain = name.lower().replace("-", "_").removeprefix("gpt_")
    near = [known for known in OBJECTIVES if plain == known or plain.startswith(f"{known}_")]
    if not near:
        return None
    here = OBJECTIVES[max(near, key=len)]
    return here if " " in here else f"it is called {here} here"


def command_hint(name: str) -> str | None:
    """The counterpart of a command of another tool."""
    here = COMMANDS.get(name.replace("-", "_").lower())
    return None if here is None else f"that is nemo-rao {here}"


# ----------------------------------------------------------------------------------------------------- the page


_BEFORE = """\
# Names in other tools

Counterparts of the keys, losses and commands of TRL, NeMo-Aligner, NeMo-RL, Megatron-SWIFT and axolotl, without the
groups in front of them. Hints on unknown names come from the same table: `nemo-rao train learning_rate=1e-6` names
`model.optim.lr`. [Moving from other tools](../guides/moving.md) goes through whole configuration files. This page is
generated by `python -m docs_pages`.
"""


def page() -> str:
    """Markdown: a table of keys, one of objectives, one of commands."""
    by_meaning: dict[Counterpart, list[str]] = {}
    for name, here in KEYS.items():
        by_meaning.setdefault(here, []).append(name)
    keys = ((_code(names), _code(here.keys) or "—", _sentence(here)) for here, names in by_meaning.items())
    by_text: dict[str, list[str]] = {}
    for name, text in OBJECTIVES.items():
        by_text.setdefault(text, []).append(name)
    objectives = ((_code(names), text if " " in text else f"`{text}`") for text, names in by_text.items())
    commands = ((f"`{name}`", f"`nemo-rao {text}`".replace(" or ", "` or `")) for name, text in COMMANDS.items())
    return "\n".join(
        [
            _BEFORE,
            *("## Keys", "", *_table(("elsewhere", "here", "meaning"), keys), ""),
            *("## Losses and trainers", "", *_table(("elsewhere", "here"), objectives), ""),
            *("## Commands", "", *_table(("elsewhere", "here"), commands), ""),
        ]
    )


def _sentence(here: Counterpart) -> str:
    if here.keys:
        return here.what.rstrip(",") + (f" ({here.note})" if here.note else "")
    return str(here)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


if __name__ == "__main__":
    print(page(), end="")
