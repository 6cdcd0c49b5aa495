"""Study files: what they become, and what is refused before anything is imported or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.checkpoint.run_records import write_run
from nemo_rao.cli import main
from nemo_rao.commands.training import plan_parser
from nemo_rao.config.compose import package_recipes
from nemo_rao.config.derived import run_dir
from nemo_rao.errors import UserError
from nemo_rao.study.estimate import expected
from nemo_rao.study.made_data import make_data
from nemo_rao.study.plan import plan
from nemo_rao.study.planned import Plan, PlannedData
from nemo_rao.study.run import policies_of
from nemo_rao.study.schema import Scored
from nemo_rao.study.study_file import load_study

from ..readme.blocks import ROOT, blocks

SHIPPED = sorted(path.stem for path in (package_recipes() / "study").glob("[!_]*.yaml"))

STUDY = """
seeds: [3, 5]
baseline: dpo
files:
  made: {function: "nemo_rao.demo.run:make_data"}
  rewarded: {input: "{made}/train.jsonl", scorer: ["r=model:{rm}"]}
common:
  model: demo_llama
  data.train_path: "{made}/train.jsonl"
  data.tokenizer: "{made}/tokenizer"
  trainer.max_steps: 4
arms:
  sft: {recipe: gpt_sft, once: true}
  rm: {recipe: gpt_rm, start: sft, once: true}
  dpo: {recipe: gpt_dpo, start: sft, set: {model.dpo.beta: 0.2}}
  rao: {recipe: gpt_rao, start: dpo, label: RAO, set: {data.train_path: "{rewarded}", model.optim.lr: 1e-5}}
