"""Errors → HTTP, in one place for the ingress and the wrappers: status, stable code, sentence, Retry-After."""

from __future__ import annotations

from starlette.responses import JSONResponse

from registry.api import ErrorAnswer
from registry.errors import RegistryError

RETRY_AFTER_S = 1
"""What a client is told to wait when it may try again, seconds."""


def error_answer(
    status: int,
    code: str,
    message: str,
    *,
    field: str | None = None,
    retryable: bool = False,
    errors: list[dict[str, str]] | None = None,
) -> JSONResponse:
    """An error body as every endpoint gives it; ``Retry-After`` where trying again can help."""
    answer = ErrorAnswer(code=code, message=message, retryable=retryable, field=field, errors=errors)
    headers = {"retry-after": str(RETRY_AFTER_S)} if retryable else None
    return JSONResponse(answer.model_dump(exclude_none=True), status_code=status, headers=headers)


def registry_error(error: RegistryError) -> JSONResponse:
    """The answer that an error of ours becomes."""
    return error_answer(
        error.http_status, error.code, str(error), field=getattr(error, "field", None), retryable=error.retryable
    )
