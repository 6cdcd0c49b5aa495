"""A loss that is not finite ends the run in one line that leads to the step's rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_rao.batch import Sample
from nemo_rao.loop.finite import not_finite
from nemo_rao.runtime.metrics_file import read_metrics

from .runs import TINY, parallel, run_training


def row(location: str, *rewards: float) -> Sample:
    token = np.zeros(1, np.int32)
    return Sample(token, (token,) * len(rewards), np.array(rewards), False, location, np.zeros((0, 0)), np.zeros(0))


def test_the_rows_with_the_largest_rewards_come_first() -> None:
    rows = [row("a line 1", 1.0, -3.0), row("a line 2", np.nan), row("b line 9", 5e11, 0.0), row("a line 4", 2.0)]
    said = not_finite("grad_norm", float("inf"), 7, [*rows, row("a line 5", 0.5)])
    assert said.startswith(
        "gradient norm of step 7 is inf. Rows of the step, largest rewards first: b line 9 (|reward| up to 5e+11), "
        "a line 1 (|reward| up to 3), a line 4 (|reward| up to 2), a line 5 (|reward| up to 0.5) and 1 more. "
    )
    assert "a line 2." in not_finite("loss", float("nan"), 1, rows[1:2])


def test_the_run_ends_with_step_and_rows_in_place_of_megatrons_traceback(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    """Weights that a huge learning rate has broken give the second step a loss that is no number, on every rank."""
    train_path = data[0].partition("=")[2]
    rewards = [
        max(abs(response["reward"]) for response in json.loads(line)["responses"])
        for line in Path(train_path).read_text().splitlines()
    ]
    with pytest.raises(AssertionError) as failed:
        run_training(
            "gpt_rao",
            [
                *TINY,
                *data,
                *parallel(1, 2, 1),
                f"model.restore_from_path={start}",
                f"exp_manager.exp_dir={tmp_path}",
                "exp_manager.name=run",
                "model.optim.lr=1e30",
                "trainer.max_steps=5",
                "data.shuffle=false",
            ],
        )
    last = str(failed.value).splitlines()[-1]
    assert last.startswith("nemo_rao.errors.RankFailure: loss of step 2 is nan. Rows of the step")
    # Step 2 has lines 9 to 16 of the file, in its order.
    first = max(range(9, 17), key=lambda number: rewards[number - 1])
    assert f"largest rewards first: {train_path} line {first} (|reward| up to {rewards[first - 1]:.6g})" in last
    assert "and 4 more" in last and "model.optim.lr" in last
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
