"""``nemo-rao plan``: from a recipe to what it takes. The arithmetic is in :mod:`nemo_rao.planning`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

from nemo_rao.errors import UserError
from nemo_rao.files import write_atomically
from nemo_rao.integration.architecture import architecture_fields, num_tokens
from nemo_rao.integration.checks import check_architecture, check_sizes
from nemo_rao.integration.compose import compose, override
from nemo_rao.integration.config import RunConfig
from nemo_rao.integration.derived import objective_config
from nemo_rao.integration.experts import check_experts
from nemo_rao.integration.precision_checks import check_named_gpu
from nemo_rao.objectives import registry
from nemo_rao.ops.workspace import CPU_WORKSPACE_BYTES, CUDA_WORKSPACE_BYTES
from nemo_rao.planning.advise import Advice, advise
from nemo_rao.planning.gpus import GPUS
from nemo_rao.planning.network import Network, network_of
from nemo_rao.planning.report import Machine, fits, record, table
from nemo_rao.planning.setting import Lora, Setting

NUM_ADVICE = 3


def main(arguments: argparse.Namespace) -> int:
    """Prints the plan. Returns 0 if the run fits, 1 if it does not.

    Raises:
        UserError: the recipe, or an option, cannot be used.
    """
    config = compose(arguments.config_name, arguments.overrides, arguments.config_dir)
    setting = setting_of(config, tokens_per_row=arguments.tokens_per_row, responses=arguments.responses)
    machine = machine_of(arguments, setting)
    if arguments.gpu_memory is None:
        check_named_gpu(config, arguments.gpu, f"--gpu {arguments.gpu}")
    found: list[Advice] = []
    if not fits(setting, machine):
        accepted = (one for one in advise(setting, machine.limit) if _accepted(config, one))
        found = list(itertools.islice(accepted, NUM_ADVICE))
    title = f"nemo-rao plan {arguments.config_name}"
    print(table(title, setting, machine, found), end="")
    if config.precision.fp8 is not None:
        print(
            f"precision.fp8={config.precision.fp8} is planned as bf16, which is no faster. Copies of weights\nin 8 "
            "bits, up to 2 bytes each, are not counted, nor what activations in 8 bits save."
        )
    if arguments.json is not None:
        text = json.dumps(record(title, setting, machine, found), indent=2) + "\n"
        write_atomically(Path(arguments.json).expanduser(), text)
    return 0 if fits(setting, machine) else 1


def machine_of(arguments: argparse.Namespace, setting: Setting) -> Machine:
    """The GPU that the options describe."""
    if arguments.gpu not in GPUS:
        raise UserError(f"--gpu {arguments.gpu}: there are {', '.join(GPUS)}; others by --gpu-memory and --peak-tflops")
    gpu = GPUS[arguments.gpu]
    given = arguments.gpu_memory is not None
    values = {
        "--gpu-memory": arguments.gpu_memory if given else gpu.memory_gib,
        "--peak-tflops": arguments.peak_tflops or gpu.peak_tflops(setting.param_bytes),
        "--mfu": arguments.mfu,
    }
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0) or (name == "--mfu" and value > 1):
            raise UserError(f"{name} {value:g}: must be above 0{' and at most 1' if name == '--mfu' else ''}")
    if not 0 <= arguments.reserve < values["--gpu-memory"]:
        raise UserError(f"--reserve {arguments.reserve:g}: must be at least 0, and below the GPU's memory, in GiB")
    return Machine(
        name="a GPU" if given else gpu.name,
        memory_gib=values["--gpu-memory"],
        reserve_gib=arguments.reserve,
        peak_tflops=values["--peak-tflops"],
        mfu=arguments.mfu,
    )


def setting_of(config: RunConfig, *, tokens_per_row: int | None = None, responses: int | None = None) -> Setting:
    """What is planned of a recipe.

    Args:
        tokens_per_row: mean tokens of prompt and response; ``None``: ``model.seq_length``, the most there can be.
        responses: of each prompt; ``None``: what the recipe says, 2 for pairs, where it says nothing 2.

    Raises:
        UserError: sizes that do not divide, or that are not known.
    """
    check_sizes(config)
    check_experts(config, architecture_fields(config))
    network = network_of_config(config)
    check_architecture(
        config,
        num_layers=network.layers,
        hidden_size=network.hidden,
        ffn_hidden_size=None if network.experts else network.ffn,
        num_attention_heads=network.heads,
        num_query_groups=network.groups,
        kv_channels=network.head,
    )
    keys, needs = config.model, registry.get(config.model.objective).needs_of(objective_config(config))
    if network.vocabulary(keys.tensor_model_parallel_size) % keys.tensor_model_parallel_size:
        raise UserError(
            f"model.arch.extra.vocab_size={network.tokens} is not divisible by "
            f"model.tensor_model_parallel_size={keys.tensor_model_parallel_size}; change one of them"
        )
    for name, value in (("--tokens-per-row", tokens_per_row), ("--responses", responses)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    if tokens_per_row is not None and tokens_per_row > keys.seq_length:
        raise UserError(
            f"--tokens-per-row {tokens_per_row}: rows longer than model.seq_length={keys.seq_length} are dropped; "
            "lower it"
        )
    lora = Lora(keys.peft.lora.dim, tuple(keys.peft.lora.target_modules))
    full = keys.recompute_granularity == "full"
    return Setting(
        network=network,
        devices=config.trainer.devices,
        nodes=config.trainer.num_nodes,
        tensor=keys.tensor_model_parallel_size,
        pipeline=keys.pipeline_model_parallel_size,
        virtual=keys.virtual_pipeline_model_parallel_size or 1,
        context=keys.context_parallel_size,
        expert=keys.expert_model_parallel_size,
        expert_tensor=keys.expert_tensor_parallel_size,
        sequence_parallel=keys.sequence_parallel,
        micro_batch_size=keys.micro_batch_size,
        global_batch_size=keys.global_batch_size,
        responses=responses or config.data.num_responses or 2,
        tokens_per_row=tokens_per_row or keys.seq_length,
        param_bytes={"bf16": 2, "fp16": 2, "fp32": 4}[config.precision.params],
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        use_distributed_optimizer=keys.optim.use_distributed_optimizer,
        overlap_grad_reduce=keys.optim.overlap_grad_reduce,
        recompute_granularity=keys.recompute_granularity,
        recompute_method=(keys.recompute_method or "uniform") if full else "uniform",
        recompute_num_layers=(keys.recompute_num_layers or 1) if full else 1,
        lora=None if keys.peft.scheme == "none" else lora,
        lora_offered=None if needs.values or needs.scores else lora,
        fused_log_probs=keys.fused_log_probs,
        workspace_bytes=_workspace_bytes(config),
        value_head=needs.values,
        scores=needs.scores,
        reference=needs.reference,
        mismatched=needs.mismatched,
        transformer_engine=config.trainer.accelerator != "cpu",
    )


def network_of_config(config: RunConfig) -> Network:
    """The recipe's sizes over those of its config class, which is read, not imported."""
    keys, fields = config.model, architecture_fields(config)
    return network_of(
        fields,
        config_class=keys.config_class,
        num_tokens=None if fields.get("vocab_size") is not None else num_tokens(config.data.tokenizer),
        seq_length=keys.seq_length,
    )


def _workspace_bytes(config: RunConfig) -> int:
    return CPU_WORKSPACE_BYTES if config.trainer.accelerator == "cpu" else CUDA_WORKSPACE_BYTES


def _accepted(config: RunConfig, advice: Advice) -> bool:
    """Whether the recipe's own checks let the overrides pass, so that they can be pasted."""
    try:
        setting_of(override(config, advice.overrides))
    except UserError:
        return False
    return True
