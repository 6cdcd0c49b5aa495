"""Loading around real runs: rows are tokenized once, and micro-batches are made ahead without changing a step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from .runs import NO_CHECKPOINTS, TINY, _train, in_fork, run_training, steps


def overrides(folder: Path, data: Sequence[str], name: str, *extra: str) -> list[str]:
    return [
        *TINY,
        *NO_CHECKPOINTS,
        *data,
        data[0].replace("train_path", "validation_path"),
        f"exp_manager.exp_dir={folder}",
        f"exp_manager.name={name}",
        "trainer.max_steps=2",
        "data.num_prompts=40",
        "model.global_batch_size=8",
        "model.micro_batch_size=2",
        *extra,
    ]


def reported(captured: str) -> list[str]:
    return [line for line in captured.splitlines() if " data: " in line]


def test_a_run_started_again_tokenizes_nothing_and_takes_the_same_steps_bit_for_bit(
    data: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_training("gpt_rao", overrides(tmp_path, data, "without", "data.cache=false"))
    lines = reported(capfd.readouterr().out)
    assert not (tmp_path / "tokenised").exists()
    first = f"{data[0].partition('=')[2]} line 1"
    assert lines == [
        "training data: 64 of 64 rows kept",
        "validation data: 64 of 64 rows kept",
        f"validation data: 64 of 64 prompts are also prompts of the training data (first: {first}, as in {first})",
        "training data: 40 of 64 prompts drawn (data.num_prompts)",
    ]
    cached = [lines[0], f"{lines[1]} (read from cache)", *lines[2:]]
    run_training("gpt_rao", overrides(tmp_path, data, "first"))
    # The same rows, loaded in the same way: validation finds what was just written.
    assert reported(capfd.readouterr().out) == cached
    in_fork(train_without_tokenizer, overrides(tmp_path, data, "again"))
    assert reported(capfd.readouterr().out) == [f"{lines[0]} (read from cache)", *cached[1:]]
    expected = steps(tmp_path / "without")
    assert len(expected) == 2
    assert steps(tmp_path / "first") == steps(tmp_path / "again") == expected
    records = [(tmp_path / name / "data.json").read_text() for name in ("without", "first", "again")]
    assert len(set(records)) == 1
    assert len(list((tmp_path / "tokenised").iterdir())) == 1
    assert len(list((tmp_path / "reference").iterdir())) == 2, "reference log-probs are found by the same fingerprints"


def train_without_tokenizer(given: Sequence[str]) -> None:
    from nemo_rao.data.encode import Encoder

    def fail(*_: Any) -> None:
        raise AssertionError("tokenizes")

    mock.patch.object(Encoder, "encode_many", fail).start()
    _train("gpt_rao", given)


def test_micro_batches_are_made_ahead_in_the_order_of_the_steps_and_the_thread_ends_with_the_run(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    """And the names of the steps' statistics are gathered once, beside those of the validation at start and end."""
    in_fork(train_and_watch, overrides(tmp_path, data, "run"))


def train_and_watch(given: Sequence[str]) -> None:
    from nemo_rao.loop.data import AlignmentData
    from nemo_rao.loop.session import Hook, Session
    from nemo_rao.mcore import loss

    made: list[tuple[str, list[int]]] = []
    used: list[list[int]] = []
    expected: list[list[int]] = []
    gathered: list[list[str]] = []
    make, gather = AlignmentData.micro_batch, loss._gathered_names

    def micro_batch(self: AlignmentData, prompts: Sequence[int]) -> Any:
        made.append((threading.current_thread().name, list(prompts)))
        return make(self, prompts)

    def gathered_names(outputs: Any) -> Sequence[str]:
        gathered.append(list(gather(outputs)))
        return gathered[-1]

    class Watch(Hook):
        def start(self, session: Session) -> None:
            ids = session.data.train.responses_of_prompts()
            for number in range(2):
                for prompts in session.data.micro_batches_of_step(number):
                    expected.append([response for prompt in prompts for response in ids[prompt]])

        def micro_batch(self, session: Session, batch: Any, *, embeds_tokens: bool) -> None:
            used.append(batch.response_ids.tolist())
            assert [thread.name for thread in threading.enumerate()].count("prefetch") == 1

    loss._gathered_names = gathered_names
    mock.patch.object(AlignmentData, "micro_batch", micro_batch).start()
    _train("gpt_rao", given, hooks=lambda hooks: [*hooks, Watch()])
    assert len(expected) == 8 and used == expected
    assert {thread for thread, _ in made} == {"prefetch"}
    assert len(gathered) == 3 and gathered[0] == gathered[1] == gathered[2] != []
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_an_error_while_a_micro_batch_is_made_ends_the_run_with_its_traceback(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"(?s)a_mistake_of_ours.*ZeroDivisionError.*no thread is left"):
        in_fork(train_and_fail, overrides(tmp_path, data, "run"))


def train_and_fail(given: Sequence[str]) -> None:
    from nemo_rao.loop.data import TrainingData

    def a_mistake_of_ours(self: TrainingData, step: int) -> Any:
        return rows(self, step) if step < 1 else 1 / 0

    rows = TrainingData.micro_batches_of_step
    mock.patch.object(TrainingData, "micro_batches_of_step", a_mistake_of_ours).start()
    try:
        _train("gpt_rao", given)
    except ZeroDivisionError as error:
        assert "prefetch" not in [thread.name for thread in threading.enumerate()]
        raise AssertionError("no thread is left") from error
