"""Number formats: every recipe of them, what they go with, and the GPUs that have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.cli import main
from nemo_rao.config.checks import check_architecture, check_sizes
from nemo_rao.config.compose import compose, package_recipes
from nemo_rao.config.gpu_models import FP8_RECIPES
from nemo_rao.config.precision_checks import (
    capabilities_present,
    check_capability,
    check_gpus_present,
    check_named_gpu,
    quantization,
    sequence_multiple,
)
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError

FILES = sorted(path.stem for path in package_recipes().glob("precision/*.yaml"))
FP8_FILES = [name for name in FILES if name.startswith("fp8_")]
LLAMA = ("model=llama3_8b", "trainer.accelerator=gpu")


def composed(*overrides: str) -> RunConfig:
    return compose("gpt_rao", overrides)


def refusal(function: Callable, *arguments: object) -> str:
    with pytest.raises(UserError) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_there_is_a_file_for_every_recipe_of_fp8_and_for_fp16() -> None:
    assert {composed(f"precision={name}").precision.fp8_recipe for name in FP8_FILES} == set(FP8_RECIPES)
    assert composed("precision=fp16_mixed").precision.params == "fp16"


@pytest.mark.parametrize("name", FILES)
def test_every_file_passes_the_checks_with_a_large_model(name: str) -> None:
    config = composed(*LLAMA, f"precision={name}")
    check_sizes(config)
    check_architecture(
        config,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
    )
    assert (config.precision.fp8 is not None) == name.startswith("fp8_")


@pytest.mark.parametrize("name", FP8_FILES)
def test_every_fp8_file_can_be_simulated_on_a_cpu(name: str) -> None:
    check_sizes(composed(f"precision={name}", "precision.fp8_simulation=true", "trainer.accelerator=cpu"))


FP8 = ("precision=fp8_delayed", "trainer.accelerator=gpu")
TENSORWISE = ("precision=fp8_tensorwise", "trainer.accelerator=gpu")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ((*FP8, "precision.params=fp32"), ("precision.fp8=hybrid", "precision.params=bf16", "fp32")),
        ((*FP8, "precision.params=fp16"), ("precision.params=bf16", "fp16")),
        ((*FP8, "trainer.accelerator=cpu"), ("precision.fp8=hybrid", "CPU", "precision.fp8_simulation=true")),
        (("precision.fp8_simulation=true",), ("precision.fp8_simulation=true", "precision.fp8=hybrid")),
        (("precision.fp8_param_gather=true",), ("precision.fp8_param_gather=true", "precision.fp8=hybrid")),
        ((*FP8, "precision.first_last_layers_bf16=true"), ("first_last_layers_bf16", "delayed", "tensorwise")),
        ((*TENSORWISE, "precision.fp8_wgrad=false"), ("precision.fp8_wgrad=false", "tensorwise")),
        (
            (*FP8, "precision.fp8_param_gather=true", "model.optim.use_distributed_optimizer=false"),
            ("precision.fp8_param_gather=true", "model.optim.use_distributed_optimizer=true"),
        ),
        (
            (*FP8, "precision.fp8_simulation=true", "precision.fp8_param_gather=true"),
            ("precision.fp8_param_gather=true", "simulation"),
        ),
        (
            (*FP8, "precision.fp8_simulation=true", "model.recompute_granularity=full"),
            ("model.recompute_granularity=full", "set it to null"),
        ),
        ((*FP8, "model.peft.scheme=lora"), ("model.peft.scheme=lora", "delayed", "tensorwise")),
        ((*FP8, "model.seq_length=1000"), ("model.seq_length=1000", "16", "set it to 1008")),
        (("precision=fp8_mxfp8", "model.seq_length=1008"), ("model.seq_length=1008", "32", "set it to 1024")),
        (
            (
                *FP8,
                "trainer.devices=2",
                "model.tensor_model_parallel_size=2",
                "model.sequence_parallel=true",
                "model.seq_length=1040",
            ),
            ("model.seq_length=1040", "32", "on each rank", "set it to 1056"),
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_both_keys(
    overrides: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    message = refusal(check_sizes, composed(*overrides))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("overrides", "sizes", "parts"),
    [
        (FP8, {"hidden_size": 1000}, ("model.arch.hidden_size = 1000", "16", "bf16_mixed")),
        (("precision=fp8_mxfp8",), {"hidden_size": 1040}, ("hidden_size = 1040", "32", "mxfp8")),
        (
            (*FP8, "trainer.devices=2", "model.tensor_model_parallel_size=2"),
            {"ffn_hidden_size": 144},
            ("ffn_hidden_size = 144 / model.tensor_model_parallel_size=2", "16"),
        ),
        (FP8, {"hidden_size": 64, "num_attention_heads": 3, "kv_channels": 8}, ("head dimension = 24",)),
        (TENSORWISE, {"num_layers": 2}, ("num_layers_at_start_in_bf16=1", "none of 2 layers")),
        (
            (*TENSORWISE, "precision.num_layers_at_end_in_bf16=3", "model.pipeline_model_parallel_size=4"),
            {"num_layers": 8},
            ("num_layers_at_end_in_bf16=3", "2 layers of a pipeline stage"),
        ),
    ],
)
def test_sizes_that_8_bit_products_do_not_take_are_refused(
    overrides: tuple[str, ...], sizes: dict[str, int], parts: tuple[str, ...]
) -> None:
    config = composed(*overrides)
    message = refusal(lambda: check_architecture(config, **sizes))
    assert all(part in message for part in parts), message
    check_architecture(composed(*(text for text in overrides if "precision" not in text)), **sizes)


def test_sequences_are_padded_for_each_tensor_parallel_rank() -> None:
    split = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    assert sequence_multiple(composed()) == 1 and sequence_multiple(composed(*split)) == 2
    assert sequence_multiple(composed(*FP8)) == 16 and sequence_multiple(composed(*FP8, *split)) == 32
    assert sequence_multiple(composed("precision=fp8_mxfp8", *split)) == 64


def test_numbers_are_cached_apart_under_other_formats() -> None:
    variants = [
        *((f"precision={name}",) for name in FILES),
        ("precision=fp8_delayed", "precision.fp8_amax_history_len=16"),
        ("precision=fp8_delayed", "precision.fp8_simulation=true"),
        ("precision=fp8_tensorwise", "precision.num_layers_at_end_in_bf16=0"),
    ]
    texts = [quantization(composed(*overrides).precision) for overrides in variants]
    assert len(set(texts)) == len(texts)
    assert quantization(composed("precision=bf16_mixed").precision) == "bf16"  # as before there was FP8


# ------------------------------------------------------------------------------------------------------------ GPUs


@pytest.mark.parametrize(
    ("recipe", "runs_on", "lacks_it"),
    [
        ("delayed", [(8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0), (8, 0), (8, 6)]),
        ("tensorwise", [(8, 9), (9, 0), (10, 0), (12, 0)], [(8, 0), (8, 6)]),
        ("blockwise", [(9, 0), (10, 0), (12, 0)], [(8, 0), (8, 9)]),
        ("mxfp8", [(10, 0), (10, 3)], [(8, 0), (8, 9), (9, 0), (12, 0)]),
    ],
)
def test_each_recipe_runs_where_transformer_engine_has_it(
    recipe: str, runs_on: list[tuple[int, int]], lacks_it: list[tuple[int, int]]
) -> None:
    config = composed("precision=fp8_delayed", f"precision.fp8_recipe={recipe}")
    for capability in runs_on:
        check_capability(config, capability, "the GPU")
    for capability in lacks_it:
        message = refusal(check_capability, config, capability, "the GPU")
        assert f"precision.fp8_recipe={recipe} needs" in message and f"{capability[0]}.{capability[1]};" in message


def test_a_gpu_without_a_recipe_is_reported_with_those_that_it_has() -> None:
    message = refusal(check_named_gpu, composed("precision=fp8_mxfp8"), "h100", "cluster.gpu=h100")
    assert "mxfp8 needs data-center Blackwell" in message and "cluster.gpu=h100 has 9.0" in message
    assert "delayed or tensorwise or blockwise" in message
    assert "choose precision=bf16_mixed" in refusal(check_named_gpu, composed(*FP8), "a100", "--gpu a100")
    check_named_gpu(composed("precision=fp8_mxfp8", "precision.fp8_simulation=true"), "a100", "--gpu a100")
    check_named_gpu(composed("precision=bf16_mixed"), "a100", "--gpu a100")
    assert "h200" in refusal(check_named_gpu, composed(), "h300", "cluster.gpu=h300")


def test_the_driver_is_asked_for_the_gpus_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the driver's command: what it is asked, and what is made of its answer."""
    command = tmp_path / "nvidia-smi"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nprintf "9.0\\n8.0\\n9.0\\n"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert capabilities_present() == [(8, 0), (9, 0)]
    assert (tmp_path / "asked").read_text().split()[-1] == "--id=0,2"
    assert "a GPU of this machine has 8.0" in refusal(check_gpus_present, composed(*FP8))
    check_gpus_present(composed("precision=bf16_mixed"))
    command.write_text("#!/bin/sh\nexit 9\n")
    assert capabilities_present() == []


