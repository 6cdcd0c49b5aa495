"""A chat model as judge: what it is asked, how its answer becomes a number, and what is done where it gives none.

    judge.yaml + (prompt, response) -> messages -> (endpoint, or model here) -> answer -> (pattern, range) -> number

The judge answers at temperature 0, unless its file says otherwise. An answer without a number in range is asked for
again, ``attempts`` times in all; then the response has no reward. Answers are kept on disk as they came, so that
another pattern needs no new question.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.scoring.answers import Answers
from nemo_rao.scoring.chat import Chat, ChatQuestion
from nemo_rao.scoring.judge_config import JudgeConfig, load_judge
from nemo_rao.scoring.scorer import Pair, PairScorer, Place, ScoringFailure

HOPELESS_AFTER = 20  # questions: where none of the first so many has a usable answer, the rest is not asked


@dataclass
class _Case:
    """A pair to be judged, with the answers about it so far and the first score that one of them holds."""

    key: str
    pair: Pair
    answers: list[str]
    score: float | None


class JudgeScorer(PairScorer):
    """Asks the judge about each pair; see the module."""

    def __init__(self, config: JudgeConfig, chat: Chat, folder: Path) -> None:
        """
        Args:
            config: checked.
            chat: who is asked.
            folder: where the file of answers lies, unless ``config.cache`` names one.
        """
        assert config.template is not None
        self.config, self.chat, self.template = config, chat, config.template
        self.pattern = re.compile(config.pattern)
        self.attempts = config.attempts if chat.varies else 1
        asked = ("system", "template", "max_tokens", "temperature", "parameters")
        self.question = dict(chat.identity) | {name: vars(config)[name] for name in asked}
        self.identity = {"judge": self.question, "score": [config.pattern, config.low, config.high, self.attempts]}
        path = Path(config.cache).expanduser() if config.cache else folder / "judge_answers.sqlite"
        self.answers = Answers(path)
        self.num_known = self.num_without = self.num_usable = 0

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float | None]:
        cases: dict[str, _Case] = {}  # what is the same is asked once
        for pair in pairs:
            if (key := self._key(pair)) not in cases:
                answers = self.answers.get(key)
                score = next((one for one in map(self.parse, answers) if one is not None), None)
                cases[key] = _Case(key, pair, answers, score)
        for case in cases.values():
            if self._is_settled(case):
                self.num_known += 1
                self._count(case)
        while unsettled := [case for case in cases.values() if not self._is_settled(case)]:
            self.chat.ask([self._asked(case) for case in unsettled], functools.partial(self._keep, unsettled))
        return [cases[self._key(pair)].score for pair in pairs]

    def _asked(self, case: _Case) -> ChatQuestion:
        stream = (int(case.key[:16], 16), len(case.answers))
        return ChatQuestion(self.config.messages(fill(self.template, case.pair)), case.pair.place, stream)

    def _keep(self, cases: Sequence[_Case], number: int, answer: str) -> None:
        """One more answer, to the question of this number."""
        case = cases[number]
        self.answers.add(case.key, answer)
        case.answers.append(answer)
        case.score = self.parse(answer)
        if self._is_settled(case):
            self._count(case)

    def _is_settled(self, case: _Case) -> bool:
        return case.score is not None or len(case.answers) >= self.attempts

    def _count(self, case: _Case) -> None:
        if case.score is not None:
            self.num_usable += 1
            return
        self.num_without += 1
        if not self.num_usable and self.num_without >= HOPELESS_AFTER:
            raise ScoringFailure(
                f"{case.pair.place}: judge {self.chat.name} gave no score in {self.num_without} answers, the last "
                f"{_short(case.answers[-1])}; check pattern ({self.config.pattern}), low, high, template and max_tokens"
            )

    def parse(self, answer: str) -> float | None:
        """The number that the pattern's last match has in its group; ``None`` without match or out of range."""
        matches = list(self.pattern.finditer(answer))
        try:
            score = float(matches[-1][1]) if matches else float("nan")
        except (TypeError, ValueError):  # a group that took no part, or no number
            return None
        return score if self.config.low <= score <= self.config.high else None

    def _key(self, pair: Pair) -> str:
        asked = [self.question, pair.prompt, pair.response]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    def notes(self) -> Mapping[str, int]:
        return {
            "requests": self.chat.num_requests,
            "questions answered before": self.num_known,
            "questions without a score": self.num_without,
        }

    def close(self) -> None:
        self.chat.close()
        self.answers.close()


def fill(template: str, pair: Pair) -> str:
    """The template with both texts in place, in one pass: braces in the texts and elsewhere stay as they are."""
    texts = {"prompt": prompt_text(pair.prompt), "response": pair.response}
    return re.sub(r"\{(prompt|response)\}", lambda match: texts[match[1]], template)


def prompt_text(prompt: str | tuple[Mapping[str, Any], ...]) -> str:
    """A prompt to be read by a judge: a single message is its text, several have their roles before them."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def make(path: str, place: Place) -> JudgeScorer:
    """The judge that a YAML file describes; its answers are kept beside the output.

    Raises:
        UserError: the file, or the model that it names, cannot be used.
    """
    config, api_key = load_judge(path)
    chat: Chat
    if config.model_folder is None:
        from nemo_rao.scoring.endpoint import Endpoint

        chat = Endpoint(config, api_key)
    else:
        from nemo_rao.scoring.local_model import LocalModel  # costs only those who ask one

        try:
            chat = LocalModel(config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return JudgeScorer(config, chat, place.folder)
