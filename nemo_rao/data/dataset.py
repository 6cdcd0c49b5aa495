"""All samples of a data set, checked against what the objective needs and kept in a few flat arrays.

Rows that do not fit are dropped and counted, never truncated: a response cut short would carry a reward that was
given to another one. Rows that show a mistake in the data stop the run with their place.
"""

from __future__ import annotations

import array
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_rao.batch import Row, Sample
from nemo_rao.data.encode import ChatTemplate, Encoder
from nemo_rao.data.rows import Paths, read_rows
from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        ranked: list[bool] = []
        places: list[str] = []
        for sample in samples:
            for segment in (sample.prompt, *sample.responses):
                tokens.frombytes(segment.astype(np.int32).tobytes())
                segment_ends.append(len(tokens))
            rewards.extend(sample.rewards)
            ranked.append(sample.ranked)
            places.append(sample.place)
            first_segment.append(len(segment_ends) - 1)
        self.report = report if report is not None else LoadReport(len(places), len(places))
        self._tokens = np.frombuffer(tokens, dtype=np.int32)
        self._segment_ends = np.array(segment_ends, dtype=np.int64)  # [segments + 1]
        self._first_segment = np.array(first_segment, dtype=np.int64)  # [N + 1]
        self._rewards = np.array(rewards, dtype=np.float64)  # [all responses]
        self._ranked = np.array(ranked, dtype=bool)  # [N]
        self._places = places
        for shared in (self._tokens, self._rewards):  # samples are views of these
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

    def reward_mean(self) -> float:
        """The mean over prompts of the mean reward of a prompt's responses: each prompt counts once, as in the loss.

        Responses without a reward are left out, and so are prompts that have none at all.

        Raises:
            UserError: no response has a reward.
        """
        known = ~np.isnan(self._rewards)
        sample_of = np.repeat(np.arange(len(self)), np.diff(self._first_segment) - 1)
        counts = np.bincount(sample_of[known], minlength=len(self))
        sums = np.bincount(sample_of[known], weights=self._rewards[known], minlength=len(self))
        if not counts.any():
            raise UserError("the data has no rewards, whose mean is needed; add them, or set the value that needs it")
        return float(np.mean(sums[counts > 0] / counts[counts > 0]))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokens and boundaries in their order. Reference sums depend on nothing else here, so new
        rewards for the same responses leave it as it is."""
        digest = hashlib.sha256(b"nemo_rao preference data 1\n")
        digest.update(np.array([len(self), len(self._segment_ends)], dtype="<i8").tobytes())
        for values, kind in ((self._first_segment, "<i8"), (self._segment_ends, "<i8"), (self._tokens, "<i4")):
            digest.update(np.ascontiguousarray(values, dtype=kind).data)
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
    needs_shared_first_token: bool = False,
    needed_by: str = "the objective",
    strict: bool = False,
    chat_template: ChatTemplate = "auto",
    template_arguments: Mapping[str, Any] | None = None,
    reward_field: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> PreferenceData:
    """Reads, tokenises and checks a data set.

    Args:
        paths: see ``rows.read_rows``.
        tokenizer: see ``encode.load_tokenizer``.
        seq_length: tokens. A row of which any response, with its prompt, is longer is dropped and counted.
        num_responses: keep the first so many responses of each prompt; None keeps all. Pairs are kept as they are.
        min_responses: each prompt must have so many, or the run stops.
        needs_rewards: each response must have a reward, or the run stops.
        needs_preference: the responses of each prompt must be comparable, by rewards or by their order, or the run
            stops.
        needs_shared_first_token: all prompts must begin with the same token t0, or the run stops.
        needed_by: what asks for these four, for messages ("objective rao").
        strict: stop at the first row that would be dropped.
        chat_template, template_arguments: see ``encode.Encoder``.
        reward_field: see ``rows.read_rows``.
        progress: called now and then with the number of rows read so far.

    Raises:
        UserError: see above; or no row is left.
    """
    if num_responses is not None and num_responses < min_responses:
        raise UserError(
            f"num_responses is {num_responses}, but {needed_by} needs at least {min_responses} responses a prompt; "
            "raise it"
        )
    encoder = Encoder(tokenizer, chat_template=chat_template, template_arguments=template_arguments)
    report = LoadReport()

    def checked_rows() -> Iterator[Row]:
        for row in read_rows(paths, reward_field=reward_field):
            if num_responses is not None and not row.ranked:
                row = replace(row, responses=row.responses[:num_responses])
            _check_responses(row, min_responses, needs_rewards, needs_preference, needed_by)
            yield row

    def kept_samples() -> Iterator[Sample]:
        first: Sample | None = None
        for rows in _batches(checked_rows(), ROWS_AT_ONCE):
            for row, sample in zip(rows, encoder.encode_many(rows), strict=True):
                report.rows_read += 1
                problem = _why_dropped(row, sample, seq_length)
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
            if response.reward is None:
                raise UserError(
                    f"{row.place}: response {number} has no reward, which {needed_by} needs; add it, "
                    "or name the field it stands in"
                )
    if needs_preference and not row.ranked and any(response.reward is None for response in row.responses):
        raise UserError(
            f"{row.place}: its responses have neither an order (chosen, rejected) nor a reward each, and {needed_by} "
            "compares them; add rewards, or name the field they stand in"
        )


def _why_dropped(row: Row, sample: Sample | UserError, seq_length: int) -> tuple[str, str] | None:
    """(reason, what to say about this row), or None to keep it."""
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


def _different_first_tokens(a: Sample, b: Sample, tokenizer: PreTrainedTokenizerBase, needed_by: str) -> UserError:
    token_a, token_b = tokenizer.convert_ids_to_tokens([int(a.prompt[0]), int(b.prompt[0])])
    return UserError(
        f"{needed_by} needs all prompts to begin with the same token, but {a.place} begins with {token_a!r} and "
        f"{b.place} with {token_b!r}; use a chat template, or a tokenizer that adds a beginning token"
    )


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch
