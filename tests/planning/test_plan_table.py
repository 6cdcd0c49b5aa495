"""The printed plan: its rows add up to its totals, and what is not planned is stated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.cli import main
from nemo_rao.config.compose import compose
from nemo_rao.config.recipe_text import to_yaml

CRITIC = ("model.ppo.critic=model",)
SMALL = ("model=tiny_llama", "+model.arch.extra.vocab_size=128256")


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Output of ``nemo-rao plan`` for an H100."""

    def plan(recipe: str, *arguments: str) -> str:
        assert main(["plan", "--config-name", recipe, "--gpu", "h100", *arguments]) in (0, 1)
        return capfd.readouterr().out

    return plan


def rows_of(table: str) -> dict[str, list[float]]:
    """Row -> GiB on each stage that is shown."""
    memory = table.partition("memory of a rank, GiB")[2].partition("\n")[2].partition(" in flight")[0]
    found = re.findall(r"^  (.*?) {2,}((?: *[\d.]+)+)$", memory, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in found}


@pytest.mark.parametrize(
    ("recipe", "arguments", "names"),
    [
        ("gpt_rao_llama3_8b", (), set()),
        ("gpt_rao_mixtral_8x7b", (), set()),
        ("gpt_rao_llama3_1_405b", (), set()),
        ("gpt_rao_llama3_8b", ("reference.micro_batch_size=512",), {"or a micro-batch of the reference **"}),
        ("gpt_rloo_llama3_8b", (), {"or sampling **"}),
        ("gpt_ppo_llama3_8b", CRITIC, {"or sampling **", "or the critic's step, with its states **"}),
        ("gpt_ppo", (*CRITIC, *SMALL, "trainer.accelerator=cpu"), {"the critic's states", "process, without tensors"}),
    ],
)
def test_the_rows_of_the_memory_add_up_to_the_total(
    recipe: str, arguments: tuple[str, ...], names: set[str], printed: Callable[..., str]
) -> None:
    rows = rows_of(printed(recipe, *arguments))
    assert names <= set(rows)
    for stage, total in enumerate(rows.pop("total")):
        of_stage = {name: numbers[stage] for name, numbers in rows.items()}
        alternatives = [size for name, size in of_stage.items() if name.endswith("**")]
        larger = [size for name, size in of_stage.items() if name.endswith("*") and not name.endswith("**")]
        step = of_stage["activations"] + max(larger)
        always = sum(size for name, size in of_stage.items() if not name.endswith("*") and name != "activations")
        assert total == pytest.approx(always + max(step, *alternatives, 0), abs=0.01 * len(of_stage))


def test_many_stages_are_the_first_the_last_and_the_largest(printed: Callable[..., str]) -> None:
    table = printed("gpt_rao_llama3_1_405b")
    assert re.search(r"stage 0 +stage 1 +stage 14 +stage 15\n", table)
    peak = max(rows_of(table)["total"])
    assert f"fits: {peak:.2f} GiB at the peak" in table


def test_experts_and_their_ranks_are_stated(printed: Callable[..., str]) -> None:
    table = printed("gpt_rao_mixtral_8x7b")
    assert "8 experts per layer, 2 per token" in table
    assert "experts over 8 ranks: expert 8 x tensor 1, in 2 copies" in table


@pytest.mark.parametrize(
    ("recipe", "arguments", "said"),
    [
        ("gpt_rloo_llama3_8b", ("data.validation_path=v.jsonl",), "validations by sampling are not planned"),
        ("gpt_rloo_llama3_8b", ("online.sampler=vllm",), "online.sampler=vllm is planned as sampling by the training"),
        ("gpt_rao_llama3_8b", ("data.prefix_sharing=true",), "the savings of computing a prompt once are not planned"),
        ("gpt_rao_llama3_8b", ("precision=fp8_delayed",), "precision.fp8=hybrid is planned as bf16"),
    ],
)
def test_what_is_not_planned_is_stated(
    recipe: str, arguments: tuple[str, ...], said: str, printed: Callable[..., str]
) -> None:
    assert said not in printed(recipe)
    assert said in printed(recipe, *arguments)


def test_a_critic_is_of_the_model_of_the_run_that_it_starts_from(
    printed: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = f"model.ppo.critic_path={tmp_path}"
    assert main(["plan", "--config-name", "gpt_ppo_llama3_8b", *CRITIC, start]) == 2
    refused = capfd.readouterr().err
    assert f"{start}: has no recipe.yaml. Give the directory of a training run." in refused
    of_policy = printed("gpt_ppo_llama3_8b", *CRITIC)
    (tmp_path / "recipe.yaml").write_text(to_yaml(compose("gpt_rm", SMALL)))
    of_run = printed("gpt_ppo_llama3_8b", *CRITIC, start)
    row = "or the critic's step, with its states **"
    assert rows_of(of_run)[row][0] < rows_of(of_policy)[row][0] / 2
    assert "1 pass of the critic" in of_run and "before that of the policy" in of_run
