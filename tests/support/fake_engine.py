"""A fake of vLLM's OpenAI app. A test decides when it answers. It notices a hang-up of its client as vLLM does.

As in vLLM, a generation is aborted when the app *receives* the client's disconnect message. If only the app's task is
cancelled, the generation continues (``entrypoints/serve/utils/api_utils.py``, ``with_cancellation``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Scope

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


class FakeEngine:
    """The fake app. While ``go`` is cleared, all answers wait. ``generating`` is set once an answer has begun.

    ``pieces``: what a stream sends; None ends it. ``error``: (status, body) of every answer, or an exception that
    is raised. ``aborted``: number of aborted generations. ``failed``: vLLM has noticed that its engine is dead;
    ``died``: the wrapper has noticed it.
    """

    served_model_name = "tiny"
    max_model_len = 2048
    failed = False

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.generating = asyncio.Event()
        self.aborted_one = asyncio.Event()
        self.died = asyncio.Event()
        self.phases: dict[str, float] = {}
        self.aborted = 0
        self.text: str | None = "an answer"
        self.error: tuple[int, Any] | Exception | None = None
        self.listens = True
        self.pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.scopes: list[Scope] = []
        self.asgi = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._models),
                Route("/sleep", self._models, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        self.scopes.append(request.scope)
        return JSONResponse({"object": "list", "data": [{"id": self.served_model_name}]})

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, lambda: {"message": {"role": "assistant", "content": self.text}})

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, lambda: {"text": self.text})

    async def _answer(self, request: Request, choice: Callable[[], dict[str, Any]]) -> Response:
        self.scopes.append(request.scope)
        body = await request.json()
        self.bodies.append((request.url.path, body))
        if isinstance(self.error, Exception):
            raise self.error
        if self.error is not None:
            status, content = self.error
            return PlainTextResponse(content, status) if isinstance(content, str) else JSONResponse(content, status)
        if body.get("stream"):
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        if not await self._unless_gone(request, self._generate):
            return JSONResponse(None)
        answer = {"choices": [{**choice(), "finish_reason": "stop", "index": 0}], "usage": USAGE}
        return JSONResponse(answer)

    async def _generate(self) -> None:
        self.generating.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self._abort()
            raise

    async def _stream(self) -> AsyncIterator[str]:
        self.generating.set()
        try:
            while (piece := await self.pieces.get()) is not None:
                yield f"data: {json.dumps(piece, separators=(',', ':'))}\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self._abort()
            raise

    def _abort(self) -> None:
        self.aborted += 1
        self.aborted_one.set()

    async def _unless_gone(self, request: Request, work: Callable[[], Awaitable[None]]) -> bool:
        """Do the work unless the client hangs up; return whether it was done."""
        if not self.listens:
            await work()
            return True
        doing = asyncio.ensure_future(work())
        gone = asyncio.ensure_future(_gone(request))
        done, pending = await asyncio.wait([doing, gone], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return doing in done


async def _gone(request: Request) -> bool:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return True
