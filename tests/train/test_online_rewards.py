"""Rewards of samples: scores by name, missing scores, and scorers that fail. Without an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_rao.batch import Response, Row
from nemo_rao.config.online_config import OnlineConfig
from nemo_rao.config.run_config import DataConfig, RunConfig
from nemo_rao.errors import RankFailure, UserError
from nemo_rao.training import online_rewards as online
from nemo_rao.training.loading import load_data
from nemo_rao.training.online_rewards import TextScorersOfRun, check_rules, scorers_of

RULES = """
def length(prompt, response):
    return len(response)

def first(prompt, response):
    return 1.0 if response.startswith(prompt[0]) else 0.0

CALLS = []

def fails_twice(prompt, response):
    CALLS.append(response)
    if len(CALLS) <= 2:
        raise OSError("not yet")
    return 2.0

def matches(prompt, response, answer, tolerance=0):
    return float(len(response) - answer <= tolerance)

def wants(prompt, response, *, source):
    return 0.0

def takes_all(prompt, response, **others):
    return float(len(others))

def is_text(prompt, response):
    return "good"
"""
ROWS = [
    Row("ab", (Response("a"), Response("bcd")), "line 1"),
    Row("ba", (Response("bb"), Response("")), "line 2", template_fields={"tools": [1]}),
]


@pytest.fixture(autouse=True)
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules_of_this_test.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(online, "_PAUSE_SECONDS", 0.0)


def scorers(*rules: str, attempts: int = 3) -> TextScorersOfRun:
    specs = [f"rule:rules_of_this_test:{rule}" for rule in rules]
    return TextScorersOfRun(specs, attempts=attempts, folder=Path())


def scores(rows: Sequence[Row], *rules: str) -> dict[str, list[list[float]]]:
    return {name: found.tolist() for name, found in scorers(*rules)(rows).items()}


def online_run(specs: Sequence[str], weights: Mapping[str, float] | None = None) -> RunConfig:
    keys = OnlineConfig(num_generations=2, reward=list(specs), reward_weights=dict(weights or {}))
    return RunConfig(online=keys)


def test_each_scorer_gives_its_scores_under_its_name() -> None:
    assert scores(ROWS, "length", "first") == {"length": [[1, 3], [2, 0]], "first": [[1, 0], [1, 0]]}


def test_what_a_scorer_counts_is_reported_once_for_the_run() -> None:
    made = scorers("length")
    made(ROWS)
    made(ROWS)
    assert made.notes() == ["length: 4 responses with tools, which is not passed to a rule"]
    made.close()


def test_a_rule_is_given_the_fields_that_it_asks_for_and_they_are_not_counted_as_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_rao.demo.tokenizer_training import train_tokenizer

    rows = ['{"prompt": "ab", "answer": 1, "source": "s"}', '{"prompt": "ba", "answer": 3, "tolerance": 9}']
    rows.append('{"prompt": "b", "chosen": "x", "rejected": "y", "answer": 2}')
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    train_tokenizer(["ab"] * 9, tmp_path / "tokenizer", 300)
    data = DataConfig(train_path=str(tmp_path / "prompts.jsonl"), tokenizer=str(tmp_path / "tokenizer"))
    for rule, expected, unused in (
        ("matches", [[1, 0], [1, 1], [1, 0]], {"source": 1}),
        ("takes_all", [[2, 2], [2, 2], [1, 1]], {}),
        ("length", [[1, 3], [1, 3], [1, 3]], {"answer": 3, "source": 1, "tolerance": 1}),
    ):
        config = replace(online_run([f"rule:rules_of_this_test:{rule}"]), data=data)
        loaded = load_data(config)
        check_rules(config, loaded.prompts)
        sampled = [replace(row, responses=(Response("a"), Response("bcd"))) for row in loaded.prompts]
        assert scores(sampled, rule) == {rule: expected}
        assert loaded.train.report.unused == unused
    lacking = r"line 2: rule rules_of_this_test:wants requires the field 'source'.*found: answer, tolerance\)"
    with pytest.raises(UserError, match=lacking):
        check_rules(replace(online_run(["rule:rules_of_this_test:wants"]), data=data), loaded.prompts)


def test_a_score_that_is_missing_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_rao.scoring.scorer import Kind, NoScore, Pair, PairScorer

    class Judge(PairScorer):
        identity: Mapping[str, Any] = {}

        def score_pairs(self, pairs: Sequence[Pair]) -> Sequence[float | NoScore]:
            return [NoScore("empty") if not pair.response else 1.0 for pair in pairs]

    monkeypatch.setattr(online, "TEXT", {**online.TEXT, "judge": Kind(lambda *_: Judge(), lambda _: "j", "FILE")})
    found = TextScorersOfRun(["judge:x"], attempts=1, folder=Path())(ROWS)["j"]
    np.testing.assert_array_equal(found, [[1, 1], [1, np.nan]])


def test_a_scorer_that_fails_is_asked_again_and_then_ends_the_run() -> None:
    assert scores(ROWS[:1], "fails_twice") == {"fails_twice": [[2, 2]]}
    with pytest.raises(RankFailure, match=r"online.reward: is_text failed 2 times: line 1, .* returned"):
        scorers("is_text", attempts=2)(ROWS)


@pytest.mark.parametrize(
    ("specs", "weights", "said"),
    [
        ([], {}, "online.reward: is empty"),
        (["rule:rules_of_this_test:none"], {}, "online.reward=rule:rules_of_this_test:none: .* has no none"),
        (
            ["column:score"],
            {},
            "online.reward=column:score: must be .*one of rule:module:func.*, judge:",
        ),
        (["rule:rules_of_this_test:length"], {"lenght": 1.0}, "online.reward_weights: no scorer is named lenght"),
    ],
)
def test_one_line_reports_what_is_wrong(specs: list[str], weights: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scorers_of(online_run(specs, weights))


def test_a_scorer_is_made_once_for_all_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    make = online.make_scorers

    def counting(*arguments: Any) -> Any:
        calls["made"] += 1
        return make(*arguments)

    monkeypatch.setattr(online, "make_scorers", counting)
    made = scorers("length")
    made(ROWS)
    made(ROWS)
    assert calls["made"] == 1
