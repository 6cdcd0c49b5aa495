"""Scorers of a run that samples its own responses. Their weighted sum is the reward."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from nemo_rao.batch import Response, Row
from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import RankFailure, UserError
from nemo_rao.runtime.launch import launch
from nemo_rao.scoring.rule import RuleScorer, rules_among
from nemo_rao.scoring.run import KINDS
from nemo_rao.scoring.scorer import (
    InputRow,
    Kind,
    NoScore,
    OutputDirectory,
    Scored,
    Scorer,
    ScoringFailure,
    make_scorers,
)
from nemo_rao.training.reward_models import RewardModelOfRun, reward_model_of

# Kinds of scorers that read the text of a single response.
TEXT: Mapping[str, Kind] = {name: KINDS[name] for name in ("rule", "judge")}
_PROBE = "The answer is 42."  # response on which rules are tried before the run
_PAUSE_SECONDS = 2.0  # wait before retrying a failed scorer; doubled after every attempt


def scorers_of(config: RunConfig) -> tuple[TextScorersOfRun, dict[str, RewardModelOfRun]]:
    """Create the scorers of a run's samples: text scorers, and by name the reward models, which read tokens.

    Raises:
        UserError: there are none, a scorer cannot be created, or a weight does not match the scorers.
    """
    keys, folder = config.online, run_dir(config)
    if not keys.reward:
        raise UserError(
            "online.reward: is empty, and samples have no other reward. Set it to [NAME=]KIND:ARGUMENT, such as "
            "online.reward=rule:my_rules:exact_match"
        )
    # Not a text scorer: it runs on the ranks of the run.
    model = Kind(lambda run, _: cast(Scorer, reward_model_of(run, config)), lambda run: Path(run).name, "RUN_FOLDER")
    made = _make(keys.reward, {**TEXT, "model": model}, folder)
    models: dict[str, RewardModelOfRun] = {}
    text = []
    for spec, (name, scorer) in zip(keys.reward, made.items(), strict=True):
        if isinstance(scorer, RewardModelOfRun):
            models[name] = scorer
        else:
            scorer.close()
            text.append(spec)
    for name, weight in keys.reward_weights.items():
        if name not in made:
            raise UserError(f"online.reward_weights: no scorer is named {name}. The scorers are {', '.join(made)}.")
        if not math.isfinite(weight):
            raise UserError(f"online.reward_weights.{name}={weight}: must be finite.")
    return TextScorersOfRun(text, attempts=keys.scoring_attempts, folder=folder), models


def _make(specs: Sequence[str], kinds: Mapping[str, Kind], folder: Path) -> dict[str, Scorer]:
    try:
        return make_scorers(specs, kinds, OutputDirectory(folder))
    except UserError as error:
        raise UserError(str(error).replace("--scorer ", "online.reward=", 1)) from None


def check_rules(config: RunConfig, prompts: Sequence[Row]) -> None:
    """Call each rule once, in a separate process: threads started by a rule would be missing in the ranks' forks.

    Args:
        prompts: prompts of the run.

    Raises:
        UserError: a rule reads a field that a row does not have, raises, or does not return a finite number.
    """
    rules = rules_among(config.online.reward)
    if rules:
        for rule in map(RuleScorer, rules.values()):
            for prompt in prompts:
                rule.check(prompt)
        asked = InputRow(**vars(replace(prompts[0], responses=(Response(_PROBE),))))
        try:
            launch(_call, (list(rules), run_dir(config), asked), num_ranks=1, in_children=True)
        except RankFailure as failure:
            raise UserError(f"online.reward={', '.join(rules)}: a call ended the process ({failure})") from None


def _call(rules: Sequence[str], folder: Path, asked: InputRow) -> None:
    for name, scorer in _make(rules, TEXT, folder).items():
        try:
            scorer.score([asked])
        except ScoringFailure as failure:
            raise UserError(f"online.reward: {name}, called with the response {_PROBE!r}: {failure}") from None


class TextScorersOfRun:
    """Scorers that read text. They are created in the process that first calls them.

    Args:
        specs: ``[NAME=]KIND:ARGUMENT`` each.
        attempts: number of failed calls of a scorer after which the run ends.
        folder: directory of the run, for files of scorers.
    """

    def __init__(self, specs: Sequence[str], *, attempts: int, folder: Path) -> None:
        self._specs = specs
        self._attempts = attempts
        self._folder = folder
        self._scorers: Mapping[str, Scorer] | None = None
        self._counts: Counter[tuple[str, str]] = Counter()  # (scorer, counted event)

    def __call__(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Return by scorer the ``[S, K]`` float64 scores of S rows with K responses; NaN if missing.

        Raises:
            RankFailure: a scorer has failed ``attempts`` times.
        """
        if self._scorers is None:
            self._scorers = _make(self._specs, TEXT, self._folder)
        given = [InputRow(**vars(row)) for row in rows]
        found = {}
        for name, scorer in self._scorers.items():
            of_rows = self._asked(name, scorer, given)
            found[name] = np.array([[np.nan if isinstance(one, NoScore) else one for one in row] for row in of_rows])
            self._counts.update({(name, what): count for what, count in scorer.take_notes().items()})
        return found

    def notes(self) -> list[str]:
        """Return the counts that the scorers report, one per line."""
        return [f"{name}: {count} {what}" for (name, what), count in self._counts.items()]

    def close(self) -> None:
        """Close the scorers that were created."""
        for scorer in (self._scorers or {}).values():
            scorer.close()
        self._scorers = None

    def _asked(self, name: str, scorer: Scorer, rows: Sequence[InputRow]) -> Sequence[Scored]:
        for attempt in range(1, self._attempts + 1):
            try:
                return scorer.score(rows)
            except ScoringFailure as failure:
                if attempt == self._attempts:
                    raise RankFailure(f"online.reward: {name} failed {attempt} times: {failure}") from failure
                time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("online.scoring_attempts is at least 1")
