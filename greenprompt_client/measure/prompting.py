"""Sends one prompt of an experiment to an LLM, and classifies its errors.

An error is caused by the prompt, ends the use of the lease, or may be temporary.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import httpx
import stamina.instrumentation

from greenprompt_client.answers import AnswerError, RequestEnded
from greenprompt_client.held_lease import HeldLease
from greenprompt_client.measure.prompt_files import Prompt

LEASE_LOST = (RequestEnded, AnswerError, httpx.TransportError)
"""Errors that end the use of a lease. The LLM is then requested again; if this request itself fails, the run ends."""

NOT_THE_PROMPTS_FAULT = frozenset(
    {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.GONE,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
    }
)
"""Statuses of a prompt's error that concern its lease, which is then lost."""

OWN_ERRORS = frozenset({"prompt_too_long"})
"""Codes of server errors (5xx) that the prompt caused nevertheless: its answer took too long."""

PROMPT_TRIES = 3
"""How often a prompt is tried if its server or a proxy fails (500, 504), which may be temporary."""


class Unanswered(Exception):
    """The server or a proxy failed in each attempt; whether the LLM can answer the prompt is unknown."""

    def __init__(self, error: AnswerError) -> None:
        super().__init__(error)
        self.error = error


def _is_own_error(refused: AnswerError) -> bool:
    """Whether an error means that this LLM can't answer this prompt."""
    return refused.status < HTTPStatus.INTERNAL_SERVER_ERROR or refused.answer_code in OWN_ERRORS


def _may_pass(error: Exception) -> bool:
    return (
        isinstance(error, AnswerError)
        and not (error.passing or error.status in NOT_THE_PROMPTS_FAULT)
        and not _is_own_error(error)
    )


def answer_of(lease: HeldLease, prompt: Prompt, timeout_s: float, *, warmup: bool) -> dict[str, Any]:
    """Return an LLM's answer to a prompt with its energy, or the prompt's own error in its place.

    Raises:
        Unanswered: Neither was obtained in PROMPT_TRIES attempts.
        LEASE_LOST: The lease can't be used any more.
    """
    asked_at, begun_s = _now(), time.monotonic()
    answer: dict[str, Any] = {"answer": None}
    error = None
    try:
        for attempt in stamina.retry_context(_may_pass, attempts=PROMPT_TRIES, timeout=None):
            with attempt:
                asked_at, begun_s = _now(), time.monotonic()
                answer = lease.prompt(prompt.question, timeout_s=timeout_s, prompt_id=prompt.id, warmup=warmup)
    except AnswerError as refused:
        if refused.passing or refused.status in NOT_THE_PROMPTS_FAULT:
            raise
        if not _is_own_error(refused):
            raise Unanswered(refused) from None
        error = {"status": refused.status, "code": refused.answer_code, "message": refused.message}
    except httpx.ReadTimeout:
        error = {"status": None, "code": "no_answer", "message": f"no answer within {timeout_s:g} s"}
    line = {
        "prompt": prompt.id,
        "question": prompt.question,
        "fields": prompt.fields,
        "asked_at": asked_at,
        "answered_at": _now(),
        "duration_s": time.monotonic() - begun_s,
        "error": error,
    }
    return line | answer | line


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
