"""Training on the policy's own samples: which prompts a rollout has, and the hook that makes one where it is due."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput, Response, RewardSummary, Row
from nemo_rao.checkpoint.find import last_checkpoint, step_of
from nemo_rao.config.online_config import OnlineConfig
from nemo_rao.data.encode import end_tokens
from nemo_rao.data.order import global_batch, rank_micro_batches
from nemo_rao.data.prefetch import NotAhead
from nemo_rao.errors import RankFailure
from nemo_rao.loop.data import AlignmentData, TrainingData
from nemo_rao.loop.prepared import Asked
from nemo_rao.loop.session import Hook, Session, log
from nemo_rao.mcore.checkpoint import load_weights
from nemo_rao.mcore.forward import evaluation_mode, forward_only
from nemo_rao.mcore.loss import response_token_log_probs, sequence_log_probs
from nemo_rao.objectives.base import Needs
from nemo_rao.ops.sampling import uniforms
from nemo_rao.rollout.decode import Request, Sampling, sample
from nemo_rao.rollout.reference import ReferenceWeights, reference_weights
from nemo_rao.rollout.samples import Rollout, RolloutData, load

ROLLOUTS = "rollouts"  # in the run folder
SAMPLES = "samples.jsonl"


class OnlineData(TrainingData):
    """The prompts of a run that samples its responses. A global batch's numbers are slots of the rollout at hand.

    Args:
        train: of a :class:`nemo_rao.rollout.samples.RolloutData`.
        num_prompts: of the whole run.
        mini_batches: global batches that fill a rollout.
        epochs: passes over it.
    """

    def __init__(
        self,
        train: AlignmentData,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int | None,
        num_prompts: int,
        mini_batches: int,
        epochs: int,
    ) -> None:
        super().__init__(train, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, seed=seed)
        self._num_prompts = num_prompts
        self._mini_batches = mini_batches
        self._epochs = epochs

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on each rollout."""
        return self._mini_batches * self._epochs

    def rollout_of(self, step: int) -> tuple[int, bool]:
        """(number of the rollout that a step is taken on, whether it is the rollout's first step)."""
        number, within = divmod(step, self.steps_per_rollout)
        return number, within == 0

    def prompts_of_rollout(self, number: int) -> np.ndarray:
        """``[S]`` int64, the prompt of each slot."""
        size = self.global_batch_size
        first = number * self._mini_batches
        parts = [
            global_batch(step, num_samples=self._num_prompts, global_batch_size=size, seed=self._seed)
            for step in range(first, first + self._mini_batches)
        ]
        return np.concatenate(parts)

    def prompts_of_step(self, step: int) -> np.ndarray:
        number, _ = self.rollout_of(step)
        epoch, batch = divmod(step % self.steps_per_rollout, self._mini_batches)
        slots = np.arange(self._mini_batches * self.global_batch_size)
        if epoch:
            seeds = np.random.SeedSequence([0 if self._seed is None else self._seed, number, epoch])
            slots = np.random.RandomState(np.random.MT19937(seeds)).permutation(slots)
        return slots[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]

    def stream(self, step: int) -> NotAhead[MicroBatch]:
        return NotAhead(self.micro_batches_from(step))  # what comes next is not sampled before


