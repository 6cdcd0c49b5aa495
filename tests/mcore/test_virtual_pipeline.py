"""Forward-only passes where every rank holds several chunks of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..megatron_ranks import import_once, run_ranks
from . import tiny
from .tiny import Layout

SAMPLES = tiny.preferences(5)
INTERLEAVED = Layout(pipeline=2, virtual_pipeline=2)


def sums_of_the_first(weights: dict[str, Tensor]) -> list[list[Tensor]]:
    """For 1 to 5 micro-batches, each of one prompt: the sums that this rank reports."""
    from nemo_rao.batch import MicroBatch, ModelOutput
    from nemo_rao.mcore.forward import evaluation_mode, forward_only
    from nemo_rao.mcore.loss import sequence_log_probs

    def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        return {"sums": torch.stack(sequence_log_probs(output, batch, vocab_size=tiny.VOCAB), -1)}

    tiny.enter(INTERLEAVED)
    chunks = [tiny.build(weights, INTERLEAVED, vp_stage=stage) for stage in range(2)]
    found = []
    with evaluation_mode(chunks):
        for number in range(1, len(SAMPLES) + 1):
            outputs = forward_only(
                chunks,
                [[prompt] for prompt in range(number)],
                make_micro_batch=lambda prompts: tiny.micro_batch(SAMPLES, prompts),
                report=report,
            )
            found.append([output["sums"] for output in outputs])
    return found


def test_any_number_of_micro_batches_is_reported_once_and_in_order() -> None:
    import_once()
    model = tiny.llama()
    expected = tiny.dense_sums(model, SAMPLES).detach().float()
    first, last = run_ranks(sums_of_the_first, (tiny.whole_tensors(model),), num_ranks=2)
    assert first == [[]] * len(SAMPLES)
    for number, sums in enumerate(last, start=1):
        assert len(sums) == number
        found: Any = torch.cat(sums)
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-5, atol=1e-5)
