"""What may change when a run continues: docs/guides/continuing.md's table is what the rule gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_rao.batch import Sample
from nemo_rao.checkpoint import continuing, run_records
from nemo_rao.checkpoint.continuing import check_data, check_settings, describe, finished_at
from nemo_rao.checkpoint.run_records import data_record, record_changes, write_run
from nemo_rao.checkpoint.starting import start_of
from nemo_rao.config.compose import compose
from nemo_rao.config.derived import run_dir
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import known_keys, types_of_keys
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_atomically
from tests.engines import ENGINE, NEMO, needs_nemo

PAGE = Path(__file__).resolve().parents[2] / "docs/guides/continuing.md"
BEGUN = (
    *("trainer.max_steps=4", "model.restore_from_path=base", "model.peft.scheme=lora", "data.validation_path=v.jsonl"),
    *("model.optim.lr=5e-7", "model.rao.beta=0.1", "model.micro_batch_size=1", "trainer.max_epochs=1"),
)

# Key -> another value than the run was begun with.
OTHER: dict[str, str] = {
    "model.objective": "dpo",
    "model.rao.beta": "0.2",
    "model.rao.log_z0": "3",
    "model.optim.lr": "1e-5",
    "model.optim.weight_decay": "0.1",
    "model.optim.sched.warmup_steps": "1",
    "trainer.gradient_clip_val": "0.5",
    "trainer.seed": "5",
    "model.global_batch_size": "16",
    "model.seq_length": "64",
    "data.num_responses": "3",
    "data.num_prompts": "5",
    "data.reward_field": "score",
    "data.seed": "5",
    "data.shuffle": "false",
    "data.answers": "verbatim",
    "data.truncated": "without_end",
    "data.pairs_by": "reward",
    "data.chat_template": "never",
    "data.columns": "{prompt: question}",
    "data.ignore_fields": "[source]",
    "data.bad_rows": "drop",
    "data.max_bad_rows": "0.5",
    "model.peft.lora.alpha": "8",
    "model.peft.lora.dropout": "0.1",
    "model.peft.scheme": "none",
    "model.peft.lora.dim": "8",
    "model.peft.lora.target_modules": "[linear_qkv]",
    "model.family": "qwen2",
    "model.arch.num_layers": "6",
    "model.arch.hidden_dropout": "0.1",
    "model.arch.attention_dropout": "0.1",
    "precision.params": "bf16",
    "precision.fp8": "hybrid",
    "trainer.max_steps": "8",
    "trainer.max_epochs": "3",
    "trainer.devices": "2",
    "model.tensor_model_parallel_size": "2",
    "model.pipeline_model_parallel_size": "2",
    "model.micro_batch_size": "2",
    "data.packing": "true",
    "data.prefix_sharing": "true",
    "model.recompute_granularity": "full",
    "trainer.val_check_interval": "7",
    "trainer.log_every_n_steps": "7",
    "trainer.profile_steps": "[2,3]",
    "exp_manager.checkpoint_callback_params.async_save": "true",
    "model.cpu_offloading_num_layers": "1",
    "model.optim.cpu_offload_fraction": "0.5",
    "online.reward": "[rule:a:b]",
    "online.reward_weights": "{b: 2.0}",
    "online.temperature": "0.5",
    "online.vllm_importance_cap": "2",
    "online.mini_batches": "2",
    "online.epochs": "2",
    "online.rows_at_once": "8",
    "online.scoring_attempts": "1",
    "online.log_samples_every": "5",
    "exp_manager.checkpoint_callback_params.save_top_k": "0",
    "exp_manager.create_wandb_logger": "true",
    "reference.cache_dir": "elsewhere",
}
# Rows about contents, which tests of their own hold.
OF_CONTENTS = ("data.train_path", "data.validation_path", "data.tokenizer", "model.restore_from_path")


def rows() -> list[tuple[str, str]]:
    """(key, outcome) of the page's table."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 2:
            keys = re.findall(r"`([a-z0-9_]+\.[a-z0-9_.]+)`", cells[0])
            found += [(key, cells[1]) for key in keys]
    return [row for row in found if not row[0].endswith((".yaml", ".json", ".jsonl"))]


def config(folder: Path, *overrides: str) -> RunConfig:
    return compose("gpt_rao", [*BEGUN, f"exp_manager.exp_dir={folder}", *overrides])


