"""The records that carry a row from a file to a gradient, in the order in which they are made.

Shape legend, used throughout the project:

    P   prompts in a micro-batch
    K   the largest number of responses to one of these prompts
    R   rows of the micro-batch: one per (prompt, response), so R <= P * K
    B   sequences that the model computes: R, or P if prompts are shared, or 1 if they are packed
    T   tokens of the longest sequence, after padding
    V   vocabulary (``V/TP`` on one tensor-parallel rank)

``Row`` -> (encode) -> ``Sample`` -> (collate) -> ``MicroBatch`` -> (model) -> ``ModelOutput`` -> (log-probs)
-> ``ObjectiveBatch`` -> (objective) -> ``LossOutput``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Response:
    """One answer to a prompt, as text.

    Attributes:
        content: not empty.
        reward: the explicit reward r(x, y), ``None`` if the file has none, NaN if a labeled pair's is not finite.
            For an ensemble, the mean of its members. A label (desirable or not) is a reward of 1 or 0.
        ensemble: the rewards of M reward models or attributes, if several were named; otherwise empty. NaN for null.
        continuation: in a conversation, the messages after this answer; the assistant's messages are answers, too.
        fields: further fields of the answer's message for the chat template (``reasoning_content``, ``tool_calls``).
            With ``tool_calls`` the content may be empty.
        weight: 1, or 0 for an answer in a conversation that is context and not learned.
        truncated: the sampler stopped at a limit, so the text is not a complete answer.
        plain_content: the text after ``Row.plain_prompt`` in a published transcript, including whitespace. Set only
            together with it.
    """

    content: str
    reward: float | None = None
    ensemble: tuple[float, ...] = ()
    continuation: tuple[Mapping[str, Any], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    truncated: bool = False
    plain_content: str | None = None


@dataclass(frozen=True)
class Row:
    """A prompt with its responses, as read from a file.

    Attributes:
        prompt: messages in the format of Hugging Face chat templates (``role``, ``content``), or plain text. Plain
            text is one user message if a chat template is used, and is tokenized unchanged otherwise.
        responses: at least one. In pairwise data the chosen response comes first.
        location: file and line of the row, for messages ("data.jsonl.gz line 12").
        ranked: the order of the responses is a preference, best first (published as chosen/rejected).
        reference_rewards: rewards of further responses of the reference policy to the prompt; often empty.
        template_fields: arguments of the chat template besides the messages (``tools``, ``documents``).
        plain_prompt: the text of a prompt that was published as a transcript (``Human: ... Assistant:``). Without a
            chat template, it is tokenized instead of the messages, followed by each response's ``plain_content``.
        unused: paths of the record's fields that nothing reads, such as ``source`` or ``completions[].model``.
        fields: the record's top-level ones of these, such as a reference ``answer``, for rules that request them.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    responses: tuple[Response, ...]
    location: str
    ranked: bool = False
    reference_rewards: tuple[float, ...] = ()
    template_fields: Mapping[str, Any] = field(default_factory=dict)
    plain_prompt: str | None = None
    unused: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Sample:
    """A tokenized row: a prompt and its K responses. Token ids are int32.

    Attributes:
        prompt: ``[prompt tokens]``, t0 first, the generation prompt last.
        responses: K arrays ``[response tokens]``, the end-of-turn token last.
        rewards: ``[K]`` float64, NaN if missing.
        ranked: see :class:`Row`.
        location: see :class:`Row`.
        ensemble: ``[K, M]`` float64; M = 0 without an ensemble.
        reference_rewards: ``[N]`` float64.
        answers: for conversations, ``[response tokens]`` bool per response, true for the assistant's tokens (including
            end tokens); ``None`` if every response is a single answer.
        remarks: observations made while encoding the row, to be counted and reported after the number of rows:
            "prompts contain the chat template's special tokens ...".
        of_tokens: for sampled responses, values per token under the names of :class:`Tokens`: K arrays
            ``[response tokens]`` float32.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    rewards: np.ndarray
    ranked: bool
    location: str
    ensemble: np.ndarray
    reference_rewards: np.ndarray
    answers: tuple[np.ndarray, ...] | None = None
    remarks: tuple[str, ...] = ()
    of_tokens: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """P prompts with all their responses, as right-padded sequences; the input of one forward pass.

    There are three layouts (:mod:`nemo_rao.data.collate`): a sequence is a row; or a prompt with all its responses,
    which contains the prompt's tokens once; or all of these, packed. Every token belongs to a segment, a run of tokens.
    It sees the earlier tokens of its segment, and those of the one segment that it continues, a shared prompt.

    Position t predicts ``labels[:, t]``, the next token of its row. Below, positions are indices into the flattened
    micro-batch, b * T + t; a position belongs to the prompt or response whose token it predicts.

    Attributes:
        tokens: ``[B, T]`` int64.
        labels: ``[B, T]`` int64; 0 where nothing is predicted.
        position_ids: ``[B, T]`` int64, positions within the row, from 0; arbitrary in padding.
        segments: ``[S, 3]`` int64: number of tokens, index of the continued segment (-1: none), 1 for padding. In this
            order, segments fill all sequences. ``None`` if each sequence is one row.
        longest_segment: number of tokens.
        prompt_positions: ``[P, longest]`` int64, positions that predict each prompt's tokens except t0, in its first
            row; the predictions in its other rows are equal. Padded with -1.
        response_positions: ``[R, longest]`` int64, positions that predict the response's tokens including its end
            token; in a conversation, the assistant's tokens. Padded with -1.
        all_prompt_positions, all_response_positions: ``[N]`` int64, the same without padding, concatenated.
        boundary: ``[R]`` int64, the position that predicts the response's first token.
        end: ``[R]`` int64, the position of the response's last token.
        prompt_lengths, response_lengths: ``[P]`` and ``[R]`` float32, the number of these positions.
        num_tokens: number of computed tokens, without padding.
        num_row_tokens: number of tokens of all rows, prompt and response; exceeds num_tokens if prompts are shared.
        num_attention_pairs: pairs of a query and a key: the square of a row's tokens, as if attention were not causal;
            for a shared prompt its square, and for each response its tokens times those of prompt and response.
        prompt_index: ``[R]`` int64 in [0, P): the row's prompt.
        response_index: ``[R]`` int64 in [0, K): the row's index among its prompt's responses.
        response_ids: ``[R]`` int64: the response's index in the data set, under which reference log-probs are stored.
        rewards: ``[R]`` float32, NaN if unknown.
        ranked: ``[P]`` bool: the order of the responses is a preference, best first.
        reference: ``[R, 2]`` float32 reference log-probs (prompt without t0, response), nats; ``None`` if not needed.
        num_prompts: P.
        max_responses: K.
        reward_ensemble: ``[R, M]`` float32, the rewards of M reward models; ``None`` without an ensemble.
        reference_rewards: ``[P, N]`` float32, rewards of the reference policy's responses, padded with NaN; ``None``
            if there are none.
        of_tokens: ``[R, longest]`` float32 each, see :class:`Sample`; 0 after a response's last token.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: Tensor | None
    longest_segment: int
    prompt_positions: Tensor
    response_positions: Tensor
    all_prompt_positions: Tensor
    all_response_positions: Tensor
    boundary: Tensor
    end: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    num_tokens: int
    num_row_tokens: int
    num_attention_pairs: int
    prompt_index: Tensor
    response_index: Tensor
    response_ids: Tensor
    rewards: Tensor
    ranked: Tensor
    reference: Tensor | None
    num_prompts: int
    max_responses: int
    reward_ensemble: Tensor | None = None
    reference_rewards: Tensor | None = None
    of_tokens: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelOutput:
    """Output of the last pipeline stage for a micro-batch.

    Attributes:
        logits: ``[B, T, V/TP]``, this tensor-parallel rank's part of the vocabulary; ``None`` if they are not computed,
            because log-probabilities come from ``hidden`` or the model is a reward model.
        hidden: ``[T, B, H]`` (``[T/TP, B, H]`` with sequence parallelism), the input of the output layer.
        output_weight: ``[V/TP, H]``, the output layer's weight, set together with ``hidden``.
        values: float32 output of the value head: V(x) ``[R]``, or V of each response token ``[R, longest]``; ``None``
            for a model without one.
        scores: ``[R, A]`` float32, a reward model's scores; ``None`` for other models.
    """

    logits: Tensor | None
    hidden: Tensor | None = None
    output_weight: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """The response tokens of a micro-batch, for token-level objectives. L: tokens of the longest response.

    Entries where ``mask`` is false hold zeros and must not reach the loss, the metrics or a gradient.

    Attributes:
        logps: ``[P, K, L]`` float32, log pi(y_t | x, y_<t), nats. Carries the gradient.
        mask: ``[P, K, L]`` bool: the token exists.
        old: ``[P, K, L]`` float32, ``logps`` of the policy that sampled; ``None``: that is the current policy.
        importance: ``[P, K, L]`` float32, importance weights correcting for a sampler other than ``old``; ``None``: 1.
        reference: ``[P, K, L]`` float32, ``logps`` of the reference policy; ``None`` if not declared.
        values: ``[P, K, L]`` float32, the value head's V(x, y_<t). Carries the gradient. ``None`` if not declared.
        old_values: ``[P, K, L]`` float32, ``values`` before the first step on the rollout.
        advantages, returns: ``[P, K, L]`` float32, computed from a whole rollout; ``None`` for objectives that do not
            use them (:class:`nemo_rao.objectives.base.Objective`). No gradient.
    """

    logps: Tensor
    mask: Tensor
    old: Tensor | None = None
    importance: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True)
class ObjectiveBatch:
    """Input of an objective: values per (prompt, response), independent of the model and its parallelism.

    Entries where ``valid`` is false hold zeros and must not reach the loss, the metrics or a gradient.

    Attributes:
        prompt_logps: ``[P, K]`` float32, sum of log pi(x_t | x_<t) over t >= 1, in the row of that response; nats.
            Carries the gradient, and is nonzero, only for objectives that declare it.
        response_logps: ``[P, K]`` float32, sum of log pi(y_t | x, y_<t); nats. Carries the gradient.
        reference_prompt_logps, reference_response_logps: ``[P, K]`` float32, the same sums for the reference policy;
            ``None`` if the objective does not declare them. No gradient.
        rewards: ``[P, K]`` float32; NaN if unknown. No gradient.
        lengths: ``[P, K]`` float32, response tokens |y|.
        prompt_lengths: ``[P, K]`` float32, prompt tokens without t0.
        valid: ``[P, K]`` bool.
        ranked: ``[P]`` bool: the order of the responses is a preference, best first.
        reward_ensemble: ``[P, K, M]`` float32, the rewards of M reward models; ``None`` without an ensemble.
        reference_rewards: ``[P, N]`` float32, rewards of the reference policy's responses to each prompt, padded with
            NaN; ``None`` if there are none.
        values: ``[P, K]`` float32, the value head's V(x) in the row of that response. Carries the gradient. ``None``
            if the objective does not declare them.
        scores: ``[P, K, A]`` float32, a reward model's scores. Carries the gradient. ``None`` if the objective does not
            declare them; if it does, log-probabilities are 0.
        kl_estimate: ``[]`` float32, the mean over the *global* batch's prompts of rho(y') = log pi(y'|x) -
            log pi_ref(y'|x), where y' is a response to another prompt. No gradient. ``None`` if not declared.
        tokens: the tokens of all responses; ``None`` if not declared.
    """

    prompt_logps: Tensor
    response_logps: Tensor
    reference_prompt_logps: Tensor | None
    reference_response_logps: Tensor | None
    rewards: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    valid: Tensor
    ranked: Tensor
    reward_ensemble: Tensor | None = None
    reference_rewards: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    kl_estimate: Tensor | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True)
class RewardSummary:
    """Statistics of the training data's rewards, for objectives whose keys depend on them.

    Attributes:
        mean: mean over prompts of the mean reward of their responses; ``None`` if no response has a reward.
        low, high: smallest and largest reward; ``None`` if no response has a reward.
        all_labels: every response has a reward of 1 or 0.
        all_ranked: for every prompt, the order of the responses is a preference.
        num_columns: number of rewards per response: 1, or the size of the ensemble.
    """

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    all_labels: bool = False
    all_ranked: bool = False
    num_columns: int = 1


@dataclass(frozen=True)
class LossOutput:
    """An objective's sums over a micro-batch. The caller divides by counts reduced over the global batch.

    Attributes:
        loss_sum: ``[]`` float32, the sum over prompts of each prompt's mean over its valid responses (or pairs); for
            some objectives, the sum over responses or tokens.
        num_prompts: ``[]`` float32, the number of prompts (responses, tokens) in ``loss_sum``; its total over the
            global batch is the divisor.
        metrics: name -> ``[2]`` float32 (sum, count), no gradient.
    """

    loss_sum: Tensor
    num_prompts: Tensor
    metrics: Mapping[str, Tensor]
