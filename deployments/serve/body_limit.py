"""Limits the size of request bodies for both HTTP apps: a longer body gets 413, and no more of it is kept."""

# D133: bodies and arguments have a limit

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.error_answers import registry_error
from registry.errors import RegistryError

MIB = 2**20


class BodyTooLarge(RegistryError):
    """The body of a request is longer than this path takes."""

    code = "body_too_large"
    http_status = 413

    limit_mib: int

    def __str__(self) -> str:
        return f"the body is longer than {self.limit_mib} MiB, the limit of this path; send less"


class BodyLimit:
    """An ASGI app around another one, which gets at most ``limit(path)`` bytes of a body.

    A body whose Content-Length is above the limit is refused before the app is called. If a body turns
    out to be longer while it is read, the app gets ``http.disconnect``, and the client gets a 413 in
    place of the app's answer.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[str], int]) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(self._limit(scope["path"]), receive, send)
        if not body.is_announced_longer(scope):
            try:
                await self._app(scope, body.receive, body.send)
            except Exception:
                if not body.longer:  # else ``http.disconnect`` has caused the error
                    raise
        if body.longer and not body.answered:
            openai = "/v1/" in scope["path"]
            answer = registry_error(BodyTooLarge(body.limit // MIB), openai=openai)
            answer.headers["connection"] = "close"  # the rest is not read
            await answer(scope, receive, send)


class _Body:
    """The body of one request, and the answer to it."""

    def __init__(self, limit: int, receive: Receive, send: Send) -> None:
        self.limit = limit
        self.longer = False
        self.answered = False
        self._receive = receive
        self._send = send
        self._bytes = 0

    def is_announced_longer(self, scope: Scope) -> bool:
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        self.longer = any(value.isdigit() and int(value[:20]) > self.limit for value in lengths)
        return self.longer

    async def receive(self) -> Message:
        if self.longer:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            if self._bytes > self.limit:
                self.longer = True
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.longer and not self.answered:
            return  # the app's answer to ``http.disconnect``; the client gets a 413 instead
        self.answered = True
        await self._send(message)
