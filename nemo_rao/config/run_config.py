"""Every key of a run: its default, range, unit and comment, here and nowhere else. YAML in conf/ only overrides.

The tree, similar to NeMo-Aligner's:

    trainer         steps, ranks, validation                   model        network, parallelism, optimizer,
    exp_manager     where results go, what is kept                          one block per objective (model.rao ...)
    data            files, tokenizer                           precision    number formats
    reference       the pass that scores data with the starting weights
    online          sampling from the policy in training   (nemo_rao.config.online_config)

``None`` (``null`` in YAML) always means "not set"; the comment says what happens then. Units are stated in the
comment. The keys of ``model`` are in :mod:`nemo_rao.config.model_config`.
"""

from dataclasses import dataclass
from typing import Any

from nemo_rao.config.model_config import ModelConfig
from nemo_rao.config.online_config import OnlineConfig
from nemo_rao.keys import key, section

# ------------------------------------------------------------------------------------------------------- trainer


@dataclass
class TrainerConfig:
    engine: str = key(
        "auto",
        "engine of the run: nemo, NeMo 2; bridge, Megatron-Bridge; auto: the installed one, NeMo if both are. A run "
        "resumes only on the engine that started it",
        choices=("auto", "nemo", "bridge"),
    )
    accelerator: str = key(
        "auto", "device type; auto: GPUs if there are any, else the CPU", choices=("auto", "cpu", "gpu")
    )
    devices: int = key(1, "ranks on each node: GPUs, or processes on a CPU", low=1)
    num_nodes: int = key(1, "nodes; the total number of ranks is devices x num_nodes", low=1)
    max_steps: int | None = key(None, "optimizer steps of the run; null: limited by max_epochs only", low=1)
    max_epochs: int | None = key(1, "passes over the data; with max_steps, whichever ends first. null: no limit", low=1)
    val_check_interval: int = key(
        50,
        "steps between validations; with validation data, the start, the end, and steps whose checkpoint is ranked by "
        "a val/ metric are always validated",
        low=1,
    )
    log_every_n_steps: int = key(1, "steps between lines of metrics", low=1)
    gradient_clip_val: float = key(1.0, "maximum gradient norm, over all ranks; 0: no clipping", low=0)
    seed: int = key(1234, "random seed of initial weights, adapters, a new reward head and dropout", low=0)
    enable_progress_bar: bool = key(True, "show progress: a bar on a terminal, occasional lines in a log file")
    timeout_minutes: float = key(
        30.0, "minutes that a rank waits for others before the run fails", low=0, exclusive=True
    )
    threads_per_rank: int | None = key(
        None,
        "CPU threads of each rank; null: on a CPU 1, or the cores divided among the ranks started here; with a GPU "
        "PyTorch's default",
        low=1,
    )
    profile_steps: list[int] | None = key(
        None,
        "[first, last] steps, from 1, that the first rank profiles: a trace of PyTorch's profiler and, on a GPU, a "
        "snapshot of its memory are written to profile in the run's directory; null: none",
        low=1,
    )


# --------------------------------------------------------------------------------------------------- exp_manager


@dataclass
class WandbConfig:
    project: str | None = key(None, "project; null: W&B's default")
    name: str | None = key(None, "name of the run; null: exp_manager.name")


@dataclass
class CheckpointConfig:
    monitor: str | None = key(
        None,
        "logged metric that decides which checkpoints are kept, such as val/loss; null: the newest are kept",
    )
    mode: str = key("min", "whether a lower or a higher metric is better", choices=("min", "max"))
    save_top_k: int = key(1, "checkpoints kept; 0: none, -1: all", low=-1)
    save_last: bool = key(True, "also keep the newest checkpoint, from which a run resumes")
    every_n_train_steps: int = key(50, "steps between checkpoints", low=1)
    async_save: bool = key(
        False, "write checkpoints in a separate process; training continues once they are copied to host memory"
    )


