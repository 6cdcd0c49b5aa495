"""Sampling from the training model in place, under its own tensor, pipeline and expert parallelism.

Keys and values of earlier tokens are cached in megatron-core's static inference context, which its attention layers
fill and read with and without Transformer Engine. All rows of a batch are at the same position: the prefill covers all
prompts up to the length of the shortest, and the remaining tokens of longer prompts are forced instead of sampled. A
prompt with several responses is prefilled once. Finished rows are removed once they are half of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.utils import get_model_config
from torch import Tensor

from nemo_rao.mcore.forward import evaluation_mode, unwrapped
from nemo_rao.mcore.output_layer import output_layer_input, unfuse_adapted_output_layer
from nemo_rao.ops.sampling import draw


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; see :func:`nemo_rao.ops.sampling.draw`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Request:
    """Request for K responses to one prompt.

    Attributes:
        prompt: ``[prompt tokens]`` int32, the generation prompt last.
        uniforms: ``[K, max_new_tokens]`` float64 in [0, 1), one for each token that may be sampled.
    """

    prompt: np.ndarray
    uniforms: np.ndarray


@dataclass(frozen=True)
class Sampled:
    """One sampled response.

    Attributes:
        tokens: int32, including the end token if it was sampled; at least one.
        logps: float32, nats, each token's log-probability under the model at temperature 1.
        is_cut: whether it reached ``max_new_tokens`` without an end token.
    """

    tokens: np.ndarray
    logps: np.ndarray
    is_cut: bool


def sample(
    chunks: Sequence[Any],
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    sampling: Sampling,
    rows_at_once: int,
    vocab_size: int,
) -> list[list[Sampled]]:
    """Sample responses to each request, in order, identical on every rank of the model-parallel group.

    A collective over the model-parallel group; if data-parallel ranks split experts, over all of them.

    Args:
        chunks: this rank's model chunks, as Megatron's schedules take them.
        requests: requests of this data-parallel rank.
        max_new_tokens: tokens of a response, including its end token.
        end_tokens: tokens that end a response.
        rows_at_once: number of rows (K per prompt) decoded together; at least K.
        vocab_size: V without padding.
    """
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    batches = _batches(requests, order, rows_at_once)
    results: dict[int, list[Sampled]] = {}
    with evaluation_mode(chunks), _whole_tokens(chunks):
        for batch in _as_many_on_every_rank(batches):
            decoder = _Decoder(chunks, max_new_tokens, end_tokens, sampling, vocab_size)
            results |= zip(batch, decoder.run([requests[i] for i in batch]), strict=True)
    return [results[i] for i in range(len(requests))]


def _batches(requests: Sequence[Request], order: Sequence[int], rows_at_once: int) -> list[list[int]]:
    """Group requests of similar length into batches, given as indices."""
    batches: list[list[int]] = []
    rows = 0
    for i in order:
        own = len(requests[i].uniforms)
        if not batches or rows + own > rows_at_once:
            batches.append([])
            rows = 0
        batches[-1].append(i)
        rows += own
    return batches


def _as_many_on_every_rank(batches: list[list[int]]) -> Iterator[list[int]]:
    """The batches, followed by empty ones until no rank has any left if ranks split experts."""
    most = _largest(len(batches))
    yield from batches
    for _ in range(most - len(batches)):
        yield []


def _largest(number: int) -> int:
    """Maximum over all ranks that split experts, or ``number`` if they do not."""
    if parallel_state.get_expert_model_parallel_world_size() == 1:
        return number
    largest = torch.tensor(number, device=_device())
    torch.distributed.all_reduce(
        largest, op=torch.distributed.ReduceOp.MAX, group=parallel_state.get_data_parallel_group()
    )
    return int(largest)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def _whole_tokens(chunks: Sequence[Any]) -> Iterator[None]:
    """Disable sequence parallelism: a single token cannot be split over ranks."""
    changed: list[Any] = []
    for chunk in chunks:
        for module in unwrapped(chunk).modules():
            for owner in (module, vars(module).get("config")):
                if owner is None:
                    continue
                if getattr(owner, "sequence_parallel", False) is True:
                    owner.sequence_parallel = False
                    changed.append((owner, "sequence_parallel"))
                if getattr(owner, "reduce_scatter_embeddings", False) is True:
                    owner.reduce_scatter_embeddings = False
                    changed.append((owner, "reduce_scatter_embeddings"))
    try:
        yield
    finally:
        for owner, name in changed:
            setattr(owner, name, True)


class _Decoder:
    """Decodes one batch.

    Tokens and everything derived from them are identical on all ranks; only the last pipeline stage has logits.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        max_new_tokens: int,
        end_tokens: Sequence[int],
        sampling: Sampling,
        vocab_size: int,
    ) -> None:
        self._chunks = [unwrapped(chunk) for chunk in chunks]
        for chunk in self._chunks:
            unfuse_adapted_output_layer(chunk)
        self._max_new_tokens = max_new_tokens
        self._end_tokens = torch.tensor(list(end_tokens), device=_device())
        self._sampling = sampling
        self._vocab_size = vocab_size

    def run(self, requests: Sequence[Request]) -> list[list[Sampled]]:
        """Sample K responses per request. Without requests, only run the passes that other ranks' experts need."""
        lengths = [len(one.prompt) for one in requests] or [1]
        shortest, longest = min(lengths), _largest(max(lengths)) + self._max_new_tokens
        shortest_of_all = -_largest(-shortest)
        prompts = torch.zeros(len(lengths), max(lengths), dtype=torch.long, device=_device())
        for number, one in enumerate(requests):
            prompts[number, : lengths[number]] = torch.from_numpy(one.prompt.astype(np.int64))
        # One context per model chunk, since each counts the tokens that it has seen.
        self._contexts = [StaticInferenceContext(len(prompts), longest) for _ in self._chunks]
        logits = self._forward(prompts[:, :shortest_of_all])

        row_of = torch.tensor([n for n, one in enumerate(requests) for _ in one.uniforms] or [0], device=_device())
        self._keep(row_of)
        if logits is not None:
            logits = logits[row_of]
        rows = _Rows(
            prompts[row_of],
            torch.tensor(lengths, device=_device())[row_of],
            torch.from_numpy(np.concatenate([one.uniforms for one in requests]) if requests else np.zeros((1, 1))),
            self._max_new_tokens,
            live=bool(requests),
        )
        for position in range(shortest_of_all, longest):
            tokens, logps = self._next(logits, rows, position)
            rows.take(tokens, logps, position, self._end_tokens)
            if not _largest(rows.num_live):
                break
            if (kept := rows.compact()) is not None:
                tokens = tokens[kept]
                self._keep(kept)
            if position + 1 < longest:
                logits = self._forward(tokens[:, None])
        return rows.responses([len(one.uniforms) for one in requests])

    def _keep(self, rows: Tensor) -> None:
        """Reindex the cached keys and values by rows; a row may occur several times."""
        for context in self._contexts:
            for layer, memory in context.key_value_memory_dict.items():
                context.key_value_memory_dict[layer] = tuple(part[:, rows] for part in memory)

    def _next(self, logits: Tensor | None, rows: _Rows, position: int) -> tuple[Tensor, Tensor]:
        """``([B], [B])`` on all ranks: the tokens at a position, sampled or forced, and their log-probabilities."""
        number = len(rows.tokens)
        drawn = torch.zeros(2, number, dtype=torch.float64, device=_device())
        if logits is not None:
            given = position < rows.lengths
            at = torch.where(given, position, 0)
            logits = logits[:, : self._vocab_size].float()  # the rest is padding
            tokens = torch.where(given, rows.given(at), self._drawn(logits, rows.uniforms_at(position)))
            logps = logits.log_softmax(-1)
            drawn[0], drawn[1] = tokens, logps.gather(-1, tokens[:, None])[:, 0]
            # GPU reductions are not deterministic, so one rank samples for all.
            torch.distributed.broadcast(
                drawn,
                parallel_state.get_tensor_model_parallel_src_rank(),
                group=parallel_state.get_tensor_model_parallel_group(),
            )
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                drawn,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return drawn[0].long(), drawn[1]

    def _drawn(self, logits: Tensor, uniform: Tensor) -> Tensor:
        temperature = torch.full_like(logits[:, :1], self._sampling.temperature)
        return draw(logits, uniform, temperature, self._sampling.top_k, self._sampling.top_p)

    def _forward(self, tokens: Tensor) -> Tensor | None:
        """``[B, V]`` logits after the last of the tokens ``[B, n]``, on the last pipeline stage; else ``None``."""
        start, (number, length) = self._contexts[0].sequence_len_offset, tokens.shape
        positions = torch.arange(start, start + length, device=tokens.device).expand(number, length)
        output: Any = None
        for at, (chunk, context) in enumerate(zip(self._chunks, self._contexts, strict=True)):
            if not chunk.pre_process:
                chunk.set_input_tensor(self._received(chunk, length, number))
            if start > 0:
                context.enable_decode_mode()
            output = chunk(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=None,
                labels=None,
                inference_context=context,
                runtime_gather_output=True,
            )
            context.increment_sequence_len_offset(length)
            if not chunk.post_process:
                self._sent(output)
            assert at + 1 == len(self._chunks) or not chunk.post_process
        chunk = self._chunks[-1]
        return self._whole_logits(chunk, output) if chunk.post_process else None

    def _received(self, chunk: Any, length: int, number: int) -> Tensor:
        config = get_model_config(chunk)
        hidden = torch.empty(length, number, config.hidden_size, dtype=config.pipeline_dtype, device=_device())
        torch.distributed.recv(
            hidden,
            parallel_state.get_pipeline_model_parallel_prev_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return hidden

    def _sent(self, hidden: Tensor) -> None:
        torch.distributed.send(
            hidden.contiguous(),
            parallel_state.get_pipeline_model_parallel_next_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )

    def _whole_logits(self, chunk: Any, output: Tensor) -> Tensor:
        """``[B, V]`` of the last position, on every tensor-parallel rank."""
        if (fused := output_layer_input(chunk)) is None:
            return output[:, -1]
        hidden, weight = fused
        logits = hidden[-1] @ weight.t()
        if (size := parallel_state.get_tensor_model_parallel_world_size()) == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(size)]
        torch.distributed.all_gather(parts, logits, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(parts, dim=-1)


class _Rows:
    """State of a batch: the rows still being decoded, and the responses of all rows.

    Args:
        prompts: ``[B, longest]``; lengths: ``[B]`` tokens.
        uniforms: ``[B, max_new_tokens]`` float64.
        live: whether there is anything to sample; otherwise the rows only keep collectives of other ranks going.
    """

    def __init__(self, prompts: Tensor, lengths: Tensor, uniforms: Tensor, max_new_tokens: int, *, live: bool) -> None:
        self.tokens = prompts
        self.lengths = lengths
        self._uniforms = uniforms.to(prompts.device)
        self._numbers = torch.arange(len(prompts), device=prompts.device)  # index of each remaining row among all rows
        self._max_new_tokens = max_new_tokens
        self._live = torch.full((len(prompts),), live, device=prompts.device)
        self._drawn = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=prompts.device)
        self._logps = torch.zeros(len(prompts), max_new_tokens, device=prompts.device)
        self._counts = torch.zeros(len(prompts), dtype=torch.long, device=prompts.device)
        self._cut = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)

    @property
    def num_live(self) -> int:
        return int(self._live.sum())

    def given(self, at: Tensor) -> Tensor:
        """``[B]``, the prompts' tokens at positions ``[B]``."""
        return self.tokens.gather(1, at[:, None])[:, 0]

    def uniforms_at(self, position: int) -> Tensor:
        """``[B]`` uniform numbers for a position; values of rows that do not sample there are arbitrary."""
        at = (position - self.lengths).clamp(0, self._uniforms.shape[1] - 1)
        return self._uniforms.gather(1, at[:, None])[:, 0]

    def take(self, tokens: Tensor, logps: Tensor, position: int, end_tokens: Tensor) -> None:
        """Store ``[B]`` tokens at a position, and mark the rows that end with them as finished."""
        drawn = self._live & (position >= self.lengths)
        at = (position - self.lengths).clamp(min=0)[drawn]
        numbers = self._numbers[drawn]
        self._drawn[numbers, at] = tokens[drawn]
        self._logps[numbers, at] = logps[drawn].float()
        self._counts[numbers] = at + 1
        is_end = torch.isin(tokens, end_tokens)
        is_full = position - self.lengths + 1 >= self._max_new_tokens
        self._cut[self._numbers[drawn & is_full & ~is_end]] = True
        self._live = self._live & ~(drawn & (is_end | is_full))

    def compact(self) -> Tensor | None:
        """Remove finished rows once they are half of all. Returns the indices of the remaining rows, or ``None``."""
        if 2 * self.num_live > len(self._live) or not self.num_live:
            return None
        kept = self._live.nonzero()[:, 0]
        self.tokens, self.lengths, self._uniforms = self.tokens[kept], self.lengths[kept], self._uniforms[kept]
        self._numbers, self._live = self._numbers[kept], self._live[kept]
        return kept

    def responses(self, numbers: Sequence[int]) -> list[list[Sampled]]:
        """Responses grouped by request; ``numbers`` holds the number of responses per request."""
        drawn, logps = self._drawn.to(torch.int32).cpu().numpy(), self._logps.cpu().numpy()
        counts, cut = self._counts.tolist(), self._cut.tolist()
        ends = np.cumsum([0, *numbers])
        return [
            [Sampled(drawn[i, : counts[i]].copy(), logps[i, : counts[i]].copy(), cut[i]) for i in range(first, end)]
            for first, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]
