"""Old names of recipes compose what their files did, with one warning that states what to write instead."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from nemo_rao import __version__
from nemo_rao.cli import main
from nemo_rao.config import compose as compose_module
from nemo_rao.config.compose import compose, compose_grid, package_recipes, recipe_names
from nemo_rao.config.moved_recipes import MOVED_RECIPES, REMOVED_IN
from nemo_rao.errors import UserError
from nemo_rao.runtime.console import warn_once
from nemo_rao.study.plan import plan
from nemo_rao.study.study_file import load_study

ADVICE = re.compile(r"warning: (\w+) is now: --config-name (.+)\. The old name works until ([\d.]+)\.\n")
# Files that there were, some of each kind: the RAO paper's models, a larger one, a model's file that extends another.
FILES = {
    "gpt_dpo_qwen2_5_7b": "objective: dpo, precision: bf16_mixed, model: qwen2_5_7b, paper: rao_2026_baselines",
    "gpt_orpo_eurollm_9b": "objective: orpo, precision: bf16_mixed, model: eurollm_9b, paper: rao_2026_baselines",
    "gpt_dpo_llama3_1_405b": "objective: dpo, precision: bf16_mixed, model: llama3_1_405b",
    "gpt_dpo_llama3_70b_lora": "objective: dpo, precision: bf16_mixed, model: llama3_70b_lora",
}
OLD = "gpt_dpo_qwen2_5_7b"


@pytest.fixture(autouse=True)
def nothing_said_before() -> None:
    warn_once.cache_clear()
    compose_module._cached_composition.cache_clear()  # a cached recipe is not read, so it cannot warn


@pytest.mark.parametrize(
    "old", [old if old in FILES else pytest.param(old, marks=pytest.mark.slow) for old in MOVED_RECIPES]
)
def test_an_old_name_composes_what_its_warning_says_to_write(old: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = compose(old)
    output, warning = capfd.readouterr()
    advice = ADVICE.fullmatch(warning)
    assert output == "" and advice is not None, warning
    name, now, until = advice.groups()
    assert (name, until) == (old, REMOVED_IN)
    recipe, *overrides = shlex.split(now)
    assert recipe not in MOVED_RECIPES and compose(recipe, overrides) == config
    assert capfd.readouterr() == ("", ""), "what is to be written now is no old name"
    assert (config.exp_manager.name, config.model.objective) == (old, recipe.removeprefix("gpt_"))


@pytest.mark.parametrize(
    ("old", "overrides"),
    [
        *((old, []) for old in FILES),
        ("gpt_dpo_qwen2_5_7b", ["model=qwen3_8b", "paper=rao_2026", "model.optim.lr=1e-3"]),
        ("gpt_dpo_llama3_70b_lora", ["precision=fp16_mixed", "objective=kto", "exp_manager.name=mine"]),
    ],
)
def test_an_old_name_composes_what_its_file_did(old: str, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / f"{old}.yaml").write_text(f"defaults: [{FILES[old]}, _self_]\nexp_manager: {{name: {old}}}\n")
    assert compose(old, overrides) == compose(old, overrides, tmp_path)


def test_the_table_names_recipes_and_files_that_exist_and_no_file_has_an_old_name() -> None:
    conf = package_recipes()
    recipes = set(recipe_names([conf]))
    for old, (recipe, groups) in MOVED_RECIPES.items():
        assert recipe in recipes and old not in recipes
        assert all((conf / group / f"{file}.yaml").is_file() for group, file in groups.items()), old
    assert len(MOVED_RECIPES) == 29 and set(FILES) <= set(MOVED_RECIPES)


def test_old_names_leave_with_the_version_that_their_warning_states() -> None:
    assert Version(__version__) < Version(REMOVED_IN), "remove nemo_rao/config/moved_recipes.py and what calls it"


def test_an_own_file_of_an_old_name_is_preferred(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"{OLD}.yaml").write_text("defaults: [gpt_rao, _self_]\ntrainer: {max_steps: 77}\n")
    config = compose(OLD, config_dir=tmp_path)
    assert (config.model.objective, config.trainer.max_steps) == ("rao", 77)
    assert capfd.readouterr() == ("", "")


def test_own_recipes_may_extend_an_old_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = f"defaults: [{OLD}, {{override model: llama3_8b}}, _self_]\nmodel: {{dpo: {{beta: 0.3}}}}\n"
    (tmp_path / "mine.yaml").write_text(mine)
    config = compose("mine", ["exp_manager.name=mine"], tmp_path)
    assert ADVICE.fullmatch(capfd.readouterr().err)
    paper = ["precision=bf16_mixed", "paper=rao_2026_baselines"]
    now = ["model=llama3_8b", *paper, "model.dpo.beta=0.3", "exp_manager.name=mine"]
    assert config == compose("gpt_dpo", now)


def test_an_old_name_in_a_sweep_and_in_a_study_is_the_same_recipe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    swept = compose_grid(OLD, ["search=dpo", "model=qwen2_5_7b,qwen3_8b", "model.optim.lr=1e-7"])
    [layers, *_] = [config.model.arch.num_layers for _, config in swept]
    assert (len(swept), layers, swept[0][1].precision.params) == (8, 28, "bf16")
    arm = f"recipe: {OLD}, start: /checkpoints/qwen, set: {{model: tiny_llama, data.tokenizer: tok}}"
    (tmp_path / "mine.yaml").write_text(
        f"seeds: [1]\ncommon: {{data.train_path: rows.jsonl}}\narms: {{dpo: {{{arm}}}}}\n"
    )
    [run] = plan(load_study(str(tmp_path / "mine.yaml"))).runs
    assert run.config.model.arch.num_layers == 4 and run.config.model.optim.lr == 2e-7
    assert ADVICE.fullmatch(capfd.readouterr().err), "said once for all of them"


def test_a_command_prints_the_warning_apart_from_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config-name", f"{OLD}.yaml", "--print-config", "model.dpo.beta=0.7"]) == 0
    output, warning = capfd.readouterr()
    assert yaml.safe_load(output)["model"]["dpo"]["beta"] == 0.7
    assert ADVICE.fullmatch(warning)


@pytest.mark.parametrize(
    ("name", "near"), [("gpt_rao_qwen2_5_7", "gpt_rao_qwen2_5_7b"), ("gpt_dpo_lama3_8b", "gpt_dpo_llama3_8b")]
)
def test_unknown_names_are_refused_with_the_nearest_and_old_ones_are_not_listed(name: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(name)
    refused, _, listed = str(caught.value).removesuffix(".").rpartition(" The recipes are ")
    assert refused == f"no recipe named {name!r}; did you mean {near}?"
    assert set(listed.split(", ")) == set(recipe_names([package_recipes()]))
