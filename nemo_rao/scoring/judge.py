"""A chat model as judge: its questions, the conversion of answers to numbers, and the handling of missing scores.

    judge.yaml + (prompt, response) -> messages -> (endpoint, or model here) -> answer -> (pattern, scale) -> number

The judge answers at temperature 0, unless its file sets another one. If an answer has no score, was cut off or is not
on the scale (:mod:`nemo_rao.scoring.reading`), the question is asked again, up to ``attempts`` times in total; then the
response has no score. Raw answers are kept on disk, so that a changed pattern needs no new questions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.scoring.answers import Answers
from nemo_rao.scoring.chat import Chat, ChatAnswer, ChatQuestion
from nemo_rao.scoring.judge_config import JudgeConfig, load_judge
from nemo_rao.scoring.reading import EMPTY, ScoreForm
from nemo_rao.scoring.scorer import NoScore, OutputDirectory, Pair, PairScorer, ScoringFailure

_OF_ALL = ("role", "content")  # fields of every message
HOPELESS_AFTER = 20  # questions: if none of the first ones has a usable answer, scoring stops


@dataclass
class _Case:
    """A pair to be judged, with the answers so far and the score of each."""

    key: str
    pair: Pair
    answers: list[ChatAnswer]
    scores: list[float | NoScore]

    @property
    def score(self) -> float | NoScore:
        """The first score, or the reason why the last answer has none."""
        first = next((score for score in self.scores if not isinstance(score, NoScore)), None)
        return first if first is not None else self.scores[-1] if self.scores else EMPTY

    @property
    def lacking(self) -> list[NoScore]:
        """Reasons of the answers without a score before the first one with a score."""
        found = []
        for score in self.scores:
            if not isinstance(score, NoScore):
                break
            found.append(score)
        return found


class JudgeScorer(PairScorer):
    """Asks the judge about each pair; see the module's docstring."""

    def __init__(self, config: JudgeConfig, chat: Chat, folder: Path) -> None:
        """
        Args:
            config: checked configuration.
            chat: the chat model.
            folder: directory of the answers' file, unless ``config.cache`` is set.
        """
        assert config.template is not None and config.low is not None and config.high is not None
        self.config, self.chat, self.template = config, chat, config.template
        self.form = ScoreForm(config.pattern, config.low, config.high)
        self.attempts = config.attempts if chat.varies else 1
        asked = ("max_tokens", "temperature", "parameters")
        self.question = dict(chat.identity) | {name: vars(config)[name] for name in asked}
        self.question["messages"] = [dict(one) for one in config.messages(self.template)]
        self.identity = {"judge": self.question, "score": [config.pattern, config.low, config.high, self.attempts]}
        path = Path(config.cache).expanduser() if config.cache else folder / "judge_answers.sqlite"
        self.answers = Answers(path)
        self.num_without = self.num_usable = 0
        self._known, self._asked_again = 0, Counter[NoScore]()  # since notes were last taken
        self._requests_before = 0

    def score_pairs(self, pairs: Sequence[Pair]) -> Sequence[float | NoScore]:
        cases: dict[str, _Case] = {}  # identical pairs are asked once
        for pair in pairs:
            if (key := self._key(pair)) not in cases:
                answers = self.answers.get(key)
                cases[key] = _Case(key, pair, answers, [self.form.read(answer) for answer in answers])
        for case in cases.values():
            if self._is_settled(case):
                self._known += 1
                self._count(case)
        while unsettled := [case for case in cases.values() if not self._is_settled(case)]:
            self.chat.ask([self._asked(case) for case in unsettled], functools.partial(self._keep, unsettled))
        return [self._outcome(cases[self._key(pair)]) for pair in pairs]

    def _outcome(self, case: _Case) -> float | NoScore:
        if isinstance(case.score, NoScore) and case.answers:
            return NoScore(case.score.reason, f"{_short(case.answers[-1].text)} (answer {len(case.answers)})")
        return case.score

    def _asked(self, case: _Case) -> ChatQuestion:
        stream = (int(case.key[:16], 16), len(case.answers))
        return ChatQuestion(self.config.messages(fill(self.template, case.pair)), case.pair.location, stream)

    def _keep(self, cases: Sequence[_Case], number: int, answer: ChatAnswer) -> None:
        """Store an answer to question ``number``."""
        case = cases[number]
        if answer.lasting:
            self.answers.add(case.key, answer)
        case.answers.append(answer)
        case.scores.append(self.form.read(answer))
        if self._is_settled(case):
            self._count(case)

    def _is_settled(self, case: _Case) -> bool:
        return not isinstance(case.score, NoScore) or len(case.answers) >= self.attempts

    def _count(self, case: _Case) -> None:
        """Count a settled case. Raises if the first ``HOPELESS_AFTER`` cases have no score."""
        if not isinstance(case.score, NoScore):
            self._asked_again.update(case.lacking)
            self.num_usable += 1
            return
        self._asked_again.update(case.lacking[:-1])
        self.num_without += 1
        if not self.num_usable and self.num_without >= HOPELESS_AFTER:
            raise ScoringFailure(
                f"{case.pair.location}: judge {self.chat.name} gave no score in {self.num_without} answers, the last "
                f"{_short(case.answers[-1].text)}: {case.score.reason}. Check pattern ({self.config.pattern}), low, "
                "high, template and max_tokens."
            )

    def _key(self, pair: Pair) -> str:
        asked = [self.question, self.config.messages(fill(self.template, pair))]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    def take_notes(self) -> Mapping[str, int]:
        requests, known, again = self.chat.num_requests - self._requests_before, self._known, self._asked_again
        self._requests_before, self._known, self._asked_again = self.chat.num_requests, 0, Counter()
        return {"requests": requests, "questions answered before": known} | {
            f"answers asked for again: {lacks.reason}": count for lacks, count in again.items()
        }

    def close(self) -> None:
        self.chat.close()
        self.answers.close()


