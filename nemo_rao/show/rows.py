"""Rows for display: tokens by kind, compared responses, and responses that are left out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_rao.batch import Response, Row, Sample
from nemo_rao.data.choice import is_known
from nemo_rao.data.report import Outcome
from nemo_rao.show.histogram import number
from nemo_rao.show.pieces import Decode, Kind, Piece, kinds_of_prompt, pieces_of

_LOCATION = re.compile(r"^.*? (?:line|row) \d+(?=: )")
NOT_USED = "not used"  # responses of dropped rows
_FIRST = "data.num_responses="
MOST_TOKENS = 6000  # shown of a prompt or response, unless all are; rows dropped for their length can be much longer


@dataclass(frozen=True)
class ShownResponse:
    """One response of a row.

    Attributes:
        number: position in the file, from 1.
        pieces: its tokens; empty if unknown (left out, or without a boundary).
        text: its content.
        num_tokens: number of tokens, including the end token; ``None`` if unknown.
        role: "chosen" or "rejected" if responses are compared, else empty.
        left_out: reason why it is not used; ``None``: it is used.
        ended: whether its last token is the end token.
    """

    number: int
    pieces: tuple[Piece, ...]
    text: str
    num_tokens: int | None
    reward: float | None
    ensemble: tuple[float, ...]
    role: str
    left_out: str | None
    truncated: bool
    ended: bool


@dataclass(frozen=True)
class ShownRow:
    """One row.

    Attributes:
        location: its location, as in messages.
        prompt: tokens of the prompt; empty if unknown.
        prompt_text: the prompt's messages.
        problem: (reason, message) if the row is dropped.
        unused: fields that nothing reads.
        compared_by: "label" or "reward", if two responses are compared.
        is_drawn: ``False`` for a row that is kept but not drawn by ``data.num_prompts``.
    """

    location: str
    prompt: tuple[Piece, ...]
    prompt_text: str
    num_prompt_tokens: int | None
    responses: tuple[ShownResponse, ...]
    problem: tuple[str, str] | None
    unused: tuple[str, ...]
    compared_by: str | None
    is_drawn: bool = True


def roles(row: Row, *, needs_pairs: bool) -> list[str]:
    """Role of each used response: "chosen", "rejected", or empty. Determined by labels if the row has them, or by
    rewards for pairwise objectives. Responses between the best and the worst have no role."""
    number = len(row.responses)
    found = [""] * number
    if number < 2:
        return found
    if row.ranked:
        best, worst = 0, number - 1
    elif needs_pairs and all(is_known(response.reward) for response in row.responses):
        rewards = [response.reward or 0.0 for response in row.responses]
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        if best == worst:
            return found
    else:
        return found
    found[best], found[worst] = "chosen", "rejected"
    return found


def indices_used(read: Row, used: Row) -> list[int]:
    """Index in the file of each used response."""
    free = list(range(len(read.responses)))
    found = []
    for response in used.responses:
        at = next((at for at in free if read.responses[at] is response), None)
        if at is None:
            at = next((at for at in free if read.responses[at].content == response.content), free[0])
        free.remove(at)
        found.append(at)
    return found


def location_of(outcome: Outcome) -> str:
    """Location of a row; for an unreadable one, taken from the message about it."""
    if outcome.read is not None:
        return outcome.read.location
    found = _LOCATION.match(outcome.detail)
    return found[0] if found else ""


def shown_row(
    outcome: Outcome,
    decode: Decode,
    end_token_id: int,
    *,
    needs_pairs: bool,
    drops_truncated: bool,
    most_tokens: int | None = MOST_TOKENS,
) -> ShownRow:
    """Prepare one row for display.

    Args:
        most_tokens: pieces of a prompt or response cover at most its first ``most_tokens`` tokens; ``None``: all.
    """
    read, used, sample = outcome.read, outcome.used, outcome.sample
    problem = None
    if outcome.reason is not None:
        problem = outcome.reason, outcome.detail.removeprefix(f"{location_of(outcome)}: ")
    if read is None:
        return ShownRow(location_of(outcome), (), "", None, (), problem, (), None)
    used = dataclasses.replace(read, responses=()) if used is None else used
    number_of = {at: number for number, at in enumerate(indices_used(read, used))}
    role = roles(used, needs_pairs=needs_pairs)
    responses = []
    for at, response in enumerate(read.responses):
        number = number_of.get(at)
        tokens = None if sample is None or number is None else sample.responses[number]
        answers = None if sample is None or number is None or sample.answers is None else sample.answers[number]
        responses.append(
            ShownResponse(
                number=at + 1,
                pieces=()
                if tokens is None
                else tuple(_response_pieces(tokens[:most_tokens], answers, decode, end_token_id)),
                text=_response_text(response),
                num_tokens=None if tokens is None else len(tokens),
                reward=response.reward,
                ensemble=response.ensemble,
                role="" if number is None else role[number],
                left_out=None if number is not None else _why_left_out(at, outcome, drops_truncated=drops_truncated),
                truncated=response.truncated,
                ended=tokens is not None and len(tokens) > 0 and int(tokens[-1]) == end_token_id,
            )
        )
    return ShownRow(
        location=read.location,
        prompt=() if sample is None else tuple(_prompt_pieces(read, sample, decode, most_tokens)),
        prompt_text=_prompt_text(read),
        num_prompt_tokens=None if sample is None else len(sample.prompt),
        responses=tuple(responses),
        problem=problem,
        unused=read.unused,
        compared_by=None if not any(role) else "label" if used.ranked else "reward",
    )


def reward_text(reward: float | None) -> str:
    """Format a reward."""
    if reward is None:
        return "none"
    return "not finite" if math.isnan(reward) else number(reward)


def left_out_text(response: ShownResponse) -> str:
    """Label of a response that is not used."""
    return NOT_USED if response.left_out == NOT_USED else f"left out: {response.left_out}"


def reward_parts(response: ShownResponse, row: ShownRow) -> list[str]:
    """Labels of a response's reward; empty if no response of the row has one."""
    if response.ensemble:
        return [f"reward {reward_text(response.reward)} = mean of {', '.join(map(number, response.ensemble))}"]
    if response.reward is not None:
        return [f"reward {reward_text(response.reward)}"]
    return ["no reward"] if any(other.reward is not None for other in row.responses) else []