"""


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    """Plans ``STUDY`` with some text replaced, or another text."""

    def make(*replaced: str, text: str = STUDY, overrides: tuple[str, ...] = ()) -> Plan:
        for old, new in zip(replaced[::2], replaced[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return plan(load_study(str(path), overrides), str(tmp_path / "out"))

    return make


def test_runs_and_files_stand_behind_what_they_need(planned: Callable[..., Plan], tmp_path: Path) -> None:
    made = planned()
    assert [step.name for step in made.steps] == [
        *("made", "sft", "rm", "dpo-seed3", "rewarded", "rao-seed3"),
        *("dpo-seed5", "rao-seed5"),
    ]
    rao = made.run_of("rao", 5)
    assert set(rao.needs) == {"dpo-seed5", "made", "rewarded"}
    assert rao.config.model.restore_from_path == str(tmp_path / "out/dpo-seed5"), "of the same seed"
    assert rao.config.data.train_path == str(tmp_path / "out/data/rewarded.jsonl"), "over the common value"
    assert rao.config.data.tokenizer == str(tmp_path / "out/data/made/tokenizer")
    assert (rao.config.trainer.seed, rao.config.data.seed, rao.config.model.optim.lr) == (5, 5, 1e-5)
    assert made.run_of("sft", 5).config.trainer.seed == 3, "trained once, with the first seed"
    rewarded = next(step for step in made.steps if step.name == "rewarded")
    assert isinstance(rewarded, PlannedData)
    assert vars(rewarded.spec)["scorer"] == [f"r=model:{tmp_path / 'out/rm'}"]


def test_the_command_of_a_run_composes_to_the_run_itself(planned: Callable[..., Plan]) -> None:
    from nemo_rao.config.compose import compose

    for run in planned().runs:
        assert compose(run.recipe, run.overrides) == run.config


def test_keys_of_the_command_line_replace_those_of_the_file(planned: Callable[..., Plan]) -> None:
    overrides = ("seeds=[7]", "trainer.max_steps=9", "arms.dpo.set.model.dpo.beta=0.5", "arms.sft.start=/checkpoints/x")
    made = planned(overrides=overrides)
    dpo = made.run_of("dpo", 7).config
    assert (dpo.trainer.max_steps, vars(dpo.model)["dpo"].beta) == (9, 0.5)
    assert made.run_of("sft", 7).config.model.restore_from_path == "/checkpoints/x"


def test_a_study_extends_others_mapping_by_mapping(planned: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(STUDY)
    made = planned(
        text="extends: below\nseeds: [1]\narms: {dpo: {set: {model.dpo.beta: 0.7}}, rm: null, rao: null}\n"
        "files: {rewarded: null}\n"
    )
    assert [step.name for step in made.steps] == ["made", "sft", "dpo-seed1"]
    dpo = made.run_of("dpo", 1).config
    assert (vars(dpo.model)["dpo"].beta, dpo.trainer.max_steps) == (0.7, 4)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_study_of_the_package_can_be_planned(name: str, tmp_path: Path) -> None:
    study = load_study(name, ["seeds=[1]"])
    made = plan(study, str(tmp_path))
    assert len(made.runs) >= len(made.compared) * len(study.keys.seeds)
    assert not list(tmp_path.iterdir())


def test_the_study_in_the_documentation_can_be_planned(planned: Callable[..., Plan]) -> None:
    [example, *_] = blocks(ROOT / "docs" / "guides" / "studies.md", "yaml")
    assert [run.name for run in planned(text=example).runs][:3] == ["sft", "dpo-seed1", "rao-seed1"]


def test_each_study_of_the_package_has_both_sizes() -> None:
    large = {name for name in SHIPPED if not name.endswith(("_toy", "_smollm2"))}
    assert {name.removesuffix("_smollm2") for name in SHIPPED if name.endswith("_smollm2")} < large
    toys = {name.removesuffix("_toy") for name in SHIPPED if name.endswith("_toy")}
    # Settings of a real model are searched by nemo-rao train --multirun search=OBJECTIVE.
    assert large == {name for name in toys if not name.endswith(("_rates", "_strengths"))}
    assert large >= {"rao_likelihood", "rao_z0_beta", "rao_table1", "rao_table2", "rpo_ground_truth"}


REFUSED = [
    (
        ("recipe: gpt_rao", "recipe: gpt_roa"),
        "arms.rao: no recipe named 'gpt_roa'; did you mean gpt_rao? The recipes are gpt_agro, ",
    ),
    (
        ("start: dpo", "start: dop"),
        "arms.rao: start: dop is neither an arm nor the directory of a checkpoint; did you mean dpo?\n",
    ),
    (("baseline: dpo", "baseline: ipo"), "baseline: ipo is not an arm that is compared"),
    (("[3, 5]", "[3, 3]"), "seeds: [3, 3] has a seed twice"),
    (("[3, 5]", "[]"), "seeds: is empty"),
    (("  rm: {", "  dpo: {"), "line 15: dpo is given twice"),
    (("baseline:", "basline:"), "unknown key basline; did you mean baseline?"),
    (("label: RAO", "lable: RAO"), "unknown key arms.rao.lable; did you mean label?"),
    (('"{rewarded}"', '"{reward}"'), "arms.rao.set.data.train_path: {reward} is neither an arm nor files"),
    (("model.dpo.beta: 0.2", "model.rao.beta: 0.2"), "model.objective=dpo does not read model.rao.beta"),
    (("trainer.max_steps: 4", "model.ipo.beta: 4"), "common.model.ipo.beta: no arm reads it"),
    (("trainer.max_steps: 4", "trainer.seed: 4"), "common.trainer.seed: is set by the study; give seeds"),
    (
        ("model.dpo.beta: 0.2", "trainer.max_step: 2"),
        "arms.dpo: unknown key trainer.max_step; did you mean trainer.max_steps?",
    ),
    (("label: RAO", "label: dpo"), "arms.rao: is labeled 'dpo' in the report, like arms.dpo"),
    (("seeds:", "extends: 3\nseeds:"), "extends: must be the name of a study, or a list"),
    (("start: sft, once: true", "start: dpo, once: true"), "arms.rm: is trained once, but needs dpo"),
    (("gpt_sft, once: true", "gpt_sft, start: rm, once: true"), "depend on each other"),
    (
        (
            '{recipe: gpt_rao, start: dpo, label: RAO, set: {data.train_path: "{rewarded}", model.optim.lr: 1e-5}}',
            "{recipe: gpt_dpo, start: sft, set: {model.dpo.beta: 0.2}}",
        ),
        "arms.rao: is the same run as arms.dpo",
    ),
    (('{function: "nemo_rao.demo.run:make_data"}', "{split: x.jsonl}"), "files.made.split: x.jsonl: no such file"),
    (('{function: "nemo_rao.demo.run:make_data"}', "{split: a, held_out: 1}"), "files.made.held_out=1: must be < 1"),
    (("start: dpo", "start: models/smollm2-135m-instruct"), "checkpoint; run make smollm2"),
    (("make_data", "make_date"), "files.made.function: module nemo_rao.demo.run"),
    (('make_data"}', 'make_data", arguments: {prompts: 2}}'), "files.made.arguments:"),
    (("seeds:", "samples: {prompts: p.jsonl, scorer: rule:nemo_rao.demo.synthetic:truth}\nseeds:"), "samples.scorer:"),
    (("seeds:", "samples: {prompts: p.jsonl, scorer: judge:none.yaml}\nseeds:"), "samples.scorer: none.yaml"),
    (("seeds:", "samples: {prompts: p.jsonl, scorer: rule:math:sqrt}\nseeds:"), "samples.prompts: p.jsonl"),
    (("seeds:", "samples: {prompts: p.jsonl, scorer: rule:math:sqrt, against: [ipo]}\nseeds:"), "samples.against: ipo"),
    (
        ("seeds:", "relations: {a: {measure: loss, over: x}}\nseeds:"),
        "relations.a.measure: 'loss' is not among the measures",
    ),
    (
        ("seeds:", "measures: {loss: val/loss}\nrelations: {a: {measure: loss, over: model.lr}}\nseeds:"),
        "model.lr: no such",
    ),
    (("seeds:", "measures: {loss: {metric: {val/loss: much}}}\nseeds:"), "measures.loss: must be a metric"),
    ((STUDY[STUDY.index("arms:") :], "arms: {}\n"), "arms: is empty"),
    (("{recipe: gpt_sft, once: true}", "gpt_sft"), "arms.sft: must be a mapping"),
    (("{recipe: gpt_sft, once: true}", "{once: true}"), "arms.sft.recipe: is missing"),
    (("  sft: {", "  data: {"), "arms.data: the study itself uses a directory of this name"),
    (("  rao: {", "  rao v2: {"), "'rao v2': becomes a directory name"),
    (("  made: {", "  dpo: {"), "files.dpo: an arm has the same name"),
    ((', scorer: ["r=model:{rm}"]', ""), "files.rewarded: needs input and scorer, or split, or function"),
    (("seeds:", "tasks: {names: []}\nseeds:"), "tasks.names: is empty"),
    (
        ("seeds:", "measures: {loss: val/loss}\nrelations: {a: {measure: loss}}\nseeds:"),
        "relations.a.over: is missing",
    ),
    (
        ("seeds:", "measures: {loss: val/loss}\nrelations: {a: {measure: loss, over: x, arms: [sft]}}\nseeds:"),
        "relations.a.arms: sft is not an arm that is compared. Compared arms are dpo, rao.",
    ),
    (("seeds:", "samples: {scorer: rule:math:sqrt}\nseeds:"), "samples.prompts: is missing"),
    (("seeds:", "samples: {prompts: p.jsonl}\nseeds:"), "samples.scorer: is missing"),
    (
        ("seeds:", "samples: {prompts: p.jsonl, scorer: rule:math:sqrt, temperature: 0}\nseeds:"),
        "samples.temperature=0: gives the same response 4 times",
    ),
    (("baseline: dpo", "samples: {prompts: p.jsonl, scorer: rule:math:sqrt}"), "samples.against: baseline is not set"),
    (
        (
            STUDY[STUDY.index("  dpo:") :],
            "  dpo: {recipe: gpt_dpo}\nsamples: {prompts: p.jsonl, scorer: rule:math:sqrt, against: [start]}\n",
        ),
        "samples.against: start needs arms.dpo.start",
    ),
    (
        (
            STUDY[STUDY.index("  dpo:") :],
            "  dpo: {recipe: gpt_dpo}\n  start: {recipe: gpt_rao}\nsamples: {prompts: p, scorer: rule:math:sqrt}\n",
        ),
        "arms.start: has a special meaning in samples.against",
    ),
    (("seeds:", "extends: rao_table2_toi\nseeds:"), "package's studies; did you mean rao_table2_toy?\n"),
    (("seeds:", "extends: mine\nseeds:"), "extends: mine leads back to this file"),
    ((STUDY, "[1, 2]\n"), "must be a mapping with arms"),
    ((STUDY, "seeds: [1\n"), "invalid YAML: while parsing a flow sequence"),
    ((STUDY, "? {a: b}\n: 1\n"), "invalid YAML: while constructing a mapping"),
    ((STUDY, "arms: {a: {recipe: gpt_rao, once: true}}\n"), "arms: all are trained once"),
]


@pytest.mark.parametrize(("replaced", "said"), REFUSED, ids=[said[:50] for _, said in REFUSED])
def test_an_error_is_reported_in_one_line_that_names_file_and_key(
    replaced: tuple[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert replaced[0] in STUDY
    Path("mine.yaml").write_text(STUDY.replace(*replaced))
    assert main(["study", "mine.yaml", "--out", "out"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("error: mine.yaml")
    assert said in line and "?." not in line and "?;" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "nothing is written"


def test_each_start_outside_the_study_is_a_policy(planned: Callable[..., Plan]) -> None:
    """Wins over the start are over each arm's own; a start that all share is sampled once."""
    text = """
common: {model: demo_llama, data.train_path: train.jsonl, data.tokenizer: tokenizer}
arms: {dpo: {recipe: gpt_dpo, start: /a}, rao: {recipe: gpt_rao, start: /b}, ipo: {recipe: gpt_ipo, start: /b}}
samples: {prompts: p.jsonl, scorer: rule:math:sqrt, against: [start]}
seeds: [1]
"""
    found = {name: str(one.checkpoint) for name, one in policies_of(planned(text=text)).items() if "start" in name}
    assert found == {"policy start@dpo": "/a", "policy start@rao": "/b"}
    shared = {name for name in policies_of(planned("start: /a", "start: /b", text=text)) if "start" in name}
    assert shared == {"policy start"}


