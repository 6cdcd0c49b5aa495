"""``nemo-rao plan``: estimate what a recipe needs. The arithmetic is in :mod:`nemo_rao.planning`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

from nemo_rao.config.architecture import architecture_fields, family_of, network_key, num_tokens
from nemo_rao.config.checks import check_network, check_sizes
from nemo_rao.config.compose import compose, override
from nemo_rao.config.derived import chosen_responses, objective_config
from nemo_rao.config.families import FAMILIES
from nemo_rao.config.gpu_models import GPUS
from nemo_rao.config.lora_targets import lora_targets
from nemo_rao.config.online_config import OnlineConfig
from nemo_rao.config.precision_checks import check_named_gpu, fp8_multiple
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.data.choice import num_used
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry
from nemo_rao.objectives.base import Needs
from nemo_rao.ops.workspace import CPU_WORKSPACE_BYTES, CUDA_WORKSPACE_BYTES
from nemo_rao.planning.advise import Advice, advise
from nemo_rao.planning.machine import Machine
from nemo_rao.planning.memory import peak, upper_peak
from nemo_rao.planning.network import Network, network_of
from nemo_rao.planning.plan_data import run_length, size_of
from nemo_rao.planning.report import fits, fits_surely, record, table
from nemo_rao.planning.setting import Lora, Rollouts, Setting
from nemo_rao.runtime.files import write_atomically

NUM_ADVICE = 3
NODE_SIZE = 8  # GPUs of NVIDIA's DGX and HGX systems
DEFAULT_RESPONSES = 2  # per prompt, if neither the recipe nor the data states it


def main(arguments: argparse.Namespace) -> int:
    """Print the plan. Returns 0 if the run fits, tightly or not, and 1 if it does not.

    Raises:
        UserError: the recipe, or an option, cannot be used.
    """
    config = compose(arguments.config_name, arguments.overrides, arguments.config_dir)
    setting = setting_of(config, tokens_per_row=arguments.tokens_per_row, responses=arguments.responses)
    machine = machine_of(arguments, setting)
    if arguments.gpu_memory is None:
        check_named_gpu(config, arguments.gpu, f"--gpu {arguments.gpu}")
    # Files are read last, after all other checks: they may be large.
    training, validation = size_of(config, config.data.train_path), size_of(config, config.data.validation_path)
    if arguments.responses is None and training is not None:
        setting = dataclasses.replace(setting, responses=_responses_used(config, training.responses))
    length = run_length(config, training=training, validation=validation, prompts=arguments.prompts)
    found = [] if fits_surely(setting, machine) else _advice(config, setting, machine)
    title = f"nemo-rao plan {arguments.config_name}"
    print(table(title, setting, machine, found, length), end="")
    if setting.rollouts is not None and config.online.sampler != "megatron":
        print(f"online.sampler={config.online.sampler} is planned as sampling by the training model.")
    if setting.rollouts is not None and config.data.validation_path is not None:
        print("data.validation_path: validations by sampling are not planned.")
    if config.model.cpu_offloading_num_layers is not None:
        print(
            "model.cpu_offloading_num_layers: activations that are offloaded to host memory are planned as if they\n"
            "stayed on the GPU."
        )
    if config.data.prefix_sharing:
        print(
            "data.prefix_sharing=true: the savings of computing a prompt once are not planned; set --tokens-per-row\n"
            "to the mean number of computed tokens per row."
        )
    if config.precision.fp8 is not None:
        print(
            f"precision.fp8={config.precision.fp8} is planned as bf16, which is not faster. 8-bit copies of weights,\n"
            "up to 2 bytes each, are not counted, nor are savings by 8-bit activations."
        )
    if arguments.json is not None:
        text = json.dumps(record(title, setting, machine, found, length), indent=2) + "\n"
        write_atomically(Path(arguments.json).expanduser(), text)
    return 0 if fits(setting, machine) else 1


def _advice(config: RunConfig, setting: Setting, machine: Machine) -> list[Advice]:
    """Return settings that fit with the uncertainty of activations, or if none does, those that fit without it."""

    def first(need: Callable[[Setting], int]) -> list[Advice]:
        found = advise(setting, machine.limit, node_size=machine.node_size, need=need)
        return list(itertools.islice((one for one in found if _accepted(config, one)), NUM_ADVICE))

    return first(upper_peak) or ([] if fits(setting, machine) else first(peak))


def machine_of(arguments: argparse.Namespace, setting: Setting) -> Machine:
    """Return the GPU that the options describe."""
    if arguments.gpu not in GPUS:
        raise UserError(
            f"--gpu {arguments.gpu}: is unknown. Choose from {', '.join(GPUS)}, or set --gpu-memory and --peak-tflops."
        )
    gpu = GPUS[arguments.gpu]
    given = arguments.gpu_memory is not None
    values = {
        "--gpu-memory": arguments.gpu_memory if given else gpu.memory_gib,
        "--peak-tflops": _either(arguments.peak_tflops, gpu.peak_tflops(setting.param_bytes)),
        "--mfu": arguments.mfu,
        "--intra-node-bandwidth": _either(arguments.intra_node_bandwidth, gpu.intra_node_gbs),
        "--inter-node-bandwidth": _either(arguments.inter_node_bandwidth, gpu.inter_node_gbs),
        "--link-efficiency": arguments.link_efficiency,
        "--memory-bandwidth": _either(arguments.memory_bandwidth, gpu.memory_gbs),
    }
    for name, value in values.items():
        share = name in ("--mfu", "--link-efficiency")
        if not (math.isfinite(value) and value > 0) or (share and value > 1):
            raise UserError(f"{name} {value:g}: must be above 0{' and at most 1' if share else ''}")
    if arguments.devices_per_node is not None and arguments.devices_per_node < setting.devices:
        raise UserError(
            f"--devices-per-node {arguments.devices_per_node}: is below the recipe's "
            f"trainer.devices={setting.devices}. Raise it, or lower trainer.devices."
        )
    if not 0 <= arguments.reserve < values["--gpu-memory"]:
        raise UserError(f"--reserve {arguments.reserve:g}: must be at least 0 and below the GPU's memory, in GiB.")
    return Machine(
        name="a GPU" if given else gpu.name,
        memory_gib=values["--gpu-memory"],
        reserve_gib=arguments.reserve,
        peak_tflops=values["--peak-tflops"],
        mfu=arguments.mfu,
        intra_node_gbs=values["--intra-node-bandwidth"],
        inter_node_gbs=values["--inter-node-bandwidth"],
        link_efficiency=arguments.link_efficiency,
        memory_gbs=values["--memory-bandwidth"],
        # A recipe for several nodes determines their size.
        node_size=arguments.devices_per_node or (NODE_SIZE if setting.nodes == 1 else setting.devices),
    )


def _either(given: float | None, otherwise: float) -> float:
    return otherwise if given is None else given


def setting_of(config: RunConfig, *, tokens_per_row: int | None = None, responses: int | None = None) -> Setting:
    """Return the planned setting of a recipe.

    Args:
        tokens_per_row: mean tokens of prompt and response; ``None``: ``model.seq_length``, the maximum.
        responses: responses per prompt in the data; ``None``: ``data.num_responses``, or 2. The plan counts those that
            a run uses: the first ``data.num_responses``, of which pairwise objectives take two.

    Raises:
        UserError: sizes do not divide, or are unknown.
    """
    check_sizes(config)
    check_network(config)
    network = network_of_config(config)
    keys, needs = config.model, registry.get(config.model.objective).needs_of(objective_config(config))
    if network.vocabulary(keys.tensor_model_parallel_size) % keys.tensor_model_parallel_size:
        raise UserError(
            f"model.arch.extra.vocab_size={network.tokens} is not divisible by "
            f"model.tensor_model_parallel_size={keys.tensor_model_parallel_size}. Change one of them."
        )
    for name, value in (("--tokens-per-row", tokens_per_row), ("--responses", responses)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1.")
    if tokens_per_row is not None and tokens_per_row > keys.seq_length:
        raise UserError(
            f"--tokens-per-row {tokens_per_row}: is above model.seq_length={keys.seq_length}, and longer rows are "
            "dropped. Lower it."
        )
    scheme = "lora" if keys.peft.scheme == "none" else keys.peft.scheme
    lora = Lora(keys.peft.lora.dim, lora_targets(config), keys.peft.lora.dropout > 0, scheme)
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
        responses=_responses_used(config, responses),
        tokens_per_row=tokens_per_row or keys.seq_length,
        pad_to_multiple_of=config.data.pad_to_multiple_of,
        part_multiple=fp8_multiple(config),
        packed=config.data.packing,
        param_bytes={"bf16": 2, "fp16": 2, "fp32": 4}[config.precision.params],
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        use_distributed_optimizer=keys.optim.use_distributed_optimizer,
        overlap_grad_reduce=keys.optim.overlap_grad_reduce,
        overlap_param_gather=keys.optim.overlap_param_gather,
        optimizer_in_host=keys.optim.cpu_offload_fraction,
        recompute_granularity=keys.recompute_granularity,
        recompute_method=(keys.recompute_method or "uniform") if full else "uniform",
        recompute_num_layers=(keys.recompute_num_layers or 1) if full else 1,
        lora=None if keys.peft.scheme == "none" else lora,
        lora_offered=None if needs.scores else lora,
        fused_log_probs=keys.fused_log_probs,
        workspace_bytes=_workspace_bytes(config),
        value_head=needs.values is not None,
        scores=needs.scores,
        reference=needs.reference,
        reference_micro_batch_size=config.reference.micro_batch_size,
        reference_in_a_row=config.reference.save_every,
        kl_estimate=needs.kl_estimate,
        rollouts=_rollouts(config.online, needs),
        critic_network=_critic_network(config, network) if needs.critic else None,
        transformer_engine=config.trainer.accelerator != "cpu",
    )


def _rollouts(keys: OnlineConfig, needs: Needs) -> Rollouts | None:
    if keys.num_generations is None:
        return None
    has_values = needs.critic or needs.values is not None
    wants_old = needs.tokens and (has_values or keys.mini_batches * keys.epochs > 1)
    return Rollouts(
        num_generations=keys.num_generations,
        max_new_tokens=keys.max_new_tokens,
        rows_at_once=keys.rows_at_once,
        mini_batches=keys.mini_batches,
        epochs=keys.epochs,
        nucleus=keys.top_p < 1,
        # As nemo_rao.loop.rollouts computes them.
        passes=int(needs.reference) + int(keys.sampler == "vllm" or wants_old),
    )


def _critic_network(config: RunConfig, policy: Network) -> Network:
    """Return the network of the run that the critic starts from, else the policy's.

    Raises:
        UserError: the run's directory has no recipe.
    """
    run = objective_config(config).critic_path
    if run is None:
        return policy
    recipe = Path(run).expanduser() / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"model.ppo.critic_path={run}: has no recipe.yaml. Give the directory of a training run.")
    return network_of_config(load_recipe(recipe))


def _responses_used(config: RunConfig, given: int | None) -> int:
    """Number of responses per prompt that a run computes, out of ``given`` in the data, or that it samples."""
    if config.online.num_generations is not None:
        return num_used(config.online.num_generations, chosen_responses(config))
    first = config.data.num_responses
    if given is None:
        given = first or DEFAULT_RESPONSES
    return num_used(min(given, first or given), chosen_responses(config))


def network_of_config(config: RunConfig) -> Network:
    """Return the family's network with the recipe's sizes."""
    keys, fields = config.model, architecture_fields(config)
    family = family_of(config)
    if family is not None and (parts := FAMILIES[family].parts):
        raise UserError(f"{network_key(config)}: {', '.join(parts)} are not supported by the planner.")
    return network_of(
        fields,
        kind=network_key(config),
        num_tokens=None if fields.get("vocab_size") is not None else num_tokens(config.data.tokenizer),
        seq_length=keys.seq_length,
    )


def _workspace_bytes(config: RunConfig) -> int:
    return CPU_WORKSPACE_BYTES if config.trainer.accelerator == "cpu" else CUDA_WORKSPACE_BYTES


def _accepted(config: RunConfig, advice: Advice) -> bool:
    """Whether the overrides pass the recipe's checks, so that they can be pasted."""
    try:
        setting_of(override(config, advice.overrides))
    except UserError:
        return False
    return True
