"""Log-probabilities and values of a rollout under the model's current weights, by a forward pass over whole rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore.loss import response_token_log_probs, sequence_log_probs
from nemo_rao.rollout.passes import rollout_reports
from nemo_rao.rollout.samples import Rollout


class LogProbs(NamedTuple):
    """Result of a pass over a rollout's rows.

    Attributes:
        sums: ``[S * K, 2]`` float32, log-probs of (prompt without t0, response), nats.
        tokens: float32, log-prob of each token, laid out as ``rollout.tokens``; ``None`` if not requested.
        values: float32, the value head's values, laid out likewise; ``None`` if not requested.
    """

    sums: np.ndarray
    tokens: np.ndarray | None = None
    values: np.ndarray | None = None


def rollout_log_probs(
    chunks: Sequence[Any],
    rollout: Rollout,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    *,
    micro_batch_size: int,
    vocab_size: int,
    of_tokens: bool,
    of_values: bool = False,
) -> LogProbs:
    """Compute log-probabilities, and values if requested. A collective over all ranks, which all get the result.

    Args:
        chunks: this rank's model chunks; their training mode is restored.
        make_micro_batch: slots of the rollout -> micro-batch.
        micro_batch_size: slots.
        vocab_size: V without padding.
        of_tokens: also return the log-probability of each token; the prompts' log-probs are 0 then.
        of_values: also return each token's value; requires ``of_tokens``.
    """

    def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        if not of_tokens:
            sums = torch.stack(sequence_log_probs(output, batch, vocab_size=vocab_size), dim=-1)
            return {"ids": batch.response_ids, "sums": sums}
        tokens = response_token_log_probs(output, batch, vocab_size=vocab_size)
        sums = torch.stack([torch.zeros_like(tokens[:, 0]), tokens.sum(-1)], dim=-1)
        found = {"ids": batch.response_ids, "sums": sums, "tokens": tokens}
        if of_values:
            assert output.values is not None and output.values.shape == tokens.shape, "a value head that reads tokens"
            found["values"] = output.values
        return found

    every = rollout_reports(
        chunks, len(rollout.prompts), make_micro_batch, micro_batch_size=micro_batch_size, report=report
    )
    names = [*(["tokens"] if of_tokens else []), *(["values"] if of_values else [])]
    return LogProbs(_sums(every, rollout), **{name: _of_tokens(every, name, rollout) for name in names})


def rollout_values(
    chunks: Sequence[Any],
    rollout: Rollout,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    *,
    micro_batch_size: int,
) -> np.ndarray:
    """Compute a critic's value of each token, float32, laid out as ``rollout.tokens``. A collective over all ranks.

    Args:
        chunks: this rank's model chunks of the critic.
        make_micro_batch, micro_batch_size: see :func:`rollout_log_probs`.
    """

    def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        assert output.values is not None, "the model has a value head"
        return {"ids": batch.response_ids, "values": output.values}

    every = rollout_reports(
        chunks, len(rollout.prompts), make_micro_batch, micro_batch_size=micro_batch_size, report=report
    )
    return _of_tokens(every, "values", rollout)


def _sums(reports: Sequence[dict[str, np.ndarray]], rollout: Rollout) -> np.ndarray:
    sums = np.full((rollout.lengths.size, 2), np.nan, dtype=np.float32)
    for one in reports:
        sums[one["ids"]] = one["sums"]
    assert not np.isnan(sums).any(), "log-probabilities of a response are missing, or not finite"
    return sums


def _of_tokens(reports: Sequence[dict[str, np.ndarray]], name: str, rollout: Rollout) -> np.ndarray:
    lengths = rollout.lengths.flatten()
    starts = np.cumsum(lengths) - lengths
    found = np.full(len(rollout.tokens), np.nan, dtype=np.float32)
    for one in reports:
        for number, values in zip(one["ids"], one[name], strict=True):
            found[starts[number] : starts[number] + lengths[number]] = values[: lengths[number]]
    assert not np.isnan(found).any(), f"{name} of a response are missing, or not finite"
    return found
