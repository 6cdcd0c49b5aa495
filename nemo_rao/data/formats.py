"""The shapes in which preference data is published, and how one record of each becomes a :class:`Row`.

A record's format is recognised by a field that only this format has (its *mark*); the other fields it needs are then
required, so that a row with a field forgotten is named as such and not taken for something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nemo_rao.batch import Response, Row
from nemo_rao.data.fields import (
    Messages,
    Record,
    RewardField,
    describe,
    read_messages,
    read_numbers,
    read_prompt,
    read_records,
    read_rewarded,
    read_score_of_pair,
    read_text,
    required,
)
from nemo_rao.errors import UserError

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@dataclass(frozen=True)
class Format:
    """A published shape of data.

    Attributes:
        name: as users know it.
        marks: a record with any of these fields has this format.
        fields: what a record of it looks like, for messages.
        convert: (record, place, reward field) -> Row.
        one_response_a_record: consecutive records with the same prompt belong together (see ``rows``).
    """

    name: str
    marks: tuple[str, ...]
    fields: str
    convert: Callable[[Record, str, RewardField], Row]
    one_response_a_record: bool = False


def recognise(record: object, place: str) -> Format:
    """The format of a record.

    Raises:
        UserError: it is not an object with named fields, or no format has such fields.
    """
    if not isinstance(record, Mapping):
        raise UserError(
            f"{place}: expected an object with named fields, found {describe(record)}; "
            "write one JSON object per line (JSON Lines, not one JSON array)"
        )
    for known in FORMATS:
        if any(mark in record for mark in known.marks):
            return known
    found = ", ".join(str(name) for name in record) or "none"
    accepted = "; ".join(f"{known.name}: {known.fields}" for known in FORMATS)
    raise UserError(f"{place}: unknown format with the fields {found}; accepted are {accepted}")


# ---------------------------------------------------------------------------------------------------- the formats


def from_canonical(record: Record, place: str, reward_field: RewardField) -> Row:
    """``{"prompt": str | messages, "responses": [{"content": str, "reward": float}, ...]}``.

    Optional are the reward, or ``"label": bool`` in its place; ``"reference_rewards": [float, ...]``, the rewards of
    further responses, which the reference policy gave; and ``"ranked": true`` where the order is a preference.
    """
    responses = []
    for number, entry in enumerate(read_records(required(record, "responses", place), place, "responses")):
        field = f"responses[{number}]"
        content = read_text(required(entry, "content", place, field), place, f"{field}.content")
        responses.append(read_rewarded(entry, content, "reward", reward_field, place, field))
    return Row(
        prompt=read_prompt(required(record, "prompt", place), place, "prompt"),
        responses=tuple(responses),
        place=place,
        reference_rewards=read_numbers(record.get("reference_rewards"), place, "reference_rewards"),
        ranked=record.get("ranked") is True,
    )


def from_ultrafeedback(record: Record, place: str, reward_field: RewardField) -> Row:
    """``instruction`` and ``completions``, each with ``response`` and ``overall_score``.

    ``reward_field`` may be a path into a completion, such as ``fine-grained_score`` or
    ``annotations.helpfulness.Rating``. The system prompts under which completions were sampled differ from one to
    the next and are no part of the prompt, as in UltraFeedback's own training sets.
    """
    responses = []
    for number, entry in enumerate(read_records(required(record, "completions", place), place, "completions")):
        field = f"completions[{number}]"
        content = read_text(required(entry, "response", place, field), place, f"{field}.response")
        responses.append(read_rewarded(entry, content, "overall_score", reward_field, place, field))
    prompt = read_prompt(required(record, "instruction", place), place, "instruction")
    return Row(prompt, tuple(responses), place)


def from_nemo_aligner(record: Record, place: str, reward_field: RewardField) -> Row:
    """``prompt``, ``chosen_response``, ``rejected_response``, and optionally ``chosen_reward``, ``rejected_reward``."""
    _no_reward_field(reward_field, "chosen_reward and rejected_reward", place)
    return Row(
        prompt=read_prompt(required(record, "prompt", place), place, "prompt"),
        responses=tuple(
            Response(
                content=read_text(required(record, f"{side}_response", place), place, f"{side}_response"),
                reward=read_score_of_pair(record.get(f"{side}_reward"), place, f"{side}_reward"),
            )
            for side in ("chosen", "rejected")
        ),
        place=place,
        ranked=True,
    )


def from_chosen_rejected(record: Record, place: str, reward_field: RewardField) -> Row:
    """TRL and UltraFeedback-binarized: ``chosen``, ``rejected``, and optionally ``prompt`` and the two scores.

    The two sides are both text or both messages. Messages may hold the answer alone or the whole conversation; the
    shared leading messages are then the prompt. Without ``prompt`` (TRL's implicit prompt) what both sides share at
    their start is the prompt: messages, or text cut where a word ends.
    """
    _no_reward_field(reward_field, "score_chosen and score_rejected", place)
    chosen, rejected = (required(record, side, place) for side in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(
            f"{place}: field 'chosen' is {describe(chosen)} and field 'rejected' is {describe(rejected)}; "
            "give both as text or both as messages"
        )
    prompt: str | Messages
    if isinstance(chosen, str):
        contents = read_text(chosen, place, "chosen"), read_text(rejected, place, "rejected")
        if record.get("prompt") is None:
            prompt, contents = _split_texts(*contents)
            if not prompt:
                raise UserError(
                    f"{place}: field 'prompt' is missing, and 'chosen' and 'rejected' share no leading text that "
                    "could be it; add it or drop the row"
                )
        else:
            prompt = record["prompt"]
    else:
        conversations = read_messages(chosen, place, "chosen"), read_messages(rejected, place, "rejected")
        prompt, contents = _split_conversations(record.get("prompt"), conversations, place)
    responses = tuple(
        Response(
            content=read_text(content, place, side),
            reward=read_score_of_pair(record.get(f"score_{side}"), place, f"score_{side}"),
        )
        for content, side in zip(contents, ("chosen", "rejected"), strict=True)
    )
    return Row(read_prompt(prompt, place, "prompt"), responses, place, ranked=True)


def from_single_response(record: Record, place: str, reward_field: RewardField) -> Row:
    """HelpSteer: ``prompt``, ``response`` and one field per attribute, of which one is the reward."""
    return Row(
        prompt=read_prompt(required(record, "prompt", place), place, "prompt"),
        responses=(
            read_rewarded(
                record, read_text(record["response"], place, "response"), HELPSTEER_ATTRIBUTES[0], reward_field, place
            ),
        ),
        place=place,
    )


def from_unpaired(record: Record, place: str, reward_field: RewardField) -> Row:
    """TRL's unpaired preferences: ``prompt``, ``completion`` (text or one message), ``label`` or ``reward``."""
    completion = record["completion"]
    if not isinstance(completion, str):
        messages = read_messages(completion, place, "completion")
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"{place}: field 'completion' must be one assistant message, found messages of {roles}")
        completion = messages[0]["content"]
    content = read_text(completion, place, "completion")
    return Row(
        prompt=read_prompt(required(record, "prompt", place), place, "prompt"),
        responses=(read_rewarded(record, content, "reward", reward_field, place),),
        place=place,
    )


