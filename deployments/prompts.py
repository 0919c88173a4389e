"""The HTTP side of a wrapper, for the holder of its lease: ``/<token>/get_status``, ``/process_prompt``, ``/v1/…``.

An ASGI app. Every request passes the lease gate, is counted while it is in flight, and is cut when the lease
ends. ``/v1/…`` is vLLM's own OpenAI app, untouched; ``process_prompt`` goes the same way inside.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any

import httpx
import structlog
from pydantic import BaseModel, ConfigDict, StrictStr, StringConstraints, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.engine import RunningLLM, public_path
from deployments.error_answers import error_answer, registry_error
from deployments.lease_gate import LeaseGate
from deployments.llm_args import map_prompting
from deployments.prompt_meter import PromptMeter
from registry.errors import EngineNotReady, LeaseEnded, RegistryError, TooManyPrompts
from registry.reconcile import LeaseGrant

log = structlog.get_logger("deployments.prompts")

MAX_QUESTION_CHARS = 4_000_000
"""Longest question of process_prompt; the LLM's own context length is far below it."""


class Question(BaseModel):
    """Body of POST process_prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: Annotated[StrictStr, StringConstraints(min_length=1, max_length=MAX_QUESTION_CHARS)]


class PromptGate:
    """The wrapper's ASGI app.

    ``engine`` gives the LLM that answers (or None) and its state in words; at most ``max_in_flight`` prompts are
    answered at once, each for at most ``prompt_max_s`` seconds.
    """

    def __init__(
        self,
        gate: LeaseGate,
        meter: PromptMeter,
        *,
        engine: Callable[[], tuple[RunningLLM | None, str]],
        max_in_flight: int,
        prompt_max_s: float,
    ) -> None:
        self._gate = gate
        self._meter = meter
        self._engine = engine
        self._max_in_flight = max_in_flight
        self._prompt_max_s = prompt_max_s
        self._in_flight: set[asyncio.Task[None]] = set()

    async def cut_all(self) -> None:
        """End every prompt in flight; their clients get an error or a broken stream. Returns when they are gone."""
        tasks = tuple(self._in_flight)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request, or Serve's lifespan."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            raise RuntimeError(f"{scope['type']} connections are not served")

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        token, _, rest = path.lstrip("/").partition("/")
        response = _Response(send)
        try:
            grant = self._gate.check(token)
            match (scope["method"], f"/{rest}"):
                case ("GET", "/get_status"):
                    await JSONResponse(self._status())(scope, receive, response)
                case ("POST", "/process_prompt"):
                    await self._tracked(grant, self._process_prompt(grant, Request(scope, receive), response))
                case (method, inner) if public_path(method, inner):
                    await self._tracked(grant, self._native(inner, scope, receive, response))
                case (method, inner):
                    known = "GET get_status, POST process_prompt and vLLM's /v1/… are served here"
                    await error_answer(404, "no_such_path", f"{method} {inner}: {known}")(scope, receive, response)
        except RegistryError as error:
            if response.started:
                raise  # the status is out: the broken stream is all that can tell
            await registry_error(error)(scope, receive, response)

    def _status(self) -> dict[str, str]:
        running, state = self._engine()
        message = "ready" if running is not None else "not ready"
        return {"status": "success", "message": message, "detail": state}

    async def _tracked(self, grant: LeaseGrant, work: Any) -> None:
        """Run a prompt as a task of its own, so that the end of the lease can cut it."""
        if len(self._in_flight) >= self._max_in_flight:
            work.close()
            raise TooManyPrompts(self._max_in_flight)
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._in_flight.add(task)
        self._gate.enter()
        try:
            await asyncio.wait({task})
        finally:  # also when the client hung up and Serve cancels us
            task.cancel()
            self._in_flight.discard(task)
            self._gate.leave(grant)
        if task.cancelled():
            raise (
                LeaseEnded("the prompt was cut") if self._gate.grant is not grant else EngineNotReady(self._engine()[1])
            )
        task.result()

    def _running(self) -> RunningLLM:
        running, state = self._engine()
        if running is None:
            raise EngineNotReady(state)
        return running

    async def _native(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        running = self._running()
        inner = dict(scope, path=path, raw_path=path.encode(), root_path="")
        await running.asgi(inner, receive, send)

    async def _process_prompt(self, grant: LeaseGrant, request: Request, send: Send) -> None:
        try:
            question = Question.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "body"
            response = error_answer(422, "invalid_field", f"{field}: {first['msg']}", field=field)
        else:
            response = await self._answer(grant, question.question)
        await response(request.scope, request.receive, send)

    async def _answer(self, grant: LeaseGrant, question: str) -> JSONResponse:
        running = self._running()
        llmconfig = json.loads(grant.llmconfig)
        body: dict[str, Any] = {"model": running.served_model_name, **_prompting(llmconfig)}
        chat = bool(llmconfig["uses_chat_template"])
        if chat:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": question}]
        else:
            path, body["prompt"] = "/v1/completions", question
        flight = self._meter.begin()
        try:
            async with asyncio.timeout(self._prompt_max_s):
                status, answer = await _call(running.asgi, path, body)
        except TimeoutError:
            return error_answer(
                504, "prompt_too_long", f"the answer took longer than {self._prompt_max_s} s and was cut"
            )
        finally:
            self._meter.end(flight)
        if status != HTTPStatus.OK:
            problem = answer.get("error", answer)
            text = problem.get("message", str(problem)) if isinstance(problem, dict) else str(problem)
            return error_answer(status, "prompt_refused", text)
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        usage = answer["usage"]
        energy = self._meter.account(flight, usage=usage, answer=text or "")
        return JSONResponse({"answer": text, "finish_reason": choice["finish_reason"], "usage": usage, **energy})


def _prompting(llmconfig: dict[str, Any]) -> Mapping[str, Any]:
    return map_prompting(llmconfig["args"]["prompting"], uses_chat_template=llmconfig["uses_chat_template"]).values


async def _call(app: ASGIApp, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """POST JSON to an ASGI app in this process; its status and JSON answer."""
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client:  # noqa: S113 - the caller bounds it
        response = await client.post(path, json=body)
        return response.status_code, response.json()


class _Response:
    """A ``send`` that knows whether the response has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        self.started = True
        await self._send(message)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return