class MakeRollouts(Hook):
    """Before the first step on each rollout: samples, rewards, and the reference policy's sums.

    Each part is written to ``rollouts/`` as soon as it is there. A run that was interrupted goes on with what it finds
    of the rollout at hand, and, in the midst of one, needs it.

    Args:
        keys: of the recipe.
        asked: what is sampled, and what it is worth.
        tokenizer: of Hugging Face; ends and decodes responses.
        adapters: only they are trained.
        needs: of the objective.
        load_from: the folder of the weights that the run started with; ``None`` for random ones.
    """

    def __init__(
        self,
        keys: OnlineConfig,
        asked: Asked,
        *,
        tokenizer: Any,
        adapters: bool,
        needs: Needs,
        load_from: Path | None,
    ) -> None:
        assert keys.num_generations is not None
        self._keys = keys
        self._num_generations = keys.num_generations
        self._asked = asked
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens(tokenizer)
        self._adapters = adapters
        self._needs = needs
        self._load_from = load_from
        self._at = -1
        self._reference: ReferenceWeights | None = None
        self._metrics: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def start(self, session: Session) -> None:
        self._unresolved = session.loss.config
        number, _ = _data(session).rollout_of(session.step)
        if session.is_first_rank:
            _remove(session.folder, lambda one: one > number or session.step == 0)
        torch.distributed.barrier()

    def before_step(self, session: Session) -> None:
        data = _data(session)
        number, is_first = data.rollout_of(session.step)
        if self._reference is None and self._needs.reference:
            self._reference = reference_weights(
                session.chunks,
                adapters=self._adapters,
                resumed=session.step > 0,
                load_start=self._load_start,
            )
        if number == self._at:
            return
        self._seconds = {}
        rollout = self._made(session, data, number, may_sample=is_first)
        held = data.train.data
        assert isinstance(held, RolloutData)
        held.rollout, data.train.reference = rollout, rollout.reference
        assert rollout.rewards_so_far is not None
        total, count = rollout.rewards_so_far.tolist()
        objective = session.loss.objective
        session.loss.config = objective.resolve(self._unresolved, RewardSummary(mean=total / max(count, 1)))
        self._at = number
        self._metrics = {**_metrics(rollout), **self._seconds}

    def after_step(self, session: Session) -> None:
        _, is_first = _data(session).rollout_of(session.step - 1)
        if is_first:
            log(session, self._metrics)
            every = self._keys.log_samples_every
            if session.is_first_rank and ((session.step - 1) % every == 0 or session.step == session.max_steps):
                self._write_samples(session)

    # ------------------------------------------------------------------------------------------------ its parts

    def _made(self, session: Session, data: OnlineData, number: int, *, may_sample: bool) -> Rollout:
        path = _file(session.folder, number)
        rollout = _of_first_rank(lambda: load(path))
        if rollout is not None and rollout.lengths.shape != (len(data.train.data), self._num_generations):
            rollout = None  # of a run with other keys
        if rollout is None:
            if not may_sample:
                raise RankFailure(
                    f"{path} is missing, or of other keys: the samples that the step at hand is one of several on; "
                    "restore it, or start a new run under another exp_manager.name"
                )
            if session.is_first_rank:
                kept = last_checkpoint(session.folder)
                oldest = 0 if kept is None else data.rollout_of(step_of(kept))[0] - 1
                _remove(session.folder, lambda one: one < oldest)
            with self._timed("rollout"):
                rollout = self._sampled(session, data, number)
            self._keep(session, path, rollout)
        if rollout.rewards is None:
            with self._timed("reward"):
                before = None if number == 0 else _of_first_rank(lambda: load(_file(session.folder, number - 1)))
                rollout = self._scored(rollout, before)
            self._keep(session, path, rollout)
        if rollout.reference is None and self._needs.reference:
            assert self._reference is not None
            with self._timed("reference"), self._reference.in_place():
                sums, of_tokens = self._log_probs(session, data, rollout)
            rollout = replace(rollout, reference=sums, reference_logps=of_tokens if self._needs.tokens else None)
            self._keep(session, path, rollout)
        if rollout.old_logps is None and self._needs.tokens and data.steps_per_rollout > 1:
            # One step alone is taken on it by the policy that sampled, whose ratio to itself is 1.
            with self._timed("old"):
                _, of_tokens = self._log_probs(session, data, rollout)
            rollout = replace(rollout, old_logps=of_tokens)
            self._keep(session, path, rollout)
        return rollout

    def _keep(self, session: Session, path: Path, rollout: Rollout) -> None:
        if session.is_first_rank:
            rollout.save(path)

    def _timed(self, name: str) -> _Timed:
        return _Timed(self._seconds, f"seconds/{name}")

    def _sampled(self, session: Session, data: OnlineData, number: int) -> Rollout:
        keys = self._keys
        prompts = data.prompts_of_rollout(number)
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        own = [slot for part in rank_micro_batches(np.arange(len(prompts)), 1, rank, size) for slot in part]
        requests = [
            Request(
                self._asked.prompts[int(prompts[slot])].prompt,
                np.stack(
                    [uniforms(keys.seed, (number, slot, k), keys.max_new_tokens) for k in range(self._num_generations)]
                ),
            )
            for slot in own
        ]
        found = sample(
            session.chunks,
            requests,
            max_new_tokens=keys.max_new_tokens,
            end_tokens=self._end_tokens,
            sampling=Sampling(keys.temperature, keys.top_k, keys.top_p),
            rows_at_once=keys.rows_at_once,
            vocab_size=session.loss.vocab_size,
        )
        of_ranks: list[Any] = [None] * size
        torch.distributed.all_gather_object(of_ranks, found, group=parallel_state.get_data_parallel_group())
        return Rollout.of(prompts.tolist(), [responses for of_rank in of_ranks for responses in of_rank])

    def _scored(self, rollout: Rollout, before: Rollout | None) -> Rollout:
        keys = self._keys

        def rewards() -> np.ndarray:
            rows = [self._row(rollout, slot) for slot in range(len(rollout.prompts))]
            found = [[np.nan if one is None else one for one in of_row] for of_row in self._asked.score(rows)]
            scored = np.array(found, dtype=np.float64)
            if keys.cut_responses != "score":
                scored[rollout.is_cut] = keys.cut_reward if keys.cut_responses == "penalty" else np.nan
            return scored

        scored = _of_first_rank(rewards)
        known = scored[~np.isnan(scored)]
        so_far = np.array([known.sum(), len(known)], dtype=np.float64)
        if before is not None and before.rewards_so_far is not None:
            so_far = so_far + before.rewards_so_far
        return replace(rollout, rewards=scored, rewards_so_far=so_far)

    def _row(self, rollout: Rollout, slot: int) -> Row:
        row = self._asked.rows[int(rollout.prompts[slot])]
        prompt = self._asked.prompts[int(rollout.prompts[slot])].prompt
        responses = [
            Response(self._text(prompt, tokens), truncated=bool(cut))
            for tokens, cut in zip(rollout.responses(slot), rollout.is_cut[slot], strict=True)
        ]
        return replace(row, responses=tuple(responses))

    def _text(self, prompt: np.ndarray, tokens: np.ndarray) -> str:
        """Of a response without its end token. Decoded behind the prompt: some tokenizers drop a blank in front."""
        if len(tokens) and int(tokens[-1]) in self._end_tokens:
            tokens = tokens[:-1]
        before, whole = self._decoded(prompt.tolist()), self._decoded([*prompt.tolist(), *tokens.tolist()])
        return whole[len(before) :] if whole.startswith(before) else self._decoded(tokens.tolist())

    def _decoded(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens,
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
                spaces_between_special_tokens=False,
            )
        )

    def _load_start(self, chunks: Sequence[Any]) -> None:
        assert self._load_from is not None  # checked before the run
        load_weights(self._load_from, chunks)

    def _log_probs(self, session: Session, data: OnlineData, rollout: Rollout) -> tuple[np.ndarray, np.ndarray | None]:
        """Of the weights that the model has: ``[S * K, 2]`` float32 sums (prompt without t0, response; nats), and where
        the objective looks at tokens, each token's, as in :class:`Rollout`. The same on every rank."""
        held, vocab_size = data.train.data, session.loss.vocab_size
        assert isinstance(held, RolloutData)
        held.rollout, data.train.reference = replace(rollout, reference_logps=None, old_logps=None), None
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        own = rank_micro_batches(np.arange(len(held)), data.micro_batch_size, rank, size)

        def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
            if not self._needs.tokens:
                sums = torch.stack(sequence_log_probs(output, batch, vocab_size=vocab_size), dim=-1)
                return {"ids": batch.response_ids, "sums": sums}
            of_tokens = response_token_log_probs(output, batch, vocab_size=vocab_size)
            sums = torch.stack([torch.zeros_like(of_tokens[:, 0]), of_tokens.sum(-1)], dim=-1)
            return {"ids": batch.response_ids, "sums": sums, "tokens": of_tokens}

        with evaluation_mode(session.chunks):
            reports = forward_only(session.chunks, own, make_micro_batch=data.train.micro_batch, report=report)
        mine = [{name: values.cpu().numpy() for name, values in one.items()} for one in reports]
        if parallel_state.get_tensor_and_context_parallel_rank() > 0:
            mine = []
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, mine)
        sums = np.full((held.num_responses, 2), np.nan, dtype=np.float32)
        of_tokens = np.full(len(rollout.tokens), np.nan, dtype=np.float32) if self._needs.tokens else None
        lengths = rollout.lengths.flatten()
        starts = np.cumsum(lengths) - lengths
        for one in (part for of_rank in of_ranks for part in of_rank):
            sums[one["ids"]] = one["sums"]
            if of_tokens is not None:
                for number, values in zip(one["ids"], one["tokens"], strict=True):
                    of_tokens[starts[number] : starts[number] + lengths[number]] = values[: lengths[number]]
        assert not np.isnan(sums).any(), "a slot's log-probabilities are missing, or not finite"
        return sums, of_tokens

    def _write_samples(self, session: Session) -> None:
        held = session.data.train.data
        assert isinstance(held, RolloutData) and held.rollout is not None and held.rollout.rewards is not None
        rollout, rewards = held.rollout, held.rollout.rewards
        with open(session.folder / SAMPLES, "a", encoding="utf-8") as file:
            for slot in range(min(self._keys.log_samples, len(held))):
                row = self._row(rollout, slot)
                responses = [
                    {
                        "content": one.content,
                        "reward": None if np.isnan(rewards[slot, k]) else float(rewards[slot, k]),
                        "tokens": int(rollout.lengths[slot, k]),
                        "truncated": one.truncated,
                    }
                    for k, one in enumerate(row.responses)
                ]
                prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
                record = {"step": session.step, "prompt": prompt, "responses": responses}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


