"""Which checkpoints are there after a run, after a kill, and after the run is started again."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from .runs import TINY, run_training, same, stored


def overrides(folder: Path, data: Sequence[str], start: Path, *extra: str, **keep: object) -> list[str]:
    return [
        *(*TINY, *data, f"model.restore_from_path={start}", f"exp_manager.exp_dir={folder}", "exp_manager.name=run"),
        *(f"exp_manager.checkpoint_callback_params.{name}={value}" for name, value in keep.items()),
        *extra,
    ]


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "run" / "checkpoints").iterdir()}


def test_a_checkpoint_is_ranked_by_a_validation_of_its_own_step(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(data[0].partition("=")[2]).read_text().splitlines(keepends=True)[:6]))
    keep = {"monitor": "val/loss", "mode": "max", "save_top_k": 1, "save_last": "false", "every_n_train_steps": 2}
    extra = (f"data.validation_path={few}", "trainer.val_check_interval=3", "trainer.max_steps=7")
    run_training("gpt_rao", overrides(tmp_path, data, start, *extra, **keep))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["val/loss"] for record in records if "val/loss" in record}
    assert list(losses) == [0, 2, 3, 4, 6, 7]
    worst = max((2, 4, 6), key=lambda step: losses[step])
    assert kept(tmp_path) == {f"step={worst}"}


def test_what_a_kill_has_left_behind_is_removed_at_the_next_start_and_nothing_else(
    data: tuple[str, ...], start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tmp_path, data, start, save_top_k=1, every_n_train_steps=3)
    run_training("gpt_sft", [*given, "trainer.max_steps=6"])
    folder = tmp_path / "run" / "checkpoints"
    assert kept(tmp_path) == {"step=6", "step=6-last"}
    # As if it had been killed before step 3 was removed, and once more while it wrote step 9.
    shutil.copytree(folder / "step=6", folder / "step=3")
    (folder / "step=3-last").symlink_to("step=3")
    (folder / "step=9" / "weights").mkdir(parents=True)
    (folder / "step=9-unfinished").touch()
    (folder / "step=12-unfinished").touch()
    # Not this run's: it has never written them.
    shutil.copytree(folder / "step=6", folder / "step=2")
    (folder / "mine").mkdir()
    run_training("gpt_sft", [*given, "trainer.max_steps=7"])
    assert kept(tmp_path) == {"mine", "step=2", "step=6", "step=7-last"}
    [said] = [line for line in capfd.readouterr().out.splitlines() if line.startswith("removed")]
    assert said == "removed checkpoints left by an earlier start: step=9, step=3, step=3-last"


def test_checkpoints_kept_under_another_save_top_k_stay(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    given = overrides(tmp_path, data, start, every_n_train_steps=1, save_last="false")
    run_training("gpt_sft", [*given, "exp_manager.checkpoint_callback_params.save_top_k=-1", "trainer.max_steps=2"])
    run_training("gpt_sft", [*given, "trainer.max_steps=4"])
    run_training("gpt_sft", [*given, "trainer.max_steps=5"])
    assert kept(tmp_path) == {"step=1", "step=2", "step=5"}


def test_a_metric_that_the_data_does_not_give_stops_the_run_at_the_first_checkpoint(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(data[0].partition("=")[2]).read_text().splitlines()[:8]]
    path = tmp_path / "pairs.jsonl"  # labels without rewards
    pairs = [
        {"prompt": row["prompt"], "chosen": row["responses"][0]["content"], "rejected": row["responses"][1]["content"]}
        for row in rows
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    keep = {"monitor": "data/reward_chosen", "every_n_train_steps": 1}
    given = overrides(tmp_path, (f"data.train_path={path}", data[1]), start, "model.objective=dpo", **keep)
    with pytest.raises(AssertionError, match=r"monitor=data/reward_chosen: this run does not log such a metric"):
        run_training("gpt_rao", given)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_written_in_the_background_are_those_written_at_once(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    """The same directories, with the same tensors, on two ranks; and a profile of two steps is written beside them."""
    found = {}
    for in_background in ("false", "true"):
        folder = tmp_path / in_background
        extra = ("trainer.devices=2", "trainer.profile_steps=[2,3]")
        keep = {"save_top_k": 1, "every_n_train_steps": 2, "async_save": in_background}
        run_training("gpt_rao", overrides(folder, data, start, *extra, "trainer.max_steps=4", **keep))
        # Continued, from what was written in the background.
        run_training("gpt_rao", overrides(folder, data, start, *extra, "trainer.max_steps=5", **keep))
        found[in_background] = (
            kept(folder),
            {name: stored(folder / "run" / "checkpoints" / name) for name in kept(folder)},
        )
        (trace,) = (folder / "run" / "profile").iterdir()
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert trace.name == "trace_steps_2_to_3.json.gz"
        assert {"aten::mm", "step 2", "step 3"} <= {event.get("name") for event in events}
    (names, tensors), (in_background_names, in_background_tensors) = found.values()
    assert names == in_background_names == {"step=4", "step=5-last"}
    assert all(same(tensors[name], in_background_tensors[name]) for name in names)


def test_links_to_a_checkpoint_that_was_being_removed_go_with_it(tmp_path: Path) -> None:
    from nemo_rao.checkpoint.find import remove_unfinished

    for name in ("step=3", "step=6", "other"):
        (tmp_path / name / "weights").mkdir(parents=True)
    (tmp_path / "step=3-last").symlink_to("step=3")
    (tmp_path / "step=6-last").symlink_to("step=6")
    (tmp_path / "step=3-unfinished").touch()
    (tmp_path / "other-unfinished").touch()
    assert remove_unfinished(tmp_path) == ["step=3", "step=3-last"]
    assert {path.name for path in tmp_path.iterdir()} == {"step=6", "step=6-last", "other", "other-unfinished"}
    assert remove_unfinished(tmp_path / "none") == []
