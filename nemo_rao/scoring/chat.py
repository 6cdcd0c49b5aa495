"""Who a judge asks: the interface of chat models, behind an endpoint or in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CUT_OFF = "answer cut off (raise max_tokens)"


@dataclass(frozen=True)
class ChatQuestion:
    """One answer that is wanted.

    Attributes:
        messages: with ``role`` and ``content``; the last is the user's.
        place: file, line and number of the response that is judged, for messages.
        stream: numbers that name the answer; a model that draws its own tokens draws the same for the same ones.
    """

    messages: tuple[Mapping[str, str], ...]
    place: str
    stream: tuple[int, ...]


@dataclass(frozen=True)
class ChatAnswer:
    """What a chat model answered.

    Attributes:
        text: empty where there is none.
        problem: why this is not a whole answer, in a few words, by which such answers are counted; else empty.
        lasting: worth keeping for later runs. Not so where the question was refused: another setting of the server may
            take it.
    """

    text: str
    problem: str = ""
    lasting: bool = True


class Chat(Protocol):
    """A chat model.

    Attributes:
        name: for messages.
        identity: what its answers depend on besides the question and the keys that every judge has; as JSON.
        varies: the same question may be answered otherwise when it is asked again.
        num_requests: that it has been asked, repeated ones included.
    """

    name: str
    identity: Mapping[str, Any]
    varies: bool
    num_requests: int

    def ask(self, questions: Sequence[ChatQuestion], keep: Callable[[int, ChatAnswer], None]) -> None:
        """Calls ``keep`` with a question's position and its answer, as soon as it is known.

        Raises:
            ScoringFailure: no use in going on; whatever ``keep`` raises ends the asking, too.
        """

    def close(self) -> None:
        """Gives back what it holds."""
