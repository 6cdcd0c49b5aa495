"""``nemo-rao score``: input -> scorers, batch by batch -> part file -> output with statistics.

The input and the scorers are checked as far as possible before the first response is scored.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.option_names import READING, OptionNames
from nemo_rao.rows.sources import HUB, JSON_LINES, expand_paths
from nemo_rao.rows.writing import record_of
from nemo_rao.runtime.part_file import PartFile, part_path
from nemo_rao.runtime.progress import Progress
from nemo_rao.scoring.column import COLUMN, ColumnScorer
from nemo_rao.scoring.finish import Scaling, stated_statistics, write_output
from nemo_rao.scoring.missing import Missing, reasons_of
from nemo_rao.scoring.notes import put_notes, total_notes
from nemo_rao.scoring.rule import RULE
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
from nemo_rao.scoring.source import Source, Survey, survey

VERSION = 4  # incremented when the same scorers give a different part file than before


def _make_judge(path: str, output_dir: OutputDirectory) -> Scorer:
    from nemo_rao.scoring.judge import make  # HTTP and YAML are imported only for judges

    return make(path, output_dir)


OPTIONS = OptionNames(READING, {"Leave data.reward_field unset": "Take these with --scorer column, without a field"})
KINDS: Mapping[str, Kind] = {
    "rule": RULE,
    "judge": Kind(_make_judge, lambda path: Path(path).stem.replace(".", "_"), "FILE.yaml"),
    "column": COLUMN,
}


@dataclass(frozen=True)
class Job:
    """Arguments of the command.

    Attributes:
        input: any source that ``nemo_rao.rows.reading.read_rows`` accepts.
        output: JSON Lines file, compressed if the name ends in .gz.
        scorer: list of ``[NAME=]KIND:ARGUMENT``.
        weight: list of ``NAME=NUMBER``.
        standardize, shift, scale: see ``finish``.
        statistics: .stats.json with the means and standard deviations for ``global``; ``None``: the output's own.
        max_missing: maximum fraction of responses without a score, per column.
        strict: stop at a response without a score.
        columns: canonical column name -> name in the input.
        ignore_fields: fields of the input to skip.
        bad_rows: ``refuse`` or ``drop`` rows that cannot be read.
        max_bad_rows: maximum fraction of bad rows.
        max_length: tokens that a model scorer reads; ``None``: as many as it was trained on.
        overwrite: whether ``output`` may exist.
        rows_at_once: number of rows that are scored and written together.
    """

    input: str
    output: Path
    scorer: Sequence[str]
    weight: Sequence[str] = ()
    standardize: str = "none"
    statistics: str | None = None
    shift: float = 0.0
    scale: float = 1.0
    max_missing: float = 0.05
    strict: bool = False
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignore_fields: Sequence[str] = ()
    bad_rows: str = "refuse"
    max_bad_rows: float = 0.05
    max_length: int | None = None
    overwrite: bool = False
    rows_at_once: int = 32

    @staticmethod
    def of(arguments: argparse.Namespace) -> Job:
        """Build a job from parsed arguments."""
        given = {one.name: vars(arguments)[one.name] for one in dataclasses.fields(Job)}
        return Job(**given | {"output": Path(arguments.output).expanduser()})

    def source(self) -> Source:
        """The input, with the options for reading it."""
        return Source(self.input, self.columns, tuple(self.ignore_fields), self.bad_rows == "drop")


def main(job: Job, kinds: Mapping[str, Kind] = KINDS) -> int:
    """Run the command. Returns the exit code: 0, or 1 after a failure during scoring, reported in one line on stderr.

    Args:
        job: the command's arguments.
        kinds: available kinds of scorers.

    Raises:
        UserError: invalid input, before anything is scored.
    """
    try:
        with OPTIONS.in_errors():
            score(job, kinds)
    except ScoringFailure as failure:
        print(f"error: {OPTIONS(' '.join(str(failure).split()))}", file=sys.stderr)
        return 1
    return 0


def score(job: Job, kinds: Mapping[str, Kind] = KINDS) -> dict[str, Any]:
    """Score every response of the input and write the output. Prints and returns the statistics.

    Raises:
        UserError: invalid input, before anything is scored.
        ScoringFailure: a failure during scoring; scored rows are kept, and the same call resumes.
    """
    _check_options(job)
    _check_files(job)
    source = job.source()
    with contextlib.ExitStack() as held:
        scorers = make_scorers(job.scorer, kinds, OutputDirectory(job.output.parent))
        for scorer in scorers.values():
            held.callback(scorer.close)
        scaling = _scaling(job, list(scorers))
        fields = list(dict.fromkeys(name for scorer in scorers.values() for name in scorer.fields))
        same_rewards = scaling.changes_nothing and all(_gives_own_rewards(one) for one in scorers.values())
        found = survey(source, scorers, fields, max_bad_rows=job.max_bad_rows, same_rewards=same_rewards)
        part = held.enter_context(PartFile(part_path(job.output), _work(source, scorers, same_rewards)))
        if part.num_records:
            print(f"resuming after {part.num_records} of {found.num_rows} rows", flush=True)
        missing = Missing(list(scorers), found.num_responses, job.max_missing)
        missing.add(part.records())
        try:
            missing.check()
            unscored = itertools.islice(source.input_rows(fields), part.num_records, None)
            for batch, scores in _scored(unscored, part.num_records, found, scorers, job):
                records = [_record(row, own, same_rewards) for row, own in zip(batch, scores, strict=True)]
                put_notes(records, scorers)
                part.append(records)
                missing.add(records)
                missing.check()
            counts = total_notes(part.records(), list(scorers))
            statistics = write_output(part, job.output, list(scorers), scaling, missing, counts)
        except (ScoringFailure, UserError) as error:  # a full disk, a changed input, ...
            raise ScoringFailure(f"{str(error).removesuffix('.')}. {_kept(part, found.num_rows)}") from error
        except KeyboardInterrupt:
            print(f"interrupted. {_kept(part, found.num_rows)}", file=sys.stderr)
            raise
        part.remove()
        notes = list(found.notes)
        for name in scorers:
            notes += [f"{name}: {count} {what}" for what, count in counts[name].items()]
            notes += [f"{name}: responses without a score: {text}" for text in missing.of(name)]
    from nemo_rao.scoring.report import print_report

    print_report(statistics)
    for note in notes:
        print(OPTIONS(note))
    print(f"wrote {job.output} and {job.output}.stats.json")
    return statistics


def _scored(
    rows: Iterator[InputRow], num_done: int, found: Survey, scorers: Mapping[str, Scorer], job: Job
) -> Iterator[tuple[list[InputRow], list[dict[str, Scored]]]]:
    """Batches of rows, with the scores of each by column."""
    order = sorted(scorers, key=lambda name: not scorers[name].forks)
    with Progress("score", unit="row", total=found.num_rows, done=num_done, stays=False) as progress:
        while batch := list(itertools.islice(rows, job.rows_at_once)):
            columns = {name: scorers[name].score(batch) for name in order}
            scores = [{name: columns[name][at] for name in scorers} for at in range(len(batch))]
            for row, own in zip(batch, scores, strict=True):
                for name, values in own.items():
                    assert len(values) == len(row.responses), f"scorer {name}: a score for each response"
                    for number, value in enumerate(values, start=1):
                        if job.strict and isinstance(value, NoScore):
                            raise ScoringFailure(
                                f"{row.location}, response {number}: {name} gave no score ({value.reason}), which "
                                "--strict does not allow. Leave the option out, or drop the row."
                            )
            yield batch, scores
            progress.advance(len(batch))


def _kept(part: PartFile, num_rows: int) -> str:
    return f"{part.num_records} of {num_rows} rows are kept in {part.path}; the same command resumes from there"


def _record(row: Row, columns: Mapping[str, Scored], same_rewards: bool) -> dict[str, Any]:
    """Item of the part file: the row in the canonical format, with columns instead of its rewards.

    If the rewards come from other scorers, ``reference_rewards`` are renamed, since they are on another scale.
    """
    responses = tuple(dataclasses.replace(response, reward=None, ensemble=()) for response in row.responses)
    record = record_of(dataclasses.replace(row, responses=responses))
    for number, response in enumerate(record["responses"]):
        for name, scores in columns.items():
            score = scores[number]
            response[name] = None if isinstance(score, NoScore) else score
    if "reference_rewards" in record and not same_rewards:
        record["input_reference_rewards"] = record.pop("reference_rewards")
    return record | reasons_of(row, columns)


def _gives_own_rewards(scorer: Scorer) -> bool:
    return isinstance(scorer, ColumnScorer) and not scorer.field


def _work(source: Source, scorers: Mapping[str, Scorer], same_rewards: bool) -> dict[str, Any]:
    """Everything that the part file depends on."""
    identities = {f"digest_of_scorer {name}": scorer.identity for name, scorer in scorers.items()}
    own = {"command": "score", "version": VERSION, "columns": list(scorers), "same_rewards": same_rewards}
    return own | source.identity() | identities


# ----------------------------------------------------------------------------------- checks before anything is scored


def _check_options(job: Job) -> None:
    for option, value in (("--rows-at-once", job.rows_at_once), ("--max-length", job.max_length)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be >= 1")
    for option, share in (("--max-missing", job.max_missing), ("--max-bad-rows", job.max_bad_rows)):
        if not 0 <= share <= 1:
            raise UserError(f"{option} {share:g}: must be a fraction from 0 to 1")


def _check_files(job: Job) -> None:
    """Check the files, as far as neither rows nor scorers are needed."""
    output = job.output
    if not output.name.endswith(JSON_LINES):
        raise UserError(f"output {output}: its name must end in one of {', '.join(JSON_LINES)}")
    if output.is_dir():
        raise UserError(f"output {output} is a directory. Pass a file.")
    part = part_path(output)
    for source in expand_paths(job.input):
        for path in (output, part):
            if not source.startswith(HUB) and os.path.realpath(source) == os.path.realpath(path):
                raise UserError(f"{job.input}: the input includes {path}, which is written to. Choose another output.")
    pattern = PurePath(os.path.abspath(os.path.expanduser(job.input)))
    if not job.input.startswith(HUB) and "*" in job.input and PurePath(os.path.abspath(part)).match(str(pattern)):
        raise UserError(f"{job.input}: matches {part}, which is written to. Choose an output in another directory.")
    if output.exists() and not job.overwrite:
        raise UserError(f"output {output} exists. Pass --overwrite to replace it, or choose another.")


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
            raise UserError("--statistics: is only used with --standardize global. Add that, or leave this out.")
        stated = stated_statistics(job.statistics, columns)
    scaling = Scaling(job.standardize, job.shift, job.scale, weights, stated)
    scaling.check(columns)
    return scaling
