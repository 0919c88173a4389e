"""Turns errors into HTTP responses, for the ingress and the wrappers: status, stable code, message, Retry-After.

There are two formats: OpenAI's below ``/v1``, which OpenAI clients understand, and the registry's
own elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.encoders import jsonable_encoder
from starlette.responses import JSONResponse

from registry.access_errors import JWTRefused, KeyNeeded, KeyRefused
from registry.errors import RegistryError
from registry.wire.schemas import ErrorAnswer

RETRY_AFTER_S = 1
"""The default Retry-After of a retryable error, seconds."""

LONGEST_RETRY_AFTER_S = 300
"""The longest Retry-After, seconds; estimates beyond this are unreliable."""

_BEARER = (KeyNeeded.code, KeyRefused.code, JWTRefused.code)


def error_answer(
    status: int,
    code: str,
    message: str,
    *,
    field: str | None = None,
    retryable: bool = False,
    retry_after_s: float | None = None,
    errors: list[dict[str, str]] | None = None,
    detail: list[dict[str, Any]] | None = None,
) -> JSONResponse:
    """Return an error in the registry's own format, with ``Retry-After`` if it is retryable.

    A 422 always has FastAPI's ``detail`` list; by default it is built from ``field`` and ``message``.
    """
    if status == HTTPStatus.UNPROCESSABLE_ENTITY and detail is None:
        detail = [{"type": "value_error", "loc": ["body", *_location(field)], "msg": message}]
    answer = ErrorAnswer(
        code=code, message=message, retryable=retryable, field=field, errors=errors, detail=detail
    ).model_dump(exclude_none=True, exclude={"detail"})
    if detail is not None:
        answer["detail"] = detail
    return JSONResponse(answer, status_code=status, headers=_headers(status, code, retryable, retry_after_s))


def openai_error(
    status: int,
    code: str,
    message: str,
    *,
    field: str | None = None,
    retryable: bool = False,
    retry_after_s: float | None = None,
) -> JSONResponse:
    """Return an error in OpenAI's format, with the same stable code."""
    body = {"error": openai_problem(status, code, message, field=field)}
    return JSONResponse(body, status_code=status, headers=_headers(status, code, retryable, retry_after_s))


# D78: below /v1 errors have OpenAI's shape
def openai_problem(status: int, code: str, message: str, *, field: str | None = None) -> dict[str, Any]:
    """Return the ``error`` object of OpenAI's format."""
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status, kind)
    return {"message": message, "type": kind, "param": field, "code": code}


def registry_error(error: RegistryError, *, openai: bool = False) -> JSONResponse:
    """Return the response for a RegistryError, in OpenAI's format if ``openai``."""
    shape = openai_error if openai else error_answer
    return shape(
        error.http_status,
        error.code,
        str(error),
        field=getattr(error, "field", None),
        retryable=error.retryable,
        retry_after_s=getattr(error, "retry_after_s", None),
    )


def fastapi_detail(problems: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the ``detail`` list of a 422, as FastAPI builds it from pydantic's errors.

    An ``input`` that JSON can't represent (NaN, a lone surrogate, too deep nesting) is left out;
    with it, FastAPI's own conversion would raise an exception.
    """
    return [_detail_of(problem) for problem in problems]


def _detail_of(problem: Mapping[str, Any]) -> dict[str, Any]:
    try:
        detail: dict[str, Any] = jsonable_encoder(problem)
        json.dumps(detail, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {"type": problem["type"], "loc": list(problem["loc"]), "msg": problem["msg"]}
    return detail


def _location(field: str | None) -> Sequence[str | int]:
    """Convert ``llms[0].model`` to ``llms``, 0, ``model``."""
    if field is None or field == "body":
        return ()
    return [int(n) if n else name for n, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", field)]


def _headers(status: int, code: str, retryable: bool, retry_after_s: float | None) -> dict[str, str]:
    wait_s = RETRY_AFTER_S if retry_after_s is None else min(max(math.ceil(retry_after_s), 1), LONGEST_RETRY_AFTER_S)
    headers = {"retry-after": str(wait_s)} if retryable else {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer" if code in _BEARER else 'Basic realm="lease"'
    return headers