def test_rows_whose_input_or_scorer_has_changed_are_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows, rule = tmp_path / "rows.jsonl", tmp_path / "rule_of_length.py"
    row = {"prompt": "p", "responses": [{"content": "a"}, {"content": "bb"}]}
    rows.write_text(json.dumps(row) + "\n")
    rule.write_text("def score(prompt, response):\n    return float(len(response))\n")
    spec = Scored(input=str(rows), scorer=["rule:rule_of_length:score"])
    data = PlannedData("longer", spec, tmp_path / "data/longer.jsonl", ())
    assert make_data(data) and not make_data(data)
    made = data.path.read_text()
    rows.write_text(json.dumps(row | {"prompt": "q"}) + "\n")
    with pytest.raises(UserError, match=r"files\.longer: .* was made before its input or a scorer changed"):
        make_data(data)
    rows.write_text(json.dumps(row) + "\n")
    rule.write_text("def score(prompt, response):\n    return -float(len(response))\n")
    with pytest.raises(UserError, match="was made before its input or a scorer changed"):
        make_data(data)
    assert data.path.read_text() == made


def test_rows_are_split_by_prompt_and_otherwise_unchanged(tmp_path: Path, planned: Callable[..., Plan]) -> None:
    """Rows of one prompt stay together, in their order; another order of the prompts gives the same split."""
    records = [
        {"question": f"prompt {number % 10}", "response": f"answer {number}", "helpfulness": number, "note": "ü"}
        for number in range(30)
    ]
    source = tmp_path / "rows.jsonl"
    study = "files: {rows: {split: %s, held_out: 0.3, columns: {prompt: question}}}\narms: {rao: {recipe: gpt_rao}}\n"
    found = []
    for order in (records, records[::-1]):
        source.write_text("".join(json.dumps(record) + "\n" for record in order))
        data = next(step for step in planned(text=study % source).steps if isinstance(step, PlannedData))
        assert make_data(data) and not make_data(data)
        train, held_out = (
            [json.loads(line) for line in (data.path / name).read_text().splitlines()]
            for name in ("train.jsonl", "held_out.jsonl")
        )
        prompts = [{record["question"] for record in part} for part in (train, held_out)]
        assert [len(part) for part in prompts] == [7, 3] and not prompts[0] & prompts[1]
        assert [record for record in order if record["question"] in prompts[0]] == train
        assert [record for record in order if record["question"] in prompts[1]] == held_out
        found.append(prompts)
        source.write_text(json.dumps(records[0]) + "\n")
        with pytest.raises(UserError, match=r"files\.rows: .* was made before its input"):
            make_data(data)
        shutil.rmtree(data.path)
    assert found[0] == found[1]
    with pytest.raises(UserError, match=r"files\.rows\.split: .*rows.jsonl: has 1 prompts, .* Give more rows"):
        make_data(data)


