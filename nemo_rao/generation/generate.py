"""``nemo-rao generate``: sample a policy's responses to prompts, as rows that can be scored and trained on."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.batch import Response
from nemo_rao.data.rendering_record import Rendering
from nemo_rao.errors import UserError
from nemo_rao.generation.model_folder import check_folder
from nemo_rao.generation.policy import EMPTY, Answer, Policy, Question
from nemo_rao.generation.progress import print_notes, work_through
from nemo_rao.generation.settings import GenerateSettings, shown
from nemo_rao.rows.prompts import Prompt, digest_of, read_prompts
from nemo_rao.rows.sources import JSON_LINES
from nemo_rao.rows.writing import record_of
from nemo_rao.runtime.files import check_place, write_atomically
from nemo_rao.runtime.part_file import PartFile, part_path

# Incremented when the same settings give other responses than before, or the form of records changes.
_VERSION = 2

TOO_LONG, UNREADABLE = "too long", "unreadable"  # reasons why a prompt has no responses, besides EMPTY
# Possible answers: training must be able to read at least one of them.
_PROBES = ("An answer.", "A thought.\n</think>\n\nAn answer.")


def generate(
    model: str,
    prompts_path: str,
    output: str,
    settings: GenerateSettings,
    columns: Mapping[str, str] | None = None,
    ignore_fields: Sequence[str] = (),
) -> None:
    """Sample K responses to each prompt and write them to ``output``, in the order of the prompts.

    Finished work is kept in ``OUTPUT.part.jsonl``, from which the same command resumes.

    Args:
        columns, ignore_fields: see :func:`nemo_rao.rows.reading.read_rows`.

    Raises:
        UserError: before any weights are loaded, for an invalid model, prompt, setting or output; later, if a file
            cannot be written or no prompt got usable responses.
    """
    path = check_output(output)
    check_folder(model)  # before reading the prompts, which may take long
    prompts = read_prompts(prompts_path, settings.system, columns=columns, ignore_fields=ignore_fields)
    policy = Policy(model, settings)
    remarks = Counter(remark for prompt in prompts for remark in policy.check(_question(prompt)))
    for name in (name for prompt in prompts for name in prompt.unused):
        remarks[f"prompts have a field '{name}' that is neither used nor written"] += 1
    check_answers(policy, _question(prompts[0]))
    print_notes(policy, remarks)
    with PartFile(part_path(path), work_of(policy, prompts, settings)) as part:
        at_once = max(1, settings.batch_size // settings.num_responses)
        numbered = list(enumerate(prompts))
        work_through(part, numbered, at_once, lambda items: respond(policy, items, settings), "generate")
        records = list(part.records())
        if not any(record["responses"] for record in records):
            raise UserError(
                f"{output}: no prompt got {settings.num_responses} usable responses ({skipped(records)}). Check the "
                "model and its chat template, or shorten the prompts."
            )
        write_atomically(path, rows_of(prompts, records))
        part.remove()
    print(report(path, records), flush=True)
    if keys := training_keys(policy.rendering):
        print(f"to train with the rendering used for sampling: {keys}", flush=True)


def check_answers(policy: Policy, question: Question) -> None:
    """Reject, before the weights are loaded, a chat template with which no response could be trained on.

    Such templates cut or move text after their generation prompt.

    Raises:
        UserError: no probe can be read for training.
    """
    if not policy.encoder.uses_template:  # for plain text it depends on the prompt
        return
    problems = [policy.problem_of(question, Answer(probe, 1, False, False)) for probe in _PROBES]
    if all(problems):
        remedy = "" if policy.rendering.answers == "verbatim" else " --answers verbatim keeps responses unchanged."
        raise UserError(f"training could not read any response to these prompts: {problems[0]}{remedy}")


def respond(policy: Policy, items: Sequence[tuple[int, Prompt]], settings: GenerateSettings) -> list[dict[str, Any]]:
    """Sample the records of some prompts: K responses each, or none and the reason.

    Args:
        policy: the policy to sample from.
        items: (index of the prompt in the file, prompt).
        settings: sampling settings. A response that training could not read, such as an empty one, is sampled again
            up to ``resamples`` times.
    """
    questions = {
        (number, response): dataclasses.replace(
            _question(prompt), stream=(number, response), temperature=settings.temperature
        )
        for number, prompt in items
        for response in range(settings.num_responses)
    }
    found: dict[tuple[int, int], Answer] = {}
    problems: dict[tuple[int, int], str] = {}  # of the latest attempt, for responses not found
    open_questions = questions
    for attempt in range(1 + (settings.resamples if settings.temperature > 0 else 0)):
        asked = [dataclasses.replace(question, stream=(*index, attempt)) for index, question in open_questions.items()]
        answers = policy.answer(asked, settings.max_new_tokens)
        for index, answer in zip(open_questions, answers, strict=True):
            problem = TOO_LONG if answer is None else policy.problem_of(questions[index], answer)
            if problem is not None:
                problems[index] = problem
            elif answer is not None:
                found[index] = answer
                problems.pop(index, None)
        open_questions = {index: questions[index] for index, problem in problems.items() if problem != TOO_LONG}
        if not open_questions:
            break
    responses = range(settings.num_responses)
    return [
        _record(
            [found[number, k] for k in responses if (number, k) in found],
            [problems[number, k] for k in responses if (number, k) in problems],
        )
        for number, _ in items
    ]


def _record(answers: Sequence[Answer], problems: Sequence[str]) -> dict[str, Any]:
    """``{"responses": [[text, tokens, cut, has special tokens], ...]}``, or the reason why there are none."""
    if not problems:
        return {"responses": [dataclasses.astuple(answer) for answer in answers]}
    problem = next((problem for problem in problems if problem != EMPTY), EMPTY)
    if problem in (EMPTY, TOO_LONG):
        return {"responses": [], "skipped": problem}
    return {"responses": [], "skipped": UNREADABLE, "problem": problem}


def _question(prompt: Prompt) -> Question:
    return Question(prompt.content, prompt.location, (), 0.0, prompt.template_fields, prompt.plain)


def rows_of(prompts: Iterable[Prompt], records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines in the canonical format, each with the other fields of its prompt's row."""
    for prompt, record in zip(prompts, records, strict=True):
        if record["responses"]:
            responses = [Response(text, truncated=cut) for text, _, cut, _ in record["responses"]]
            yield json_line({**record_of(_question(prompt).row(*responses)), **prompt.carried})


