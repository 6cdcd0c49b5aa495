"""NeMo's launcher lists the recipes of conf/, overrides them key by key, checks them and runs them."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from multiprocessing import get_context
from pathlib import Path

import pytest

from ..engines import ENGINE, NEMO, NO_NEMO

if ENGINE != NEMO:
    pytest.skip(NO_NEMO, allow_module_level=True)

import fiddle
import nemo_run

from nemo_rao import recipes
from nemo_rao.config.compose import compose, package_recipes, recipe_names
from nemo_rao.config.moved_recipes import MOVED_RECIPES
from nemo_rao.config.run_config import RunConfig
from nemo_rao.demo.synthetic import write_preferences
from nemo_rao.demo.tokenizer_training import train_tokenizer
from nemo_rao.errors import UserError

from ..megatron_ranks import import_once

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
NAMES = recipe_names([package_recipes()])


def declared() -> EntryPoint:
    """The entry point as pyproject.toml declares it, whether or not the package is installed here."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        [(name, value)] = tomllib.load(file)["project"]["entry-points"]["nemo_run.cli"].items()
    return EntryPoint(name, value, "nemo_run.cli")


def parse(*arguments: str, factory: str | None = "gpt_rao") -> nemo_run.Partial:
    """What the launcher makes of ``nemo rao train --factory FACTORY ARGUMENTS``."""
    return recipes.OverriddenByKey(name="train", factory=factory).parse_fn(recipes.train, list(arguments))


def test_the_entry_point_leads_to_the_recipes_and_names_their_command() -> None:
    assert declared().load() is recipes
    assert declared().name == recipes.NAMESPACE  # the launcher loads commands by the entry point's name
    assert recipes.train.cli_entrypoint.path == "rao.train"


def test_each_recipe_of_conf_is_a_factory_and_so_are_old_names() -> None:
    assert {"gpt_rao", "gpt_dpo", "gpt_sft"} <= set(NAMES)
    assert set(recipes.FACTORIES) == set(NAMES) | set(MOVED_RECIPES)
    assert recipes.FACTORIES["gpt_rao"].__doc__.startswith("RAO: fits")
    assert "gpt_dro model=eurollm_9b precision=bf16_mixed" in recipes.FACTORIES["gpt_dro_eurollm_9b"].__doc__


@pytest.mark.parametrize("name", ["gpt_rao", "gpt_rpo", "gpt_sft", "gpt_dro_eurollm_9b"])
def test_a_factory_describes_the_same_run_as_its_recipe(name: str) -> None:
    assert recipes.run_config(parse(factory=name)) == recipes.run_config(recipes.recipe(name)) == compose(name)


def test_a_task_takes_all_groups_of_keys_of_a_run() -> None:
    assert list(inspect.signature(recipes.train).parameters) == [field.name for field in dataclasses.fields(RunConfig)]


def test_keys_are_overridden_by_the_names_they_have_in_yaml() -> None:
    given = ["model.rao.beta=0.2", "model.rao.log_z0=auto", "trainer.max_epochs=null", "trainer.max_steps=7"]
    given += ["data.train_path=[a.jsonl,b.jsonl]", "data.tokenizer=./tok", "exp_manager.name=2024_11_21"]
    given += ["model.arch.extra={qk_layernorm: true}", "model.optim.lr=1e-6", "data.strict=true"]
    assert recipes.run_config(parse(*given)) == compose("gpt_rao", given)


def test_files_of_a_group_are_arguments_of_the_factory() -> None:
    task = parse("trainer.accelerator=gpu", factory="gpt_rao(model=llama3_8b, precision=bf16_mixed)")
    assert recipes.run_config(task) == compose(
        "gpt_rao", ["model=llama3_8b", "precision=bf16_mixed", "trainer.accelerator=gpu"]
    )


def test_keys_are_set_in_python_and_survive_the_way_to_another_machine() -> None:
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    task = recipes.recipe("gpt_dpo", precision="bf16_mixed")
    task.model.dpo.beta = 0.3
    arrived = ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(task))
    assert recipes.run_config(arrived) == compose("gpt_dpo", ["precision=bf16_mixed", "model.dpo.beta=0.3"])
    task.model.dpo.beta = -1.0
    with pytest.raises(UserError, match=r"model\.dpo\.beta=-1"):
        recipes.run_config(task)
    with pytest.raises(UserError, match="no such file"):
        recipes.recipe("gpt_rao", model="lama")


