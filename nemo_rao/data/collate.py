"""Collation of samples into a micro-batch: input tokens and the label of each position.

Four layouts give the same log-probabilities; x, y are the tokens of a prompt and a response, y' of another response:

    rows                    [x y    pad]  [x y' pad]  [u v    pad]      one sequence per response
    packed                  [x y x y' u v pad]                          one sequence, rows concatenated
    shared prompts          [x y y' pad]  [u v    pad]                  one sequence per prompt
    packed, shared prompts  [x y y' u v pad]

A shared prompt occurs once, without its last token. Each response begins with a copy of that token, which predicts the
response's first token, so that every position predicts exactly one token. In each response, positions continue from the
prompt. Rows do not attend to each other (:class:`nemo_rao.batch.MicroBatch`, ``segments``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, Sample

NO_SEGMENT = -1


@dataclass(frozen=True)
class _Segment:
    """Contiguous tokens of a sequence.

    Attributes:
        tokens, labels: ``[n]``; one label per token, 0 where nothing is predicted.
        first_position: position of the first token within its row.
        prompt: number of leading labels that are prompt tokens.
        reads_prompt: whether the prompt's log-probability is read here. It is the same in all of the prompt's
            segments, so it is read in one of them.
        answers: ``[n - prompt]`` bool, which of the other labels count; ``None`` for a prompt alone.
        continues: whether it continues the shared prompt's segment.
    """

    tokens: np.ndarray
    labels: np.ndarray
    first_position: int
    prompt: int
    reads_prompt: bool
    answers: np.ndarray | None
    continues: bool = False


def collate(
    samples: Sequence[Sample],
    first_response_ids: Sequence[int],
    *,
    pad_token_id: int,
    pad_multiple: int = 1,
    packed: bool = False,
    shared_prompts: bool = False,
    reference: np.ndarray | None = None,
) -> MicroBatch:
    """Collate samples. Sequences are padded to the longest one, rounded up to ``pad_multiple``.

    Args:
        samples: the P prompts; their numbers of responses may differ.
        first_response_ids: ``[P]`` index of each prompt's first response in the whole data set
            (``PreferenceData.response_offset``).
        pad_token_id: fills ``tokens`` after the end of a sequence; nothing is predicted there.
        pad_multiple: tokens. T is a multiple of it, as tensor, sequence and context parallelism require.
        packed: put all rows into one sequence.
        shared_prompts: store a prompt's tokens once for all its responses.
        reference: ``[all responses, 2]`` reference log-probs in nats, indexed by response id, or ``None``.

    Returns:
        a :class:`MicroBatch` on the CPU with R = number of responses of all samples.
    """
    assert samples and len(samples) == len(first_response_ids), (len(samples), len(first_response_ids))
    assert pad_multiple >= 1, pad_multiple
    sequences = [list(_shared(sample)) for sample in samples] if shared_prompts else list(_rows(samples))
    if packed:
        sequences = [[segment for sequence in sequences for segment in sequence]]
    longest = max(sum(len(segment.tokens) for segment in sequence) for sequence in sequences)
    layout = _Layout(len(sequences), -(-longest // pad_multiple) * pad_multiple, pad_token_id)
    for number, sequence in enumerate(sequences):
        layout.add(number, sequence)

    num_responses = [len(sample.responses) for sample in samples]
    prompt_index = np.repeat(np.arange(len(samples)), num_responses)
    response_index = np.concatenate([np.arange(number) for number in num_responses])
    response_ids = np.asarray(first_response_ids, dtype=np.int64)[prompt_index] + response_index
    reference_log_probs = None
    if reference is not None:
        assert reference.ndim == 2 and reference.shape[1] == 2, reference.shape
        reference_log_probs = torch.from_numpy(reference[response_ids].astype(np.float32))
    ensemble = np.concatenate([sample.ensemble for sample in samples])
    num_reference_rewards = [len(sample.reference_rewards) for sample in samples]
    reference_rewards = np.full((len(samples), max(num_reference_rewards)), np.nan, dtype=np.float32)
    for number, sample in enumerate(samples):
        reference_rewards[number, : num_reference_rewards[number]] = sample.reference_rewards
    return MicroBatch(
        tokens=torch.from_numpy(layout.tokens),
        labels=torch.from_numpy(layout.labels),
        position_ids=torch.from_numpy(layout.position_ids),
        segments=torch.tensor(layout.segments) if packed or shared_prompts else None,
        longest_segment=max(size for size, _, _ in layout.segments),
        prompt_positions=_ragged(layout.prompt_positions),
        response_positions=_ragged(layout.response_positions),
        all_prompt_positions=torch.from_numpy(np.concatenate(layout.prompt_positions)),
        all_response_positions=torch.from_numpy(np.concatenate(layout.response_positions)),
        boundary=torch.tensor(layout.boundary),
        end=torch.tensor(layout.end),
        prompt_lengths=torch.tensor([len(positions) for positions in layout.prompt_positions], dtype=torch.float32),
        response_lengths=torch.tensor([len(positions) for positions in layout.response_positions], dtype=torch.float32),
        num_tokens=sum(len(segment.tokens) for sequence in sequences for segment in sequence),
        num_row_tokens=sum(len(s.prompt) * len(s.responses) + sum(map(len, s.responses)) for s in samples),
        num_attention_pairs=layout.num_pairs,
        prompt_index=torch.from_numpy(prompt_index.astype(np.int64)),
        response_index=torch.from_numpy(response_index.astype(np.int64)),
        response_ids=torch.from_numpy(response_ids),
        rewards=torch.from_numpy(np.concatenate([sample.rewards for sample in samples]).astype(np.float32)),
        ranked=torch.tensor([sample.ranked for sample in samples], dtype=torch.bool),
        reference=reference_log_probs,
        num_prompts=len(samples),
        max_responses=max(num_responses),
        reward_ensemble=torch.from_numpy(ensemble.astype(np.float32)) if ensemble.shape[1] else None,
        reference_rewards=torch.from_numpy(reference_rewards) if reference_rewards.shape[1] else None,
        of_tokens={name: _of_tokens([one.of_tokens[name] for one in samples]) for name in samples[0].of_tokens},
    )


def _of_tokens(of_samples: Sequence[Sequence[np.ndarray]]) -> Tensor:
    """``[R, longest]`` float32, padded with 0 after each response's last token."""
    every = [values for of_sample in of_samples for values in of_sample]
    made = np.zeros((len(every), max(map(len, every))), dtype=np.float32)
    for row, values in zip(made, every, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(made)


def _rows(samples: Sequence[Sample]) -> Iterator[list[_Segment]]:
    """One segment per row."""
    for sample in samples:
        for number, response in enumerate(sample.responses):
            tokens = np.concatenate([sample.prompt, response])
            labels = np.append(tokens[1:], 0)
            yield [_Segment(tokens, labels, 0, len(sample.prompt) - 1, number == 0, _answers(sample, number))]


def _shared(sample: Sample) -> Iterator[_Segment]:
    """The prompt without its last token, then that token with each response."""
    last = len(sample.prompt) - 1
    if last:
        yield _Segment(sample.prompt[:last], sample.prompt[1:], 0, last, True, None)
    for number, response in enumerate(sample.responses):
        tokens, labels = np.append(sample.prompt[last], response), np.append(response, 0)
        reads_prompt = last == 0 and number == 0  # a prompt of one token predicts none of its tokens: log-prob 0
        yield _Segment(tokens, labels, last, 0, reads_prompt, _answers(sample, number), continues=last > 0)


def _answers(sample: Sample, number: int) -> np.ndarray:
    """``[response tokens + 1]`` bool: the labels that count; the one after the end token does not."""
    counted = np.ones(len(sample.responses[number]), bool) if sample.answers is None else sample.answers[number]
    return np.append(counted, False)


class _Layout:
    """The arrays of a micro-batch, filled sequence by sequence."""

    def __init__(self, num_sequences: int, length: int, pad_token_id: int) -> None:
        shape = num_sequences, length
        self._length = length
        self.tokens = np.full(shape, pad_token_id, dtype=np.int64)
        self.labels = np.zeros(shape, dtype=np.int64)
        self.position_ids = np.zeros(shape, dtype=np.int64)
        self.segments: list[tuple[int, int, int]] = []
        self.prompt_positions: list[np.ndarray] = []
        self.response_positions: list[np.ndarray] = []
        self.boundary: list[int] = []
        self.end: list[int] = []
        self.num_pairs = 0

    def add(self, number: int, sequence: Sequence[_Segment]) -> None:
        start, prompt = 0, NO_SEGMENT
        for segment in sequence:
            end, boundary = start + len(segment.tokens), start + segment.prompt
            self.tokens[number, start:end] = segment.tokens
            self.labels[number, start:end] = segment.labels
            self.position_ids[number, start:end] = segment.first_position + np.arange(end - start)
            offset = number * self._length
            if segment.reads_prompt:
                self.prompt_positions.append(offset + np.arange(start, boundary))
            if segment.answers is None:
                prompt = len(self.segments)
            else:
                self.response_positions.append(offset + boundary + np.flatnonzero(segment.answers))
                self.boundary.append(offset + boundary)
                self.end.append(offset + end - 1)
            self.segments.append((end - start, prompt if segment.continues else NO_SEGMENT, 0))
            continued = segment.first_position if segment.continues else 0
            self.num_pairs += (end - start) * (continued + end - start)
            start = end
        self.position_ids[number, start:] = np.arange(self._length - start)
        if start < self._length:
            self.segments.append((self._length - start, NO_SEGMENT, 1))


def _ragged(positions: Sequence[np.ndarray]) -> Tensor:
    """``[len(positions), longest]`` int64, each row padded with -1."""
    padded = np.full((len(positions), max(map(len, positions))), -1, dtype=np.int64)
    for number, found in enumerate(positions):
        padded[number, : len(found)] = found
    return torch.from_numpy(padded)