def report(path: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """One line about the result: number and length of responses, and how many were cut or skipped."""
    responses = [response for record in records for response in record["responses"]]
    rows = sum(bool(record["responses"]) for record in records)
    mean = sum(num_tokens for _, num_tokens, _, _ in responses) / len(responses)
    num_cut, num_special = (sum(response[at] for response in responses) for at in (2, 3))
    parts = [
        f"{path}: {rows} prompts, {len(responses)} responses, mean length {mean:.1f} tokens, "
        f"{100 * num_cut / len(responses):.1f} % cut at --max-new-tokens"
        + (' ("truncated": true, which training drops unless data.truncated=without_end)' if num_cut else "")
    ]
    if num_special:
        parts.append(f"{num_special} responses contain special tokens")
    return "; ".join([*parts, *filter(None, [skipped(records)])])


def training_keys(rendering: Rendering) -> str:
    """Recipe keys for this rendering, without those at their default."""
    return " ".join(
        f"data.{name}={shown(value)}"
        for name, value in dataclasses.asdict(rendering).items()
        if value != getattr(Rendering(), name) and value != "always"
    )


def skipped(records: Sequence[Mapping[str, Any]]) -> str:
    """Number of prompts without responses by reason, with the first problem of those that training could not read."""
    counts = Counter(record["skipped"] for record in records if "skipped" in record)
    first = next((record["problem"] for record in records if "problem" in record), "")
    causes = {
        EMPTY: "skipped for empty responses",
        UNREADABLE: f"skipped for responses that training could not read, the first: {first}",
        TOO_LONG: "skipped as too long for the model's context",
    }
    return ", ".join(f"{counts[reason]} {words}" for reason, words in causes.items() if counts[reason])


def work_of(policy: Policy, prompts: Sequence[Prompt], settings: GenerateSettings) -> dict[str, Any]:
    """Everything that the responses depend on. ``batch_size`` is excluded and may be changed on resuming."""
    keys = dataclasses.asdict(settings)
    del keys["batch_size"], keys["system"]  # the system message is in the prompts
    keys |= dataclasses.asdict(policy.rendering) | {"engine": policy.engine_name}
    return {
        "command": "generate",
        "version": _VERSION,
        "digest_of_model": policy.fingerprint,
        "digest_of_prompts": digest_of(prompts),
        **keys,
    }


def check_output(output: str) -> Path:
    """Check that a new file can be written to the path, and return it.

    Raises:
        UserError: the file exists, does not have an extension of JSON Lines, or its parent is not a directory.
    """
    path = Path(output).expanduser()
    if not path.name.endswith(JSON_LINES):
        raise UserError(f"{output}: rows are written as JSON Lines. Use one of the extensions {', '.join(JSON_LINES)}.")
    check_place(path)
    return path


def json_line(record: Mapping[str, Any]) -> str:
    """One line of JSON, ASCII-escaped only if it contains half a surrogate pair, which UTF-8 cannot represent."""
    line = json.dumps(record, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(record, default=str)
    return line + "\n"