def test_a_plan_for_a_gpu_that_lacks_the_recipe_ends_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    recipe = ("plan", "--config-name", "gpt_rao_llama3_8b", "precision=fp8_mxfp8")
    assert main([*recipe, "--gpu", "h100"]) == 2
    output, message = capfd.readouterr()
    assert output == "" and message.count("\n") == 1 and "mxfp8 needs data-center Blackwell" in message
    assert main([*recipe, "--gpu", "b200"]) == 0
    assert "planned as bf16" in capfd.readouterr().out


def test_a_job_for_a_cluster_that_lacks_the_recipe_ends_with_2_before_it_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer").mkdir()
    given = [
        *("launch", "--dry-run", "cluster=slurm", "cluster.partition=a", "cluster.gpu=a100"),
        *("data.train_path=train.jsonl", "data.tokenizer=./tokenizer", "trainer.accelerator=gpu"),
    ]
    assert main([*given, "precision=fp8_tensorwise"]) == 2
    output, message = capfd.readouterr()
    assert output == "" and message.count("\n") == 1
    assert "precision.fp8_recipe=tensorwise needs Ada, Hopper" in message and "cluster.gpu=a100 has 8.0" in message
    assert main([*given, "precision=fp8_tensorwise", "cluster.gpu=h100"]) == 0
    assert main([*given, "precision=bf16_mixed"]) == 0
    assert main([*given, "precision=bf16_mixed", "cluster.gpu=a1"]) == 2
    assert "cluster.gpu=a1: must be one of a100, h100" in capfd.readouterr().err