def test_null_on_the_command_line_removes_a_mapping(planned: Callable[..., Plan]) -> None:
    made = planned(overrides=("arms.rm=null", "arms.rao=null", "files.rewarded=null"))
    assert [step.name for step in made.steps] == ["made", "sft", "dpo-seed3", "dpo-seed5"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rao_likelyhood",), "study rao_likelyhood: no such file; did you mean rao_likelihood? The studies are "),
        (("rao_likelihood_toy", "seeds"), "'seeds' is not an override. Write key=value, such as seeds=[1,2]."),
        (("rao_likelihood_toy", "=1"), "'=1' is not an override."),
        (("rao_likelihood_toy", "seeds.first=1"), "seeds.first=1: seeds has no subkeys. Set seeds itself."),
        (("rao_likelihood_toy", "--dry-run", "--gpu", "h1000"), "--gpu h1000: is unknown. Choose one of a100, "),
    ],
)
def test_options_are_refused_in_one_line(
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {said}") and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_study_started_by_every_rank_of_a_launcher_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert main(["study", "rao_likelihood_toy", "--dry-run"]) == 2
    assert "a study starts its own. Run it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("common.trainer.max_steps=9", "trainer.max_steps", 9),
        ("trainer.max_steps=9", "trainer.max_steps", 9),
        ("data.train_path={made}/train.jsonl", "data.train_path", "out/data/made/train.jsonl"),
        ("data.train_path={made}", "data.train_path", "out/data/made"),
    ],
)
def test_overrides_reach_every_arm_and_may_name_files(
    override: str, key: str, value: object, planned: Callable[..., Plan], tmp_path: Path
) -> None:
    group, _, name = key.partition(".")
    config = planned(overrides=(override,)).run_of("dpo", 3).config
    found = vars(vars(config)[group])[name]
    assert found == (value if not isinstance(value, str) else str(tmp_path / value))


