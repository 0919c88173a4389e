"""Turns errors of a call into HTTP answers."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from deployments.error_answers import error_answer, fastapi_detail, registry_error
from registry.errors import InternalError, NoCredentials, RegistryError


def add_error_handlers(app: FastAPI) -> None:
    """Make the app answer every error with an ``ErrorAnswer``."""
    app.exception_handler(RegistryError)(_on_registry_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(Exception)(_on_fault)


async def _on_registry_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryError)
    return registry_error(error)


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [{"field": _field_of(problem["loc"]), "problem": problem["msg"]} for problem in error.errors()]
    first = problems[0]
    return error_answer(
        422,
        "invalid_field",
        f"{first['field']}: {first['problem']}",
        field=first["field"],
        errors=problems,
        detail=fastapi_detail(error.errors()),
    )


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # an unreadable body
        return error_answer(422, "invalid_field", f"body: {error.detail}", field="body")
    if error.status_code == HTTPStatus.UNAUTHORIZED:  # unreadable credentials
        return registry_error(NoCredentials())
    code = {404: "no_such_path", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    answer = error_answer(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}")
    if error.status_code == 405:
        answer.headers["allow"] = ", ".join(_methods_of(request))
    return answer


def _methods_of(request: Request) -> list[str]:
    """Return all methods of a path. FastAPI's own answer names only those of the first matching route."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    there = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in there for method in route.methods or ()})


async def _on_fault(_request: Request, error: Exception) -> Response:
    return registry_error(InternalError(type(error).__name__))  # the server logs the traceback


def _field_of(location: Sequence[int | str]) -> str:
    """Convert ``("body", "llms", 0, "model")`` to ``llms[0].model``; a body that is not JSON is ``body``."""
    name = ""
    for part in location[1:] if location[0] in ("body", "query", "path", "header") else location:
        name += f"[{part}]" if isinstance(part, int) and name else f".{part}" if name else str(part)
    return name if name and not name.isdigit() else "body"