def _prompt_pieces(row: Row, sample: Sample, decode: Decode, most_tokens: int | None) -> list[Piece]:
    ids = sample.prompt[:most_tokens].tolist()
    pieces = pieces_of(ids, [Kind.PROMPT] * len(ids), decode)
    contents = [content for _, content in _messages(row)]
    if len(row.responses) == 1 and (later := row.responses[0].continuation):  # answers of weight 0 are in the prompt
        contents += [row.responses[0].content, *(_content(message.get("content")) for message in later)]
    return kinds_of_prompt(pieces, contents, cut=len(ids) < len(sample.prompt))


def _response_pieces(tokens: np.ndarray, answers: np.ndarray | None, decode: Decode, end: int) -> list[Piece]:
    ids = tokens.tolist()
    learned = [True] * len(ids) if answers is None else answers[: len(ids)].tolist()
    kinds = [Kind.RESPONSE if one else Kind.TEMPLATE for one in learned]
    for at, one in enumerate(ids):
        closes = at + 1 == len(learned) or not learned[at + 1]
        if one == end and learned[at] and closes:
            kinds[at] = Kind.END
    return pieces_of(ids, kinds, decode)


def _why_left_out(at: int, outcome: Outcome, *, drops_truncated: bool) -> str:
    """The reason, among the row's, that applies to this response. Truncated responses are removed first, then all but
    the first ``data.num_responses``, then those that ``data.responses`` does not choose."""
    assert outcome.read is not None
    responses = outcome.read.responses
    if drops_truncated and responses[at].truncated:
        return "data.truncated=drop"
    if outcome.used is None or outcome.reason is not None:
        return NOT_USED
    before = sum(not (drops_truncated and response.truncated) for response in responses[:at])
    first = [reason for reason in outcome.left_out if reason.startswith(_FIRST)]
    others = [reason for reason in outcome.left_out if reason not in first]
    if first and (not others or before >= int(first[0].removeprefix(_FIRST))):
        return first[0]
    return " or ".join(others) or NOT_USED


def _messages(row: Row) -> list[tuple[str, str]]:
    """(role, content) of the prompt's messages; the role of a plain prompt is empty."""
    if isinstance(row.prompt, str):
        return [("", row.prompt)]
    return [(str(message.get("role", "")), _content(message.get("content"))) for message in row.prompt]


def _content(content: Any) -> str:
    return content if isinstance(content, str) else "" if content is None else str(content)


def _prompt_text(row: Row) -> str:
    return _joined([*_fields(row.template_fields), *_messages(row)])


def _response_text(response: Response) -> str:
    later = [(str(one.get("role", "")), _content(one.get("content"))) for one in response.continuation]
    return _joined([*_fields(response.fields), ("", response.content), *later])


def _fields(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, value if isinstance(value, str) else str(value)) for name, value in fields.items()]


def _joined(messages: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{role}: {content}" if role else content for role, content in messages)
