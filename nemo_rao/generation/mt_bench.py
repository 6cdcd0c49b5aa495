"""MT-Bench: a policy's answers in the format of FastChat's ``llm_judge``, one question per line.

    {"question_id": 81, "answer_id": ..., "model_id": ..., "choices": [{"index": 0, "turns": [...]}], "tstamp": ...}

https://github.com/lm-sys/FastChat, fastchat/llm_judge. Each turn sees the turns before it with their answers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.data.encode import BoundaryError
from nemo_rao.errors import UserError
from nemo_rao.generation.policy import Policy, Question
from nemo_rao.generation.progress import work_through
from nemo_rao.generation.settings import EvaluateSettings
from nemo_rao.generation.thinking import after_thinking
from nemo_rao.rows.fields import Messages, describe, read_text
from nemo_rao.rows.prompt import with_context
from nemo_rao.rows.prompts import read_records, with_system
from nemo_rao.rows.responses import make_row
from nemo_rao.rows.view import Columns
from nemo_rao.runtime.part_file import PartFile

# FastChat's `temperature_config`; 0 is greedy. Other categories use 0.7.
TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Example:
    """One question of several turns; ``row`` has the first turn as its prompt and no responses."""

    location: str
    question_id: Any
    category: str
    turns: tuple[str, ...]
    row: Row


class MtBench:
    """MT-Bench with the user's copy of its questions.

    Args:
        path: FastChat's ``question.jsonl``: ``question_id``, ``category``, ``turns``.
        model_name: written as ``model_id`` and used as the file name, from which FastChat takes it.
        settings: sampling settings; the temperature is the category's.
        ignore_fields: fields to skip.
    """

    name = "mt_bench"

    def __init__(
        self, path: str | None, model_name: str, settings: EvaluateSettings, ignore_fields: tuple[str, ...] = ()
    ) -> None:
        if path is None:
            raise UserError(
                "--questions: is required by task mt_bench. Pass FastChat's "
                "fastchat/llm_judge/data/mt_bench/question.jsonl."
            )
        if settings.chat_template == "never":
            raise UserError(
                "chat_template='never': mt_bench has several turns, which need a chat template. Leave it at auto."
            )
        self.model_name, self._settings = model_name, settings
        self._max_new_tokens = settings.max_new_tokens or 1024
        columns = Columns(ignore_fields=ignore_fields)
        self._examples = [_example(location, record, columns) for location, record in read_records(path)][
            : settings.limit
        ]
        self.file_name = f"mt_bench/{model_name}.jsonl"
        self.identity = {
            "digest_of_questions": hashlib.sha256(
                json.dumps([_identity(example) for example in self._examples]).encode()
            ).hexdigest()[:32],
            "max_new_tokens": self._max_new_tokens,
        }

    def check(self, policy: Policy) -> Iterator[str]:
        """Reject questions that the chat template cannot render, including later turns. Yields remarks on prompts."""
        for number, example in enumerate(self._examples):
            yield from policy.check(self._question(number, ["An answer."] * (len(example.turns) - 1)))
            yield from (f"questions have a field '{name}' that is not used" for name in example.row.unused)

    def answer(self, policy: Policy, part: PartFile) -> None:
        """Answer the questions missing from ``part``. A record is [answers, tokens, cut, time], the first three by
        turn."""

        def produce(numbers: Sequence[int]) -> list[Any]:
            turns: dict[int, list[str]] = {number: [] for number in numbers}
            tokens: dict[int, list[int]] = {number: [] for number in numbers}
            cut: dict[int, list[bool]] = {number: [] for number in numbers}
            for turn in range(max(len(self._examples[number].turns) for number in numbers)):
                asked = [number for number in numbers if turn < len(self._examples[number].turns)]
                answers = policy.answer([self._asked(policy, n, turns[n]) for n in asked], self._max_new_tokens)
                for number, found in zip(asked, answers, strict=True):
                    turns[number].append("" if found is None else found.text.strip())
                    tokens[number].append(0 if found is None else found.num_tokens)
                    cut[number].append(found is None or found.cut)
            return [[turns[number], tokens[number], cut[number], time.time()] for number in numbers]

        work_through(part, range(len(self._examples)), self._settings.batch_size, produce, self.name)

    def whole(self, records: Sequence[Any]) -> Iterator[str]:
        """Lines of the file for the judge."""
        for example, (turns, _, _, tstamp) in zip(self._examples, records, strict=True):
            identity = json.dumps([example.question_id, self.model_name, turns])
            line = {
                "question_id": example.question_id,
                "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
                "model_id": self.model_name,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": tstamp,
            }
            yield json.dumps(line, ensure_ascii=False) + "\n"

    def metrics(self, records: Sequence[Any]) -> Mapping[str, float]:
        """Metrics that need no judge."""
        tokens = [count for _, counts, _, _ in records for count in counts]
        # A question without room for an answer has one of 0 tokens, which counts as cut.
        cut = [count for _, counts, cuts, _ in records for count, was_cut in zip(counts, cuts, strict=True) if was_cut]
        return {
            "answers": len(tokens),
            "mean_tokens": sum(tokens) / len(tokens),
            "cut": sum(count > 0 for count in cut) / len(tokens),
            "no_room": sum(count == 0 for count in cut) / len(tokens),
        }

    def judge_command(self, folder: Path) -> str:
        """Instructions for judging the file with FastChat."""
        return (
            f"copy {folder / self.file_name} to data/mt_bench/model_answer/ in FastChat's fastchat/llm_judge, and "
            f"there OPENAI_API_KEY=... python gen_judgment.py --model-list {self.model_name} && "
            f"python show_result.py --model-list {self.model_name}"
        )

    def _asked(self, policy: Policy, number: int, answers: Sequence[str]) -> Question:
        """The next turn. Thinking in earlier answers is removed if the chat template would cut it."""
        question = self._question(number, answers)
        try:
            policy.check(question)
        except BoundaryError:
            return self._question(number, [_without_thinking(answer) for answer in answers])
        return question

    def _question(self, number: int, answers: Sequence[str]) -> Question:
        """The turn after the answered ones, with the conversation before it."""
        example = self._examples[number]
        content = with_system(example.row.prompt, self._settings.system)
        first = [{"role": "user", "content": content}] if isinstance(content, str) else content
        later: list[Mapping[str, str]] = []
        for answer, turn in zip(answers, example.turns[1:], strict=False):
            later += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        messages: Messages = (*first, *later)
        temperature = TEMPERATURES.get(example.category, OTHER_TEMPERATURE)
        stream = (number, len(answers), 0)
        return Question(messages, example.location, stream, temperature, example.row.template_fields)


def _without_thinking(answer: str) -> str:
    """The answer without its thinking, or all of it if the thinking does not end."""
    rest = after_thinking(answer)
    return answer if rest is None else rest.lstrip()


def _identity(example: Example) -> list[Any]:
    """Everything about an example that its answers depend on."""
    row = example.row
    more = [] if row.prompt == example.turns[0] and not row.template_fields else [row.prompt, row.template_fields]
    return [example.question_id, example.category, example.turns, *more]


def _example(location: str, record: Mapping[str, Any], columns: Columns) -> Example:
    view = columns.view(record, location)
    turns = view.required("turns")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{location}: field 'turns' must be a list of texts, found {describe(turns)}")
    texts = tuple(read_text(turn, location, f"turns[{number}]") for number, turn in enumerate(turns))
    question_id, category = view.required("question_id"), read_text(view.required("category"), location, "category")
    view.get("reference")  # used by the judge only
    return Example(location, question_id, category, texts, make_row(view, with_context(view, texts[0]), (), ()))
