"""``nemo-rao study`` from end to end: data made, trained, sampled and judged; killed in the middle and run again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nemo_rao.cli import main
from nemo_rao.runtime.source_version import source_version

from .runs import TINY, in_fork, start_fork

STUDY = """
title: A small study
seeds: [1, 2]
baseline: dpo
files:
  puzzles: {{function: "nemo_rao.demo.run:make_data", arguments: {{num_prompts: 200, num_held_out: 8}}}}
common:
  data.train_path: "{{puzzles}}/train.jsonl"
  data.validation_path: "{{puzzles}}/held_out.jsonl"
  data.tokenizer: "{{puzzles}}/tokenizer"
  trainer.max_steps: 4
  trainer.max_epochs: null
  exp_manager.checkpoint_callback_params.every_n_train_steps: 2
{tiny}
arms:
  sft: {{recipe: gpt_sft, once: true}}
  dpo: {{recipe: gpt_dpo, start: sft, label: DPO}}
  rao: {{recipe: gpt_rao, start: sft, label: "<RAO>"}}
  too_large: {{recipe: gpt_rao, start: sft, set: {{model.global_batch_size: 512}}}}
samples:
  prompts: "{{puzzles}}/held_out.jsonl"
  scorer: rule:nemo_rao.demo.synthetic:ground_truth_reward
  against: [baseline, start]
  num_responses: 2
  max_new_tokens: 8
  log_ratio: true
"""
RUNS = ("sft", "dpo-seed1", "rao-seed1", "dpo-seed2", "rao-seed2")


def study(command: list[str], code: int) -> None:
    assert main(command) == code


def killed_study(command: list[str], run: str, last: int) -> None:
    """The same, but killed with the process of that run in the step after ``last``."""
    from nemo_rao.loop.metrics import Metrics

    counted, of_study = Metrics.micro_batch, os.getpid()

    def killing(self: Metrics, session: Any, batch: Any, *, embeds_tokens: bool) -> None:
        if session.folder.name == run and session.step == last:
            os.kill(of_study, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        counted(self, session, batch, embeds_tokens=embeds_tokens)

    mock.patch.object(Metrics, "micro_batch", killing).start()
    main(command)


def contents(folder: Path) -> dict[str, Any]:
    return {name: (folder / name).read_text() for name in ("report.md", "report.html", "results.json")}


def changed_at(folder: Path) -> dict[str, int]:
    """Files of finished work with the time of their last change."""
    paths = [path for run in RUNS for path in (folder / run).rglob("*")]
    paths += [*(folder / "samples").iterdir(), *(folder / "data").rglob("*")]
    return {str(path): path.stat().st_mtime_ns for path in paths if path.is_file()}


def test_a_study_that_is_killed_and_run_again_trains_nothing_twice_and_reports_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = "\n".join(f"  {key.replace('=', ': ', 1)}" for key in TINY)
    (tmp_path / "small.yaml").write_text(STUDY.format(tiny=tiny))
    out = tmp_path / "out"
    command = ["study", str(tmp_path / "small.yaml"), "--out", str(out)]

    process, _ = start_fork(killed_study, command, "dpo-seed2", 3)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((out / "dpo-seed2/checkpoints").glob("step=2*")) and not (out / "report.md").exists()
    before = {run: (out / run / "run.json").stat().st_mtime_ns for run in RUNS[:3]}

    in_fork(study, command, 1)
    assert {run: (out / run / "run.json").stat().st_mtime_ns for run in before} == before
    # Of training and held-out data, each as pairs (DPO) and with all responses (RAO), whatever the seed.
    assert len(list((out / "reference").iterdir())) == 4
    said = capfd.readouterr()
    assert said.out.count("finished before") == 3
    assert "too_large-seed1 failed: " in said.out and "Traceback" not in said.err
    report, finished = contents(out), changed_at(out)

    in_fork(study, command, 1)
    assert contents(out) == report and changed_at(out) == finished

    shutil.rmtree(out / "dpo-seed2")  # the run that was killed, once more without
    in_fork(study, command, 1)
    assert contents(out) == report

    found = json.loads(report["results.json"])
    assert {run["name"]: run["state"] for run in found["runs"]} == {
        **dict.fromkeys(RUNS, "finished"),
        **dict.fromkeys(("too_large-seed1", "too_large-seed2"), "failed"),
    }
    last = [json.loads(line) for line in (out / "rao-seed2/metrics.jsonl").read_text().splitlines()][-1]
    of_run = next(run for run in found["runs"] if run["name"] == "rao-seed2")
    assert of_run["measures"]["held-out accuracy"] == last["val/rewards/accuracies"]
    assert abs(of_run["measures"]["log-ratio of samples (KL), nats"]) > 1e-6
    for against in ("dpo", "start"):
        wins = found["wins"][against]["rao"]
        assert [one["seed"] for one in wins["seeds"]] == [1, 2]
        assert wins["win"] + wins["tie"] + wins["loss"] == pytest.approx(1)
    assert found["wins"]["start"]["too_large"] == {"seeds": []}
    page = report["report.html"]
    assert page.count("<svg") >= 3 and "&lt;RAO&gt;" in page and "<RAO>" not in page
    assert "src=" not in page and "<script" not in page, "nothing is loaded from elsewhere"

    study(["report", str(out / "rao-seed1")], 0)
    of_run = (out / "rao-seed1/report.md").read_text()
    assert f"by {source_version()}." in of_run and found["trained_by"] == [source_version()]
    assert "finished after 4 steps of 4 planned" in of_run and "| val/rao/target_error |" in of_run
