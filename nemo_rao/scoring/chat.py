"""Interface of the chat models behind judges, at an endpoint or in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

CUT_OFF = "answer cut off (raise max_tokens)"


@dataclass(frozen=True)
class ChatQuestion:
    """Request for one answer.

    Attributes:
        messages: messages with ``role`` and ``content``; the last is the user's.
        location: file, line and number of the judged response, for error messages.
        stream: numbers that identify the answer; a model in this process samples the same tokens for the same numbers.
    """

    messages: tuple[Mapping[str, str], ...]
    location: str
    stream: tuple[int, ...]


@dataclass(frozen=True)
class ChatAnswer:
    """Answer of a chat model.

    Attributes:
        text: empty if there is none.
        problem: short reason why the answer is incomplete, by which such answers are counted; else empty.
        lasting: whether to keep it for later runs. False if the question was rejected, since another setting of the
            server may accept it.
    """

    text: str
    problem: str = ""
    lasting: bool = True


class Chat(Protocol):
    """A chat model.

    Attributes:
        name: name for messages.
        identity: everything its answers depend on, besides the question and the keys of all judges; as JSON.
        varies: whether the same question may be answered differently when asked again.
        num_requests: number of requests so far, including retries.
    """

    name: str
    identity: Mapping[str, Any]
    varies: bool
    num_requests: int

    def ask(self, questions: Sequence[ChatQuestion], keep: Callable[[int, ChatAnswer], None]) -> None:
        """Call ``keep`` with the index of a question and its answer, as soon as the answer is known.

        Raises:
            ScoringFailure: the model cannot be used. Exceptions of ``keep`` also end the questioning.
        """

    def close(self) -> None:
        """Release all resources."""
