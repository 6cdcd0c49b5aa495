"""A whole run: how many steps it has, and what they and the passes around them take."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.cli import main
from nemo_rao.config.compose import compose, override
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.planning.machine import Machine
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.plan_data import DataSize, run_length, size_of
from nemo_rao.planning.step_time import forward_seconds, step_time
from nemo_rao.planning.whole_run import RunLength, num_validations, run_time

MACHINE = Machine("H100", 80.0, 4.0, 989.4, 0.5, 450.0, 50.0, 0.8, 3350.0, 8)
VALIDATED = "data.validation_path=validation.jsonl"


@pytest.fixture(scope="module")
def llama() -> RunConfig:
    return override(compose("gpt_rao_llama3_8b"), ["trainer.max_epochs=3", "trainer.max_steps=null"])


def steps_of(config: RunConfig, *overrides: str, prompts: int | None = None) -> RunLength | None:
    return run_length(override(config, overrides), training=None, validation=None, prompts=prompts)


@pytest.mark.parametrize(
    ("overrides", "prompts", "steps", "used"),
    [
        ((), 1000, 3 * 15, 1000),  # the last prompts of an epoch do not fill a batch of 64
        (("trainer.max_steps=20",), 1000, 20, 1000),
        (("trainer.max_steps=200",), 1000, 45, 1000),
        (("trainer.max_epochs=null", "trainer.max_steps=200"), 1000, 200, 1000),
        (("data.num_prompts=128",), 1000, 6, 128),
        (("data.num_prompts=128",), None, 6, 128),
        (("trainer.max_steps=20",), None, 20, None),
    ],
)
def test_steps_are_those_of_a_run(
    overrides: tuple[str, ...], prompts: int | None, steps: int, used: int | None, llama: RunConfig
) -> None:
    assert steps_of(llama, *overrides, prompts=prompts) == RunLength(steps, used, 0, 0)


def test_without_prompts_and_steps_a_run_has_no_length(llama: RunConfig) -> None:
    assert steps_of(llama) is None


@pytest.mark.parametrize(
    ("overrides", "prompts", "part"),
    [
        ((), 63, "batch_size is 64 prompts, but the data has only 63"),
        ((), 0, "--prompts 0"),
        (("data.num_prompts=2000",), 1000, "data.num_prompts=2000"),
    ],
)
def test_data_that_a_run_refuses_is_refused(
    overrides: tuple[str, ...], prompts: int, part: str, llama: RunConfig
) -> None:
    with pytest.raises(UserError, match=part):
        steps_of(llama, *overrides, prompts=prompts)


@pytest.mark.parametrize(("steps", "interval", "times"), [(10, 5, 3), (11, 5, 4), (4, 5, 2), (5, 5, 2)])
def test_validations_are_those_of_a_run(steps: int, interval: int, times: int) -> None:
    """Before the first step, at each interval, and at the end."""
    assert num_validations(steps, interval) == times


def test_hours_are_of_steps_the_reference_pass_and_validations(llama: RunConfig) -> None:
    setting = setting_of(llama)
    length = RunLength(steps=100, prompts=6400, validation_prompts=640, validations=3)
    time = run_time(length, setting, MACHINE)
    once = forward_seconds(setting, MACHINE, prompts=640)
    assert time.training == pytest.approx(100 * step_time(setting, MACHINE).total)
    assert time.reference == pytest.approx(11 * once) and time.validation == pytest.approx(3 * once)
    assert time.total == pytest.approx(time.training + 14 * once)
    assert time.gpu_hours(setting) == pytest.approx(8 * time.total / 3600)
    free = dataclasses.replace(setting, reference=False)
    assert run_time(length, free, MACHINE).reference == 0
    # Of KTO one response of another prompt is scored beside the two: half as much again.
    kto = dataclasses.replace(setting, kl_estimate=True)
    assert run_time(length, kto, MACHINE).reference == pytest.approx(11 * 1.5 * once)
    unknown = run_time(dataclasses.replace(length, prompts=None, validation_prompts=None), setting, MACHINE)
    assert unknown.reference is None and unknown.validation is None and unknown.total == unknown.training


def test_the_reference_pass_has_its_own_micro_batches(llama: RunConfig) -> None:
    """Fewer of them for as many prompts; in a pipeline they wait less for each other, or more where saved often."""
    deep = ["model.pipeline_model_parallel_size=2", "reference.micro_batch_size=4"]
    length = RunLength(steps=1, prompts=640, validation_prompts=0, validations=0)
    setting = setting_of(override(llama, deep))
    passing = dataclasses.replace(setting, micro_batch_size=4)
    expected = forward_seconds(passing, MACHINE, prompts=640, in_a_row=50)
    assert run_time(length, setting, MACHINE).reference == pytest.approx(expected)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """200 prompts, of which one has 4 responses, the others 3."""
    path = tmp_path / "train.jsonl"
    with path.open("w") as lines:
        for number in range(200):
            responses = [{"content": f"{at}", "reward": float(at)} for at in range(3 + (number == 7))]
            lines.write(json.dumps({"prompt": f"{number}?", "responses": responses}) + "\n")
    return path


def test_prompts_and_responses_of_a_file_are_counted(file: Path, llama: RunConfig) -> None:
    assert size_of(llama, str(file)) == size_of(llama, [str(file)]) == DataSize(prompts=200, responses=4)
    assert size_of(llama, str(file.parent / "*.jsonl")) == DataSize(prompts=200, responses=4)
    assert size_of(llama, str(file.with_name("absent.jsonl"))) is None
    assert size_of(llama, None) is None and size_of(llama, "hf:some/data") is None
    file.write_text('{"prompt": "a"')
    with pytest.raises(UserError, match="line 1"):
        size_of(llama, str(file))
    keys = override(llama, ["data.bad_rows=drop", "data.columns={prompt: asked}", "data.ignore_fields=[context]"])
    row = {"asked": "Hi?", "context": "none", "responses": [{"content": "a"}, {"content": "b"}]}
    file.write_text("{\n" + json.dumps(row) + "\n")
    assert size_of(keys, str(file)) == DataSize(prompts=1, responses=2)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, str, dict]]:
    """Exit code, stdout, stderr and record of ``nemo-rao plan``."""

    def plan(*arguments: str) -> tuple[int, str, str, dict]:
        out = tmp_path / "plan.json"
        code = main(["plan", "--config-name", "gpt_rao_llama3_8b", "--json", str(out), *arguments])
        return code, *capfd.readouterr(), json.loads(out.read_text()) if out.exists() else {}

    return plan


def test_the_table_and_the_record_have_the_whole_run(run: Callable, file: Path) -> None:
    code, table, message, record = run("--prompts", "60000", "data.num_responses=2", "trainer.max_epochs=3")
    assert (code, message) == (0, "")
    whole = record["whole_run"]
    assert (whole["steps"], whole["prompts"]) == (3 * 937, 60000)
    assert whole["seconds"] == pytest.approx(2811 * record["seconds"] + whole["seconds_of"]["reference"])
    assert whole["gpu_hours"] == pytest.approx(8 * whole["seconds"] / 3600)
    assert "2,811 of 64 prompts, on 60,000 prompts" in table and f"{whole['gpu_hours']:.1f} on 8 GPUs" in table
    _, table, _, record = run(f"data.train_path={file}", "trainer.max_epochs=3", "data.num_responses=null")
    assert (record["whole_run"]["steps"], record["whole_run"]["prompts"], record["setting"]["responses"]) == (9, 200, 4)
    _, table, _, record = run("trainer.max_steps=null", "trainer.max_epochs=3")
    assert record["whole_run"] is None and "--prompts N" in table
    _, table, _, record = run("trainer.max_steps=50", VALIDATED)
    assert record["whole_run"]["seconds_of"]["reference"] is None
    assert "without the reference pass" in table and "without validation" in table


def test_options_are_checked_before_files_are_read(run: Callable, file: Path) -> None:
    file.write_text("no JSON")
    code, _, message, _ = run(f"data.train_path={file}", "--mfu", "2")
    assert code == 2 and "--mfu 2" in message
    code, _, message, _ = run(f"data.train_path={file}")
    assert code == 2 and "line 1" in message and message.count("\n") == 1


def test_of_a_file_of_many_responses_pairs_take_two(run: Callable, file: Path) -> None:
    *_, record = run(f"data.train_path={file}", "data.num_responses=null", "model.objective=dpo")
    assert record["setting"]["responses"] == 2
