"""The loss of a micro-batch from the model's logits; all loss scaling is in this module.

A global batch's loss is the mean over its prompts. Micro-batches and data-parallel ranks hold different numbers of
them, so no rank can divide by the correct count alone. Therefore each micro-batch returns its *sum* over prompts and
the number of prompts; with ``calculate_per_token_loss`` Megatron sums both over micro-batches and data-parallel ranks,
and divides the gradients once by the global count (``finalize_model_grads``). Nothing else scales anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_rao.batch import LossOutput, MicroBatch, ModelOutput, ObjectiveBatch, Tokens
from nemo_rao.mcore.context_parallel import summed
from nemo_rao.objectives.base import Objective
from nemo_rao.ops.linear_log_probs import linear_vocab_parallel_log_probs
from nemo_rao.ops.segments import sums_at, to_prompts, valid_entries, values_at
from nemo_rao.ops.vocab_parallel import vocab_parallel_log_probs

LOSS = "loss"


def configure_loss_scaling(config: TransformerConfig) -> None:
    """Make Megatron normalize gradients by the global number of prompts, as this module's sums expect.

    A mixture of experts trains without a load-balancing loss. Megatron adds one inside the router, independently of the
    objective, weighted by a micro-batch's tokens. Divided by prompts it would be thousands of times its nominal
    coefficient; it also depends on how a batch is split into micro-batches, and it counts padding. The router of a
    pretrained model is balanced, and a run of a few thousand prompts changes little of that: transformers and TRL also
    disable the loss by default.
    """
    config.calculate_per_token_loss = True
    # Micro-batches are padded to their longest row, and have as many rows as their prompts have responses.
    config.variable_seq_lengths = True
    # Rejected together with variable lengths by a check that does not consider whether the model has experts at all;
    # the other dispatcher requires equally many tokens on all ranks.
    config.moe_token_dispatcher_type = "alltoall"
    config.moe_router_load_balancing_type = "none"
    config.moe_aux_loss_coeff = 0.0
    config.moe_z_loss_coeff = None


def sequence_log_probs(
    output: ModelOutput,
    batch: MicroBatch,
    *,
    vocab_size: int,
    prompts: bool = True,
    prompt_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities of every prompt (without t0) and response, in nats, float32.

    Args:
        output: logits, or what they would be computed from.
        batch: labels, and the positions that predict them.
        vocab_size: V without padding.
        prompts: whether to compute those of prompts; if not, they are 0.
        prompt_gradient: whether those of prompts carry a gradient; if not, no backward pass is computed for them.

    Returns:
        ``([R], [R])``: prompt sums, response sums; the same on every tensor- and context-parallel rank.
    """
    positions, num_trained = batch.all_response_positions, len(batch.all_response_positions)
    if prompts:
        positions = torch.cat([positions, batch.all_prompt_positions])
    logps = _token_log_probs(output, batch, positions, len(positions) if prompt_gradient else num_trained, vocab_size)
    response_sums = sums_at(logps, batch.response_positions)
    if not prompts:
        response_logps = summed(response_sums)
        return torch.zeros_like(response_logps), response_logps
    sums = summed(torch.cat([response_sums, sums_at(logps, batch.prompt_positions)]))
    response_logps, prompt_logps = sums.split([len(response_sums), batch.num_prompts])
    return prompt_logps[batch.prompt_index], response_logps


def response_token_log_probs(output: ModelOutput, batch: MicroBatch, *, vocab_size: int) -> Tensor:
    """Compute ``[R, longest]`` float32, log pi of every response token, in nats; 0 after a response's last token.

    The same on every tensor- and context-parallel rank. Carries a gradient.
    """
    positions = batch.all_response_positions
    logps = _token_log_probs(output, batch, positions, len(positions), vocab_size)
    return summed(values_at(logps, batch.response_positions))


def _token_log_probs(
    output: ModelOutput, batch: MicroBatch, positions: Tensor, num_trained: int, vocab_size: int
) -> Tensor:
    """Compute ``[B, T]`` float32, nats; 0 except at ``[N]`` positions, of which the first ones carry a gradient."""
    length = batch.tokens.shape[1]
    at_b, at_t = positions // length, positions % length
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "group": parallel_state.get_tensor_model_parallel_group(),
        "num_trained": num_trained,
    }
    if output.logits is not None:
        return vocab_parallel_log_probs(output.logits, batch.labels, positions=(at_b, at_t), **common)
    assert output.hidden is not None and output.output_weight is not None, (
        "the model returns what log-probabilities need"
    )
    return linear_vocab_parallel_log_probs(
        output.hidden,
        output.output_weight,
        batch.labels.t(),
        positions=(at_t, at_b),
        sequence_parallel=output.hidden.shape[0] != length,
        **common,
    ).t()


def objective_batch(
    batch: MicroBatch,
    prompt_logps: Tensor,
    response_logps: Tensor,
    *,
    values: Tensor | None = None,
    scores: Tensor | None = None,
    kl_estimate: Tensor | None = None,
    token_logps: Tensor | None = None,
    token_values: Tensor | None = None,
) -> ObjectiveBatch:
    """Arrange row sums and values ``[R]``, scores ``[R, A]``, log-probabilities and values of tokens ``[R, longest]``
    by prompt and response, together with the data's fields."""
    num_responses = batch.max_responses

    def by_prompt(values: Tensor) -> Tensor:
        return to_prompts(values, batch.prompt_index, batch.response_index, batch.num_prompts, num_responses)

    tokens = None
    if token_logps is not None:
        positions = torch.arange(token_logps.shape[1], device=token_logps.device)
        tokens = Tokens(
            logps=by_prompt(token_logps),
            mask=by_prompt(positions < batch.response_lengths[:, None]),
            values=None if token_values is None else by_prompt(token_values),
            **{name: by_prompt(of_rows) for name, of_rows in batch.of_tokens.items()},
        )
    reference = batch.reference
    return ObjectiveBatch(
        prompt_logps=by_prompt(prompt_logps),
        response_logps=by_prompt(response_logps),
        reference_prompt_logps=None if reference is None else by_prompt(reference[:, 0]),
        reference_response_logps=None if reference is None else by_prompt(reference[:, 1]),
        rewards=by_prompt(batch.rewards),
        lengths=by_prompt(batch.response_lengths),
        prompt_lengths=by_prompt(batch.prompt_lengths[batch.prompt_index]),
        valid=valid_entries(batch.prompt_index, batch.response_index, batch.num_prompts, num_responses),
        ranked=batch.ranked,
        reward_ensemble=None if batch.reward_ensemble is None else by_prompt(batch.reward_ensemble),
        reference_rewards=batch.reference_rewards,
        values=None if values is None else by_prompt(values),
        scores=None if scores is None else by_prompt(scores),
        kl_estimate=kl_estimate,
        tokens=tokens,
    )


def micro_batch_loss(
    output: ModelOutput,
    batch: MicroBatch,
    objective: Objective,
    config: Any,
    *,
    vocab_size: int,
    kl_estimate: Tensor | None = None,
    observe: Callable[[ObjectiveBatch], None] | None = None,
) -> LossOutput:
    """Compute the objective's sums over one micro-batch, from the last pipeline stage's output.

    Args:
        kl_estimate: ``[]``, of the global batch (:func:`nemo_rao.mcore.mismatched.mean_log_ratio`), for objectives that
            need it.
        observe: called with the objective's input.
    """
    needs = objective.needs_of(config)
    token_logps = None
    if needs.scores:
        prompt_logps = response_logps = torch.zeros_like(batch.rewards)
    elif needs.values_alone:
        assert output.values is not None, "the model has a value head"
        prompt_logps = response_logps = torch.zeros_like(batch.rewards)
        token_logps = torch.zeros_like(output.values)
    elif needs.tokens:
        token_logps = response_token_log_probs(output, batch, vocab_size=vocab_size)
        response_logps = token_logps.sum(-1)
        prompt_logps = torch.zeros_like(response_logps)
    else:
        prompt_logps, response_logps = sequence_log_probs(
            output,
            batch,
            vocab_size=vocab_size,
            prompts=needs.prompt_logps,
            prompt_gradient=needs.prompt_gradient,
        )
    arranged = objective_batch(
        batch,
        prompt_logps,
        response_logps,
        values=output.values if needs.values == "prompt" else None,
        scores=output.scores,
        kl_estimate=kl_estimate,
        token_logps=token_logps,
        token_values=output.values if needs.values == "tokens" else None,
    )
    if observe is not None:
        observe(arranged)
    return objective.loss(arranged, config)


def for_schedule(output: LossOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Convert a micro-batch's result to the form of Megatron's schedules: (sum, count, statistics)."""
    statistics = {LOSS: torch.stack([output.loss_sum.detach(), output.num_prompts])}
    statistics.update(output.metrics)
    num_prompts = output.num_prompts.to(torch.int)
    if parallel_state.get_context_parallel_rank() > 0:
        num_prompts = torch.zeros_like(num_prompts)  # every rank of the group has the same prompts, so one counts them
    return output.loss_sum, num_prompts, statistics


def reduce_statistics(
    outputs: Sequence[Mapping[str, Tensor]],
    *,
    names: Sequence[str] = (),
    of_rank: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Tensor]:
    """Sum the micro-batches' (sum, count) pairs over the whole global batch.

    A collective over all ranks.

    Args:
        outputs: one mapping name -> ``[2]`` per micro-batch; empty except on the last pipeline stage.
        names: the names in ``outputs``, if every rank knows them from an earlier call: an objective's never change.
            Otherwise they are gathered first, as Python objects, which costs more than the sum.
        of_rank: further pairs, with the same names on every rank, each of which contributes its part.

    Returns:
        name -> ``[2]`` float64 (sum, count), the same on every rank; those of ``of_rank`` come last.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    names, of_rank = names or _gathered_names(outputs), of_rank or {}
    totals = torch.zeros(len(names) + len(of_rank), 2, dtype=torch.float64, device=device)
    # Tensor- and context-parallel ranks hold the same statistics, so only one of them contributes.
    if outputs and parallel_state.get_tensor_and_context_parallel_rank() == 0:
        assert all(set(output) == set(names) for output in outputs), (names, [list(output) for output in outputs])
        stacked = torch.stack([torch.stack([output[name] for name in names]) for output in outputs])
        totals[: len(names)] += stacked.double().sum(0)
    for number, pair in enumerate(of_rank.values(), start=len(names)):
        totals[number] += totals.new_tensor(pair)
    torch.distributed.all_reduce(totals)
    return dict(zip([*names, *of_rank], totals, strict=True))


def _gathered_names(outputs: Sequence[Mapping[str, Tensor]]) -> Sequence[str]:
    """Return the names that any rank has: a data-parallel rank may have had nothing to compute, and only the last
    pipeline stage has statistics at all."""
    by_rank: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, list(outputs[0]) if outputs else [])
    return max(by_rank, key=len)


def means(statistics: Mapping[str, Tensor]) -> dict[str, float]:
    """Convert (sum, count) to means, without entries of count 0."""
    if not statistics:
        return {}
    pairs = torch.stack(list(statistics.values())).tolist()  # in one copy from the GPU
    return {name: total / count for name, (total, count) in zip(statistics, pairs, strict=True) if count > 0}