class _Timed:
    """Adds the seconds of its block to a mapping."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._started


def _metrics(rollout: Rollout) -> dict[str, float]:
    """Of one rollout: means over responses, but for quantiles and deviations."""
    rewards = rollout.rewards
    assert rewards is not None
    logps = rollout.response_logps()
    metrics = {
        "rollout/length": float(rollout.lengths.mean()),
        "rollout/cut": float(rollout.is_cut.mean()),
        "rollout/entropy": float(-logps.sum() / rollout.lengths.sum()),  # nats a token, estimated by the samples
    }
    known = rewards[~np.isnan(rewards)]
    if len(known):
        low, middle, high = np.quantile(known, [0.1, 0.5, 0.9]).tolist()
        metrics |= {
            "rollout/reward": float(known.mean()),
            "rollout/reward_std": float(known.std()),
            "rollout/reward_p10": low,
            "rollout/reward_p50": middle,
            "rollout/reward_p90": high,
        }
    if rollout.reference is not None:
        metrics["rollout/kl"] = float((logps - rollout.reference[:, 1].reshape(logps.shape)).mean())
    return metrics


def _data(session: Session) -> OnlineData:
    data = session.data
    assert isinstance(data, OnlineData)
    return data


def _of_first_rank(compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, on every rank; a failure there is one of all ranks."""
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [compute(), None]
        except RankFailure as failure:
            found = [None, str(failure)]
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise RankFailure(found[1])
    return found[0]


def _file(folder: Path, number: int) -> Path:
    return folder / ROLLOUTS / f"{number:06d}.npz"


def _remove(folder: Path, which: Callable[[int], bool]) -> None:
    for path in (folder / ROLLOUTS).glob("*.npz"):
        if path.stem.isdigit() and which(int(path.stem)):
            path.unlink()
