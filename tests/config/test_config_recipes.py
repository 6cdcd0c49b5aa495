"""Every YAML file in conf/ composes, prints with its comments, and ships with the package."""

import zipfile
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml

import nemo_rao.config.compose as compose_module
from nemo_rao.config.compose import compose, compose_grid, package_recipes
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.config.typed_config import known_keys
from nemo_rao.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
# Without search/: what those files hold are several values of a key (test_config_sweeps.py); without cluster/ and
# study/: they are no part of a recipe (tests/slurm, tests/study).
GROUP_FILES = [
    (file.parent.name, file.stem)
    for file in sorted(CONF.glob("*/*.yaml"))
    if file.parent.name not in ("search", "cluster", "study")
]
FREE = "model.arch.extra."  # a key in which further ones stand


def test_the_recipes_of_a_checkout_are_those_at_its_top() -> None:
    assert package_recipes() == CONF


@pytest.mark.parametrize(("group", "choice"), GROUP_FILES)
def test_each_group_file_composes_and_sets_what_it_says(group: str, choice: str) -> None:
    content = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    content.pop("defaults", None)
    if "@package _global_" not in (CONF / group / f"{choice}.yaml").read_text():
        content = {group: content}
    # What the file sets is what the composed recipe has, unless a later group of gpt_rao sets it too (model over lr).
    config = compose("gpt_rao", [f"{group}={choice}"])
    later = {"model.optim.lr"} if group == "objective" else set()
    assert {key for key in dotted(content) if not key.startswith(FREE)} <= known_keys().keys()
    printed = dotted(yaml.safe_load(to_yaml(config)))
    assert {k: v for k, v in dotted(content).items() if k not in later and printed[k] != pytest.approx(v)} == {}