def begin(folder: Path, *overrides: str, step: int = 2, finished: int | None = None) -> Path:
    """What a run leaves that has saved a checkpoint."""
    made = config(folder, *overrides)
    run = run_dir(made)
    (run / f"checkpoints/step={step}-last/weights").mkdir(parents=True)
    write_atomically(run / run_records.RECIPE, to_yaml(made))
    write_atomically(run / run_records.DATA, json.dumps(data_record(data(), data(5))))
    write_run(run, engine=ENGINE or NEMO, start_from=Path("/checkpoints/base"), max_steps=4, finished_at=finished)
    return run


def data(first_token: int = 7, reward: float = 1.0, num_prompts: int = 3) -> PreferenceData:
    return PreferenceData(
        Sample(
            prompt=np.array([1, first_token]),
            responses=(np.array([2, 3]), np.array([4])),
            rewards=np.array([reward, 0.0]),
            ranked=False,
            location=f"line {number}",
            ensemble=np.zeros((2, 0)),
            reference_rewards=np.zeros(0),
            answers=None,
        )
        for number in range(num_prompts)
    )


def outcome(folder: Path, *overrides: str) -> str:
    """applied, refused or new run; refusals are one line with the remedies that help."""
    try:
        changes = check_settings(config(folder, *overrides))
    except UserError as error:
        message = str(error)
        assert "\n" not in message and "another exp_manager.name" in message
        anyway = config(folder, *overrides, "exp_manager.resume_with_changes=true")
        if "resume_with_changes=true" not in message:
            with pytest.raises(UserError):
                check_settings(anyway)
            return "new run"
        assert {change.key for change in check_settings(anyway)} >= {text.partition("=")[0] for text in overrides}
        return "refused"
    assert changes
    return "applied"


# A class of NeMo -> the family and the fields that describe the same network.
CLASSES: dict[str, tuple[str, ...]] = {
    "LlamaConfig": (),
    "Llama31Config70B": ("model.arch.rope_scaling.factor=8", "model.arch.rotary_base=5e5"),
    "Llama32Config1B": (
        *("model.arch.rope_scaling.factor=32", "model.arch.rotary_base=500000"),
        "model.arch.share_embeddings_and_output_weights=true",
    ),
    "Qwen25Config500M": ("model.family=qwen2", "model.arch.extra={vocab_size: 151936}"),
    "MistralConfig7B": ("model.family=mistral", "model.arch.extra={window_size: [4096, 0]}"),
    "MixtralConfig8x7B": ("model.family=mixtral",),
    "Qwen3Config30B_A3B": (
        "model.family=qwen3_moe",
        "model.arch.extra={vocab_size: 151936, moe_ffn_hidden_size: 768}",
    ),
}


