"""Log-probabilities of a rollout by a pass over its whole rows, of whatever weights the model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore.loss import response_token_log_probs, sequence_log_probs
from nemo_rao.rollout.passes import rollout_reports
from nemo_rao.rollout.samples import Rollout


def rollout_log_probs(
    chunks: Sequence[Any],
    rollout: Rollout,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    *,
    micro_batch_size: int,
    vocab_size: int,
    of_tokens: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """A collective over all ranks, which all have the result.

    Args:
        chunks: this rank's model chunks; left in the mode they came in.
        make_micro_batch: slots of the rollout -> micro-batch.
        micro_batch_size: slots.
        vocab_size: V without padding.
        of_tokens: the log-probability of each token is wanted; those of prompts are 0 then.

    Returns:
        ``[S * K, 2]`` float32 sums (prompt without t0, response; nats), and where wanted each token's, laid out as
        ``rollout.tokens``.
    """

    def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        if not of_tokens:
            sums = torch.stack(sequence_log_probs(output, batch, vocab_size=vocab_size), dim=-1)
            return {"ids": batch.response_ids, "sums": sums}
        tokens = response_token_log_probs(output, batch, vocab_size=vocab_size)
        sums = torch.stack([torch.zeros_like(tokens[:, 0]), tokens.sum(-1)], dim=-1)
        return {"ids": batch.response_ids, "sums": sums, "tokens": tokens}

    reports = rollout_reports(
        chunks, len(rollout.prompts), make_micro_batch, micro_batch_size=micro_batch_size, report=report
    )
    return _arranged(reports, rollout, of_tokens=of_tokens)


def _arranged(
    reports: Sequence[dict[str, np.ndarray]], rollout: Rollout, *, of_tokens: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    lengths = rollout.lengths.flatten()
    starts = np.cumsum(lengths) - lengths
    sums = np.full((len(lengths), 2), np.nan, dtype=np.float32)
    tokens = np.full(len(rollout.tokens), np.nan, dtype=np.float32) if of_tokens else None
    for one in reports:
        sums[one["ids"]] = one["sums"]
        if tokens is not None:
            for number, values in zip(one["ids"], one["tokens"], strict=True):
                tokens[starts[number] : starts[number] + lengths[number]] = values[: lengths[number]]
    assert not np.isnan(sums).any(), "log-probabilities of a response are missing, or not finite"
    return sums, tokens
