"""The command: every large recipe is planned, settings that fit are proposed for the others, bad input is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.cli import main
from nemo_rao.config.compose import compose, override, package_recipes
from nemo_rao.config.gpu_models import GIB
from nemo_rao.config.run_config import RunConfig
from nemo_rao.planning.advise import advise
from nemo_rao.planning.communication import communication
from nemo_rao.planning.compute import bubble, flops
from nemo_rao.planning.memory import PROCESS_BYTES, memory, peak
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting

LARGE = {path.stem for path in package_recipes().glob("model/*.yaml")} - {"tiny_llama", "demo_llama", "smollm2_135m"}
RECIPES = sorted(path.stem for path in package_recipes().glob("*.yaml") if path.stem.endswith(tuple(LARGE)))


@pytest.fixture(scope="module")
def llama() -> RunConfig:
    return compose("gpt_rao_llama3_8b")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of ``nemo-rao plan``."""

    def plan(*arguments: str, recipe: str = "gpt_rao_llama3_8b") -> tuple[int, str, str]:
        code = main(["plan", "--config-name", recipe, *arguments])
        return code, *capfd.readouterr()

    return plan


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_of_a_large_model_is_planned_and_fits_the_gpus_that_it_names(recipe: str) -> None:
    assert peak(setting_of(compose(recipe))) < 76 * GIB  # "GPUs with 80 GB"


def test_a_plan_that_fits_is_a_table_of_at_most_a_hundred_columns(run: Callable, tmp_path: Path) -> None:
    code, table, message = run("--json", str(tmp_path / "plan.json"), "model.pipeline_model_parallel_size=2")
    assert (code, message) == (0, "")
    assert max(map(len, table.splitlines())) <= 100 and all(line == line.rstrip() for line in table.splitlines())
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"] and len(written["memory_bytes"]) == 2
    for stage in written["memory_bytes"]:
        assert f"{stage['total'] / GIB:.2f}" in table and f"{stage['optimizer'] / GIB:.2f}" in table


def test_a_plan_for_a_cpu_counts_the_process_on_a_line_of_its_own(run: Callable, tmp_path: Path) -> None:
    file = str(tmp_path / "plan.json")
    tokens = "model.arch.extra={vocab_size: 1024}"
    _, on_gpu, _ = run("--json", file, tokens, recipe="gpt_rao")
    [gpu] = json.loads(Path(file).read_text())["memory_bytes"]
    _, on_cpu, _ = run("--json", file, tokens, "trainer.accelerator=cpu", recipe="gpt_rao")
    [cpu] = json.loads(Path(file).read_text())["memory_bytes"]
    assert (gpu["process"], cpu["process"]) == (0, PROCESS_BYTES)
    states = cpu["weights"] + cpu["gradients"] + cpu["optimizer"]
    assert cpu["total"] == states + cpu["activations"] + max(cpu["backward"], cpu["log_probs"]) + PROCESS_BYTES
    [line] = [line for line in on_cpu.splitlines() if line.startswith("  process")]
    assert line.split()[-1] == f"{PROCESS_BYTES / GIB:.2f}" and "  process" not in on_gpu


def test_what_does_not_fit_is_reported_with_overrides_that_make_it_fit(run: Callable, llama: RunConfig) -> None:
    code, table, message = run("--gpu-memory", "20")
    assert (code, message) == (1, "")
    lines = table.splitlines()
    proposals = lines[next(number for number, line in enumerate(lines) if "nearest settings" in line) + 1 :]
    proposed = [line.split() for line in proposals if "=" in line]
    assert len(proposed) == 3
    for overrides in proposed:
        assert run("--gpu-memory", "20", *overrides)[0] == 0, overrides


