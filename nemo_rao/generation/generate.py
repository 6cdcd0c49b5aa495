"""``nemo-rao generate``: a policy's own responses to given prompts, as rows that can be scored and trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.data.rows import JSON_LINES
from nemo_rao.errors import UserError
from nemo_rao.files import check_place, write_atomically
from nemo_rao.generation.model_folder import check_folder
from nemo_rao.generation.policy import Answer, Policy, Question
from nemo_rao.generation.progress import work_through
from nemo_rao.generation.prompts import Prompt, digest_of, read_prompts
from nemo_rao.generation.settings import GenerateSettings
from nemo_rao.part_file import PartFile, part_path

# Changed when the same settings would give other responses than before.
_VERSION = 1


def generate(model: str, prompts_path: str, output: str, settings: GenerateSettings) -> None:
    """Samples K responses to each prompt into ``output``, in the prompts' order.

    What is finished is kept in ``OUTPUT.part.jsonl``, from which the same command goes on.

    Raises:
        UserError: before any weights are loaded, for whatever is wrong with model, prompts, settings or output;
            later, where a file cannot be written or no prompt got usable responses.
    """
    path = check_output(output)
    check_folder(model)  # before the prompts are read, which may be many
    prompts = read_prompts(prompts_path, settings.system)
    policy = Policy(model, settings)
    for prompt in prompts:
        policy.check(Question(prompt.content, prompt.place, (), 0.0))
    with PartFile(part_path(path), work_of(policy, prompts, settings)) as part:
        at_once = max(1, settings.batch_size // settings.num_responses)
        numbered = list(enumerate(prompts))
        work_through(part, numbered, at_once, lambda items: respond(policy, items, settings), "generate")
        records = list(part.records())
        if not any(record["responses"] for record in records):
            raise UserError(
                f"{output}: no prompt got {settings.num_responses} usable responses ({_skipped(records)}); "
                "look at the model and its chat template, or shorten the prompts"
            )
        write_atomically(path, rows_of(prompts, records))
        part.remove()
    print(report(path, records), flush=True)


def respond(policy: Policy, items: Sequence[tuple[int, Prompt]], settings: GenerateSettings) -> list[dict[str, Any]]:
    """The records of some prompts: K responses each, or none and the reason why.

    Args:
        policy: who answers.
        items: (the prompt's number in the file, the prompt).
        settings: of sampling. An empty response is sampled again, with another draw, ``resamples`` times.
    """
    questions = {
        (number, response): Question(prompt.content, prompt.place, (number, response), settings.temperature)
        for number, prompt in items
        for response in range(settings.num_responses)
    }
    found: dict[tuple[int, int], Answer] = {}
    too_long: set[int] = set()
    open_questions = questions
    for attempt in range(1 + (settings.resamples if settings.temperature > 0 else 0)):
        asked = [dataclasses.replace(question, stream=(*place, attempt)) for place, question in open_questions.items()]
        answers = policy.answer(asked, settings.max_new_tokens)
        for place, answer in zip(open_questions, answers, strict=True):
            if answer is None:
                too_long.add(place[0])
            elif policy.can_be_trained_on(questions[place], answer):
                found[place] = answer
        open_questions = {
            place: question
            for place, question in open_questions.items()
            if place not in found and place[0] not in too_long
        }
        if not open_questions:
            break
    return [
        _record([found.get((number, k)) for k in range(settings.num_responses)], number in too_long)
        for number, _ in items
    ]


def _record(answers: Sequence[Answer | None], too_long: bool) -> dict[str, Any]:
    whole = [answer for answer in answers if answer is not None]
    if len(whole) < len(answers):
        return {"responses": [], "skipped": "too long" if too_long else "empty"}
    return {"responses": [[answer.text, answer.num_tokens, answer.cut] for answer in whole]}


def rows_of(prompts: Iterable[Prompt], records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the project's own format; what else a prompt's row had is kept beside it."""
    for prompt, record in zip(prompts, records, strict=True):
        if record["responses"]:
            responses = [{"content": text} for text, _, _ in record["responses"]]
            yield json_line({"prompt": prompt.content, "responses": responses, **prompt.fields})


def report(path: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """What was made, in a line: how much of it, how long, how much was cut or skipped."""
    responses = [response for record in records for response in record["responses"]]
    rows = sum(bool(record["responses"]) for record in records)
    mean = sum(num_tokens for _, num_tokens, _ in responses) / len(responses)
    cut = 100 * sum(cut for _, _, cut in responses) / len(responses)
    skipped = _skipped(records)
    return (
        f"{path}: {rows} prompts, {len(responses)} responses, mean length {mean:.1f} tokens, {cut:.1f} % cut at "
        f"--max-new-tokens{f'; {skipped}' if skipped else ''}"
    )


def _skipped(records: Sequence[Mapping[str, Any]]) -> str:
    counts = {reason: sum(record.get("skipped") == reason for record in records) for reason in ("empty", "too long")}
    told = {"empty": "skipped for empty responses", "too long": "skipped as too long for the model's context"}
    return ", ".join(f"{count} {told[reason]}" for reason, count in counts.items() if count)


def work_of(policy: Policy, prompts: Sequence[Prompt], settings: GenerateSettings) -> dict[str, Any]:
    """What the responses are a function of. ``batch_size`` is not among it, and may be changed on the way."""
    keys = dataclasses.asdict(settings)
    del keys["batch_size"], keys["system"]  # the system message is in the prompts
    keys["engine"] = policy.engine_name
    return {
        "command": "generate",
        "version": _VERSION,
        "digest_of_model": policy.fingerprint,
        "digest_of_prompts": digest_of(prompts),
        **keys,
    }


def check_output(output: str) -> Path:
    """The path, once it is known that it can be written without losing anything.

    Raises:
        UserError: it is there already, has another ending than JSON Lines, or lies in what is no folder.
    """
    path = Path(output).expanduser()
    if not path.name.endswith(JSON_LINES):
        raise UserError(f"{output}: rows are written as JSON Lines; end its name with one of {', '.join(JSON_LINES)}")
    check_place(path)
    return path


def json_line(record: Mapping[str, Any]) -> str:
    """One line of JSON, readable unless it holds half a surrogate pair, which UTF-8 cannot."""
    line = json.dumps(record, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(record, default=str)
    return line + "\n"