def dotted(tree: dict, prefix: str = "") -> dict:
    """Leaves by dotted name; PyYAML reads 5e-7 as text, so numbers are converted."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found |= dotted(value, f"{prefix}{name}.")
        else:
            try:
                found[prefix + name] = float(value) if isinstance(value, str) else value
            except ValueError:
                found[prefix + name] = value
    return found


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_each_file_says_at_its_top_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", ["gpt_rao", "gpt_dpo", "gpt_rpo", "gpt_rao_eurollm_9b"])
def test_a_printed_recipe_has_each_key_with_its_comment_and_is_a_recipe_itself(name: str, tmp_path: Path) -> None:
    config = compose(name, ["model.arch.extra={a: 1}", 'exp_manager.name="a: #b"', "data.train_path=[x.jsonl,y.jsonl]"])
    text = to_yaml(config)
    assert len(text.splitlines()) == len(known_keys())
    for line, (key, spec) in zip(text.splitlines(), known_keys().items(), strict=True):
        assert line.strip().startswith(f"{key.rpartition('.')[2]}:") and f"  # {spec.comment}" in line
    (tmp_path / "saved.yaml").write_text(text)
    assert compose("saved", config_dir=tmp_path) == config


def test_the_container_command_gives_a_model_split_over_eight_gpus() -> None:
    config = compose("gpt_rao", ["model=llama3_8b", "precision=bf16_mixed", "trainer.accelerator=gpu"])
    assert (config.trainer.devices, config.model.tensor_model_parallel_size) == (8, 4)
    assert config.model.optim.lr == 5e-7
    assert config.precision.params == "bf16"


def test_an_unknown_recipe_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean gpt_rao"):
        compose("gpt_roa")


def test_own_recipes_extend_and_shadow_those_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny_llama.yaml").write_text("seq_length: 77\n")
    (tmp_path / "mine.yaml").write_text("defaults: [gpt_rao, _self_]\ntrainer: {max_steps: 5}\n")
    config = compose("mine", ["model.rao.beta=0.5"], tmp_path)
    assert (config.trainer.max_steps, config.model.seq_length, config.model.objective) == (5, 77, "rao")


def test_a_recipe_of_its_own_needs_no_defaults_list(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("trainer:\n  max_steps: 5\ndata:\n")
    assert compose("plain", config_dir=tmp_path).trainer.max_steps == 5


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("trainer: {max_step: 3}", ("unknown key trainer.max_step", "trainer.max_steps?")),
        ("trainer: {max_steps: abc}", ("trainer.max_steps", "abc", "an integer")),
        ("trainer: 3", ("trainer=3", "group of keys")),
        ("trainer: {max_steps: 3\nx: 3", ("mine.yaml", "line 2", "YAML")),
        ("trainer:\n  max_steps: 3\n  max_steps: 4", ("mine.yaml", "duplicate key max_steps")),
        ("- 3", ("mine",)),
        ("defaults: [gpt_roa, _self_]", ("gpt_roa.yaml", "did you mean gpt_rao")),
        ("defaults: [model: tiny_lama, _self_]", ("model/tiny_lama.yaml", "did you mean tiny_llama")),
    ],
)
def test_a_bad_recipe_of_ones_own_is_refused_in_one_line(content: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        compose("mine", config_dir=tmp_path)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_missing_recipe_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        compose("gpt_rao", config_dir=tmp_path / "nope")


def test_a_recipe_of_the_package_is_read_once_and_others_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(args)
        return hydra_compose(*args, **options)

    hydra_compose = hydra.compose
    monkeypatch.setattr(hydra, "compose", counted)
    compose_module._cached_composition.cache_clear()
    betas = ["model.rao.beta=2", "model.rao.beta=3"]
    assert [compose("gpt_rao", [beta]).model.rao.beta for beta in betas] == [2, 3]
    assert compose("gpt_rao").model.rao.beta != 3, "an override has changed what is cached"
    assert len(asked) == 1
    (tmp_path / "mine.yaml").write_text("defaults: [gpt_rao, _self_]\ntrainer: {max_steps: 5}\n")
    assert compose("mine", config_dir=tmp_path).trainer.max_steps == 5
    (tmp_path / "mine.yaml").write_text("defaults: [gpt_rao, _self_]\ntrainer: {max_steps: 7}\n")
    assert compose("mine", config_dir=tmp_path).trainer.max_steps == 7
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny_llama.yaml").write_text("seq_length: 78\n")  # now shadows the package's
    assert compose("mine", config_dir=tmp_path).model.seq_length == 78
    assert compose("gpt_rao", config_dir=tmp_path).model.seq_length == 78
    assert compose("gpt_rao").model.seq_length != 78
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(UserError, match="no recipe named 'mine'"):
        compose("mine", config_dir=tmp_path)


def test_what_a_recipe_takes_from_the_environment_is_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [gpt_rao, {override model: '${oc.env:MY_MODEL}'}, _self_]\n"
        "data: {train_path: '${oc.env:MY_DATA}'}\n"
        "hydra: {sweeper: {params: {model.rao.beta: '${oc.env:MY_BETAS}'}}}\n"
    )
    for model, betas, data, layers in (("llama3_8b", "2,3", "a", 32), ("tiny_llama", "4,5", "b", 4)):
        for name, value in {"MY_MODEL": model, "MY_BETAS": betas, "MY_DATA": data}.items():
            monkeypatch.setenv(name, value)
        runs = [config for _, config in compose_grid("mine", config_dir=tmp_path)]
        assert [f"{run.model.rao.beta:g}" for run in runs] == betas.split(",")
        assert {(run.data.train_path, run.model.arch.num_layers) for run in runs} == {(data, layers)}


def test_files_of_a_recipes_own_search_path_are_read_each_time(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    recipes = tmp_path / "recipes"
    elsewhere.mkdir()
    recipes.mkdir()
    (recipes / "mine.yaml").write_text(
        f"defaults: [gpt_rao, shared, _self_]\nhydra: {{searchpath: ['file://{elsewhere}']}}\n"
    )
    for steps in (5, 6):
        (elsewhere / "shared.yaml").write_text(f"trainer: {{max_steps: {steps}}}\n")
        assert compose("mine", config_dir=recipes).trainer.max_steps == steps


def test_composing_leaves_an_application_that_uses_hydra_itself_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("x: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("gpt_rao").model.objective == "rao"
        assert hydra.compose("theirs") == {"x": 1}


def test_a_broken_interpolation_is_refused_with_its_override() -> None:
    with pytest.raises(UserError, match=r"^exp_manager\.name='\$\{a\.b': [^\n]+$"):
        compose("gpt_rao", ["exp_manager.name='${a.b'"])


def test_composing_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [gpt_rao, _self_]\n")
    compose("mine", config_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_wheel_ships_every_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(CONF.parent)
    wheel = zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path)))
    shipped = {name for name in wheel.namelist() if name.startswith("nemo_rao/conf/")}
    assert shipped == {f"nemo_rao/conf/{path.relative_to(CONF).as_posix()}" for path in CONF.rglob("*.yaml")}
