"""Routes for the Prompting Service's own client.

That client sends JSON without a Content-Type, and sends prompts to paths at the root.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from deployments.wrapper.json_bodies import read_json
from registry.errors import InvalidField, NoCredentials
from registry.wire.schemas import ErrorAnswer

TITLE = "GreenPrompt LLM Registry"

_BASIC = HTTPBasic(auto_error=False, description="User name `lease`; password: the token in `address`")
Credentials = Annotated[HTTPBasicCredentials | None, Depends(_BASIC)]


class _StrictRequest(Request):
    """A request whose JSON is parsed strictly."""

    async def json(self) -> Any:
        """Return the body's value.

        Raises:
            JSONDecodeError: It is not JSON; FastAPI turns this into an answer.
            HTTPException: It has a duplicate key, or NaN.
        """
        try:
            return read_json(await self.body())
        except InvalidField as error:
            await super().json()
            raise HTTPException(HTTPStatus.BAD_REQUEST, error.problem) from None


class JSONBody(APIRoute):
    """A route that reads any body as JSON, whatever its Content-Type.

    The Prompting Service's client sends none, and curl by default a wrong one.

    Every route with a body uses this class, so duplicate keys are always refused.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route's handler, with the Content-Type set to JSON."""
        handle = super().get_route_handler()

        async def as_json(request: Request) -> Response:
            headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
            headers.append((b"content-type", b"application/json"))
            return await handle(_StrictRequest({**request.scope, "headers": headers}, request.receive))

        return as_json


def root_router(call: Callable[..., Awaitable[Any]]) -> APIRouter:
    """Return the routes at the root: the service's index, and two for the Prompting Service's client.

    That client builds its URLs from ``address``, whose userinfo contains the lease's token. It is
    redirected (307, same method and body) to the lease's ``url``; nothing is proxied.
    """
    router = APIRouter()
    answers: dict[int | str, dict[str, Any]] = {307: {"description": "Redirect to the same path below `url`"}}
    answers |= {status: {"model": ErrorAnswer} for status in (401, 403, 410, 429, 503)}

    @router.get("/", response_model=dict[str, str], responses={429: {"model": ErrorAnswer}})
    async def root() -> dict[str, str]:
        """Return the name and version of this service, and its main paths."""
        return {
            "service": TITLE,
            "version": version("greenprompt-llm-registry"),
            "api": "/openapi.json",
            "openapi": "/openapi.json",
            "request": "/promptingservice/request",
            "health": "/healthz",
        }

    async def to_lease(request: Request, credentials: Credentials) -> Response:
        if credentials is None:
            raise NoCredentials
        url = await call("lease_url", credentials.password)
        async for _ in request.stream():
            pass  # an unread body would close the connection
        return Response(status_code=HTTPStatus.TEMPORARY_REDIRECT, headers={"location": url + request.url.path})

    @router.get("/get_status", status_code=307, response_class=Response, responses=answers)
    async def get_status(request: Request, credentials: Credentials) -> Response:
        """Redirect to the LLM's status, at the ``url`` of the lease with this token."""
        return await to_lease(request, credentials)

    @router.post("/process_prompt", status_code=307, response_class=Response, responses=answers)
    async def process_prompt(request: Request, credentials: Credentials) -> Response:
        """Redirect a prompt to its LLM, at the ``url`` of the lease with this token."""
        return await to_lease(request, credentials)

    return router
