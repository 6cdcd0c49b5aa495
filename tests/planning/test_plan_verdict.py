"""Whether it fits, with what uncertainty, and which settings are proposed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.cli import main
from nemo_rao.config.compose import compose, override
from nemo_rao.config.gpu_models import GIB
from nemo_rao.config.run_config import RunConfig
from nemo_rao.planning.advise import advise
from nemo_rao.planning.memory import memory, peak, upper_peak
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting

ALONE = ("trainer.devices=1", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false")


@pytest.fixture(scope="module")
def llama() -> RunConfig:
    return compose("gpt_rao_llama3_8b")


@pytest.fixture(scope="module")
def one_gpu(llama: RunConfig) -> Setting:
    return setting_of(override(llama, ALONE))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, list[str], dict]]:
    """Exit code, lines and record of ``nemo-rao plan`` without a reserve."""

    def plan(*arguments: str) -> tuple[int, list[str], dict]:
        out = tmp_path / "plan.json"
        code = main(["plan", "--config-name", "gpt_rao_llama3_8b", "--json", str(out), "--reserve", "0", *arguments])
        return code, capfd.readouterr().out.splitlines(), json.loads(out.read_text())

    return plan


def test_activations_may_be_a_tenth_larger(llama: RunConfig) -> None:
    setting = setting_of(llama)
    [stage] = memory(setting)
    exact = stage.weights + stage.gradients + stage.optimizer
    assert upper_peak(setting) - exact == pytest.approx(1.1 * (peak(setting) - exact), abs=1)


def test_what_the_uncertainty_may_take_away_fits_tightly(run: Callable, llama: RunConfig) -> None:
    needed, most = peak(setting_of(llama)), upper_peak(setting_of(llama))
    code, lines, record = run("--gpu-memory", str(most / GIB + 0.01))
    assert (code, record["fits"], record["tight"], record["advice"]) == (0, True, False, [])
    assert any(line.startswith("fits: ") for line in lines)
    code, lines, record = run("--gpu-memory", str(needed / GIB + 0.1))
    assert (code, record["fits"], record["tight"]) == (0, True, True)
    assert record["margin_bytes"] == pytest.approx(0.1 * GIB, rel=1e-3)
    assert record["uncertainty_bytes"] == most - needed
    verdict = next(line for line in lines if line.startswith("fits, tightly: "))
    assert verdict.endswith(", 0.10 GiB to spare")
    assert f"within 10 %: the peak may be {most / GIB:.2f} GiB" in lines[lines.index(verdict) + 2]
    for one in record["advice"]:  # with the uncertainty of their own
        advised = setting_of(override(llama, one["overrides"]))
        assert upper_peak(advised) <= needed + 0.1 * GIB
    assert record["advice"]
    code, lines, record = run("--gpu-memory", str(needed / GIB - 0.1))
    assert (code, record["fits"], record["tight"]) == (1, False, False)
    assert any(line.startswith("does not fit: ") and line.endswith(", 0.10 GiB too much") for line in lines)


def test_advice_fits_with_the_uncertainty_included(run: Callable, llama: RunConfig) -> None:
    """Between a setting's peak and its upper bound lies a limit at which it is not proposed."""
    setting = setting_of(override(llama, ["model.micro_batch_size=8"]))
    nearest = next(advise(setting, 40 * GIB))
    limit = peak(nearest.setting) + 1
    assert peak(setting) > limit
    assert next(advise(setting, limit)).overrides == nearest.overrides
    assert next(advise(setting, limit, need=upper_peak)).overrides != nearest.overrides
    _, lines, record = run("--gpu-memory", str(limit / GIB), "model.micro_batch_size=8")
    assert record["advice"][0]["overrides"] != list(nearest.overrides)
    assert not any("; tight" in line for line in lines)