@pytest.mark.parametrize(
    ("arguments", "factory", "parts"),
    [
        (["model.rao.bta=1"], "gpt_rao", ("unknown key model.rao.bta", "did you mean model.rao.beta?")),
        (["model.rao.beta=-1"], "gpt_rao", ("model.rao.beta=-1", "> 0")),
        (["trainer.devices=many"], "gpt_rao", ("trainer.devices='many'", "must be an integer")),
        (["model.rao.beta"], "gpt_rao", ("model.rao.beta", "key=value")),
        (["model.rao.beta=1"], None, ("trainer is not set", "--factory", "gpt_rao")),
    ],
)
def test_a_wrong_key_or_value_is_reported_in_one_line_before_anything_is_launched(
    arguments: Sequence[str], factory: str | None, parts: Sequence[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*arguments, factory=factory)
    message = capfd.readouterr().err
    assert end.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert all(part in message for part in parts), message


def test_what_only_the_running_machine_can_know_is_reported_there(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fiddle.build(parse("data.train_path=nope.jsonl"))()
    assert end.value.code == 2
    assert capfd.readouterr().err.startswith("error: data.train_path: nope.jsonl: no such file")


def test_neither_nemo_nor_megatron_is_imported_to_offer_the_recipes() -> None:
    code = (
        "import sys\nfrom nemo_rao import recipes\nrecipes.recipe('gpt_rao')\n"
        "assert not {name.partition('.')[0] for name in sys.modules} & {'nemo', 'megatron', 'lightning'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# An environment in which only this package has such an entry point: NeMo's own takes 15 s to load.
LAUNCHER = """
import importlib_metadata
from importlib_metadata import EntryPoint, EntryPoints
ours = EntryPoints([EntryPoint({name!r}, {value!r}, "nemo_run.cli")])
importlib_metadata.entry_points = lambda **by: ours.select(**by)
from nemo_run.__main__ import app
app()
"""


@pytest.mark.slow
def test_the_launcher_lists_the_command_and_its_recipes(tmp_path: Path) -> None:
    code = LAUNCHER.format(name=declared().name, value=declared().value)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-c", code, "rao", "train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100)
    assert all(name in shown.stdout for name in ("--factory", *NAMES, "trainer", "exp_manager")), shown


def test_nemo_run_trains_a_recipe(tmp_path: Path) -> None:
    """One step on two ranks, in a process whose NeMo-Run started it directly."""
    import_once()
    write_preferences(tmp_path / "prefs.jsonl", 4)
    train_tokenizer([(tmp_path / "prefs.jsonl").read_text()], tmp_path / "tokenizer", 300)
    given = (
        *(f"data.train_path={tmp_path}/prefs.jsonl", f"data.tokenizer={tmp_path}/tokenizer"),
        *("model.arch.num_layers=2", "model.arch.hidden_size=32", "model.arch.ffn_hidden_size=64"),
        *("model.seq_length=128", "model.global_batch_size=2", "model.micro_batch_size=1"),
        *("model.pipeline_model_parallel_size=2", "trainer.devices=2", "trainer.max_steps=1"),
        *(f"exp_manager.exp_dir={tmp_path}/runs", "exp_manager.checkpoint_callback_params.every_n_train_steps=1"),
    )
    launcher = get_context("fork").Process(target=run_directly, args=(given, tmp_path))
    launcher.start()
    launcher.join(100)
    assert launcher.exitcode == 0
    assert (tmp_path / "runs/gpt_sft/checkpoints/step=1-last/weights").is_dir()
    assert "  num_layers: 2  # " in (tmp_path / "runs/gpt_sft/recipe.yaml").read_text()


def run_directly(given: Sequence[str], folder: Path) -> None:
    os.environ["NEMORUN_HOME"] = str(folder / "nemo_run")
    nemo_run.run(parse(*given, factory="gpt_sft"), direct=True)
