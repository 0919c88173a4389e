"""Reads the registry's answers: what they contain, which errors they are, and whether a call may be repeated."""

from __future__ import annotations

import random
from http import HTTPStatus
from typing import TypeVar

import httpx
from pydantic import TypeAdapter

from registry.errors import RegistryError
from registry.wire.schemas import ErrorAnswer

T = TypeVar("T")

_PASSING = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)
"""Statuses after which a call is retried if the answer allows it; not 504, because a retry would take as long again."""

LONGEST_PAUSE_S = 60.0
"""Longest Retry-After of a rate limit that is waited for, seconds; after a longer one, the usual pauses apply."""

SHORTEST_PAUSE_S = 1.0
"""The shortest pause after such an answer, seconds, whatever it says."""

SPREAD_S = 1.0
"""Most that is added to such a pause, at random, seconds: otherwise all refused callers would call again at once."""

_RATES = ("too_many_calls", "too_many_wrong_keys")
"""Codes of the rate limits' answers, which say exactly when the next call is allowed. Other 429s only estimate it."""

UNEXPECTED = "unexpected_answer"
"""``answer_code`` of an answer that does not come from a registry."""

_NO_REGISTRY = "the server at this URL is not a registry, or a registry whose answers this client does not understand"


class AnswerError(RegistryError):
    """The registry or a wrapper answered with an error. ``answer_code`` is its stable code.

    ``passing``: the same call may succeed later without any change; with ``retry_after_s``, after so many seconds.
    """

    code = "answer_error"

    status: int
    answer_code: str
    message: str
    passing: bool = False
    retry_after_s: float | None = None

    def __str__(self) -> str:
        after = "" if self.retry_after_s is None else f", Retry-After: {self.retry_after_s:g}"
        return f"{self.message} (HTTP {self.status}, {self.answer_code}{after})"


class NotDeployed(RegistryError):
    """A request has no LLM now: it waits, or has ended. ``reason`` is the registry's."""

    code = "not_deployed"

    request_id: str
    status: str
    reason: str | None

    def __str__(self) -> str:
        return f"request {self.request_id} is {self.status}" + (f": {self.reason}" if self.reason else "")


class RequestEnded(NotDeployed):
    """A request ended before its LLM was handed over, or its lease has ended."""

    code = "request_ended"


def read(kind: type[T], response: httpx.Response) -> T:
    """Return the body of an answer. Raises AnswerError if it is not a registry's answer."""
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValueError:
        raise AnswerError(response.status_code, UNEXPECTED, _NO_REGISTRY) from None


def is_passing(error: Exception) -> bool:
    """Whether a retry may help: the connection failed (the registry or proxy restarts), or the answer says so."""
    return isinstance(error, httpx.TransportError) or (isinstance(error, AnswerError) and error.passing)


def when_to_call_again(error: Exception) -> bool | float:
    """Return whether a retry may help, see ``is_passing``; above a rate limit, the seconds until then."""
    if isinstance(error, AnswerError) and error.passing and error.answer_code in _RATES:
        wait_s = error.retry_after_s
        if wait_s is not None and wait_s <= LONGEST_PAUSE_S:
            return max(wait_s, SHORTEST_PAUSE_S) + random.uniform(0, SPREAD_S)
    return is_passing(error)


def may_ask_again(error: Exception) -> bool:
    """Like ``is_passing``, except for read timeouts: a retry would only wait as long again."""
    return is_passing(error) and not isinstance(error, httpx.ReadTimeout)


def checked(response: httpx.Response, expected: HTTPStatus = HTTPStatus.OK) -> httpx.Response:
    """Return the answer. Raises AnswerError unless its status is ``expected``.

    Another 2xx does not come from a registry: a proxy that serves nothing answers 200 to everything.
    """
    if response.status_code == expected:
        return response
    if response.is_success:
        raise AnswerError(response.status_code, UNEXPECTED, _NO_REGISTRY)
    try:
        answer = ErrorAnswer.model_validate_json(response.content)
    except ValueError:
        text = response.text.strip().partition("\n")[0][:200] or response.reason_phrase
        # A 503 without a registry's body comes from a proxy, probably because the server behind it is being restarted.
        passing = response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        raise AnswerError(response.status_code, UNEXPECTED, text, passing) from None
    passing = answer.retryable and response.status_code in _PASSING
    after = response.headers.get("retry-after", "")
    wait_s = float(after) if passing and after.isdecimal() else None
    raise AnswerError(response.status_code, answer.code, answer.message, passing, wait_s)
