"""Grids of runs: what they expand to, what the runs are called, and what is refused before any of them starts."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_rao.cli import main
from nemo_rao.config.compose import compose, compose_grid
from nemo_rao.errors import UserError
from nemo_rao.training.sweep import MAX_NAME, check, plan

CONF = Path(__file__).resolve().parents[2] / "conf"
BETA, RATE = (0.05, 0.1, 0.5, 1.0), (1e-7, 2e-7, 5e-7, 1e-6)
# The RAO paper's grids, objective -> key -> values.
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "rao": {"model.rao.beta": BETA, "model.rao.log_z0": (-50, 0, 50, 100, 200, 500), "model.optim.lr": RATE},
    "dpo": {"model.dpo.beta": BETA, "model.optim.lr": RATE},
    "ipo": {"model.ipo.beta": BETA, "model.optim.lr": RATE},
    "robust_po": {"model.robust_po.beta": BETA, "model.optim.lr": RATE},
    "slic": {"model.slic.lam": (0.05, 0.1, 0.5, 1, 5, 10), "model.optim.lr": RATE[:3]},
    "simpo": {"model.simpo.beta": (1.0, 2.0, 2.5), "model.simpo.gamma": (0.3, 0.5, 0.7, 1.0, 1.5)},
    "orpo": {"model.orpo.lam": (0.01, 0.05, 0.1, 1.0)},
    "dro": {"model.dro.tau": (1.0,), "model.optim.lr": RATE[:2]},
}


def value(config: object, key: str) -> object:
    for part in key.split("."):
        config = vars(config)[part]
    return config


def refusal(*overrides: str, recipe: str = "gpt_dpo") -> str:
    with pytest.raises(UserError) as caught:
        check(plan(recipe, overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- expansion


def test_there_is_a_grid_for_each_objective_that_the_paper_compares() -> None:
    assert {path.stem for path in CONF.glob("search/*.yaml")} == set(PAPER)


@pytest.mark.parametrize("objective", PAPER)
def test_a_search_is_every_combination_of_the_papers_values_under_names_of_their_own(objective: str) -> None:
    sweep = plan(f"gpt_{objective}", [f"search={objective}"])
    keys, num_runs = PAPER[objective], 1
    for values in keys.values():
        num_runs *= len(values)
    assert len(sweep.runs) == len({run.name for run in sweep.runs}) == num_runs
    assert len({tuple(value(run.config, key) for key in keys) for run in sweep.runs}) == num_runs
    for key, values in keys.items():
        assert {value(run.config, key) for run in sweep.runs} == set(values)
    for run in sweep.runs:
        assert run.config.exp_manager.name == run.name == Path(run.name).name
        assert run.config.model.objective == objective


def test_keys_with_several_values_make_the_product_of_them_in_order() -> None:
    grid = compose_grid("gpt_dpo", ["model.dpo.beta=0.1,0.5", "trainer.max_steps=range(1,4)", "trainer.devices=2"])
    assert [own for own, _ in grid] == [
        (f"model.dpo.beta={beta}", f"trainer.max_steps={steps}") for beta in (0.1, 0.5) for steps in (1, 2, 3)
    ]
    assert [(config.trainer.max_steps, config.trainer.devices) for _, config in grid[:3]] == [(1, 2), (2, 2), (3, 2)]


def test_what_the_command_line_sets_replaces_the_files_values() -> None:
    grid = compose_grid("gpt_dpo", ["search=dpo", "model.dpo.beta=0.3", "model.optim.lr=1e-5,1e-4"])
    assert [(own, config.model.dpo.beta, config.model.optim.lr) for own, config in grid] == [  # type: ignore[attr-defined]
        (("model.optim.lr=1e-05",), 0.3, 1e-5),
        (("model.optim.lr=0.0001",), 0.3, 1e-4),
    ]


def test_a_search_is_chosen_with_or_without_a_plus_and_goes_with_any_recipe_of_its_objective() -> None:
    assert compose_grid("gpt_orpo", ["+search=orpo"]) == compose_grid("gpt_orpo", ["search=orpo"])
    [_, config], *rest = compose_grid("gpt_orpo", ["model=llama3_8b", "paper=rao_2026", "search=orpo"])
    assert len(rest) == 3 and (config.model.seq_length, config.model.arch.num_layers) == (2048, 32)


def test_files_of_a_group_are_swept_over_like_values() -> None:
    grid = compose_grid("gpt_rao", ["model=tiny_llama,llama3_8b", "precision=fp32,bf16_mixed"])
    assert [(config.model.arch.num_layers, config.precision.params) for _, config in grid] == [
        (num_layers, params) for num_layers in (4, 32) for params in ("fp32", "bf16")
    ]


def test_interpolations_follow_the_swept_value() -> None:
    grid = compose_grid("gpt_rao", ["trainer.seed=1,2", "data.seed=${trainer.seed}"])
    assert [config.data.seed for _, config in grid] == [1, 2]


def test_a_recipe_of_ones_own_may_hold_a_grid(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [gpt_rao, _self_]\nhydra: {sweeper: {params: {model.rao.log_z0: 'auto,50'}}}\n"
    )
    grid = compose_grid("mine", config_dir=tmp_path)
    assert [config.model.rao.log_z0 for _, config in grid] == ["auto", 50.0]  # type: ignore[attr-defined]


def test_without_several_values_there_is_one_run_of_the_recipes_name() -> None:
    sweep = plan("gpt_rao", ["model.rao.beta=0.3"])
    [run] = sweep.runs
    assert run.name == sweep.name == "gpt_rao" and run.overrides == ()
    assert run.config == compose("gpt_rao", ["model.rao.beta=0.3"])


# ------------------------------------------------------------------------------------------------------------ names


def names(*overrides: str) -> list[str]:
    return [run.name for run in plan("gpt_dpo", ["exp_manager.name=s", *overrides]).runs]


def test_runs_are_named_by_the_last_parts_of_their_keys() -> None:
    assert names("model.dpo.beta=0.1,0.5", "model.optim.lr=1e-7") == ["s-beta=0.1", "s-beta=0.5"]
    assert names("trainer.seed=1,2", "data.seed=3,4")[0] == "s-trainer.seed=1-data.seed=3"


def test_names_are_those_of_folders_whatever_the_values() -> None:
    got = names('data.train_path=/data/a b.jsonl,[x.jsonl,y.jsonl],"~/s-beta=1"', "model.dpo.beta=1,2")
    assert len(set(got)) == 6 and all(Path(name).name == name for name in got)
    assert got[0] == "s-train_path=data_a_b.jsonl-beta=1" and got[4] == "s-train_path=s-beta=1-beta=1"


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    got = names(f"data.train_path=/data/{'x' * 300}/a.jsonl,/data/{'x' * 300}/b.jsonl")
    assert len(set(got)) == 2 and max(map(len, got)) == len("s-") + MAX_NAME


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("override", ["model.dpo.beta=0.1,0.5", "trainer.max_steps=range(1,3)", "search=dpo"])
def test_a_grid_without_multirun_is_refused_with_the_remedy(override: str) -> None:
    with pytest.raises(UserError, match="--multirun"):
        compose("gpt_dpo", [override])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("model.dpo.bta=0.1,0.5",), ("unknown key model.dpo.bta", "did you mean model.dpo.beta?")),
        (("search=dpo", "model.dpo.beta=0.1,-1"), ("model.dpo.beta=-1 model.optim.lr=1e-07: ", "> 0")),
        (("model.global_batch_size=9,8",), ("model.global_batch_size=9: ", "micro_batch_size=2")),
        (("trainer=1,2",), ("trainer=1", "group of keys")),
        (("model=tiny_llama,lama3_8b",), ("model=lama3_8b", "did you mean llama3_8b")),
        (("search=simop",), ("search=simop", "did you mean simpo")),
        (("search=dpo,ipo",), ("search=dpo", "file that contains a grid")),
        (("search=orpo",), ("model.orpo.lam=0.01", "model.objective=dpo does not read model.orpo.lam")),
        (("model.objective=dpo,ipo", "model.dpo.beta=0.1,0.5"), ("model.objective=ipo does not read model.dpo.beta",)),
        (("exp_manager.name=a,b",), ("exp_manager.name=a", "the same for all runs")),
        (("exp_manager.exp_dir=a,b",), ("exp_manager.exp_dir=a", "the same for all runs")),
        (
            ("model.dpo.beta=1,1.0",),
            ("model.dpo.beta=1.0: gives the same run or run name, gpt_dpo-beta=1.0, as model.dpo.beta=1.",),
        ),
        (("data.train_path=a/b,a_b",), ("data.train_path=a_b", "the same run or run name, gpt_dpo-train_path=a_b")),
        (("model.restore_from_path=runs/s-beta=1,runs/s-beta=2",), ("runs/s-beta=1,runs/s-beta=2", "quote each")),
        (("model.dpo.beta=interval(0.1,1)",), ("interval(0.1,1)", "write them out")),
        (("model.dpo.beta=shuffle(0.1,1)",), ("shuffle(0.1,1)", "write them out")),
        (("trainer.max_steps=range(3,1)",), ("range(3,1)", "empty")),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_in_one_line(overrides: Sequence[str], parts: Sequence[str]) -> None:
    message = refusal(*overrides)
    assert all(part in message for part in parts), message


def test_bad_input_of_one_run_stops_all_with_code_2_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prefs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    command = ["train", "--config-name", "gpt_dpo", "data.train_path=prefs.jsonl", "data.tokenizer=./tokenizer"]
    assert main([*command, "-m", "model.dpo.beta=0.1", "model.micro_batch_size=1,2,3"]) == 2
    output, message = capfd.readouterr()
    assert output == "" and message.count("\n") == 1
    assert message.startswith("error: model.micro_batch_size=3: model.global_batch_size=8"), message
    assert {path.name for path in tmp_path.iterdir()} == {"prefs.jsonl", "tokenizer"}


def test_print_config_lists_the_runs_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config-name", "gpt_orpo", "--multirun", "--print-config", "search=orpo"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        f"gpt_orpo-lam={lam} model.orpo.lam={lam}" for lam in (0.01, 0.05, 0.1, 1.0)
    ]
    assert not list(tmp_path.iterdir())