def fill(template: str, pair: Pair) -> str:
    """Fill both texts into the template in one pass; braces in the texts and elsewhere are left unchanged."""
    texts = {"prompt": prompt_text(pair), "response": _with_fields(pair.response, pair.response_fields)}
    return re.sub(r"\{(prompt|response)\}", lambda match: texts[match[1]], template)


def prompt_text(pair: Pair) -> str:
    """Format a prompt for a judge: a single message as its text, several with their roles.

    Other parts (tools, tool calls of a message) are included as JSON.
    """
    if isinstance(pair.prompt, str):
        text = pair.prompt
    else:
        messages = [
            (str(one["role"]), _with_fields(one["content"], {k: v for k, v in one.items() if k not in _OF_ALL}))
            for one in pair.prompt
        ]
        text = messages[0][1] if len(messages) == 1 else "\n\n".join(f"{role}: {content}" for role, content in messages)
    return _with_fields("", pair.template_fields) + "\n\n" * bool(pair.template_fields) + text


def _with_fields(text: str | None, fields: Mapping[str, Any]) -> str:
    """A text, followed by one line per field."""
    values = {
        name: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for name, one in fields.items()
    }
    return "\n".join([*([text] if text else []), *(f"{name}: {value}" for name, value in values.items())])


def _short(text: str) -> str:
    """End of a text, where a score would be."""
    return repr(text if len(text) <= 80 else "..." + text[-77:])


def make(path: str, output_dir: OutputDirectory) -> JudgeScorer:
    """Build the judge described by a YAML file; its answers are stored next to the output.

    Raises:
        UserError: the file, or the model that it names, cannot be used.
    """
    config, api_key = load_judge(path)
    chat: Chat
    if config.model_folder is None:
        from nemo_rao.scoring.endpoint import Endpoint

        chat = Endpoint(config, api_key)
    else:
        from nemo_rao.scoring.local_model import JudgeSettings, LocalModel  # imported only if needed

        try:
            chat = LocalModel(config)
        except UserError as error:
            raise UserError(f"{path}: {JudgeSettings.OPTIONS(str(error))}") from None
    return JudgeScorer(config, chat, output_dir.folder)
