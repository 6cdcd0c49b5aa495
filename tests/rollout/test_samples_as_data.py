"""A step on samples is the offline step on the same responses, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nemo_rao.data.collate import collate
from nemo_rao.data.store import PreferenceData
from nemo_rao.objectives import registry
from nemo_rao.rollout.samples import Rollout, RolloutData

from ..mcore import tiny
from ..mcore.tiny import Layout
from ..megatron_ranks import run_ranks

PROMPTS = [
    replace(one, responses=(), rewards=np.zeros(0), of_tokens={}, ensemble=np.zeros((0, 0)))
    for one in tiny.preferences(4)
]
RESPONSES, NEW, END = 3, 6, 5
RPO = {"distance": "sqloo", "beta": 0.3, "sft_weight": 0.0}


def _steps(source: dict[str, Any]) -> list[tuple[dict[str, torch.Tensor], list[list[float]]]]:
    """On one rank: gradients and reported sums of RPO on fresh samples, then on the same responses as a data set."""
    from nemo_rao.mcore.loss import for_schedule, micro_batch_loss
    from nemo_rao.ops.sampling import uniforms
    from nemo_rao.rollout.decode import Request, Sampling, sample

    tiny.enter(Layout())
    numbers = [np.stack([uniforms(1, (0, i, k), NEW) for k in range(RESPONSES)]) for i in range(len(PROMPTS))]
    sampled = sample(
        [tiny.build(source, Layout())],
        [Request(one.prompt, number) for one, number in zip(PROMPTS, numbers, strict=True)],
        max_new_tokens=NEW,
        end_tokens=[END],
        sampling=Sampling(),
        rows_at_once=100,
        vocab_size=tiny.VOCAB,
    )
    rng = np.random.default_rng(2)
    samples = RolloutData(PreferenceData(PROMPTS), num_slots=len(PROMPTS), num_responses=RESPONSES)
    samples.rollout = replace(
        Rollout.of(range(len(PROMPTS)), sampled),
        rewards=rng.random((len(PROMPTS), RESPONSES)),
        reference=rng.normal(-20, 2, (len(PROMPTS) * RESPONSES, 2)).astype(np.float32),
    )
    rows = [
        replace(
            one,
            responses=tuple(response.tokens for response in of),
            rewards=rewards,
            ensemble=np.zeros((RESPONSES, 0)),
        )
        for one, of, rewards in zip(PROMPTS, sampled, samples.rollout.rewards, strict=True)
    ]
    objective = registry.get("rpo")
    config = objective.make_config(RPO)

    def loss(output: Any, batch: Any) -> Any:
        return for_schedule(micro_batch_loss(output, batch, objective, config, vocab_size=tiny.VOCAB))

    found = []
    for data in (samples, PreferenceData(rows)):
        batches = [
            collate(
                [data[i] for i in slots],
                [data.response_offset(i) for i in slots],
                pad_token_id=0,
                packed=True,
                reference=samples.rollout.reference,
            )
            for slots in ((2, 0), (1, 3))
        ]
        gradients, reported = tiny.run_schedule(tiny.build(source, Layout()), batches, loss)
        found.append((gradients, [value.tolist() for one in reported for value in one.values()]))
    return found


def test_loss_metrics_and_gradients_are_those_of_the_same_responses_as_data() -> None:
    ((online, reported), (offline, same)) = run_ranks(_steps, (tiny.whole_tensors(tiny.llama()),), num_ranks=1)[0]
    assert reported == same
    assert online.keys() == offline.keys() and max(float(one.abs().max()) for one in online.values()) > 0
    for name, gradient in online.items():
        assert torch.equal(gradient, offline[name]), name
