"""All samples of a data set, checked against what the objective needs and kept in a few flat arrays.

Rows that do not fit are dropped and counted, never truncated: a response cut short would carry a reward that was
given to another one. Rows that show a mistake in the data stop the run with their place.
"""

from __future__ import annotations

import array
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nemo_rao.batch import RewardSummary, Row, Sample
from nemo_rao.data.choice import (
    NO_PAIR,
    PairsBy,
    Responses,
    choose_responses,
    has_pair,
    prefer_by,
    where_to_add_rewards,
)
from nemo_rao.data.encode import ChatTemplate, Encoder
from nemo_rao.data.fields import RewardField
from nemo_rao.data.rows import Paths, read_rows
from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")

ROWS_AT_ONCE = 64  # tokenised in one call

PROMPT_TOO_LONG = "prompt alone as long as seq_length"
TOO_LONG = "prompt and response longer than seq_length"
NO_BOUNDARY = "no boundary in tokens between prompt and response"


@dataclass
class LoadReport:
    """What became of the rows read. ``str()`` gives one line for the user.

    Attributes:
        rows_read: rows (prompts) in the files.
        rows_kept: of these, those in the data.
        dropped: reason -> rows.
        examples: reason -> what was said about the first row dropped for it.
        inner_ends: kept responses with the end token also inside them, which then looks like an early end.
    """

    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    inner_ends: int = 0

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, example)

    def __str__(self) -> str:
        parts = [f"{self.rows_kept} of {self.rows_read} rows kept"]
        parts += [f"{rows} dropped ({reason}; first: {self.examples[reason]})" for reason, rows in self.dropped.items()]
        if self.inner_ends:
            parts.append(f"{self.inner_ends} responses hold the end token inside")
        return "; ".join(parts)