def test_a_dry_run_lists_runs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(STUDY)
    assert main(["study", "mine.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(f"{run} " in said for run in ("sft", "rm", "dpo-seed3", "rao-seed5"))
    assert "files made: runs/study/mine/data/made" in said and "unknown for 6 runs" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_what_is_left_is_estimated_from_measured_steps_and_else_planned(planned: Callable[..., Plan]) -> None:
    made = planned(overrides=("model=llama3_8b", "precision=bf16_mixed"))
    folder = run_dir(made.run_of("dpo", 3).config)
    (folder / "checkpoints/step=1/weights").mkdir(parents=True)
    lines = [{"step": step, "seconds/update": 2.0, "seconds/reward": 1.0 * step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run(run_dir(made.run_of("sft", 3).config), start_from=None, max_steps=4, finished_at=4, engine="nemo")

    found = {one.run.name: one for one in expected(made, plan_parser().parse_intermixed_args(["--gpu", "h100"]))}
    assert (found["sft"].state, found["sft"].seconds) == ("finished", 0)
    assert (found["dpo-seed3"].state, found["dpo-seed3"].steps, found["dpo-seed3"].seconds) == ("to continue", 3, 12.0)
    assert (found["dpo-seed5"].steps, found["dpo-seed5"].seconds) == (4, 16.0), "of another seed"
    assert found["rm"].source == "planned" and found["rm"].seconds is not None and found["rm"].seconds > 0
    assert {one.run.name: one.seconds for one in expected(made, None)}["rm"] is None