@dataclass
class ExpManagerConfig:
    exp_dir: str = key("runs", "directory of all runs")
    name: str = key("default", "directory of this run, in exp_dir")
    resume_if_exists: bool = key(True, "continue from the newest checkpoint of a run of this name")
    resume_with_changes: bool = key(
        False,
        "continue although keys or data that change the run's numbers have changed; recorded in changes.jsonl. false: "
        "refused",
    )
    create_tensorboard_logger: bool = key(True, "a TensorBoard log is always written", choices=(True,))
    draw_curves: bool = key(True, "draw curves.png at the end of the run")
    create_wandb_logger: bool = key(False, "also log to Weights & Biases")
    wandb_logger_kwargs: WandbConfig = section(WandbConfig, "Weights & Biases")
    checkpoint_callback_params: CheckpointConfig = section(CheckpointConfig, "which checkpoints are kept")


# ------------------------------------------------------------------------------------ data, precision, reference


@dataclass
class DataConfig:
    train_path: Any = key(
        None,
        "training data: a file (.jsonl, .json, either with .gz, .parquet), a pattern, a directory of `datasets`, "
        "hf:NAME or hf:NAME:SPLIT; or a list of these",
    )
    validation_path: Any = key(None, "validation data, in the same forms; null: no validation")
    tokenizer: str | None = key(None, "directory or name of a Hugging Face tokenizer")
    columns: dict[str, str] = key(
        {}, "names of the files' fields, if they differ from those of the format, such as {prompt: question}"
    )
    ignore_fields: list[str] = key(
        [],
        "fields of the files to ignore; other unused fields are reported, or refused if they look like a part of the "
        "prompt",
    )
    num_prompts: int | None = key(
        None,
        "number of training prompts, drawn once, with data.seed, from those that are kept; a smaller number draws a "
        "subset of a larger one; null: all",
        low=1,
    )
    num_responses: int | None = key(None, "K: number of responses used per prompt, the first ones; null: all", low=1)
    responses: str | None = key(
        None,
        "which of them are used; best_worst: the best and the worst; best_random: the best and a worse one, drawn once "
        "for each prompt; null: best_worst for pairwise objectives, else all",
        choices=(None, "all", "best_worst", "best_random"),
    )
    pairs_by: str = key(
        "auto",
        "what decides which response is better: label (chosen, rejected), or reward, even against labels; auto: labels "
        "if the data has them, else rewards",
        choices=("auto", "label", "reward"),
    )
    chat_template: str = key(
        "auto",
        "auto: use the tokenizer's chat template if it has one; always: refuse a tokenizer without one; never: use the "
        "text unchanged",
        choices=("auto", "always", "never"),
    )
    template_arguments: dict[str, Any] = key({}, "passed to the chat template, such as {enable_thinking: false}")
    reward_field: str | list[str] | None = key(
        None,
        "field of a response's reward, such as helpfulness or annotations.helpfulness.Rating; a list: an ensemble of "
        "reward models, whose mean is the reward; null: that of the data's format",
    )
    answers: str = key(
        "template",
        "template: answers are rendered by the chat template; verbatim: an answer's text follows the generation prompt "
        "unchanged, for templates that shorten or strip answers",
        choices=("template", "verbatim"),
    )
    truncated: str = key(
        "drop",
        "responses marked as truncated (truncated: true); drop: left out and counted; without_end: trained on without "
        "an end token",
        choices=("drop", "without_end"),
    )
    bad_rows: str = key(
        "refuse",
        "rows that cannot be read, that the chat template refuses, or that lack what the objective needs; refuse: the "
        "first one ends the run; drop: counted by cause",
        choices=("refuse", "drop"),
    )
    max_bad_rows: float = key(0.05, "bad_rows=drop: maximum fraction of bad rows in a data set", low=0, high=1)
    strict: bool = key(
        False, "refuse rows that would be dropped and counted: too long, without a token boundary, without a pair"
    )
    cache: bool = key(
        True, "cache tokenized data on disk for other runs and later starts; false: tokenize at every start"
    )
    cache_dir: str | None = key(None, "directory of tokenized data; null: exp_dir/tokenised")
    shuffle: bool = key(True, "shuffle training prompts anew in each epoch; false: the files' order")
    seed: int = key(1234, "random seed of that order, and of draws from the data", low=0)
    pad_to_multiple_of: int = key(
        1, "tokens; micro-batches are padded to a multiple of it, and of what the parallelism needs", low=1
    )
    packing: bool = key(
        False,
        "concatenate a micro-batch's rows into one sequence without attention between rows: no padding",
    )
    prefix_sharing: bool = key(
        False,
        "compute a prompt once for all its responses; with Transformer Engine its attention is replaced by PyTorch's "
        "FlexAttention, and context parallelism is refused",
    )


