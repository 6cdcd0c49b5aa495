"""The command ``nemo-rao score``: input -> scorers, batch after batch -> part file -> output with statistics.

Everything that can be known of the input and the scorers is checked before the first response is scored.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.data.rows import HUB, JSON_LINES, expand_paths
from nemo_rao.errors import UserError
from nemo_rao.part_file import PartFile, part_path
from nemo_rao.progress import Progress
from nemo_rao.scoring.column import COLUMN, ColumnScorer
from nemo_rao.scoring.finish import Scaling, stated_statistics, write_output
from nemo_rao.scoring.rule import RULE
from nemo_rao.scoring.scorer import InputRow, Kind, Place, Scorer, Scores, ScoringFailure, make_scorers, read_input

VERSION = 2  # changed when the same scorers would leave another part file than before


def _make_judge(path: str, place: Place) -> Scorer:
    from nemo_rao.scoring.judge import make  # HTTP and YAML cost only those who ask a judge

    return make(path, place)


KINDS: Mapping[str, Kind] = {
    "rule": RULE,
    "judge": Kind(_make_judge, lambda path: Path(path).stem.replace(".", "_"), "FILE.yaml"),
    "column": COLUMN,
}


@dataclass(frozen=True)
class Job:
    """What to score, and how; the command's arguments.

    Attributes:
        input: whatever ``data.rows.read_rows`` reads.
        output: JSON Lines, compressed where the name ends in .gz.
        scorer: ``[NAME=]KIND:ARGUMENT`` each.
        weight: ``NAME=NUMBER`` each.
        standardize, shift, scale: see ``finish``.
        statistics: a .stats.json whose means and standard deviations ``global`` takes; ``None``: the output's own.
        strict: a response without a score stops the run.
        overwrite: ``output`` may exist.
        rows_at_once: rows handed to the scorers, and then written, together.
    """

    input: str
    output: Path
    scorer: Sequence[str]
    weight: Sequence[str] = ()
    standardize: str = "none"
    statistics: str | None = None
    shift: float = 0.0
    scale: float = 1.0
    strict: bool = False
    overwrite: bool = False
    rows_at_once: int = 32


def main(arguments: argparse.Namespace, kinds: Mapping[str, Kind] = KINDS) -> int:
    """Runs the command. Returns the exit code: 0, or 1 after a failure under way, told in one line on stderr.

    Args:
        arguments: as ``cli.score_parser`` makes them.
        kinds: the kinds of scorers there are.

    Raises:
        UserError: input that cannot be used, before anything is scored.
    """
    given = {one.name: vars(arguments)[one.name] for one in dataclasses.fields(Job)}
    try:
        score(Job(**given | {"output": Path(arguments.output).expanduser()}), kinds)
    except ScoringFailure as failure:
        print(f"error: {' '.join(str(failure).split())}", file=sys.stderr)
        return 1
    return 0


def score(job: Job, kinds: Mapping[str, Kind] = KINDS) -> dict[str, Any]:
    """Scores every response of the input, writes the output and its statistics, prints and returns these.

    Raises:
        UserError: input that cannot be used, before anything is scored.
        ScoringFailure: a failure under way; what is scored is kept, and the same call goes on from it.
    """
    _check_files(job)
    with contextlib.ExitStack() as held:
        scorers = make_scorers(job.scorer, kinds, Place(job.output.parent))
        for scorer in scorers.values():
            held.callback(scorer.close)
        scaling = _scaling(job, list(scorers))
        fields = list(dict.fromkeys(name for scorer in scorers.values() for name in scorer.fields))
        num_rows, notes = _check_rows(job.input, fields, scorers)
        part = held.enter_context(PartFile(part_path(job.output), _work(job.input, scorers)))
        if part.num_records:
            print(f"goes on after {part.num_records} of {num_rows} rows", flush=True)
        try:
            _score_rows(part, read_input(job.input, fields), num_rows, scorers, job)
            statistics = write_output(part, job.output, list(scorers), scaling)
        except (ScoringFailure, UserError) as error:  # a full disk, an input that has changed meanwhile, ...
            raise ScoringFailure(f"{error}. {_kept(part, num_rows)}") from error
        except KeyboardInterrupt:
            print(f"interrupted. {_kept(part, num_rows)}", file=sys.stderr)
            raise
        part.remove()
        for name, scorer in scorers.items():
            notes += [f"{name}: {count} {what}" for what, count in scorer.notes().items()]
    from nemo_rao.scoring.report import print_report

    print_report(statistics)
    for note in [*notes, f"wrote {job.output} and {job.output}.stats.json"]:
        print(note)
    return statistics


def _score_rows(
    part: PartFile, rows: Iterator[InputRow], num_rows: int, scorers: Mapping[str, Scorer], job: Job
) -> None:
    """Scores the rows that are not in the part file yet, and puts them there, in order."""
    order = sorted(scorers, key=lambda name: not scorers[name].forks)
    unscored = itertools.islice(rows, part.num_records, None)
    with Progress("score", unit="row", total=num_rows, done=part.num_records, stays=False) as progress:
        while batch := list(itertools.islice(unscored, job.rows_at_once)):
            columns = {name: scorers[name].score(batch) for name in order}
            scores = [{name: columns[name][at] for name in scorers} for at in range(len(batch))]
            for row, own in zip(batch, scores, strict=True):
                for name, values in own.items():
                    assert len(values) == len(row.responses), f"scorer {name}: a score for each response"
                    if job.strict and None in values:
                        number = values.index(None) + 1
                        raise ScoringFailure(
                            f"{row.place}, response {number}: {name} gave no score, and with --strict none may be "
                            "missing; leave that out, or drop the row"
                        )
            part.append(_record(row, own) for row, own in zip(batch, scores, strict=True))
            progress.advance(len(batch))


def _kept(part: PartFile, num_rows: int) -> str:
    return f"{part.num_records} of {num_rows} rows are kept in {part.path}; the same command goes on from there"


def _record(row: Row, columns: Mapping[str, Scores]) -> dict[str, Any]:
    """The row in the canonical format, without ``reward``: an item of the part file."""
    responses = [
        {"content": response.content} | {name: scores[number] for name, scores in columns.items()}
        for number, response in enumerate(row.responses)
    ]
    prompt = row.prompt if isinstance(row.prompt, str) else [dict(message) for message in row.prompt]
    ranked = {"ranked": True} if row.ranked else {}
    return {"prompt": prompt, "responses": responses} | ranked


def _work(path: str, scorers: Mapping[str, Scorer]) -> dict[str, Any]:
    """What the scores are a function of."""
    identities = {f"digest_of_scorer {name}": scorer.identity for name, scorer in scorers.items()}
    own = {"command": "score", "version": VERSION, "digest_of_input": _digest(path), "columns": list(scorers)}
    return own | identities


# ----------------------------------------------------------------------------------- checks before anything is scored


def _check_files(job: Job) -> None:
    """The arguments that need neither input nor scorers."""
    output = job.output
    if job.rows_at_once < 1:
        raise UserError(f"--rows-at-once {job.rows_at_once}: must be >= 1")
    if not output.name.endswith(JSON_LINES):
        raise UserError(f"output {output}: its name must end in one of {', '.join(JSON_LINES)}")
    if output.is_dir():
        raise UserError(f"output {output} is a folder; name a file")
    part = part_path(output)
    for source in expand_paths(job.input):
        for path in (output, part):
            if not source.startswith(HUB) and os.path.realpath(source) == os.path.realpath(path):
                raise UserError(f"{job.input}: the input holds {path}, which is written to; choose another output")
    pattern = PurePath(os.path.abspath(os.path.expanduser(job.input)))
    if not job.input.startswith(HUB) and "*" in job.input and PurePath(os.path.abspath(part)).match(str(pattern)):
        raise UserError(f"{job.input}: matches {part}, which is written to; choose an output in another folder")
    if output.exists() and not job.overwrite:
        raise UserError(f"output {output} exists; add --overwrite to replace it, or choose another")


def _scaling(job: Job, columns: Sequence[str]) -> Scaling:
    weights = {}
    for text in job.weight:
        name, _, number = text.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise UserError(f"--weight {text}: must be NAME=NUMBER, such as {columns[0]}=0.5") from None
    stated = {}
    if job.statistics is not None:
        if job.standardize != "global":
            raise UserError("--statistics says by what columns are standardized; add --standardize global")
        stated = stated_statistics(job.statistics, columns)
    scaling = Scaling(job.standardize, job.shift, job.scale, weights, stated)
    scaling.check(columns)
    return scaling


def _check_rows(path: str, fields: Sequence[str], scorers: Mapping[str, Scorer]) -> tuple[int, list[str]]:
    """Reads the whole input once. Returns its number of rows, and what the user should know of it."""
    empty: dict[str, ColumnScorer] = {
        name: scorer for name, scorer in scorers.items() if isinstance(scorer, ColumnScorer)
    }
    num_rows = num_dropped = 0
    try:
        for row in read_input(path, fields):
            num_rows += 1
            num_dropped += bool(row.reference_rewards)
            empty = {name: one for name, one in empty.items() if not any(s is not None for s in one.score([row])[0])}
            if not isinstance(row.prompt, str):
                _check_json(row)
            if any(response.continuation for response in row.responses):
                raise UserError(f"{row.place}: a conversation of several answers cannot be scored; keep its last turn")
    except UserError as error:
        said = str(error).replace("leave data.reward_field unset", "take these with --scorer column, without a field")
        raise UserError(said) from None
    if not num_rows:
        raise UserError(f"{path}: has no rows; give a file with some")
    for name, column in empty.items():
        where = f"under {column.field}" if column.field else "of its own"
        raise UserError(f"--scorer column: {path} has no rewards {where} for column {name}; leave it out")
    left_out = f"reference_rewards of {num_dropped} rows left out: another scorer gave them"
    return num_rows, [left_out] if num_dropped else []


def _check_json(row: InputRow) -> None:
    try:
        json.dumps(_record(row, {}))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{row.place}: the prompt's messages cannot be written as JSON ({error}); drop the row"
        ) from None


def _digest(path: str) -> str:
    """Of the input's content, wherever it lies; of a data set ``hf:NAME``, of its name."""
    digest = hashlib.blake2b(digest_size=20)
    for source in expand_paths(path):
        if source.startswith(HUB):
            digest.update(source.encode())
            continue
        files = sorted(file for file in Path(source).rglob("*") if file.is_file()) or [Path(source)]
        for name in files:
            with open(name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
