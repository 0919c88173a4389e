"""A registry that is a script, for tests of the Python client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from greenprompt_client.client import RegistryClient

STATE: dict[str, Any] = {
    "requestId": "r1",
    "llmconfig": {"model": "m"},
    "status": "queued",
    "measurementId": 1,
    "address": None,
    "link": "http://x/r1",
    "createdAt": "2026-01-01T00:00:00.000Z",
}

DEPLOYED = {
    **STATE,
    "status": "deployed",
    "url": "http://x/wrappers/a-0/token",
    "address": "lease:token@x",
}

BUSY = {"code": "registry_unavailable", "message": "try again", "retryable": True}

Reply = dict[str, Any] | httpx.Response | BaseException


class Script:
    """Answers each request with the next of its replies: a JSON body, a response, or an exception."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return reply if isinstance(reply, httpx.Response) else httpx.Response(200, json=reply)

    @property
    def asked(self) -> list[str]:
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]


Make = Callable[..., tuple[RegistryClient, Script]]