@dataclass
class PrecisionConfig:
    """Named as in NeMo's ``MegatronMixedPrecision``; docs/precision.md describes their effects."""

    params: str = key(
        "fp32",
        "number format of weights and activations; bf16, fp16: with fp32 master weights in the optimizer",
        choices=("fp32", "bf16", "fp16"),
    )
    grad_reduce_in_fp32: bool = key(True, "accumulate and reduce gradients in fp32")
    fp8: str | None = key(
        None,
        "FP8 format of the four linear layers of each transformer layer; e4m3: everything in e4m3; hybrid: gradients "
        "in e5m2; null: none. The output layer and log-probabilities are never in 8 bits",
        choices=(None, "hybrid", "e4m3"),
    )
    fp8_recipe: str = key(
        "delayed",
        "what scales are computed from; delayed: the largest values of earlier micro-batches; tensorwise: the tensor; "
        "blockwise: 1 x 128 and 128 x 128 blocks; mxfp8: 32 values",
        choices=("delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    fp8_amax_history_len: int = key(1024, "delayed: micro-batches in the history of largest values", low=1)
    fp8_amax_compute_algo: str = key(
        "max",
        "delayed: whether the largest or the last value of the history sets the scale",
        choices=("max", "most_recent"),
    )
    fp8_margin: int = key(0, "delayed: powers of 2 by which scales stay below the largest that fits", low=0)
    fp8_wgrad: bool = key(True, "delayed: compute gradients of weights in 8 bits too; false: in 16 bits")
    fp8_param_gather: bool = key(
        False,
        "keep weights in 8 bits and gather them in 8 bits over data-parallel ranks; the optimizer keeps fp32 weights",
    )
    first_last_layers_bf16: bool = key(False, "keep the first and the last layers in bf16; not with delayed")
    num_layers_at_start_in_bf16: int = key(1, "number of first layers in bf16, with first_last_layers_bf16", low=0)
    num_layers_at_end_in_bf16: int = key(1, "number of last layers in bf16, with first_last_layers_bf16", low=0)
    fp8_simulation: bool = key(
        False, "round through 8 bits in PyTorch, without Transformer Engine, on any device; for accuracy, not for speed"
    )
    fp16_loss_scale: float | None = key(None, "fp16: loss scale; null: dynamic", low=0, exclusive=True)
    fp16_initial_loss_scale: float = key(
        4096.0, "fp16: initial dynamic loss scale; steps whose gradients overflow are skipped and halve it", low=1
    )
    fp16_min_loss_scale: float = key(1.0, "fp16: minimum dynamic loss scale", low=0, exclusive=True)
    fp16_loss_scale_window: int = key(1000, "fp16: steps without an overflow after which the scale doubles", low=1)
    fp16_hysteresis: int = key(2, "fp16: overflows before the scale is halved", low=1)


@dataclass
class ReferenceConfig:
    cache_dir: str | None = key(None, "directory of the reference log-probabilities; null: exp_dir/reference")
    micro_batch_size: int | None = key(
        None, "prompts per forward pass of the reference pass; null: model.micro_batch_size", low=1
    )
    save_every: int = key(50, "global batches after which an unfinished pass is saved for resumption", low=1)


@dataclass
class RunConfig:
    """A whole run, typed and checked. Created by :func:`nemo_rao.config.compose.compose`."""

    trainer: TrainerConfig = section(TrainerConfig, "steps, ranks, validation")
    exp_manager: ExpManagerConfig = section(ExpManagerConfig, "where results go, what is kept")
    model: ModelConfig = section(ModelConfig, "network, parallelism, optimizer, objective")
    data: DataConfig = section(DataConfig, "files and tokenizer")
    precision: PrecisionConfig = section(PrecisionConfig, "number formats")
    reference: ReferenceConfig = section(
        ReferenceConfig, "log-probabilities of the data under the starting weights, computed once"
    )
    online: OnlineConfig = section(OnlineConfig, "training on samples of the policy itself")
