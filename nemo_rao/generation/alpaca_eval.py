"""AlpacaEval 2: a policy's answers in the format of ``alpaca_eval --model_outputs``.

    [{"instruction": ..., "output": ..., "generator": ..., "dataset": ...}, ...]

https://github.com/tatsu-lab/alpaca_eval. Its 805 instructions are licensed CC BY-NC and are not shipped: the user
provides the file. The answers are judged by AlpacaEval itself, which queries an OpenAI model.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.generation.policy import Policy, Question
from nemo_rao.generation.progress import work_through
from nemo_rao.generation.settings import EvaluateSettings
from nemo_rao.rows.fields import read_text
from nemo_rao.rows.prompt import read_asked
from nemo_rao.rows.prompts import read_records, with_system
from nemo_rao.rows.responses import make_row
from nemo_rao.rows.view import Columns
from nemo_rao.runtime.part_file import PartFile

DATASET = "alpaca_eval"  # for instructions without `dataset`
_IGNORED = ("output", "generator", "datasplit")  # AlpacaEval's own file contains a model's answers


@dataclass(frozen=True)
class Example:
    """One instruction, with its prompt as a row without responses."""

    instruction: str
    dataset: str
    row: Row


class AlpacaEval:
    """AlpacaEval with the user's instructions.

    Args:
        path: a JSON array or JSON Lines, each record with ``instruction``, optionally ``dataset``, and the fields that
            training reads next to a prompt (``input``, ``system``, ``tools``).
        model_name: written as ``generator``.
        settings: sampling settings.
        ignore_fields: fields to skip.
    """

    name = "alpaca_eval"

    def __init__(
        self, path: str | None, model_name: str, settings: EvaluateSettings, ignore_fields: tuple[str, ...] = ()
    ) -> None:
        if path is None:
            raise UserError(
                "--instructions: is required by task alpaca_eval. Pass alpaca_eval.json of the data set "
                "tatsu-lab/alpaca_eval, or a file of rows with `instruction`."
            )
        self.model_name, self._settings = model_name, settings
        self._max_new_tokens = settings.max_new_tokens or 2048
        columns = Columns(ignore_fields=ignore_fields)
        self._examples = [_example(location, record, columns) for location, record in read_records(path)][
            : settings.limit
        ]
        self.file_name = "alpaca_eval.json"
        self.identity = {
            "digest_of_instructions": hashlib.sha256(
                json.dumps([_identity(example) for example in self._examples]).encode()
            ).hexdigest()[:32],
            "temperature": settings.temperature,
            "max_new_tokens": self._max_new_tokens,
        }

    def check(self, policy: Policy) -> Iterator[str]:
        """Reject prompts that the chat template cannot render. Yields remarks on prompts."""
        for number, example in enumerate(self._examples):
            yield from policy.check(self._question(number))
            yield from (f"instructions have a field '{name}' that is not used" for name in example.row.unused)

    def answer(self, policy: Policy, part: PartFile) -> None:
        """Answer the instructions missing from ``part``. A record is ``[output, tokens, cut]``."""

        def produce(numbers: Sequence[int]) -> list[Any]:
            answers = policy.answer([self._question(number) for number in numbers], self._max_new_tokens)
            # An instruction without room for an answer gets an empty one: the judge expects all of them.
            return [["", 0, True] if found is None else [found.text, found.num_tokens, found.cut] for found in answers]

        work_through(part, range(len(self._examples)), self._settings.batch_size, produce, self.name)

    def whole(self, records: Sequence[Any]) -> str:
        """Content of the file for the judge."""
        outputs = [
            {
                "instruction": example.instruction,
                "output": output.strip(),
                "generator": self.model_name,
                "dataset": example.dataset,
            }
            for example, (output, _, _) in zip(self._examples, records, strict=True)
        ]
        return json.dumps(outputs, ensure_ascii=False, indent=2) + "\n"

    def metrics(self, records: Sequence[Any]) -> Mapping[str, float]:
        """Metrics that need no judge."""
        return {
            "answers": len(records),
            "mean_tokens": sum(num_tokens for _, num_tokens, _ in records) / len(records),
            "cut": sum(cut and num_tokens > 0 for _, num_tokens, cut in records) / len(records),
            "no_room": sum(cut and num_tokens == 0 for _, num_tokens, cut in records) / len(records),
        }

    def judge_command(self, folder: Path) -> str:
        """Command that judges the file, with AlpacaEval's default annotator since 2.0, given explicitly to pin it."""
        file = shlex.quote(str(folder / self.file_name))
        return (
            "pip install alpaca-eval && OPENAI_API_KEY=... "
            f"alpaca_eval --model_outputs {file} --annotators_config weighted_alpaca_eval_gpt4_turbo"
        )

    def _question(self, number: int) -> Question:
        row = self._examples[number].row
        content = with_system(row.prompt, self._settings.system)
        plain = row.plain_prompt if content is row.prompt else None
        return Question(content, row.location, (number, 0, 0), self._settings.temperature, row.template_fields, plain)


def _example(location: str, record: Mapping[str, Any], columns: Columns) -> Example:
    view = columns.view(record, location)
    instruction = read_text(view.required("instruction"), location, "instruction")
    dataset = str(view.get("dataset") or DATASET)
    for name in _IGNORED:
        view.get(name)
    return Example(instruction, dataset, make_row(view, read_asked(view, "instruction"), (), ()))


def _identity(example: Example) -> list[Any]:
    """Everything about an example that its answer depends on."""
    row = example.row
    more = [] if row.prompt == example.instruction and not row.template_fields else [row.prompt, row.template_fields]
    return [example.instruction, example.dataset, *more]
