"""Loading of a data set, with every sample checked against the objective's requirements.

Rows that are too long are dropped and counted, never truncated: the reward of a truncated response would belong to
another text. Rows with an error in the data stop the run and are reported with file and line, or are dropped and
counted if the user asks for it. Unused fields and responses are counted as well.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nemo_rao.batch import Row, Sample
from nemo_rao.data.choice import PairsBy, Responses, which_pair
from nemo_rao.data.encode import Answers, BoundaryError, ChatTemplate, Encoder, inner_ends
from nemo_rao.data.report import LoadReport, Outcome
from nemo_rao.data.row_checks import Candidate, RowChecks, Truncated
from nemo_rao.data.sample_checks import equal_tokens, why_dropped
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import UserError
from nemo_rao.rows.reading import Paths, read_rows
from nemo_rao.rows.rewards import RewardField

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
BadRows = Literal["refuse", "drop"]

ROWS_AT_ONCE = 64  # tokenized in one call
INNER_END = "a response contains the end token before its end, which looks like an early end"


def load_preferences(
    paths: Paths,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_length: int,
    num_responses: int | None = None,
    min_responses: int = 1,
    needs_rewards: bool = False,
    needs_preference: bool = False,
    needs_pairs: bool = False,
    needs_shared_first_token: bool = False,
    needed_by: str = "the objective",
    responses: Responses = "all",
    pairs_by: PairsBy = "auto",
    seed: int = 0,
    strict: bool = False,
    bad_rows: BadRows = "refuse",
    max_bad_rows: float = 0.05,
    truncated: Truncated = "drop",
    chat_template: ChatTemplate = "auto",
    template_arguments: Mapping[str, Any] | None = None,
    answers: Answers = "template",
    reward_field: RewardField = None,
    columns: Mapping[str, str] | None = None,
    ignore_fields: Sequence[str] = (),
    max_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
    observer: Callable[[Outcome], None] | None = None,
) -> PreferenceData:
    """Read, tokenize and check a data set.

    Args:
        paths: see ``rows.read_rows``.
        tokenizer: see ``encode.load_tokenizer``.
        seq_length: tokens. A row with any prompt and response longer than this is dropped and counted.
        num_responses: keep only the first ``num_responses`` of each prompt; ``None`` keeps all. Pairs are unaffected.
        min_responses: minimum number of responses per prompt; a row with fewer is bad.
        needs_rewards: each response must have a reward, or the row is bad. A row that is dropped for its length or
            token boundary needs none: the model that scores a file cannot read such a response either.
        needs_preference: the responses of each prompt must be comparable, by rewards or by their order, or the row is
            bad.
        needs_pairs: drop and count a row in which no response is better than another, or the compared responses have
            the same tokens.
        needs_shared_first_token: all prompts must begin with the same token t0, or the run stops.
        needed_by: owner of the five requirements above, for messages ("objective rao").
        responses, pairs_by, seed: see :mod:`nemo_rao.data.choice`.
        strict: stop at the first row that would be dropped.
        bad_rows: ``refuse``: the first bad row stops the run. A row is bad if it cannot be read, the chat template
            rejects it, or it does not meet a requirement. ``drop``: bad rows are dropped and counted.
        max_bad_rows: fraction of bad rows in [0, 1] above which the run stops even with ``bad_rows="drop"``.
        truncated: ``drop``: responses marked as truncated are left out, and a row that then has too few is dropped.
            ``without_end``: they are kept, without an end token.
        chat_template, template_arguments, answers: see ``encode.Encoder``.
        reward_field, columns, ignore_fields: see ``rows.read_rows``.
        max_rows: stop after this many readable rows; ``None``: read all. For a quick look at large data.
        progress: called now and then with the number of rows read so far.
        observer: called with the outcome of each row, in file order, except that unreadable records may come slightly
            early.

    Raises:
        UserError: a check above fails, or no row is left.
    """
    checks = RowChecks(
        num_responses,
        min_responses,
        needs_rewards,
        needs_preference,
        needs_pairs,
        needed_by,
        responses,
        pairs_by,
        seed,
        truncated,
    )
    encoder = Encoder(tokenizer, chat_template=chat_template, template_arguments=template_arguments, answers=answers)
    report = LoadReport()
    drops_bad = bad_rows == "drop" and not strict

    def candidates() -> Iterator[_Read]:
        """Rows, and the errors of unreadable records."""
        unreadable: list[UserError] = []
        rows = read_rows(
            paths,
            reward_field=reward_field,
            columns=columns or {},
            ignore_fields=ignore_fields,
            on_bad=unreadable.append if drops_bad else None,
        )
        try:
            for number, row in enumerate(itertools.islice(rows, max_rows)):
                yield from unreadable
                unreadable.clear()
                yield checks.apply(row, number)
        except UserError as complaint:  # raised after the rows before it, which are encoded in batches
            yield from unreadable
            yield _Stop(complaint)
            return
        yield from unreadable

    def judged(candidate: _Read, encoded: Sample | UserError | None) -> Outcome:
        """The outcome of a row. Counts bad and dropped rows."""
        if isinstance(candidate, _Stop):
            raise candidate.complaint
        if isinstance(candidate, UserError):
            return bad(None, None, None, candidate)
        read, row, sample = candidate.read, candidate.row, encoded if isinstance(encoded, Sample) else None
        report.not_used(read.unused)
        dropped = candidate.dropped
        if dropped is None and isinstance(encoded, BoundaryError):
            dropped = encoded.reason, str(encoded)
        if dropped is None and isinstance(encoded, UserError):
            return bad(read, row, None, encoded)
        if dropped is None:
            assert row is not None and sample is not None
            dropped = why_dropped(row, sample, seq_length, needs_pairs and candidate.bad is None)
        if dropped is not None:
            if strict:
                raise UserError(f"{dropped[1]} (strict: no row may be dropped)")
            report.drop(*dropped)
            return Outcome(read, row, sample, *dropped)
        if candidate.bad is not None:
            return bad(read, row, sample, candidate.bad)
        assert sample is not None
        remarks = [*candidate.remarks, *sample.remarks, *equal_tokens(sample)]
        if inner_ends(sample, encoder.end_token_id):
            remarks.append(INNER_END)
        return Outcome(read, row, sample, None, "", tuple(dict.fromkeys(remarks)), candidate.left_out)

    def bad(read: Row | None, row: Row | None, sample: Sample | None, complaint: UserError) -> Outcome:
        if not drops_bad:
            raise complaint
        return Outcome(read, row, sample, report.drop_bad(str(complaint)), str(complaint))

    def kept_samples() -> Iterator[Sample]:
        first: Sample | None = None
        for batch in _batches(candidates(), ROWS_AT_ONCE):
            encoded = _encode(encoder, batch)
            for candidate, made in zip(batch, encoded, strict=True):
                report.rows_read += 1
                outcome = judged(candidate, made)
                if observer is not None:
                    observer(outcome)
                sample, read, row = outcome.sample, outcome.read, outcome.used
                if outcome.reason is not None:
                    continue
                assert sample is not None and read is not None and row is not None
                first = first or sample
                if needs_shared_first_token and sample.prompt[0] != first.prompt[0]:
                    raise different_first_tokens(first, sample, tokenizer, needed_by)
                report.keep(outcome, which_pair(read, row, responses) if needs_pairs else None)
                yield sample
            if progress is not None:
                progress(report.rows_read)

    data = PreferenceData(kept_samples(), report)
    report.notes = list(dict.fromkeys(encoder.notes))
    sources = ", ".join(map(str, [paths] if isinstance(paths, (str, os.PathLike)) else paths))
    if report.rows_bad > max_bad_rows * report.rows_read:
        raise UserError(
            f"{sources}: {report.rows_bad} of {report.rows_read} rows are bad, more than data.max_bad_rows="
            f"{max_bad_rows:g} allows. Fix them or raise the limit: {'; '.join(report.about_bad())}"
        )
    if not data:
        raise UserError(f"{sources}: no rows left to train on: {report}")
    return data


@dataclass(frozen=True)
class _Stop:
    """An error that ends reading."""

    complaint: UserError


_Read = Candidate | UserError | _Stop


def _encode(encoder: Encoder, batch: Sequence[_Read]) -> list[Sample | UserError | None]:
    """For each row its sample, the error that prevented it, or ``None`` if there is nothing to encode."""
    rows = [entry.row if isinstance(entry, Candidate) and entry.dropped is None else None for entry in batch]
    made = iter(encoder.encode_many([row for row in rows if row is not None]))
    return [None if row is None else next(made) for row in rows]


def different_first_tokens(a: Sample, b: Sample, tokenizer: PreTrainedTokenizerBase, needed_by: str) -> UserError:
    """The error for two prompts that begin with different tokens."""
    token_a, token_b = tokenizer.convert_ids_to_tokens([int(a.prompt[0]), int(b.prompt[0])])
    return UserError(
        f"{needed_by} needs all prompts to begin with the same token, but {a.location} begins with {token_a!r} and "
        f"{b.location} with {token_b!r}. Use a chat template, or a tokenizer that adds a beginning token."
    )


def _batches(rows: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch
