"""RAO through the real model: its invariances, and that it learns real data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from .runs import NO_CHECKPOINTS, TINY, in_fork, make_data, parallel, run_training, steps

REAL_DATA = Path(__file__).parents[3] / "shared" / "data" / "alpacaeval_k4_shared.jsonl.gz"
BETA, LOG_Z0, SHIFT = 0.1, 20.0, 7.0


def train(folder: Path, data: Sequence[str], start: Path, *extra: str) -> list[dict[str, float]]:
    overrides = [
        *TINY,
        *data,
        *NO_CHECKPOINTS,
        *parallel(2, 2, 1),
        f"model.restore_from_path={start}",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.name=run",
        f"model.rao.beta={BETA}",
        *extra,
    ]
    run_training("gpt_rao", overrides)
    return steps(folder / "run")


def test_at_the_reference_every_r_hat_is_beta_log_z0(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    """Single responses, one a step, and a learning rate too small to change a weight: every row has its own loss."""
    rows = [json.loads(line) for line in Path(data[0].partition("=")[2]).read_text().splitlines()]
    single = [{**row, "responses": row["responses"][:1]} for row in rows[:12]]
    path = tmp_path / "single.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in single))
    got = train(
        tmp_path,
        (f"data.train_path={path}", data[1]),
        start,
        f"model.rao.log_z0={LOG_Z0}",
        "model.global_batch_size=1",
        "model.micro_batch_size=1",
        "data.shuffle=false",
        "model.optim.lr=1e-30",
        "trainer.max_steps=12",
    )
    for row, step in zip(single, got, strict=True):
        reward = row["responses"][0]["reward"]
        assert step["loss"] == pytest.approx((reward - BETA * LOG_Z0) ** 2, rel=1e-5)
        assert step["rao/target_error"] == pytest.approx(abs(reward - BETA * LOG_Z0), rel=1e-5)
        assert step["rao/log_z"] == pytest.approx(LOG_Z0, abs=1e-4)


@pytest.mark.slow
def test_raising_log_z0_equals_lowering_every_reward(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    """loss(r, log_z0 + c) = loss(r - beta c, log_z0), and so the whole course of training."""
    rows = [json.loads(line) for line in Path(data[0].partition("=")[2]).read_text().splitlines()]
    for row in rows:
        for response in row["responses"]:
            response["reward"] -= BETA * SHIFT
    path = tmp_path / "lowered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raised = train(tmp_path / "raised", data, start, f"model.rao.log_z0={LOG_Z0 + SHIFT}", "trainer.max_steps=4")
    lowered = train(
        tmp_path / "lowered",
        (f"data.train_path={path}", data[1]),
        start,
        f"model.rao.log_z0={LOG_Z0}",
        "trainer.max_steps=4",
    )
    for one, other in zip(raised, lowered, strict=True):
        for name in ("loss", "grad_norm", "rao/target_error", "logps/chosen", "logps/rejected"):
            assert one[name] == pytest.approx(other[name], rel=2e-5), name
        assert one["rao/log_z"] == pytest.approx(other["rao/log_z"] + SHIFT, abs=1e-3)
    assert raised[0]["loss"] != pytest.approx(raised[-1]["loss"], rel=1e-2), "something was learned"


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the AlpacaEval answers are not there")
def test_forty_steps_on_real_answers_lower_the_target_error(tmp_path: Path) -> None:
    in_fork(_tokenizer_of_real_data, tmp_path / "tokenizer")
    overrides = [
        *TINY,
        *NO_CHECKPOINTS,
        *parallel(2, 2, 1),
        f"data.train_path={REAL_DATA}",
        f"data.tokenizer={tmp_path / 'tokenizer'}",
        "data.num_responses=4",
        "model.rao.log_z0=50",
        "model.seq_length=320",
        "model.global_batch_size=4",
        "model.micro_batch_size=2",
        "trainer.max_epochs=null",
        "trainer.max_steps=40",
        f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.name=run",
    ]
    run_training("gpt_rao", overrides)
    errors = [step["rao/target_error"] for step in steps(tmp_path / "run")]
    assert len(errors) == 40
    assert sum(errors[-5:]) < 0.6 * sum(errors[:5]), errors


def _tokenizer_of_real_data(folder: Path) -> None:
    from nemo_rao.demo.tokenizer_training import texts_of_rows, train_tokenizer
    from nemo_rao.rows.reading import read_rows

    train_tokenizer(texts_of_rows(read_rows(str(REAL_DATA))), folder, 2048)


def test_log_z0_auto_starts_at_a_mean_target_of_zero(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    """The mean of r - r_hat over the data is 0 at the reference: what is left is the rewards' own spread."""
    train_path, _ = make_data(tmp_path / "data", num_prompts=8)
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    by_prompt = [[response["reward"] for response in row["responses"]] for row in rows]
    mean = sum(sum(rewards) / len(rewards) for rewards in by_prompt) / len(by_prompt)
    spread = sum(sum((r - mean) ** 2 for r in rewards) / len(rewards) for rewards in by_prompt) / len(by_prompt)
    of_start = next(override for override in data if override.startswith("data.tokenizer"))
    got = train(tmp_path, (train_path, of_start), start, "model.global_batch_size=8", "trainer.max_steps=1")
    assert got[0]["loss"] == pytest.approx(spread, rel=1e-4)
    assert got[0]["rao/log_z"] == pytest.approx(mean / BETA, rel=1e-4)
