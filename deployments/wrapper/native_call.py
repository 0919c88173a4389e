"""Calls vLLM's own OpenAI app in this process for ``process_prompt``: the body, the call, and the text of errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Scope

from deployments.engine.our_words import in_our_words
from deployments.models.args.mapping import PromptArgs
from deployments.wrapper.json_bodies import with_body


class Caller(Protocol):
    """The client for which a call is made."""

    async def receive(self) -> Message:
        """Return the client's next message: ``http.disconnect`` when it has hung up or was cut."""
        ...

    @property
    def given_up(self) -> bool:
        """Whether the client has hung up or was cut."""
        ...


def native_prompt(model: str, args: PromptArgs, question: str) -> tuple[str, dict[str, Any]]:
    """Return the path and body of vLLM's API for a question to an LLM that answers with text."""
    body = {"model": model, **args.values}
    if args.uses_chat_template:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": question}]}
    return "/v1/completions", {**body, "prompt": question}


def problem_of(answer: bytes) -> str:
    """Return the message in an error of the engine's app (OpenAI's form, other JSON, or text); see `in_our_words`."""
    try:
        problem = json.loads(answer)
    except ValueError:
        return in_our_words(answer.decode(errors="replace"))
    if isinstance(problem, dict):
        problem = problem.get("error", problem)
    return in_our_words(str(problem.get("message", problem)) if isinstance(problem, dict) else str(problem))


async def call(app: ASGIApp, path: str, body: Mapping[str, Any], caller: Caller) -> tuple[int, bytes]:
    """POST JSON to an ASGI app in this process, on behalf of a client; return the answer's status and body.

    Raises:
        asyncio.CancelledError: the client has hung up or was cut.
        Exception: the app failed before it had sent a status; its own exception.
    """
    content = json.dumps(body).encode()
    status, answer = 0, bytearray()

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"engine"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ],
        "client": None,
        "server": ("engine", 80),
    }
    try:
        await app(scope, with_body(content, caller.receive), send)
    except Exception:
        if not status:
            raise
        # The app has answered this error already, and raises it again only for the log of an HTTP server.
    if caller.given_up:
        raise asyncio.CancelledError  # ignore what the app sent after the client had gone
    return status, bytes(answer)