class PreferenceData:
    """N samples in memory as flat arrays: 4 bytes a token and little else.

    A sample's segments (its prompt, then its responses) follow each other in ``tokens``; ``segment_ends`` delimits
    them, ``first_segment`` says where a sample's begin. ``report`` says what was dropped on the way here.
    """

    def __init__(self, samples: Iterable[Sample], report: LoadReport | None = None) -> None:
        tokens = array.array("i")  # int32; grows in place
        segment_ends, first_segment = [0], [0]
        rewards: list[float] = []
        ensemble: list[np.ndarray] = []
        reference_rewards: list[np.ndarray] = []
        answers: dict[int, np.ndarray] = {}  # segment -> where it is an answer, of conversations
        ranked: list[bool] = []
        places: list[str] = []
        for sample in samples:
            for segment in (sample.prompt, *sample.responses):
                tokens.frombytes(segment.astype(np.int32).tobytes())
                segment_ends.append(len(tokens))
            for number, mask in enumerate(sample.answers or (), start=1):
                answers[first_segment[-1] + number] = mask
            rewards.extend(sample.rewards)
            ensemble.append(sample.ensemble)
            reference_rewards.append(sample.reference_rewards)
            ranked.append(sample.ranked)
            places.append(sample.place)
            first_segment.append(len(segment_ends) - 1)
        self.report = report if report is not None else LoadReport(len(places), len(places))
        self._tokens = np.frombuffer(tokens, dtype=np.int32)
        self._segment_ends = np.array(segment_ends, dtype=np.int64)  # [segments + 1]
        self._first_segment = np.array(first_segment, dtype=np.int64)  # [N + 1]
        self._rewards = np.array(rewards, dtype=np.float64)  # [all responses]
        self._ensemble = np.concatenate(ensemble) if ensemble else np.zeros((0, 0))  # [all responses, M]
        self._reference_rewards = np.concatenate(reference_rewards) if reference_rewards else np.zeros(0)
        self._reference_reward_ends = np.cumsum([0, *map(len, reference_rewards)])  # [N + 1]
        self._answers = answers
        self._ranked = np.array(ranked, dtype=bool)  # [N]
        self._places = places
        for shared in (self._tokens, self._rewards, self._ensemble, self._reference_rewards):  # samples are views
            shared.setflags(write=False)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        first, end = self._first_segment[index : index + 2]
        prompt, *responses = (
            self._tokens[self._segment_ends[segment] : self._segment_ends[segment + 1]] for segment in range(first, end)
        )
        offset = self.response_offset(index)
        return Sample(
            prompt=prompt,
            responses=tuple(responses),
            rewards=self._rewards[offset : offset + len(responses)],
            ranked=bool(self._ranked[index]),
            place=self._places[index],
            ensemble=self._ensemble[offset : offset + len(responses)],
            reference_rewards=self._reference_rewards[slice(*self._reference_reward_ends[index : index + 2])],
            answers=tuple(self._answers[segment] for segment in range(first + 1, end))
            if first + 1 in self._answers
            else None,
        )

    @property
    def num_responses(self) -> int:
        """Responses of all samples; they are numbered from 0 in the order of the samples."""
        return len(self._rewards)

    def response_offset(self, index: int) -> int:
        """The number of a sample's first response in the whole data set (``MicroBatch.response_ids``)."""
        return int(self._first_segment[index]) - index

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """``[N]`` int64 tokens of each sample's longest row: its prompt with its longest response."""
        sizes = np.diff(self._segment_ends)
        return np.array(
            [sizes[a] + sizes[a + 1 : b].max() for a, b in itertools.pairwise(self._first_segment)], dtype=np.int64
        )

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with one response; 0 where there is no sample."""
        return int(self.lengths.max(initial=0))

    def reward_summary(self) -> RewardSummary:
        """What is known of the rewards of all responses."""
        known = ~np.isnan(self._rewards)
        if not known.any():
            return RewardSummary(all_ranked=bool(self._ranked.all()), num_columns=self._ensemble.shape[1] or 1)
        sample_of = np.repeat(np.arange(len(self)), np.diff(self._first_segment) - 1)
        counts = np.bincount(sample_of[known], minlength=len(self))
        sums = np.bincount(sample_of[known], weights=self._rewards[known], minlength=len(self))
        return RewardSummary(
            mean=float(np.mean(sums[counts > 0] / counts[counts > 0])),
            low=float(self._rewards[known].min()),
            high=float(self._rewards[known].max()),
            all_labels=bool(np.isin(self._rewards, (0, 1)).all()),
            all_ranked=bool(self._ranked.all()),
            num_columns=self._ensemble.shape[1] or 1,
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokens and boundaries in their order. Reference sums depend on nothing else here, so new
        rewards for the same responses leave it as it is."""
        digest = hashlib.sha256(b"nemo_rao preference data 1\n")
        digest.update(np.array([len(self), len(self._segment_ends)], dtype="<i8").tobytes())
        for values, kind in ((self._first_segment, "<i8"), (self._segment_ends, "<i8"), (self._tokens, "<i4")):
            digest.update(np.ascontiguousarray(values, dtype=kind).data)
        for segment, mask in self._answers.items():
            digest.update(np.array([segment], dtype="<i8").tobytes() + np.packbits(mask).tobytes())
        return digest.hexdigest()


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

    def checked_rows() -> Iterator[tuple[Row, UserError | None]]:
        for number, row in enumerate(read_rows(paths, reward_field=reward_field)):
            if num_responses is not None and not row.ranked:
                row = replace(row, responses=row.responses[:num_responses])
            try:
                preferred = prefer_by(row, pairs_by)
                _check_responses(preferred, min_responses, needs_rewards, needs_preference, needed_by)
                yield choose_responses(preferred, responses, seed=seed, number=number), None
            except UserError as complaint:
                yield row, complaint

    def kept_samples() -> Iterator[Sample]:
        first: Sample | None = None
        for batch in _batches(checked_rows(), ROWS_AT_ONCE):
            rows = [row for row, _ in batch]
            for (row, complaint), sample in zip(batch, encoder.encode_many(rows), strict=True):
                report.rows_read += 1
                problem = _why_dropped(row, sample, seq_length, needs_pairs and complaint is None)
                if problem is None and complaint is not None:
                    raise complaint
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
            if response.reward is None or any(math.isnan(reward) for reward in response.ensemble):
                raise UserError(
                    f"{row.place}: response {number} has no reward, which {needed_by} needs; "
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
