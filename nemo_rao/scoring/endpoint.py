"""Concurrent questions to an OpenAI-compatible endpoint, with retries.

Asynchronous on one thread, so that Ctrl-C or a failure cancels all requests at once.

Retries are the loop in ``Endpoint._answer``, after considering

- the client of the ``openai`` package: it retries by status code alone, and not when a server answers 200 with
  something that is not a completion, as proxies do while a server starts; and it would be a dependency of all
  installations for one POST request;
- ``tenacity``: whether to retry, how long to wait (backoff with jitter, or Retry-After if that is longer) and what to
  report in the end all depend on the response, so that its stop, wait, retry and error callbacks would be the same
  lines in four places.

A request has a deadline, ``timeout``, from start to last byte; a question has none beyond ``retries`` of them, because
a run that gives up can be resumed: answers are on disk when they arrive (:mod:`nemo_rao.scoring.answers`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import httpx

from nemo_rao.scoring.chat import CUT_OFF, ChatAnswer, ChatQuestion
from nemo_rao.scoring.judge_config import JudgeConfig
from nemo_rao.scoring.scorer import ScoringFailure

AGAIN = frozenset({408, 409, 425, 429})  # and 5xx
NO_ANSWER = frozenset({400, 413, 422})  # this question is rejected, for example because it is too long
# `finish_reason` of complete answers, and of those that reached a limit; some servers send none. Others
# (content_filter, abort, error, ...) are reported by name.
FINISHED = frozenset(
    {
        *("stop", "eos", "eos_token", "stop_token", "stop_sequence", "end_turn", "complete", "completed"),
        *("end", "finished", "normal", "tool_calls", "function_call", "null", "none", ""),
    }
)
AT_A_LIMIT = frozenset({"length", "max_tokens", "model_length", "max_length", "max_output_tokens"})
LONGEST_WAIT = 60.0  # seconds between two requests; an endpoint may request up to five times as long


class Endpoint:
    """Asks ``{base_url}/chat/completions``; see :class:`nemo_rao.scoring.chat.Chat`.

    Args:
        config: checked, with base_url and model. ``timeout`` is for one request, from its start to the last byte; the
            wait before another is drawn between half of what ``backoff`` gives and all.
        api_key: sent as bearer token, and never shown: it is taken out of whatever the endpoint says. ``None``: none
            is sent.
    """

    varies = True  # even at temperature 0: servers compute what they are asked together

    def __init__(self, config: JudgeConfig, api_key: str | None) -> None:
        assert config.base_url is not None and config.model is not None
        self.url = config.base_url.rstrip("/") + "/chat/completions"
        self.name = config.model
        self.identity: Mapping[str, Any] = {"base_url": config.base_url.rstrip("/"), "model": config.model}
        self.num_requests = 0
        self._api_key, self._timeout, self._retries, self._backoff = (
            api_key,
            config.timeout,
            config.retries,
            config.backoff,
        )
        limit = {} if config.max_tokens is None else {"max_tokens": config.max_tokens}
        self._fields = {"model": config.model, "temperature": config.temperature} | limit | config.parameters
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request otherwise
        self._client = httpx.AsyncClient(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            verify=_certificates(),
            timeout=None,  # of single reads and writes; the whole request has one, in `_post`
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
        )
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Semaphore(config.concurrency)
        self._answered = False

    def ask(self, questions: Sequence[ChatQuestion], keep: Callable[[int, ChatAnswer], None]) -> None:
        """Ask all questions. If one fails, or Ctrl-C is pressed, the others are canceled."""

        async def one(number: int, question: ChatQuestion) -> None:
            keep(number, await self._answer(question))

        self._loop.run_until_complete(self._all([one(*item) for item in enumerate(questions)]))

    async def _all(self, questions: Sequence[Coroutine[Any, Any, None]]) -> None:
        tasks = [asyncio.ensure_future(question) for question in questions]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, question: ChatQuestion) -> ChatAnswer:
        """Ask one question. If the endpoint has answered others, an unusable response becomes the answer.

        Raises:
            ScoringFailure: the key is rejected, the endpoint or the model does not exist, or all retries failed.
        """
        location = question.location
        async with self._free:
            problem = ""
            for retry in range(self._retries + 1):
                wait = min(LONGEST_WAIT, self._backoff * 2**retry) * random.uniform(0.5, 1.0)
                try:
                    response = await self._post(question)
                except asyncio.TimeoutError:
                    problem = f"no answer within {self._timeout:g} s"
                except httpx.TransportError as error:
                    problem = f"{type(error).__name__}: {error}"
                except (httpx.InvalidURL, httpx.HTTPError) as error:
                    raise self._failure(location, f"{type(error).__name__}: {error}. Check base_url.") from None
                else:
                    if response.status_code == 200:
                        try:
                            answer = _read(response)
                        except _Unreadable as error:
                            if self._answered and error.is_completion:
                                return ChatAnswer(self._begin(response), str(error))
                            problem = f"{error} ({self._begin(response)}). Check base_url."
                        else:
                            self._answered = True
                            return answer
                    elif response.status_code in AGAIN or response.status_code >= 500:
                        problem = f"{response.status_code} ({self._begin(response)})"
                        wait = max(wait, _asked_to_wait(response))
                    elif response.status_code in NO_ANSWER and self._answered:
                        problem = f"question rejected by the endpoint ({response.status_code})"
                        return ChatAnswer(self._begin(response), problem, lasting=False)
                    else:
                        raise self._failure(location, self._refusal(response))
                if retry < self._retries:
                    await asyncio.sleep(wait)
            times = "once" if not self._retries else f"{self._retries + 1} times"
            raise self._failure(location, f"asked {times}, the last time: {problem}")

    async def _post(self, question: ChatQuestion) -> httpx.Response:
        self.num_requests += 1
        request = {"messages": list(question.messages)} | self._fields
        return await asyncio.wait_for(self._client.post(self.url, json=request), self._timeout)

    def _refusal(self, response: httpx.Response) -> str:
        status = f"{response.status_code} ({self._begin(response)})"
        if response.status_code in (401, 403):
            return status + (
                "; no key was sent. Set api_key_variable." if self._api_key is None else ". Check the key."
            )
        return f"{status}. Check base_url, model and parameters."

    def _failure(self, location: str, problem: str) -> ScoringFailure:
        return ScoringFailure(f"{location}: judge at {self.url}: {self._without_key(problem)}")

    def _begin(self, response: httpx.Response) -> str:
        text = " ".join(self._without_key(response.text).split())
        return text if len(text) <= 160 else text[:157] + "..."

    def _without_key(self, text: str) -> str:
        return text if self._api_key is None else text.replace(self._api_key, "***")

    def close(self) -> None:
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}  # after Ctrl-C
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._client.aclose()


@functools.cache
def _certificates() -> ssl.SSLContext:
    """TLS context. Cached, since loading the certificates takes a tenth of a second."""
    return httpx.create_ssl_context()


class _Unreadable(Exception):
    """The response is not an answer; ``is_completion``: it is a chat completion, but without text."""

    def __init__(self, what: str, is_completion: bool = False) -> None:
        super().__init__(what)
        self.is_completion = is_completion


def _read(response: httpx.Response) -> ChatAnswer:
    """Read the answer from a chat completion; empty if it has no text.

    Raises:
        _Unreadable: the body is not a chat completion, or its content is neither text nor text parts.
    """
    try:
        choice = response.json()["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Unreadable("the response is not a chat completion") from None
    parts = content if isinstance(content, list) else [] if content is None else [content]
    text = "".join(map(_text_of, parts))
    if refusal or any(isinstance(part, dict) and part.get("type") == "refusal" for part in parts):
        return ChatAnswer(text or str(refusal or ""), "the model refused to answer")
    name = "" if reason is None else str(reason)
    if name.lower() in AT_A_LIMIT:
        return ChatAnswer(text, CUT_OFF)
    return ChatAnswer(text, "" if name.lower() in FINISHED else f"answer not finished (finish_reason {name[:40]})")


def _text_of(part: object) -> str:
    """Text of one content part; empty for thinking and refusals."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in ("text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("thinking", "reasoning", "redacted_thinking", "refusal"):
        return ""
    what = f"a part of type {kind!r}" if isinstance(kind, str) else f"a part that is {type(part).__name__}"
    raise _Unreadable(f"the answer contains {what}, from which no text can be read", is_completion=True)


def _asked_to_wait(response: httpx.Response) -> float:
    """Seconds to wait according to the endpoint's retry-after header."""
    try:
        return min(max(float(response.headers.get("retry-after", "0")), 0.0), 5 * LONGEST_WAIT)
    except ValueError:  # a date
        return 0.0