def test_a_setting_that_fits_tightly_is_proposed_where_no_other_fits(run: Callable) -> None:
    small = ("model.arch.num_layers=3", "model.arch.num_attention_heads=1", "model.arch.num_query_groups=1")
    alone = (*ALONE, *small, "model.global_batch_size=1", "model.objective=rm")
    setting = setting_of(compose("gpt_rao_llama3_8b", alone))
    # All that can be changed is recomputation, which saves this much at most.
    least = dataclasses.replace(
        setting, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    limit = (peak(least) + upper_peak(least)) / 2 / GIB
    assert peak(least) < peak(setting) and limit < peak(setting) / GIB
    code, lines, record = run("--gpu-memory", str(limit), *alone)
    assert code == 1 and [one["overrides"] for one in record["advice"]] == [["model.recompute_granularity=full"]]
    assert any(line.endswith("; tight, as activations are known to within 10 %") for line in lines)


# --------------------------------------------------------------------------------------------------------- advice


def ranks(setting: Setting, limit: int, node_size: int | None) -> list[tuple[int, int]]:
    """(devices, nodes) that are proposed where neither other parallelism nor adapters are to help."""
    only = dataclasses.replace(setting, lora_offered=None, recompute_granularity="full")
    found = [one.setting for one in advise(only, limit, node_size=node_size)]
    return [(one.devices, one.nodes) for one in found if one.data == one.ranks and one.ranks > setting.ranks]


def test_a_node_is_made_full_before_there_are_others(one_gpu: Setting) -> None:
    on_one, over_two = (
        dataclasses.replace(one_gpu, recompute_granularity="full", devices=8, nodes=nodes) for nodes in (1, 2)
    )
    assert ranks(one_gpu, peak(on_one), 8)[0] == (8, 1)
    assert ranks(one_gpu, peak(over_two), 8)[0] == (8, 2)
    assert all(devices == 8 or nodes == 1 for devices, nodes in ranks(one_gpu, peak(over_two), 8))
    assert ranks(one_gpu, peak(on_one), 2)[0] == (2, 4)
    assert ranks(one_gpu, peak(on_one), None)[0] == (1, 8)


def test_the_command_takes_nodes_of_eight_gpus_or_as_large_as_they_are(run: Callable) -> None:
    def proposed(*arguments: str) -> str:
        return " ".join(text for one in run(*arguments)[2]["advice"] for text in one["overrides"])

    found = proposed("--gpu-memory", "78", *ALONE)
    assert "trainer.devices=" in found and "trainer.num_nodes=8" not in found
    assert "trainer.devices=" not in proposed("--gpu-memory", "78", "--devices-per-node", "1", *ALONE)
    # Nodes of a run over several of them are as large as it says.
    assert "trainer.devices=" not in proposed("--gpu-memory", "40", *ALONE, "trainer.num_nodes=2")


def test_smaller_micro_batches_of_the_reference_pass_are_proposed_first(llama: RunConfig) -> None:
    large = setting_of(override(llama, ["reference.micro_batch_size=512"]))
    assert next(advise(large, peak(setting_of(llama)))).overrides == ("reference.micro_batch_size=null",)


def test_logits_that_an_adapter_needs_are_not_proposed_to_be_left_out(llama: RunConfig) -> None:
    keys = ["model.peft.scheme=lora", "model.peft.lora.target_modules=[output_layer]", "model.fused_log_probs=false"]
    setting = setting_of(override(llama, keys))
    assert not any("fused" in text for one in advise(setting, peak(setting) - 1) for text in one.overrides)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--intra-node-bandwidth", "0"), ("--intra-node-bandwidth 0", "above 0")),
        (("--inter-node-bandwidth", "-1"), ("--inter-node-bandwidth -1", "above 0")),
        (("--link-efficiency", "1.1"), ("--link-efficiency 1.1", "at most 1")),
        (("--peak-tflops", "0"), ("--peak-tflops 0", "above 0")),
        (("--devices-per-node", "4"), ("--devices-per-node 4", "trainer.devices=8")),
        (("--prompts", "0"), ("--prompts 0", "at least 1")),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(
    arguments: tuple[str, ...], parts: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config-name", "gpt_rao_llama3_8b", *arguments]) == 2
    out, message = capfd.readouterr()
    assert not out and message.count("\n") == 1 and all(part in message for part in parts)
