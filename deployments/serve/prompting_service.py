"""What the Prompting Service's own client needs of the ingress: JSON without a type, and prompts sent to the root."""

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

_BASIC = HTTPBasic(auto_error=False, description="User name `lease`, password the token: the userinfo of `address`")
Credentials = Annotated[HTTPBasicCredentials | None, Depends(_BASIC)]


class _StrictRequest(Request):
    """A request whose JSON is read to the letter."""

    async def json(self) -> Any:
        """Return the body's value.

        Raises:
            JSONDecodeError: it is not JSON, for which FastAPI has an answer of its own.
            HTTPException: it has a key twice, or NaN.
        """
        await super().json()
        try:
            return read_json(await self.body())
        except InvalidField as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, error.problem) from None


class JSONBody(APIRoute):
    """A route that takes its body for JSON: the Prompting Service's own client names no type, curl a wrong one.

    Every route with a body is one of these: a key that is there twice is refused.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route's handler, for requests that are said to be JSON."""
        handle = super().get_route_handler()

        async def as_json(request: Request) -> Response:
            headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
            headers.append((b"content-type", b"application/json"))
            return await handle(_StrictRequest({**request.scope, "headers": headers}, request.receive))

        return as_json


def root_router(call: Callable[..., Awaitable[Any]]) -> APIRouter:
    """The paths at the root: what is served here, and the two that the Prompting Service's own client calls.

    That client builds its URLs from ``address``, whose userinfo is the lease's token. It is redirected to the lease's
    ``url``, with method and body; nothing is proxied.
    """
    router = APIRouter()
    answers: dict[int | str, dict[str, Any]] = {307: {"description": "To the same path below the `url`"}}
    answers |= {status: {"model": ErrorAnswer} for status in (401, 403, 410, 503)}

    @router.get("/", response_model=dict[str, str])
    async def root() -> dict[str, str]:
        """What this is, and where its parts are."""
        return {
            "service": TITLE,
            "version": version("greenprompt-llm-registry"),
            "api": "/docs",
            "openapi": "/openapi.json",
            "request": "/promptingservice/request",
            "health": "/healthz",
        }

    async def to_lease(request: Request, credentials: Credentials) -> Response:
        if credentials is None:
            raise NoCredentials
        url = await call("lease_url", credentials.password)
        async for _ in request.stream():
            pass  # a body that nobody has read would cost the connection
        return Response(status_code=HTTPStatus.TEMPORARY_REDIRECT, headers={"location": url + request.url.path})

    @router.get("/get_status", status_code=307, response_class=Response, responses=answers)
    async def get_status(request: Request, credentials: Credentials) -> Response:
        """The status of the LLM whose lease has this token: a redirect to its ``url``."""
        return await to_lease(request, credentials)

    @router.post("/process_prompt", status_code=307, response_class=Response, responses=answers)
    async def process_prompt(request: Request, credentials: Credentials) -> Response:
        """Prompt the LLM whose lease has this token: a redirect to its ``url``."""
        return await to_lease(request, credentials)

    return router