def test_advice_changes_as_little_as_will_do(llama: RunConfig) -> None:
    setting = setting_of(llama)
    [nearest, *_] = advise(setting, peak(setting) - 1)
    assert len(nearest.overrides) == 1
    large = dataclasses.replace(setting, micro_batch_size=16, fused_log_probs=False)
    for limit in (60, 40, 20):
        for one in advise(large, limit * GIB):
            assert peak(one.setting) == one.bytes <= limit * GIB
            for left_out in one.overrides:  # each of its keys is needed
                rest = [text for text in one.overrides if text != left_out]
                asked = override(llama, ["model.micro_batch_size=16", "model.fused_log_probs=false", *rest])
                assert peak(setting_of(asked)) > limit * GIB
            break


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--gpu", "h1000"), ("--gpu h1000", "h100, h200")),
        (("--mfu", "1.5"), ("--mfu 1.5", "at most 1")),
        (("--gpu-memory", "-3"), ("--gpu-memory -3", "above 0")),
        (("--reserve", "90"), ("--reserve 90", "below the GPU's memory")),
        (("--tokens-per-row", "5000"), ("--tokens-per-row 5000", "model.seq_length=2048")),
        (("--responses", "0"), ("--responses 0", "at least 1")),
        (
            ("model.tensor_model_parallel_size=3", "trainer.devices=3", "model.sequence_parallel=false"),
            ("num_attention_heads=32", "size=3"),
        ),
        (("model.micro_batch_sze=3",), ("model.micro_batch_sze", "did you mean")),
        (("model.virtual_pipeline_model_parallel_size=2",), ("virtual_pipeline", "set it to null")),
        (("model.expert_model_parallel_size=2",), ("expert_model_parallel_size=2", "no experts", "set it to 1")),
        (
            (
                *("model.family=mixtral", "model.expert_model_parallel_size=3"),
                *("trainer.devices=12", "model.global_batch_size=48"),
            ),
            ("num_moe_experts=8", "size=3"),
        ),
        (
            ("model.family=mixtral", "model.sequence_parallel=false"),
            ("set model.sequence_parallel=true",),
        ),
        (("trainer.devices=12", "model.expert_tensor_parallel_size=8"), ("12 ranks", "expert tensor")),
    ],
)
def test_bad_input_is_refused_in_one_line(run: Callable, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    code, table, message = run(*arguments)
    assert (code, table) == (2, "") and message.count("\n") == 1 and all(part in message for part in parts), message


# ------------------------------------------------------------------------------------- what follows from the formulas


@pytest.fixture(scope="module")
def setting(llama: RunConfig) -> Setting:
    return setting_of(llama)


def test_a_pipeline_holds_as_many_micro_batches_as_stages_follow(setting: Setting) -> None:
    deep = dataclasses.replace(setting, pipeline=4, devices=16, global_batch_size=3)  # one copy, three micro-batches
    assert [stage.in_flight for stage in memory(dataclasses.replace(deep, tensor=4))] == [3, 3, 2, 1]
    assert bubble(dataclasses.replace(deep, global_batch_size=29)) == pytest.approx(3 / 32)


def test_the_larger_the_part_that_is_split_the_less_a_rank_holds(setting: Setting) -> None:
    whole = dataclasses.replace(setting, sequence_parallel=False)
    assert peak(setting) < peak(whole)
    assert peak(dataclasses.replace(setting, recompute_granularity="full")) < peak(setting)
    assert peak(dataclasses.replace(setting, nodes=2)) < peak(setting)
    # Sequence parallelism sends what two all-reduces would, and the inputs once more in backward.
    assert communication(setting).tensor > communication(whole).tensor


def test_time_is_by_model_flops_and_recomputation_is_separate(setting: Setting) -> None:
    again = dataclasses.replace(setting, recompute_granularity="full")
    assert flops(again).model == flops(setting).model and flops(again).executed > flops(setting).executed


def test_adapters_leave_out_the_gradients_of_frozen_weights(setting: Setting) -> None:
    adapted = dataclasses.replace(setting, lora=setting.lora_offered)
    ratio = flops(adapted).model / flops(setting).model
    assert 2 / 3 < ratio < 0.75


def test_chunks_of_a_stage_shorten_the_bubble_and_hold_and_send_more(setting: Setting) -> None:
    deep = dataclasses.replace(setting, pipeline=4, devices=16, tensor=4, global_batch_size=32)
    chunked = dataclasses.replace(deep, virtual=4)
    assert chunked.possible() and (bubble(deep), bubble(chunked)) == pytest.approx((3 / 35, 3 / 131))
    # 2 (p - 1) + (v - 1) p + 1 chunks of a quarter of its layers each, where p whole ones were.
    assert [stage.in_flight for stage in memory(chunked)] == [19, 17, 15, 13]
    assert communication(chunked).pipeline == 4 * communication(deep).pipeline
    ratio = memory(chunked)[0].activations / memory(deep)[0].activations
    assert ratio == pytest.approx(19 / 16, rel=1e-2)


def test_a_split_sequence_is_held_in_parts_and_sends_keys_and_values(setting: Setting) -> None:
    split = dataclasses.replace(setting, context=2, nodes=2)
    assert (split.data, split.shards, split.step_tokens) == (setting.data, 2 * setting.data, setting.step_tokens)
    assert memory(split)[0].activations == pytest.approx(memory(setting)[0].activations / 2, rel=1e-3)
    network, tokens = setting.network, setting.micro_batch_tokens // 2
    once = tokens * 2 * network.key // setting.tensor * setting.param_bytes * network.layers
    # Once round in forward; in backward once round, and their gradients, which come home.
    assert communication(split).context == setting.num_micro_batches * once * (1 + 1 + 2)
    assert communication(setting).context == 0


def test_experts_exchange_the_tokens_that_are_sent_to_other_ranks() -> None:
    mixture = setting_of(compose("gpt_rao_mixtral_8x7b"))
    assert (mixture.expert, mixture.of_expert, mixture.expert_shards) == (8, 1, 2)
    layers, tokens = mixture.layers_of_stage(0), mixture.micro_batch_tokens // mixture.tensor
    copies = tokens * mixture.network.chosen * mixture.network.hidden * mixture.param_bytes
    # There and back, forward and backward; an eighth stays.
    assert communication(mixture).expert == 4 * layers * mixture.num_micro_batches * copies * 7 // 8
    assert communication(dataclasses.replace(mixture, expert=1)).expert == 0


def test_what_does_not_fit_of_a_mixture_may_share_its_experts() -> None:
    mixture = setting_of(compose("gpt_rao_mixtral_8x7b"))
    whole = dataclasses.replace(mixture, expert=1)
    found = next(one for one in advise(whole, peak(mixture)) if one.setting.expert > 1)
    assert "model.expert_model_parallel_size" in " ".join(found.overrides)
