"""A rollout as a file, as data and as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_rao.batch import Row, Sample
from nemo_rao.data.collate import collate
from nemo_rao.data.store import PreferenceData
from nemo_rao.rollout.metrics import importance, metrics
from nemo_rao.rollout.samples import Rollout, RolloutData, load
from nemo_rao.rollout.text import SampleText

END = 9


class Sampled:
    """As :class:`nemo_rao.rollout.decode.Sampled`, which imports Megatron."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = np.array(tokens, dtype=np.int32)
        self.logps = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        self.is_cut = tokens[-1] != END


NOTHING = np.zeros((0, 0)), np.zeros(0)
PROMPTS = [
    Sample(np.array([1, *range(2, 2 + number)], np.int32), (), np.zeros(0), False, f"row {number}", *NOTHING)
    for number in (1, 2, 3)
]
RESPONSES = [[Sampled(4, END), Sampled(5, 6, 7)], [Sampled(END), Sampled(6, 5, 4, END)]]
SLOTS = [2, 0]  # the third prompt, then the first


@pytest.fixture
def rollout() -> Rollout:
    made = Rollout.of(SLOTS, RESPONSES)  # type: ignore[arg-type]
    return Rollout(
        **vars(made)
        | {
            "rewards": np.array([[1.0, 0.25], [np.nan, -2.0]]),
            "reference": np.arange(8, dtype=np.float32).reshape(4, 2),
            "old_logps": made.logps - 1,
            "rewards_so_far": np.array([3.0, 4.0]),
            "scores": {"judge": np.array([[1.0, 0.25], [np.nan, -2.0]]), "r/m": np.zeros((2, 2))},
        }
    )


def held(rollout: Rollout) -> RolloutData:
    made = RolloutData(PreferenceData(PROMPTS), num_slots=2, num_responses=2)
    made.rollout = rollout
    return made


def test_a_file_holds_all_of_it(rollout: Rollout, tmp_path: Path) -> None:
    assert load(tmp_path / "none.npz") is None
    rollout.save(tmp_path / "some" / "0.npz")
    found = load(tmp_path / "some" / "0.npz")
    assert found is not None
    for name, value in vars(rollout).items():
        if value is None:
            assert getattr(found, name) is None
        elif name == "scores":
            np.testing.assert_equal(found.scores, value)
        else:
            np.testing.assert_array_equal(getattr(found, name), value)
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["0.npz"]
    replace(rollout, scores={}).save(tmp_path / "earlier.npz")  # as releases wrote it that kept no scores
    found = load(tmp_path / "earlier.npz")
    assert found is not None and found.scores == {} and "rollout/reward" in metrics(found)


def test_micro_batches_are_those_of_the_same_samples_in_a_file(rollout: Rollout) -> None:
    """So that an objective computes the same of samples as of data, bit for bit."""
    data = held(rollout)
    assert rollout.rewards is not None
    data.advantages = {"advantages": np.arange(len(rollout.tokens), dtype=np.float32)}
    nothing = np.zeros((2, 0)), np.zeros(0)
    rows = [
        Sample(PROMPTS[prompt].prompt, tuple(one.tokens for one in of), rewards, False, f"row {prompt}", *nothing)
        for prompt, of, rewards in zip(SLOTS, RESPONSES, rollout.rewards, strict=True)
    ]
    stored = PreferenceData(rows)
    assert (len(data), data.num_responses) == (len(stored), stored.num_responses) == (2, 4)
    for packed in (False, True):
        common = {"pad_token_id": 0, "packed": packed, "reference": rollout.reference}
        made, same = (
            collate([one[i] for i in (1, 0)], [one.response_offset(i) for i in (1, 0)], **common)  # type: ignore[arg-type]
            for one in (data, stored)
        )
        for name, value in vars(same).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(made, name).nan_to_num(-7), value.nan_to_num(-7)), name
            elif name != "of_tokens":
                assert getattr(made, name) == value, name
    assert made.of_tokens.keys() == {"old", "advantages"}
    assert made.of_tokens["old"].tolist() == [[-2, 0, 0, 0], [-2, -3, -4, -5], [-2, -3, 0, 0], [-2, -3, -4, 0]]


def test_metrics_are_those_of_the_samples(rollout: Rollout) -> None:
    found = metrics(rollout)
    assert found["rollout/unscored"] == 0.25 and found["rollout/cut"] == 0.25
    assert found["rollout/length"] == 2.5 and found["rollout/entropy"] == (3 + 6 + 1 + 10) / 10 + 1
    assert found["rollout/reward"] == pytest.approx(-0.25) and found["rollout/reward_p50"] == 0.25
    assert found["rollout/kl"] == (-3 - 1 + -6 - 3 + -1 - 5 + -10 - 7 - 10) / 4  # by the pass over whole rows
    assert found["rollout/sampler_logps_mean_diff"] == found["rollout/sampler_logps_max_diff"] == 1
    assert found["rollout/scores/judge"] == pytest.approx(-0.25) and found["rollout/scores/r/m"] == 0


def test_importance_weights_are_ratios_up_to_their_cap(rollout: Rollout) -> None:
    assert rollout.old_logps is not None
    for difference, cap, expected in ((-1.0, 2.0, np.exp(-1)), (0.5, 2.0, np.exp(0.5)), (1.0, 2.0, 2.0)):
        sampled = replace(rollout, logps=rollout.old_logps - np.float32(difference))
        np.testing.assert_allclose(importance(sampled, cap), expected, rtol=1e-6)
        found = metrics(sampled, cap)
        assert found["rollout/importance"] == pytest.approx(expected, rel=1e-6)
        assert found["rollout/importance_capped"] == (expected == cap)
    assert "rollout/importance" not in metrics(rollout)


class Tokenizer:
    """One character a token; the end token is a special one."""

    eos_token_id = END
    chat_template = None
    name_or_path = "made here"
    split_special_tokens = False
    unk_token_id = None

    def __call__(self, text: object, **_: object) -> dict[str, list]:
        if isinstance(text, str):
            return {"input_ids": [ord(one) for one in text]}
        assert isinstance(text, list)
        return {"input_ids": [[ord(one) for one in part] for part in text]}

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join("<end>" if token == END else f"{token}." for token in tokens)


def test_text_is_without_its_end_and_marked_where_it_was_cut(rollout: Rollout) -> None:
    text = SampleText(Tokenizer(), [Row(f"prompt {number}", (), f"row {number}") for number in range(3)])
    assert text.end_tokens == [END]
    first, second = (text.row(held(rollout), slot) for slot in (0, 1))
    assert (first.prompt, second.prompt) == ("prompt 2", "prompt 0")
    assert [(one.content, one.truncated) for one in first.responses] == [("4.", False), ("5.6.7.", True)]
    assert [(one.content, one.truncated) for one in second.responses] == [("", False), ("6.5.4.", False)]
