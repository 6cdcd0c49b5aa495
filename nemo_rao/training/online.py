"""What a run that samples its own responses needs before any rank exists: its prompts, and what scores samples."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nemo_rao.batch import Row, Sample
from nemo_rao.config.derived import objective_config, run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.encode import Encoder, load_tokenizer, pad_token_id
from nemo_rao.data.report import LoadReport
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import RankFailure, UserError
from nemo_rao.generation.prompts import read_prompts
from nemo_rao.loop.prepared import Asked
from nemo_rao.objectives import registry
from nemo_rao.runtime.console import say
from nemo_rao.scoring.run import KINDS
from nemo_rao.scoring.scorer import InputRow, NoScore, Place, Scorer, ScoringFailure, make_scorers
from nemo_rao.training.loading import LoadedData, draw_numbers

_PAUSE_SECONDS = 2.0  # before a scorer that has failed is asked again, doubled each time


def asked_of(config: RunConfig) -> tuple[Asked, LoadedData]:
    """The prompts of a run and its scorers, and the prompts as the data that the run loads.

    Raises:
        UserError: a file cannot be read, a prompt is no prompt, a scorer cannot be made.
    """
    rewards = Rewards(
        tuple(config.online.reward), dict(config.online.reward_weights), config.online.scoring_attempts, run_dir(config)
    )
    rewards.check()
    tokenizer = load_tokenizer(config.data.tokenizer or "")
    encoder = Encoder(
        tokenizer,
        chat_template=config.data.chat_template,  # type: ignore[arg-type]
        template_arguments=config.data.template_arguments,
        answers=config.data.answers,  # type: ignore[arg-type]
    )
    prompts = read_prompts(config.data.train_path, columns=config.data.columns, ignore_fields=config.data.ignore_fields)
    limit = config.model.seq_length - config.online.max_new_tokens
    rows, samples, too_long = [], [], 0
    for row, sample in zip(rows_of := [one.as_row() for one in prompts], encoder.encode_many(rows_of), strict=True):
        if isinstance(sample, UserError):
            raise UserError(f"{row.place}: {sample}")
        if len(sample.prompt) > limit:
            if config.data.strict:
                raise UserError(
                    f"{row.place}: the prompt has {len(sample.prompt)} tokens, and model.seq_length="
                    f"{config.model.seq_length} less online.max_new_tokens={config.online.max_new_tokens} leaves "
                    f"{limit}; drop it, or set data.strict=false"
                )
            too_long += 1
            continue
        rows.append(row)
        samples.append(replace(sample, ensemble=np.zeros((0, 0))))
    if not samples:
        raise UserError(
            f"{config.data.train_path}: no prompt fits: model.seq_length={config.model.seq_length} less "
            f"online.max_new_tokens={config.online.max_new_tokens} leaves {limit} tokens; change one of them"
        )
    if registry.get(config.model.objective).needs_of(objective_config(config)).shared_first_token:
        _check_first_tokens(samples, config.model.objective)
    if config.data.num_prompts is not None:
        if config.data.num_prompts > len(samples):
            raise UserError(
                f"data.num_prompts={config.data.num_prompts}, but there are only {len(samples)} prompts; lower it, or "
                "set it to null for all"
            )
        chosen = draw_numbers(len(samples), config.data.num_prompts, seed=config.data.seed).tolist()
        rows, samples = [rows[i] for i in chosen], [samples[i] for i in chosen]
        say(f"training data: {len(samples)} prompts drawn (data.num_prompts)")
    report = LoadReport(len(prompts), len(samples))
    left_out = f", {too_long} longer than {limit} tokens left out" if too_long else ""
    unused = sorted({path for one in prompts for path in (*one.unused, *one.fields)})
    said = f"; fields that nothing reads: {', '.join(unused)}" if unused else ""
    say(f"training data: {len(samples)} of {len(prompts)} prompts{left_out}{said}")
    for note in encoder.notes:
        say(f"training data: {note}")
    data = PreferenceData(samples, report)
    return Asked(data, tuple(rows), rewards), LoadedData(data, None, len(tokenizer), pad_token_id(tokenizer))


def _check_first_tokens(samples: Sequence[Sample], objective: str) -> None:
    for sample in samples:
        if sample.prompt[0] != samples[0].prompt[0]:
            raise UserError(
                f"{sample.place}: objective {objective} needs all prompts to begin with the same token, but it begins "
                f"with {int(sample.prompt[0])} and {samples[0].place} with {int(samples[0].prompt[0])}; use a chat "
                "template or a tokenizer with a beginning token"
            )


@dataclass(frozen=True)
class Rewards:
    """The weighted sum of scorers, asked on one rank; they are made there, when they are first asked.

    Attributes:
        specs: ``[NAME=]KIND:ARGUMENT`` each.
        weights: by name; 1 for the others.
        attempts: how often a scorer is asked before the run ends.
        folder: where scorers keep what they keep.
    """

    specs: tuple[str, ...]
    weights: Mapping[str, float]
    attempts: int
    folder: Path

    def check(self) -> None:
        """That there are such scorers.

        Raises:
            UserError: there are not.
        """
        if not self.specs:
            raise UserError(
                "online.reward is empty: what are samples worth? Give [NAME=]KIND:ARGUMENT, such as "
                "rule:my_rules:exact_match"
            )
        scorers = self._made()
        for scorer in scorers.values():
            scorer.close()
        for name, scorer in scorers.items():
            if scorer.fields:
                raise UserError(
                    f"online.reward: {name} reads columns of a file, and samples are in none; use a rule or a judge"
                )
        for name, weight in self.weights.items():
            if name not in scorers:
                raise UserError(f"online.reward_weights: there is no {name}; there are {', '.join(scorers)}")
            if not math.isfinite(weight):
                raise UserError(f"online.reward_weights.{name}={weight}: must be finite")

    def __call__(self, rows: Sequence[Row]) -> list[list[float | None]]:
        """A reward for each response; ``None`` where a scorer gives none.

        Raises:
            RankFailure: a scorer has failed ``attempts`` times.
        """
        scorers = _scorers_of(self)
        given = [InputRow(**vars(row)) for row in rows]
        totals = [np.zeros(len(row.responses)) for row in rows]
        missing = [np.zeros(len(row.responses), dtype=bool) for row in rows]
        for name, scorer in scorers.items():
            for of_row, total, lacks in zip(self._asked(name, scorer, given), totals, missing, strict=True):
                for k, score in enumerate(of_row):
                    if isinstance(score, NoScore):
                        lacks[k] = True
                    else:
                        total[k] += self.weights.get(name, 1.0) * score
        return [
            [None if lack else float(value) for value, lack in zip(total, lacks, strict=True)]
            for total, lacks in zip(totals, missing, strict=True)
        ]

    def _asked(self, name: str, scorer: Scorer, rows: Sequence[InputRow]) -> Sequence[Sequence[float | NoScore]]:
        for attempt in range(1, self.attempts + 1):
            try:
                return scorer.score(rows)
            except ScoringFailure as failure:
                if attempt == self.attempts:
                    raise RankFailure(
                        f"online.reward: {name} failed {attempt} times: {failure}. The samples are kept, and the same "
                        "command goes on with them from the last checkpoint"
                    ) from failure
                time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("online.scoring_attempts is at least 1")

    def _made(self) -> dict[str, Scorer]:
        kinds = {name: kind for name, kind in KINDS.items() if name in ("rule", "judge")}
        try:
            return make_scorers(self.specs, kinds, Place(self.folder))
        except UserError as error:
            raise UserError(str(error).replace("--scorer ", "online.reward=", 1)) from None


_MADE: dict[int, dict[str, Scorer]] = {}  # in the process that asks them


def _scorers_of(rewards: Rewards) -> dict[str, Scorer]:
    key = id(rewards)
    if key not in _MADE:
        _MADE[key] = rewards._made()
    return _MADE[key]
