"""Samples to one padded micro-batch: a prompt's responses stand in consecutive rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nemo_rao.batch import MicroBatch, Sample


def collate(
    samples: Sequence[Sample],
    first_response_ids: Sequence[int],
    *,
    pad_token_id: int,
    pad_multiple: int = 1,
    pad_to: int | None = None,
    reference: np.ndarray | None = None,
) -> MicroBatch:
    """Pads to the longest row, rounded up to a multiple.

    Args:
        samples: the P prompts; they may differ in their number of responses.
        first_response_ids: ``[P]`` the number of each prompt's first response in the whole data set
            (``PreferenceData.response_offset``).
        pad_token_id: fills ``tokens`` after a row's end; nothing is predicted there.
        pad_multiple: tokens. T is a multiple of it, as tensor, sequence and context parallelism need.
        pad_to: tokens. T is at least this, for pipelines that want one shape throughout.
        reference: ``[all responses, 2]`` reference sums in nats, indexed by response number, or None.

    Returns:
        a :class:`MicroBatch` on the CPU, R = the number of responses of all samples.
    """
    assert samples and len(samples) == len(first_response_ids), (len(samples), len(first_response_ids))
    assert pad_multiple >= 1, pad_multiple
    num_responses = [len(sample.responses) for sample in samples]
    longest = max(len(sample.prompt) + max(map(len, sample.responses)) for sample in samples)
    length = -(-max(longest, pad_to or 0) // pad_multiple) * pad_multiple

    shape = sum(num_responses), length
    tokens = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.zeros(shape, dtype=np.int64)
    prompt_mask = np.zeros(shape, dtype=bool)
    response_mask = np.zeros(shape, dtype=bool)
    row = 0
    for sample in samples:
        prompt_end = len(sample.prompt)
        for number, response in enumerate(sample.responses):
            end = prompt_end + len(response)
            tokens[row, :prompt_end] = sample.prompt
            tokens[row, prompt_end:end] = response
            labels[row, : end - 1] = tokens[row, 1:end]
            prompt_mask[row, : prompt_end - 1] = True
            response_mask[row, prompt_end - 1 : end - 1] = True if sample.answers is None else sample.answers[number]
            row += 1

    prompt_index = np.repeat(np.arange(len(samples)), num_responses)
    response_index = np.concatenate([np.arange(number) for number in num_responses])
    response_ids = np.asarray(first_response_ids, dtype=np.int64)[prompt_index] + response_index
    sums = None
    if reference is not None:
        assert reference.ndim == 2 and reference.shape[1] == 2, reference.shape
        sums = torch.from_numpy(reference[response_ids].astype(np.float32))
    ensemble = np.concatenate([sample.ensemble for sample in samples])
    num_reference_rewards = [len(sample.reference_rewards) for sample in samples]
    reference_rewards = np.full((len(samples), max(num_reference_rewards)), np.nan, dtype=np.float32)
    for number, sample in enumerate(samples):
        reference_rewards[number, : num_reference_rewards[number]] = sample.reference_rewards
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        prompt_mask=torch.from_numpy(prompt_mask),
        response_mask=torch.from_numpy(response_mask),
        prompt_index=torch.from_numpy(prompt_index.astype(np.int64)),
        response_index=torch.from_numpy(response_index.astype(np.int64)),
        response_ids=torch.from_numpy(response_ids),
        rewards=torch.from_numpy(np.concatenate([sample.rewards for sample in samples]).astype(np.float32)),
        ranked=torch.tensor([sample.ranked for sample in samples], dtype=torch.bool),
        reference=sums,
        num_prompts=len(samples),
        reward_ensemble=torch.from_numpy(ensemble.astype(np.float32)) if ensemble.shape[1] else None,
        reference_rewards=torch.from_numpy(reference_rewards) if reference_rewards.shape[1] else None,
    )