@needs_nemo
@pytest.mark.parametrize("name", CLASSES)
def test_a_run_of_a_class_of_nemo_continues_under_its_family(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is refused where the network is another, by the field's name here."""
    begin(tmp_path, f"model.config_class={name}")
    assert check_settings(config(tmp_path, *CLASSES[name])) == []
    with pytest.raises(UserError, match=r"changes model\.arch\.rotary_base from [0-9.]+ to 77\.0; "):
        check_settings(config(tmp_path, *CLASSES[name], "model.arch.rotary_base=77"))
    with pytest.raises(UserError, match=r"changes model\.arch\.extra\.qk_layernorm from "):
        normed = name.startswith("Qwen3")
        check_settings(config(tmp_path, *CLASSES[name], f"model.arch.extra.qk_layernorm={not normed}"))
    [warning] = {line for line in capsys.readouterr().err.splitlines() if "deprecated" in line}
    family = CLASSES[name][0] if "family" in str(CLASSES[name]) else "model.family=llama"
    assert f"model.config_class={name} is deprecated; write {family} and model.arch={{" in warning


@needs_nemo
def test_a_class_that_belongs_to_no_family_continues_as_itself(tmp_path: Path) -> None:
    begin(tmp_path, "model.config_class=GPTConfig")
    assert check_settings(config(tmp_path, "model.config_class=GPTConfig")) == []
    with pytest.raises(UserError, match=r"model\.config_class from GPTConfig to null"):
        check_settings(config(tmp_path))


def test_the_page_names_keys_that_there_are_and_tests_know_another_value_of_each() -> None:
    named = {key for key, _ in rows()}
    assert named <= set(known_keys()) and named == set(OTHER) | set(OF_CONTENTS)


@pytest.mark.parametrize(("key", "documented"), [row for row in rows() if row[0] not in OF_CONTENTS])
def test_a_changed_key_has_the_outcome_of_the_page(key: str, documented: str, tmp_path: Path) -> None:
    begin(tmp_path)
    assert outcome(tmp_path, f"{key}={OTHER[key]}") == re.split(r"[;.]", documented)[0]


def test_a_refusal_names_every_key_with_its_old_and_its_new_value(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(UserError) as caught:
        check_settings(config(tmp_path, "model.optim.lr=1e-5", "model.rao.beta=0.2", "trainer.devices=2"))
    message = str(caught.value)
    assert "model.optim.lr from 5e-07 to 1e-05" in message and "model.rao.beta from 0.1 to 0.2" in message
    assert "trainer.devices" not in message, "it may change"


def test_keys_of_objectives_that_are_not_trained_are_not_compared(tmp_path: Path) -> None:
    begin(tmp_path)
    assert check_settings(config(tmp_path, "model.dpo.beta=7")) == []


def test_a_value_heads_learning_rate_needs_a_new_run(tmp_path: Path) -> None:
    begin(tmp_path, "model.objective=dro")
    assert outcome(tmp_path, "model.objective=dro", "model.optim.lr=1e-5") == "new run"
    assert outcome(tmp_path, "model.objective=rao") == "new run"


def test_every_key_that_is_declared_is_one(tmp_path: Path) -> None:
    keys = types_of_keys()
    for declared in (*continuing.KEEPS_NUMBERS, *continuing.NEEDS_NEW_RUN, *continuing._SPLITS):
        assert any(key.startswith(declared) for key in keys), declared


def test_a_key_that_nobody_has_declared_is_refused() -> None:
    before, now = compose("gpt_rao", []), compose("gpt_rao", [])
    before.model.arch.extra, now.model.arch.extra = {"new": 1}, {"new": 2}
    changes = continuing.settings_changes(before, now)
    assert [change.keeps_numbers for change in changes] == [False]


def test_nothing_is_compared_where_there_is_nothing_to_continue(tmp_path: Path) -> None:
    run = begin(tmp_path)
    for folder in (run / "checkpoints").iterdir():
        folder.joinpath("weights").rmdir()
    assert check_settings(config(tmp_path, "model.optim.lr=1")) == []


@pytest.mark.parametrize(
    ("train", "validation", "key"),
    [
        (data(8), data(5), "data.train_path from 3 prompts"),
        (data(reward=0.5), data(5), "data.train_path"),
        (data(num_prompts=4), data(5), "to 4 prompts"),
        (data(), data(6), "data.validation_path from 3 prompts"),
    ],
    ids=["other texts", "other rewards", "a row more", "other validation data"],
)
def test_other_contents_of_the_data_are_refused(
    train: PreferenceData, validation: PreferenceData, key: str, tmp_path: Path
) -> None:
    begin(tmp_path)
    with pytest.raises(UserError, match=re.escape(key)):
        check_data(config(tmp_path), data_record(train, validation))
    changes = check_data(config(tmp_path, "exp_manager.resume_with_changes=true"), data_record(train, validation))
    assert len(changes) == 1 and not changes[0].keeps_numbers


def test_the_same_contents_elsewhere_and_validation_that_is_left_out_are_applied(tmp_path: Path) -> None:
    begin(tmp_path)
    moved = config(tmp_path, "data.train_path=moved.jsonl", "data.tokenizer=moved")
    assert check_data(moved, data_record(data(), data(5))) == []
    assert {change.key for change in check_settings(moved)} == {"data.train_path", "data.tokenizer"}
    assert [change.keeps_numbers for change in check_data(moved, data_record(data(), None))] == [True]


def test_the_start_is_the_recorded_one_also_where_the_run_that_made_it_has_gone_on(tmp_path: Path) -> None:
    begin(tmp_path)
    assert start_of(config(tmp_path)) == Path("/checkpoints/base")
    other = tmp_path / "other"
    (other / "weights").mkdir(parents=True)
    for scheme, remedy in (("lora", False), ("none", True)):
        with pytest.raises(UserError, match="from /checkpoints/base to") as caught:
            start_of(config(tmp_path, f"model.restore_from_path={other}", f"model.peft.scheme={scheme}"))
        assert ("resume_with_changes=true to resume" in str(caught.value)) == remedy, "adapters need their own base"


@pytest.mark.parametrize(
    ("step", "ended", "max_steps", "expected"),
    [(4, 4, 4, 4), (4, 4, 2, 4), (4, 4, 8, None), (4, None, 4, None), (2, None, 4, None), (4, 2, 4, None)],
    ids=["at its end", "shortened", "made longer", "stopped before its end", "under way", "stopped when it was longer"],
)
def test_a_run_is_finished_when_its_end_and_its_checkpoint_reach_the_steps_asked_for(
    step: int, ended: int | None, max_steps: int, expected: Any, tmp_path: Path
) -> None:
    begin(tmp_path, step=step, finished=ended)
    assert finished_at(config(tmp_path), max_steps) == expected


def test_a_run_that_keeps_no_checkpoint_can_be_finished(tmp_path: Path) -> None:
    run = begin(tmp_path)
    (run / "checkpoints/step=2-last/weights").rmdir()
    assert finished_at(config(tmp_path), 4) is None
    write_run(run, start_from=None, max_steps=4, finished_at=4, engine=ENGINE or NEMO)
    assert finished_at(config(tmp_path), 4) == 4
    assert outcome(tmp_path, "model.optim.lr=1e-5") == "refused"


def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_earlier_one(tmp_path: Path) -> None:
    run = begin(tmp_path)
    with pytest.raises(UserError, match="mix with those of a new one"):
        check_settings(config(tmp_path, "exp_manager.resume_if_exists=false"))
    (run / run_records.RECIPE).unlink()
    with pytest.raises(UserError, match=r"recipe\.yaml is missing"):
        check_settings(config(tmp_path))


def test_changes_that_are_applied_are_described_and_recorded(tmp_path: Path) -> None:
    run = begin(tmp_path)
    changes = check_settings(config(tmp_path, "trainer.max_steps=8", "trainer.devices=2"))
    assert describe(changes) == [
        "changed since the last start: trainer.devices 1 -> 2, trainer.max_steps 4 -> 8 (numbers agree to rounding, "
        "not bit for bit)"
    ]
    record_changes(run, changes, step=2)
    record_changes(run, [], step=3)
    (line,) = (run / run_records.CHANGES).read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 2 and {"key": "trainer.max_steps", "old": 4, "new": 8} in record["changes"]


def test_a_change_of_samples_or_rewards_is_said_to_leave_the_rollout_that_the_run_has(tmp_path: Path) -> None:
    begin(tmp_path)
    anyway = "exp_manager.resume_with_changes=true"
    for override in ("online.temperature=0.5", "online.reward=[rule:a:b]", "online.reward_weights={b: 2.0}"):
        _, said = describe(check_settings(config(tmp_path, override, anyway)))
        assert "the current rollout keeps its samples and rewards" in said
    for override in ("online.vllm_importance_cap=2", "online.rows_at_once=8"):
        assert len(describe(check_settings(config(tmp_path, override, anyway)))) == 1


@pytest.mark.parametrize(("began_on", "asked"), [("nemo", "bridge"), ("bridge", "nemo")])
def test_a_run_is_not_continued_on_another_engine(tmp_path: Path, began_on: str, asked: str) -> None:
    run = begin(tmp_path)
    write_run(run, engine=began_on, start_from=Path("/checkpoints/base"), max_steps=4)
    with pytest.raises(UserError) as refused:
        check_settings(config(tmp_path, f"trainer.engine={asked}"))
    message = str(refused.value)
    assert f"{run} was trained with {began_on} and would resume with {asked}" in message and "\n" not in message
    assert check_settings(config(tmp_path, f"trainer.engine={began_on}"))[0].key == "trainer.engine"


def test_runs_of_versions_before_there_were_engines_are_nemos(tmp_path: Path) -> None:
    run = begin(tmp_path)
    (run / "run.json").write_text(json.dumps({"start_from": "/checkpoints/base", "max_steps": 4}))
    check_settings(config(tmp_path, "trainer.engine=nemo"))
    with pytest.raises(UserError, match="trained with nemo"):
        check_settings(config(tmp_path, "trainer.engine=bridge"))
