"""The records that carry a row from a file to a gradient, in the order in which they are made.

Shape legend, used throughout the project:

    P   prompts in a micro-batch
    K   the largest number of responses to one of these prompts
    R   rows of the micro-batch: one per (prompt, response), so R <= P * K
    B   sequences that the model computes: R, or P where prompts are shared, or 1 where they are packed
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
        reward: the explicit reward r(x, y), ``None`` where the file has none; of a labelled pair, NaN where the
            file's is not finite. Of an ensemble, its members' mean. A label (desirable or not) is a reward of 1 or 0.
        ensemble: the rewards of M reward models, or M attributes, where several were named; else empty. NaN where
            the file has null.
        continuation: of a conversation, the messages after this answer; the assistant's are answers too.
        fields: what the answer's message has beside role and content, for the chat template (``reasoning_content``,
            ``tool_calls``). With ``tool_calls`` the content may be empty.
        weight: 1, or 0 for an answer of a conversation that is context and not learned.
        truncated: the text was cut where its sampler stopped at a limit, and is no whole answer.
        plain_content: what follows ``Row.plain_prompt`` in a published transcript, blanks included. Set with it alone.
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
        prompt: messages in the form of Hugging Face chat templates (``role``, ``content``), or plain text,
            which is one user message where a chat template is used, and is tokenised as it stands where not.
        responses: at least one. In pairwise data the chosen response stands first.
        place: where the row came from, for messages to the user ("data.jsonl.gz line 12").
        ranked: the responses' order is a preference, best first (published as chosen/rejected).
        reference_rewards: rewards of further responses, which the reference policy gave to the prompt; often empty.
        template_fields: what the chat template takes beside the messages (``tools``, ``documents``).
        plain_prompt: of a prompt published as a transcript (``Human: ... Assistant:``), its text. Tokenised in
            place of the messages where no chat template is used, with each response's ``plain_content`` behind it.
        unused: paths of the fields of its record that nothing reads, such as ``source`` or ``completions[].model``.
        fields: those of them that are the record's own, such as a reference ``answer``, for rules that ask for them.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    responses: tuple[Response, ...]
    place: str
    ranked: bool = False
    reference_rewards: tuple[float, ...] = ()
    template_fields: Mapping[str, Any] = field(default_factory=dict)
    plain_prompt: str | None = None
    unused: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Sample:
    """A tokenised row: a prompt and its K responses. Token ids are int32.

    Attributes:
        prompt: ``[prompt tokens]``, t0 first, the generation prompt last.
        responses: K arrays ``[response tokens]``, the end-of-turn token last.
        rewards: ``[K]`` float64, NaN where the row has none.
        ranked: see :class:`Row`.
        place: see :class:`Row`.
        ensemble: ``[K, M]`` float64; M = 0 without an ensemble.
        reference_rewards: ``[N]`` float64.
        answers: of conversations, for each response ``[response tokens]`` bool, true where the assistant speaks (with
            its end tokens); ``None`` where every response is one answer.
        remarks: what was noticed about the row while it was encoded, each to be counted and reported behind the number
            of rows: "prompts hold the chat template's own tokens ...".
        of_tokens: of sampled responses, by names of :class:`Tokens` what is known of each token: K arrays
            ``[response tokens]`` float32.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    rewards: np.ndarray
    ranked: bool
    place: str
    ensemble: np.ndarray
    reference_rewards: np.ndarray
    answers: tuple[np.ndarray, ...] | None = None
    remarks: tuple[str, ...] = ()
    of_tokens: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """P prompts with all their responses, as sequences padded on the right; what one forward pass computes.

    Three layouts (:mod:`nemo_rao.data.collate`): a sequence is a row; or a prompt with all its responses, the prompt's
    tokens standing there once; or all of them, packed. Every token belongs to a segment, a run of tokens that see those
    before them in the segment, and those of the one segment that it continues, a shared prompt; nothing else.

    Position t predicts ``labels[:, t]``, the next token of its row. A place is a position counted through the whole
    micro-batch, b * T + t; it is a prompt's or a response's by what it predicts.

    Attributes:
        tokens: ``[B, T]`` int64.
        labels: ``[B, T]`` int64; 0 where nothing is predicted.
        position_ids: ``[B, T]`` int64, positions within the row, from 0; anything in padding.
        segments: ``[S, 3]`` int64: tokens, number of the segment that it continues (-1: none), 1 for padding; in
            their order, they fill all sequences. ``None`` where each sequence is one row.
        longest_segment: tokens.
        prompt_places: ``[P, longest]`` int64, where each prompt's tokens, other than t0, are predicted, in its first
            row: they are the same in the others. -1 behind the last one.
        response_places: ``[R, longest]`` int64, where the response's tokens are predicted, its end token included; of
            a conversation, where the assistant's are. -1 behind the last one.
        all_prompt_places, all_response_places: ``[N]`` int64, the same without the -1, one after the other.
        boundary: ``[R]`` int64, the place that predicts the response's first token.
        end: ``[R]`` int64, the place of the response's last token.
        prompt_lengths, response_lengths: ``[P]`` and ``[R]`` float32, how many of these places there are.
        num_tokens: tokens that are computed, without padding.
        num_row_tokens: tokens of all rows, prompt and response; more than are computed where prompts are shared.
        num_attention_pairs: pairs of a query and a key, the square of a row's tokens as if attention were not causal;
            of a shared prompt its own square, and of each response its tokens times those of prompt and response.
        prompt_index: ``[R]`` int64 in [0, P): the row's prompt.
        response_index: ``[R]`` int64 in [0, K): the row's place among its prompt's responses.
        response_ids: ``[R]`` int64: the response's number in the data set, by which reference log-probs are found.
        rewards: ``[R]`` float32, NaN where unknown.
        ranked: ``[P]`` bool: the responses' order is a preference, best first.
        reference: ``[R, 2]`` float32 reference log-probs (prompt without t0, response), nats; ``None`` if not needed.
        num_prompts: P.
        max_responses: K.
        reward_ensemble: ``[R, M]`` float32, the rewards of M reward models; ``None`` without an ensemble.
        reference_rewards: ``[P, N]`` float32, rewards of the reference policy's own responses, NaN where there are
            fewer than N; ``None`` where there are none.
        of_tokens: ``[R, longest]`` float32 each, see :class:`Sample`; 0 behind a response's last token.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: Tensor | None
    longest_segment: int
    prompt_places: Tensor
    response_places: Tensor
    all_prompt_places: Tensor
    all_response_places: Tensor
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
    """What the last pipeline stage makes of a micro-batch.

    Attributes:
        logits: ``[B, T, V/TP]``, this tensor-parallel rank's part of the vocabulary; ``None`` where they are never
            computed: log-probabilities come from ``hidden``, or it is a reward model, which has none.
        hidden: ``[T, B, H]`` (``[T/TP, B, H]`` with sequence parallelism), what would enter the output layer.
        output_weight: ``[V/TP, H]`` of the output layer, with ``hidden``.
        values: the value head's, float32: V(x) ``[R]``, or V of each response token ``[R, longest]``; ``None`` for a
            model without one.
        scores: ``[R, A]`` float32, a reward model's scores; ``None`` for other models.
    """

    logits: Tensor | None
    hidden: Tensor | None = None
    output_weight: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """The response tokens of a micro-batch, for objectives that look at each. L: tokens of the longest response.

    Entries where ``mask`` is false hold zeros and must not reach the loss, the metrics or a gradient.

    Attributes:
        logps: ``[P, K, L]`` float32, log pi(y_t | x, y_<t), nats. Carries the gradient.
        mask: ``[P, K, L]`` bool: there is such a token.
        old: ``[P, K, L]`` float32, the same of the policy that sampled; ``None``: it is the policy at hand.
        importance: ``[P, K, L]`` float32, by how much the token counts because another policy than the one that it is
            taken for has sampled it; ``None``: 1.
        reference: ``[P, K, L]`` float32, the same of the reference policy; ``None`` where it is not declared.
        values: ``[P, K, L]`` float32, the value head's V(x, y_<t). Carries the gradient. ``None`` where not declared.
        old_values: ``[P, K, L]`` float32, the same before the first step on the rollout.
        advantages, returns: ``[P, K, L]`` float32, worked out from a whole rollout; ``None`` for objectives that do not
            (:class:`nemo_rao.objectives.base.Objective`). No gradient.
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
    """What an objective sees: numbers per (prompt, response), whatever the model and its parallelism.

    Entries where ``valid`` is false hold zeros and must not reach the loss, the metrics or a gradient.

    Attributes:
        prompt_logps: ``[P, K]`` float32, sum of log pi(x_t | x_<t) over t >= 1, in the row of that response; nats.
            Carries the gradient, and is not 0, for objectives that declare so.
        response_logps: ``[P, K]`` float32, sum of log pi(y_t | x, y_<t); nats. Carries the gradient.
        reference_prompt_logps, reference_response_logps: ``[P, K]`` float32, the same sums of the reference policy;
            ``None`` for an objective that declares no need of them. No gradient.
        rewards: ``[P, K]`` float32; NaN where unknown. No gradient.
        lengths: ``[P, K]`` float32, response tokens |y|.
        prompt_lengths: ``[P, K]`` float32, prompt tokens without t0.
        valid: ``[P, K]`` bool.
        ranked: ``[P]`` bool: the responses' order is a preference, best first.
        reward_ensemble: ``[P, K, M]`` float32, the rewards of M reward models; ``None`` without an ensemble.
        reference_rewards: ``[P, N]`` float32, rewards of the reference policy's own responses to each prompt, NaN where
            there are fewer than N; ``None`` where there are none.
        values: ``[P, K]`` float32, the value head's V(x) in the row of that response. Carries the gradient. ``None``
            for an objective that declares no need of them.
        scores: ``[P, K, A]`` float32, a reward model's scores. Carries the gradient. ``None`` for an objective that
            declares no need of them; for one that does, log-probabilities are 0.
        kl_estimate: ``[]`` float32, the mean over the *global* batch's prompts of rho(y') = log pi(y'|x) -
            log pi_ref(y'|x), y' being a response to another prompt. No gradient. ``None`` where not declared.
        tokens: of every response; ``None`` where not declared.
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
    """What objectives whose keys depend on the training data ask of its rewards.

    Attributes:
        mean: over prompts of the mean reward of a prompt's responses; ``None`` where no response has one.
        low, high: smallest and largest reward; ``None`` likewise.
        all_labels: every response has a reward, and each is 1 or 0.
        all_ranked: every prompt's order of responses is a preference.
        num_columns: rewards of each response: 1, or the members of the ensemble.
    """

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    all_labels: bool = False
    all_ranked: bool = False
    num_columns: int = 1


@dataclass(frozen=True)
class LossOutput:
    """An objective's sums over a micro-batch. Whoever calls divides by counts reduced over the whole global batch.

    Attributes:
        loss_sum: ``[]`` float32, the sum over prompts of each prompt's mean over its valid responses (or pairs); of
            objectives that say so, over responses or tokens.
        num_prompts: ``[]`` float32, the prompts (responses, tokens) in ``loss_sum``, by whose number over the global
            batch it is divided.
        metrics: name -> ``[2]`` float32 (sum, count), no gradient.
    """

    loss_sum: Tensor
    num_prompts: Tensor
    metrics: Mapping[str, Tensor]