def from_messages(record: Record, place: str, reward_field: RewardField) -> Row:
    """UltraChat and other chats: ``messages``, of which every one by the assistant is an answer to be learned.

    What follows the last answer is left out.
    """
    if reward_field is not None:
        raise UserError(f"{place}: a conversation has no reward field; leave data.reward_field unset")
    messages = read_messages(record["messages"], place, "messages")
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise UserError(
            f"{place}: field 'messages' must hold an assistant message with another one before it; drop the row"
        )
    for number in answers:
        read_text(messages[number]["content"], place, f"messages[{number}].content")
    first, last = answers[0], answers[-1]
    response = Response(messages[first]["content"], continuation=messages[first + 1 : last + 1])
    return Row(read_prompt(messages[:first], place, "messages"), (response,), place)


FORMATS = (
    Format("canonical", ("responses",), "prompt, responses[content, reward]", from_canonical),
    Format("UltraFeedback", ("completions",), "instruction, completions[response, overall_score]", from_ultrafeedback),
    Format(
        "NeMo-Aligner",
        ("chosen_response", "rejected_response"),
        "prompt, chosen_response, rejected_response, chosen_reward, rejected_reward",
        from_nemo_aligner,
    ),
    Format(
        "TRL and UltraFeedback-binarized",
        ("chosen", "rejected"),
        "prompt, chosen, rejected, score_chosen, score_rejected",
        from_chosen_rejected,
    ),
    Format(
        "HelpSteer",
        ("response",),
        f"prompt, response, {', '.join(HELPSTEER_ATTRIBUTES)}",
        from_single_response,
        one_response_a_record=True,
    ),
    Format("chats", ("messages",), "messages", from_messages),
    Format(
        "unpaired",
        ("completion",),
        "prompt, completion, label or reward",
        from_unpaired,
        one_response_a_record=True,
    ),
)


