"""All samples of a data set, checked against what the objective needs.

Rows that do not fit are dropped and counted, never truncated: a response cut short would carry a reward that was
given to another one. Rows that show a mistake in the data stop the run with their place.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nemo_rao.batch import Row, Sample
from nemo_rao.data.choice import (
    NO_PAIR,
    PairsBy,
    Responses,
    choose_responses,
    has_pair,
    is_known,
    lacks,
    prefer_by,
    reasons_left_out,
    where_to_add_rewards,
    which_pair,
)
from nemo_rao.data.encode import ChatTemplate, Encoder
from nemo_rao.data.fields import RewardField
from nemo_rao.data.rows import Paths, read_rows
from nemo_rao.data.store import LoadReport, PreferenceData
from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")

ROWS_AT_ONCE = 64  # tokenised in one call

PROMPT_TOO_LONG = "prompt alone as long as seq_length"
TOO_LONG = "prompt and response longer than seq_length"
NO_BOUNDARY = "no boundary in tokens between prompt and response"


@dataclass(frozen=True)
class Outcome:
    """What became of one row, for whoever shows it.

    Attributes:
        read: as it stands in the file.
        used: the same with the responses that are used.
        sample: its tokens; ``None`` where it cannot be tokenised.
        left_out: why some of its responses are not used.
        problem: (reason, what is said about this row) of a row that is dropped; ``None``: it is kept.
    """

    read: Row
    used: Row
    sample: Sample | None
    left_out: tuple[str, ...]
    problem: tuple[str, str] | None


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
    chat_template: ChatTemplate = "auto",
    template_arguments: Mapping[str, Any] | None = None,
    reward_field: RewardField = None,
    progress: Callable[[int], None] | None = None,
    observe: Callable[[Outcome], None] | None = None,
) -> PreferenceData:
    """Reads, tokenises and checks a data set.

    Args:
        paths: see ``rows.read_rows``.
        tokenizer: see ``encode.load_tokenizer``.
        seq_length: tokens. A row of which any response, with its prompt, is longer is dropped and counted.
        num_responses: keep the first so many responses of each prompt; None keeps all. Pairs are kept as they are.
        min_responses: each prompt must have so many, or the run stops.
        needs_rewards: each response must have a reward, or the run stops. A row that is dropped for its length or its
            boundary needs none: the model that scores a file cannot read such a response, either.
        needs_preference: the responses of each prompt must be comparable, by rewards or by their order, or the run
            stops.
        needs_pairs: a row of which no response is better than another is dropped and counted.
        needs_shared_first_token: all prompts must begin with the same token t0, or the run stops.
        needed_by: what asks for these five, for messages ("objective rao").
        responses, pairs_by, seed: see :mod:`nemo_rao.data.choice`.
        strict: stop at the first row that would be dropped.
        chat_template, template_arguments: see ``encode.Encoder``.
        reward_field: see ``rows.read_rows``.
        progress: called now and then with the number of rows read so far.
        observe: called with each row, kept or dropped, in the files' order.

    Raises:
        UserError: see above; or no row is left.
    """
    if num_responses is not None and num_responses < min_responses:
        raise UserError(
            f"data.num_responses is {num_responses}, but {needed_by} needs at least {min_responses} responses a "
            "prompt; raise it"
        )
    encoder = Encoder(tokenizer, chat_template=chat_template, template_arguments=template_arguments)
    report = LoadReport()

    def checked_rows() -> Iterator[tuple[Row, Row, UserError | None]]:
        """(row as it is read, row as it is used, what is wrong with it)."""
        for number, read in enumerate(read_rows(paths, reward_field=reward_field)):
            row = read
            if num_responses is not None and not row.ranked:
                row = replace(row, responses=row.responses[:num_responses])
            try:
                preferred = prefer_by(row, pairs_by)
                _check_responses(preferred, min_responses, needs_rewards, needs_preference, needed_by)
                yield read, choose_responses(preferred, responses, seed=seed, number=number), None
            except UserError as complaint:
                yield read, row, complaint

    def kept_samples() -> Iterator[Sample]:
        first: Sample | None = None
        for batch in _batches(checked_rows(), ROWS_AT_ONCE):
            rows = [row for _, row, _ in batch]
            for (read, row, complaint), sample in zip(batch, encoder.encode_many(rows), strict=True):
                report.rows_read += 1
                problem = _why_dropped(row, sample, seq_length, needs_pairs and complaint is None)
                if problem is None and complaint is not None:
                    raise complaint
                left_out = tuple(reasons_left_out(read, row, num_responses, responses))
                if observe is not None:
                    tokens = sample if isinstance(sample, Sample) else None
                    observe(Outcome(read, row, tokens, left_out, problem))
                if problem is not None:
                    if strict:
                        raise UserError(f"{problem[1]} (strict: no row may be dropped)")
                    report.drop(*problem)
                    continue
                assert isinstance(sample, Sample)
                first = first or sample
                if needs_shared_first_token and sample.prompt[0] != first.prompt[0]:
                    raise _different_first_tokens(first, sample, tokenizer, needed_by)
                report.rows_kept += 1
                report.use(
                    len(read.responses),
                    len(row.responses),
                    left_out,
                    which_pair(row, responses) if needs_pairs else None,
                )
                report.unknown_rewards += sum(
                    response.reward is not None and not is_known(response.reward) for response in row.responses
                )
                report.inner_ends += sum(encoder.end_token_id in response[:-1] for response in sample.responses)
                yield sample
            if progress is not None:
                progress(report.rows_read)

    data = PreferenceData(kept_samples(), report)
    if not data:
        sources = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        raise UserError(f"{', '.join(map(str, sources))}: no rows left to train on; {report}")
    return data


def _check_responses(row: Row, min_responses: int, needs_rewards: bool, needs_preference: bool, needed_by: str) -> None:
    if len(row.responses) < min_responses:
        raise UserError(
            f"{row.place}: has {len(row.responses)} responses, {needed_by} needs at least {min_responses} a prompt; "
            "drop the row or add responses"
        )
    if needs_rewards:
        for number, response in enumerate(row.responses, start=1):
            if not is_known(response.reward) or not all(map(is_known, response.ensemble)):
                raise UserError(
                    f"{row.place}: response {number} has {lacks(response)}, which {needed_by} needs; "
                    f"{where_to_add_rewards(row)}"
                )
    if needs_preference and not row.ranked and any(response.reward is None for response in row.responses):
        raise UserError(
            f"{row.place}: its responses have neither an order (chosen, rejected) nor a reward each, and {needed_by} "
            "compares them; add rewards (or labels), or name the field they stand in by data.reward_field"
        )


def _why_dropped(row: Row, sample: Sample | UserError, seq_length: int, needs_pairs: bool) -> tuple[str, str] | None:
    """(reason, what to say about this row), or None to keep it."""
    if needs_pairs and not has_pair(row):
        return NO_PAIR, f"{row.place}: all responses have the same reward"
    if isinstance(sample, UserError):
        return NO_BOUNDARY, str(sample)
    if len(sample.prompt) >= seq_length:
        return PROMPT_TOO_LONG, f"{row.place}: the prompt has {len(sample.prompt)} tokens, seq_length is {seq_length}"
    for number, response in enumerate(sample.responses, start=1):
        if len(sample.prompt) + len(response) > seq_length:
            return TOO_LONG, (
                f"{row.place}: prompt and response {number} have {len(sample.prompt)} + {len(response)} tokens, "
                f"seq_length is {seq_length}"
            )
    return None


def mismatched(data: PreferenceData, *, seq_length: int, seed: int) -> PreferenceData:
    """Every prompt with a response to another one: what the log-ratio of unrelated responses is estimated on.

    The other prompt is the next one in a seeded random order, the response one of its own at random: always the same
    for the same data and seed. **Choice** A response too long for its new prompt is cut there, since no reward belongs
    to it.

    Raises:
        UserError: there is only one prompt.
    """
    if len(data) < 2:
        raise UserError(
            f"{data[0].place}: the only prompt that is left, but the objective compares with responses to other "
            "prompts; add data"
        )
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, len(data)])))
    order = generator.permutation(len(data))
    draws = generator.random_sample(len(data))
    others = np.empty(len(data), dtype=np.int64)
    others[order] = np.roll(order, -1)

    def samples() -> Iterator[Sample]:
        for index in range(len(data)):
            sample, other = data[index], data[int(others[index])]
            response = other.responses[int(draws[index] * len(other.responses))][: seq_length - len(sample.prompt)]
            yield replace(
                sample,
                responses=(response,),
                rewards=np.full(1, np.nan),
                ranked=False,
                ensemble=np.zeros((1, 0)),
                reference_rewards=np.zeros(0),
                answers=None,
            )

    return PreferenceData(samples())


def _different_first_tokens(a: Sample, b: Sample, tokenizer: PreTrainedTokenizerBase, needed_by: str) -> UserError:
    token_a, token_b = tokenizer.convert_ids_to_tokens([int(a.prompt[0]), int(b.prompt[0])])
    return UserError(
        f"{needed_by} needs all prompts to begin with the same token, but {a.place} begins with {token_a!r} and "
        f"{b.place} with {token_b!r}; use a chat template, or a tokenizer that adds a beginning token"
    )


def _batches(rows: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch
