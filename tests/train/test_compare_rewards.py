"""``nemo-rao compare-rewards``: its figures are those of the scores of each run; interrupted, it goes on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_rao.checkpoint.find import last_checkpoint
from nemo_rao.cli import main
from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.data.store import PreferenceData
from nemo_rao.demo.synthetic import write_preferences
from nemo_rao.errors import UserError
from nemo_rao.runtime.metrics_file import read_metrics

from .runs import TINY, in_fork, score, start_fork, steps

NUM_STEPS, NUM_HELD_OUT = 3, 12
RUNS = [f"{method}-{size}" for size in (16, "all") for method in ("rm_base", "rm_sft", "dpo_sft")]


@dataclass
class Compared:
    """A comparison that was interrupted in its second run, and started again until its end.

    Attributes:
        command: the whole command line.
        folder: its results.
        interrupted: rows of the table when it was interrupted, and the checkpoint that its second run had left.
        log: what it printed then, from the second start on.
    """

    command: list[str]
    folder: Path
    interrupted: tuple[list[dict], str]
    log: str


@pytest.fixture(scope="module")
def compared(data: tuple[str, ...], start: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder = tmp_path_factory.mktemp("compared")
    write_preferences(folder / "held_out.jsonl", NUM_HELD_OUT, 4, seed=8, split="held_out")
    out = folder / "out"
    command = ["compare-rewards", "--base", "random", "--sft", str(start), "--pairs", "16", "--pairs", "all"]
    command += ["--out", str(out), *TINY, *data, f"data.validation_path={folder}/held_out.jsonl"]
    command += ["exp_manager.draw_curves=true", "trainer.max_epochs=null", f"trainer.max_steps={NUM_STEPS}"]
    checkpoints = "exp_manager.checkpoint_callback_params"  # one a step, each of which takes a while
    command += [f"{checkpoints}.every_n_train_steps=1", f"{checkpoints}.save_last=false"]
    command += ["--rm", "model.rm.center=0.1", "--dpo", "model.dpo.beta=0.5"]

    process, failure = start_fork(compare, command, 130, folder / "first.log")
    deadline = time.monotonic() + 120
    while last_checkpoint(out / RUNS[1]) is None and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 0, failure.recv() if failure.poll() else process.exitcode
    left = last_checkpoint(out / RUNS[1])
    assert left is not None
    interrupted = (table(out), left.name)
    in_fork(compare, command, 0, folder / "second.log")
    return Compared(command, out, interrupted, (folder / "second.log").read_text())


def compare(command: Sequence[str], code: int, log: Path) -> None:
    """The command, in a process of its own that prints to ``log``."""
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        found = main(command)
    assert found == code, log.read_text()


def table(folder: Path) -> list[dict]:
    return json.loads((folder / "comparison.json").read_text())["rows"]


def contents(folder: Path) -> dict[str, int]:
    """Files with the time of their last change; without tokenized data, which is kept whatever is refused."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tokenised" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_an_interrupted_comparison_goes_on_where_it_was(compared: Compared) -> None:
    rows, checkpoint = compared.interrupted
    assert [row["run"] for row in rows] == RUNS[:1]
    assert not checkpoint.startswith(f"step={NUM_STEPS}"), "it was interrupted too late to show anything"
    assert f"[1/6] {RUNS[0]}: finished before" in compared.log and compared.log.count("finished before") == 1
    after = compared.log.partition(f"[2/6] {RUNS[1]}\n")[2].partition("[3/6]")[0]
    assert f"continuing from {compared.folder / RUNS[1] / 'checkpoints' / 'step='}" in after
    for run in RUNS:
        assert [step["step"] for step in steps(compared.folder / run)] == list(range(1, NUM_STEPS + 1)), run


@pytest.mark.parametrize("run", ["rm_sft-all", "dpo_sft-16"])
def test_the_figures_are_those_of_the_scores_that_the_run_gives_the_held_out_file(
    run: str, compared: Compared, tmp_path: Path
) -> None:
    held_out = compared.folder.parent / "held_out.jsonl"
    score(str(held_out), str(tmp_path / "scored.jsonl"), "--scorer", f"r_1=model:{compared.folder / run}")
    margins = []
    for old, new in zip(held_out.open(), (tmp_path / "scored.jsonl").open(), strict=True):
        given = [answer["reward"] for answer in json.loads(old)["responses"]]
        found = [answer["r_1"] for answer in json.loads(new)["responses"]]
        margins.append(found[given.index(max(given))] - found[given.index(min(given))])
    assert len(margins) == NUM_HELD_OUT and all(margins)
    right = [1 / (1 + math.exp(-margin)) for margin in margins]
    [row] = [row for row in table(compared.folder) if row["run"] == run]
    assert row["loss"] == pytest.approx(-sum(map(math.log, right)) / len(right), rel=1e-5)
    assert row["brier"] == pytest.approx(sum((1 - p) ** 2 for p in right) / len(right), rel=1e-5)
    assert row["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))


def test_every_row_is_measured_on_the_same_pairs_by_the_same_loss(compared: Compared) -> None:
    rows = table(compared.folder)
    assert [row["run"] for row in rows] == RUNS
    assert [row["pairs"] for row in rows] == [16] * 3 + [64] * 3
    assert [row["start"] for row in rows] == ["random", "sft", "sft"] * 2
    assert [row["reward"] for row in rows][1:3] == ["Bradley-Terry reward model", "implicit reward of DPO, β = 0.5"]
    assert {(row["state"], row["steps"], row["held_out_pairs"]) for row in rows} == {
        ("finished", NUM_STEPS, NUM_HELD_OUT)
    }
    assert len({row["loss"] for row in rows}) == len(rows), "six models, six losses"
    for row in rows:
        last = [line for line in read_metrics(Path(row["folder"]) / "metrics.jsonl") if "val/loss" in line][-1]
        if "dpo" in row["run"]:
            assert row["loss"] == pytest.approx(last["val/loss"], rel=1e-6)
        else:
            assert row["loss"] < last["val/loss"] - 1e-6, "without the reward model's centering"
            assert row["brier"] == pytest.approx(last["val/rm/brier"], rel=1e-6)
    printed, markdown = compared.log, (compared.folder / "comparison.md").read_text().splitlines()
    assert len(markdown) == 2 + len(rows)
    for row, line in zip(rows, markdown[2:], strict=True):
        assert (
            f"| {row['pairs']} | {NUM_STEPS} | {row['loss']:.4f} | {row['accuracy']:.4f} | {row['brier']:.4f} |" in line
        )
        assert f"{row['loss']:.4f}" in printed
    assert f"rewards on {NUM_HELD_OUT} held-out pairs" in printed


def test_the_same_command_again_trains_nothing_and_gives_the_same_table(compared: Compared, tmp_path: Path) -> None:
    before, rows = contents(compared.folder), table(compared.folder)
    in_fork(compare, compared.command, 0, tmp_path / "log")
    assert (tmp_path / "log").read_text().count("finished before") == len(RUNS)
    after = contents(compared.folder)
    changed = {Path(path).name for path in before | after if before.get(path) != after.get(path)}
    assert changed == {"comparison.json", "comparison.md"}
    assert table(compared.folder) == rows


@pytest.mark.parametrize(
    ("more", "other_held_out", "parts"),
    [
        (("--rm", "model.rm.center=0.2"), False, ("rm_base-16: ", "model.rm.center from 0.1 to 0.2", "another --out")),
        (("--pairs", "8"), True, ("rm_base-16: ", "data.validation_path from 12 prompts", "another --out")),
    ],
    ids=["other settings", "other pairs"],
)
def test_rows_that_cannot_stand_in_one_table_are_refused(
    more: tuple[str, ...], other_held_out: bool, parts: Sequence[str], compared: Compared, tmp_path: Path
) -> None:
    held_out = compared.folder.parent / "held_out.jsonl"
    before, text = contents(compared.folder), held_out.read_text()
    if other_held_out:
        held_out.write_text("".join(text.splitlines(keepends=True)[1:]))
    try:
        in_fork(compare, [*compared.command, *more], 2, tmp_path / "log")
    finally:
        held_out.write_text(text)
    message = (tmp_path / "log").read_text().splitlines()[-1]
    assert message.startswith("error: ") and all(part in message for part in parts), message
    assert contents(compared.folder) == before


# ------------------------------------------------------------------------------------------------- the smaller part


def test_the_prompts_drawn_are_a_part_of_a_larger_draw_in_their_order(data: tuple[str, ...]) -> None:
    from nemo_rao.training.loading import draw_prompts

    train, tokenizer = (text.partition("=")[2] for text in data)
    whole = load_preferences(train, load_tokenizer(tokenizer), seq_length=64)

    def locations(drawn: PreferenceData) -> list[str]:
        return [drawn[index].location for index in range(len(drawn))]

    order = locations(whole)
    few, many = locations(draw_prompts(whole, 8, seed=1)), locations(draw_prompts(whole, 24, seed=1))
    assert (len(few), len(many)) == (8, 24) and set(few) < set(many)
    assert many == [location for location in order if location in many] and many != order[:24]
    assert locations(draw_prompts(whole, 24, seed=2)) != many
    assert draw_prompts(whole, len(whole), seed=1).fingerprint() == whole.fingerprint()
    with pytest.raises(UserError, match=f"data.num_prompts=65: the training data has only {len(order)}"):
        draw_prompts(whole, 65, seed=1)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (("--pairs", "0"), ("--pairs 0", "positive number of pairs, or all")),
        (("--pairs", "many"), ("--pairs many", "positive number of pairs, or all")),
        (("--pairs", "8", "--pairs", "08"), ("--pairs", "given twice")),
        (("--pairs", "100"), ("rm_base-100: data.num_prompts=100", "only 64")),
        (("--pairs", "6"), ("rm_base-6: global_batch_size is 8", "only 6")),
        (("--base", "nowhere"), ("--base: ", "nowhere", "neither a checkpoint")),
        (("--sft", "."), ("--sft: ", "neither a checkpoint")),
        (("data.validation_path=null",), ("data.validation_path: is not set", "held-out")),
        (("data.validation_path=gone.jsonl",), ("rm_base-8: data.validation_path", "gone.jsonl", "no such file")),
        (("data.responses=all",), ("data.responses=all", "best_worst")),
        (("exp_manager.exp_dir=runs",), ("exp_manager.exp_dir=runs", "give --out")),
        (("--dpo", "model.restore_from_path=x"), ("model.restore_from_path=x", "give --base and --sft")),
        (("--dpo", "model.seq_length=32"), ("model.seq_length: is 64 for rm, but 32 for dpo", "same pairs")),
        (("--rm", "data.pairs_by=reward"), ("data.pairs_by: is reward for rm, but auto for dpo", "same pairs")),
        (("--dpo", "model.rm.center=0"), ("--dpo: model.rm.center=0", "does not read model.rm.center")),
        (("--rm", "model.rm.centre=0"), ("--rm: unknown key model.rm.centre", "did you mean model.rm.center")),
        (("--dpo", "model.dpo.beta=0.1,0.5"), ("model.dpo.beta=0.1,0.5", "a single value")),
        (("model.micro_batch_size=3",), ("rm_base-8: model.global_batch_size=8",)),
    ],
    ids=lambda value: "-".join(value) if value and value[0].startswith(("-", "data", "model", "exp")) else "",
)
def test_what_cannot_be_compared_is_refused_in_one_line_with_nothing_written(
    given: tuple[str, ...],
    parts: Sequence[str],
    data: tuple[str, ...],
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["compare-rewards", "--base", "random", "--sft", str(start)]
    command += [] if "--pairs" in given else ["--pairs", "8"]
    held_out = f"data.validation_path={data[0].partition('=')[2]}"
    assert main([*command, *TINY, *data, held_out, *given]) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert all(part in message for part in parts), message
    assert contents(tmp_path) == {}