# ------------------------------------------------------------------------------- prompts shared by chosen and rejected


def _split_texts(chosen: str, rejected: str) -> tuple[str, tuple[str, str]]:
    """Shared leading text, and what follows it on either side. Neither side is left empty, no word is cut."""
    shortest = min(len(chosen), len(rejected))
    shared = next((at for at in range(shortest - 1) if chosen[at] != rejected[at]), max(shortest - 1, 0))
    turn = "\n\nAssistant:"  # Anthropic's hh-rlhf: answers that begin alike must not lend their start to the prompt
    if (at := chosen.rfind(turn, 0, shared)) >= 0:
        shared = at + len(turn)
    else:
        while shared > 0 and not chosen[shared].isspace():
            shared -= 1
        while shared > 0 and chosen[shared - 1].isspace():
            shared -= 1
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def _split_conversations(
    prompt: object, conversations: tuple[Messages, Messages], place: str
) -> tuple[str | Messages, tuple[str, str]]:
    """The prompt and the one assistant message that follows it on either side."""
    chosen, rejected = conversations
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    leading = chosen[:shared]
    before: str | Messages = leading
    if isinstance(prompt, str):
        if not leading:
            before = prompt
        elif all(message["role"] != "user" for message in leading):
            raise UserError(
                f"{place}: field 'prompt' is text that belongs among the messages which 'chosen' and 'rejected' share; "
                "write it there as a user message or give the answers alone"
            )
    elif prompt is not None:
        explicit = read_messages(prompt, place, "prompt")
        if leading[: len(explicit)] != explicit:  # otherwise both sides repeat the prompt
            before = explicit if explicit[len(explicit) - shared :] == leading else explicit + leading
    if not before:
        raise UserError(
            f"{place}: field 'prompt' is missing, and 'chosen' and 'rejected' share no leading messages that could "
            "be it; add it or drop the row"
        )
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        answer = messages[shared:]
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in answer)
            raise UserError(
                f"{place}: field '{side}' must hold one assistant message after what it shares with the other side, "
                f"found messages of {roles}; keep only the turn in which the two conversations differ"
            )
    return before, (chosen[-1]["content"], rejected[-1]["content"])


def _no_reward_field(reward_field: RewardField, own: str, place: str) -> None:
    if reward_field is not None:
        names = [reward_field] if isinstance(reward_field, str) else reward_field
        raise UserError(
            f"{place}: reward field {', '.join(map(repr, names))} cannot be chosen for pairs, whose rewards are {own}; "
            "leave data.reward_field unset"
        )
