"""``samples.jsonl``: some of a run's samples, for reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_rao.loop.data import AlignmentData
from nemo_rao.mcore.loss import objective_batch
from nemo_rao.objectives.base import Objective
from nemo_rao.rollout.samples import Rollout, RolloutData
from nemo_rao.rollout.text import SampleText
from nemo_rao.runtime.files import write_atomically

SAMPLES = "samples.jsonl"


def drop_samples_after(folder: Path, last_step: int) -> None:
    """Drop the entries of steps after ``last_step``, which will be repeated, and a truncated last line."""
    path = folder / SAMPLES
    if path.exists():
        # Not splitlines(): samples may contain other characters at which it splits.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        write_atomically(path, (line + "\n" for line in lines if json.loads(line)["step"] <= last_step))


def write_samples(
    folder: Path,
    step: int,
    data: AlignmentData,
    text: SampleText,
    num_prompts: int,
    *,
    objective: Objective,
    config: Any,
) -> None:
    """Append the first prompts of the current rollout, with their responses.

    Each response has its ``reward``, the ``scores`` that the reward is the weighted sum of (``null`` if missing), and,
    if the objective has one, its ``advantage`` at the log-probabilities of the policy that sampled it.

    Args:
        folder: directory of the run.
        step: optimizer steps done.
        data: data that wraps a :class:`nemo_rao.rollout.samples.RolloutData` with scores.
        text: text of its prompts.
        num_prompts: maximum number of entries to write.
        objective: objective of the run.
        config: its keys, resolved from the rewards of this rollout.
    """
    held = data.data
    assert isinstance(held, RolloutData) and held.rollout is not None and held.rollout.rewards is not None
    rollout, slots = held.rollout, range(min(num_prompts, len(held)))
    if not slots:
        return
    rewards = _numbers(held.rollout.rewards)
    scores = {name: _numbers(values) for name, values in rollout.scores.items()}
    advantages = _advantages(data, slots, rollout, objective, config)
    with open(folder / SAMPLES, "a", encoding="utf-8") as file:
        for slot in slots:
            row = text.row(held, slot)
            responses = []
            for k, one in enumerate(row.responses):
                response = {
                    "content": one.content,
                    "reward": rewards[slot][k],
                    "scores": {name: of_slots[slot][k] for name, of_slots in scores.items()},
                    "tokens": int(rollout.lengths[slot, k]),
                    "truncated": one.truncated,
                }
                if advantages is not None:
                    response["advantage"] = float(advantages[slot, k])
                responses.append(response)
            prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
            record = {"step": step, "prompt": prompt, "responses": responses}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _numbers(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else value for value in of_slot] for of_slot in values.tolist()]


def _advantages(
    data: AlignmentData, slots: range, rollout: Rollout, objective: Objective, config: Any
) -> np.ndarray | None:
    """Return ``[slots, K]`` advantages under the sampling policy; ``None`` if the objective has none."""
    if objective.response_advantages is None:
        return None
    batch = data.micro_batch(slots)
    of_rows = torch.from_numpy(rollout.response_logps().flatten()).float()[batch.response_ids]
    arranged = objective_batch(batch, torch.zeros_like(of_rows), of_rows, token_logps=_of_tokens(rollout, slots))
    found: np.ndarray = objective.response_advantages(arranged, config).numpy()
    return found


def _of_tokens(rollout: Rollout, slots: range) -> torch.Tensor:
    """Return ``[R, longest]`` float32 log-probabilities of the slots' response tokens, in nats; 0 after the end."""
    logps = rollout.logps if rollout.old_logps is None else rollout.old_logps
    of_rows = [torch.from_numpy(one) for slot in slots for one in rollout.of_tokens(logps, slot)]
    return torch.nn.utils.rnn.pad_sequence(of_rows, batch_first=True)
