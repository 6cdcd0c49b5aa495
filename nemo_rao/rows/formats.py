"""Published formats of preference data, and the conversion of one record of each to a :class:`Row`.

A record's format is recognized by a field that only this format has (its *mark*). Its other fields are then required,
so that a forgotten field is reported as such and the row is not mistaken for another format. The parts that formats
share are read by ``prompt`` (under any of its names, with system message and tools) and ``responses``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nemo_rao.batch import Response, Row
from nemo_rao.errors import UserError
from nemo_rao.rows.fields import describe, read_numbers, read_text
from nemo_rao.rows.messages import answer_of, as_messages, read_messages
from nemo_rao.rows.pairs import SIDES, from_chosen_rejected
from nemo_rao.rows.prompt import CONVERSATIONS, Asked, read_asked, with_context
from nemo_rao.rows.responses import make_row, read_answer, read_response
from nemo_rao.rows.rewards import RewardField, no_reward_field, read_reward, read_score_of_pair
from nemo_rao.rows.view import View

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@dataclass(frozen=True)
class Format:
    """A published data format.

    Attributes:
        name: its common name.
        marks: a record with any of these fields has this format.
        fields: the fields of a record, for messages.
        convert: (record, reward field) -> Row.
        one_response_a_record: consecutive records with the same prompt belong together (see ``reading``).
    """

    name: str
    marks: tuple[str, ...]
    fields: str
    convert: Callable[[View, RewardField], Row]
    one_response_a_record: bool = False


def recognize(record: View) -> Format:
    """Return the format of a record. A mark that is null counts only if there is no other.

    Raises:
        UserError: no format has these fields.
    """
    for is_there in (record.__contains__, record.is_null):
        for known in FORMATS:
            if any(is_there(mark) for mark in known.marks):
                return known
    found = ", ".join(record) or "none"
    accepted = "; ".join(f"{known.name}: {known.fields}" for known in FORMATS)
    raise UserError(
        f"{record.location}: unknown format with the fields {found}; accepted are {accepted}. Map fields with other "
        "names by data.columns (data.columns.prompt=NAME)."
    )


def from_canonical(record: View, reward_field: RewardField) -> Row:
    """``{"prompt": str | messages, "responses": [{"content": str, "reward": float}, ...]}``.

    Optional fields: the reward, or ``"label": bool`` instead; ``"reference_rewards": [float, ...]``, the rewards of
    further responses sampled from the reference policy; and ``"ranked": true`` if the order is a preference. See
    ``writing`` for the rest.
    """
    entries = record.records("responses")
    responses = [_canonical_response(entry, reward_field) for entry in entries]
    asked = read_asked(record)
    if "plain_prompt" in record:
        if isinstance(asked.content, str):
            raise UserError(
                f"{record.location}: field 'plain_prompt' requires a prompt of messages, not text. Drop one of the two."
            )
        plain = read_text(record["plain_prompt"], record.location, "plain_prompt")
        asked = Asked(asked.content, plain=plain)
    return make_row(
        record,
        asked,
        responses,
        [entry.path_of("content") for entry in entries],
        ranked=record.get("ranked") is True,
        reference_rewards=read_numbers(record.get("reference_rewards"), record.location, "reference_rewards"),
    )


def from_ultrafeedback(record: View, reward_field: RewardField) -> Row:
    """``instruction`` and ``completions``, each with ``response`` and ``overall_score``.

    ``reward_field`` may be a path into a completion, such as ``fine-grained_score`` or
    ``annotations.helpfulness.Rating``. The system prompts with which completions were sampled differ between
    completions and are not part of the prompt, as in UltraFeedback's own training sets.
    """
    entries = record.records("completions")
    responses = [read_response(entry, "response", "overall_score", reward_field) for entry in entries]
    names = [entry.path_of("response") for entry in entries]
    return make_row(record, read_asked(record, "instruction"), responses, names)


def from_nemo_aligner(record: View, reward_field: RewardField) -> Row:
    """``prompt``, ``chosen_response``, ``rejected_response``, and optionally ``chosen_reward``, ``rejected_reward``."""
    no_reward_field(reward_field, "chosen_reward and rejected_reward", record.location)
    asked = read_asked(record)
    names = [f"{side}_response" for side in SIDES]
    responses = [
        Response(
            content=read_text(record.required(name), record.location, name),
            reward=read_score_of_pair(record.get(f"{side}_reward"), record.location, f"{side}_reward"),
        )
        for side, name in zip(SIDES, names, strict=True)
    ]
    return make_row(record, asked, responses, names, ranked=True)


def from_single_response(record: View, reward_field: RewardField) -> Row:
    """HelpSteer: ``prompt``, ``response`` and one field per attribute, one of which is the reward."""
    asked = read_asked(record)
    response = read_response(record, "response", HELPSTEER_ATTRIBUTES[0], reward_field)
    return make_row(record, asked, [response], ["response"])


def from_unpaired(record: View, reward_field: RewardField) -> Row:
    """TRL's unpaired preferences: ``prompt``, ``completion`` (text or one message), ``label`` or ``reward``."""
    asked = read_asked(record)
    value = as_messages(record.get("completion"), record.location, "completion")
    if isinstance(value, str):
        response = read_response(record, "completion", "reward", reward_field)
    else:
        reward, ensemble = read_reward(record, "reward", reward_field)
        response = replace(read_answer(value, record, "completion"), reward=reward, ensemble=ensemble)
    return make_row(record, asked, [response], ["completion"])


def from_messages(record: View, reward_field: RewardField) -> Row:
    """UltraChat and other chats: ``messages``; every assistant message is an answer to learn.

    Messages after the last answer are left out and counted as unused.
    """
    if reward_field is not None:
        raise UserError(f"{record.location}: a conversation has no reward field. Leave data.reward_field unset.")
    name = next(name for name in CONVERSATIONS if name in record or record.is_null(name))
    own = read_messages(record.required(name), record, name)
    answers = [number for number, message in enumerate(own) if message["role"] == "assistant"]
    asked = with_context(record, own[: answers[0]], name) if answers else None
    if asked is None or not asked.content:
        raise UserError(
            f"{record.location}: field '{name}' must contain an assistant message after another message. Drop the row."
        )
    for number in answers:
        answer_of(own[number], record.location, f"{name}[{number}].content")  # raises if it is empty
    first, last = answers[0], answers[-1]
    response = answer_of(own[first], record.location, name, continuation=own[first + 1 : last + 1])
    row = make_row(record, asked, [response], [name])
    behind = (f"{name}[] after the last answer",) if last + 1 < len(own) else ()
    return replace(row, unused=row.unused + behind)


def _canonical_response(record: View, reward_field: RewardField) -> Response:
    location = record.location
    if record.get("role", "assistant") != "assistant":
        raise UserError(
            f"{location}: field '{record.path_of('role')}' must be assistant, found {describe(record['role'])}"
        )
    response = read_response(record, "content", "reward", reward_field)
    if "continuation" in record:
        response = replace(response, continuation=read_messages(record["continuation"], record, "continuation"))
    if "plain_content" in record:
        plain = read_text(record["plain_content"], location, record.path_of("plain_content"))
        response = replace(response, plain_content=plain)
    return response


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
        SIDES,
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
    Format(
        "unpaired",
        ("completion",),
        "prompt, completion, label or reward",
        from_unpaired,
        one_response_a_record=True,
    ),
    Format("chats", CONVERSATIONS, "messages or conversations", from_messages),
)
