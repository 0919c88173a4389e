"""The wrapper's HTTP side, for the holder of its lease: ``/get_status``, ``/process_prompt``, ``/v1/…``.

An ASGI app. Every request needs the token of the bound lease, in its path or in a header. Prompts are
counted while in flight, and are cut when the lease ends. All paths that ``public_path`` allows are served by vLLM's own
OpenAI app, with these changes: bodies must be JSON without duplicate keys, answers carry energy,
error texts use the names of an llmconfig, and "busy" answers get Retry-After. ``process_prompt``
calls the same app internally.

vLLM aborts a generation only when its app receives ``http.disconnect``. If the request's task is
merely cancelled, the engine continues. So a prompt is cut by sending the app that message.
"""

from __future__ import annotations

import asyncio
import json
import math
import traceback
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import Annotated, Any, TypedDict

import structlog
from pydantic import BaseModel, ConfigDict, StrictStr, StringConstraints, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from deployments.energy.prompt_meter import PromptMeter
from deployments.engine.our_words import ErrorsInOurWords
from deployments.engine.token_count import counting_tokens
from deployments.engine.vllm_api import RunningLLM, public_path
from deployments.error_answers import RETRY_AFTER_S, error_answer, fastapi_detail, openai_problem, registry_error
from deployments.models.args.mapping import PromptArgs, prompt_args
from deployments.wrapper.answer_account import (
    EVENT_STREAM,
    REFUSED,
    AccountedAnswer,
    content_type_of,
    is_warmup,
    prompt_id_of,
)
from deployments.wrapper.json_bodies import read_json, with_body
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.lease_tokens import Headers, lease_call
from deployments.wrapper.native_call import call, native_prompt, problem_of
from deployments.wrapper.prompt_errors import EngineFailed, NoSuchPath, NotJSON, PromptTooLong, WritesNoText
from deployments.wrapper.prompt_limits import require_short_text, require_within_limits
from registry.background import spawn_awaited
from registry.contract.messages import LeaseGrant
from registry.errors import EngineNotReady, InvalidField, RegistryError, RegistryUnheard, TooManyPrompts

log = structlog.get_logger("deployments.wrapper.prompt_gate")

MAX_QUESTION_CHARS = 4_000_000
"""Longest question of process_prompt, characters; an LLM's context length is far below it."""

TRY_AGAIN = (429, 503)
"""Statuses of vLLM's own answers to which Retry-After is added."""

WITHOUT_THE_LLM = ("/tokenize", "/detokenize")
"""Endpoints of vLLM that run no prompt: their energy counts as idle energy of the lease."""

CUT_GRACE_S = 1.0
"""How long vLLM's app may take to end a request whose client has gone, before it is cancelled, seconds."""


DEATH_GRACE_S = 1.0
"""How long this wrapper may take to notice the death of an engine after vLLM has, seconds."""


class _Marks(TypedDict):
    """What a client says about a prompt, for its record."""

    warmup: bool
    prompt_id: str | None


class Question(BaseModel):
    """Body of POST process_prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: Annotated[StrictStr, StringConstraints(min_length=1, max_length=MAX_QUESTION_CHARS)]


class PromptGate:
    """The wrapper's ASGI app.

    ``engine`` returns the LLM that answers (or None) and its state in words. At most ``max_in_flight`` prompts are
    answered at once, each for at most ``prompt_max_s`` seconds. Prompts in flight at their lease's deadline are cut,
    unless ``finish`` is set.
    """

    def __init__(
        self,
        gate: LeaseGate,
        meter: PromptMeter,
        *,
        engine: Callable[[], tuple[RunningLLM | None, str]],
        max_in_flight: int,
        prompt_max_s: float,
        finish: bool = False,
    ) -> None:
        self._gate = gate
        self._meter = meter
        self._engine = engine
        self._max_in_flight = max_in_flight
        self._prompt_max_s = prompt_max_s
        self._finish = finish
        self._in_flight: dict[_Exchange, LeaseGrant] = {}
        self._llmconfig: str | None = None
        self._args: PromptArgs | InvalidField | None = None
        self.lease_changed(gate.grant)

    # D108: once for all prompts of a lease
    def lease_changed(self, grant: LeaseGrant | None) -> None:
        """Map the prompting arguments of the bound lease (None: there is none), once for all of its prompts.

        Must be called whenever the lease gate binds a lease or ends one.
        """
        if grant is not None and grant.llmconfig != self._llmconfig:
            self._llmconfig = self._args = None  # never use those of another lease, even if the mapping fails
            try:
                args: PromptArgs | InvalidField = prompt_args(grant.llmconfig)
            except InvalidField as error:  # the lease can still use vLLM's own API
                args = InvalidField(error.field, error.problem)
            self._llmconfig, self._args = grant.llmconfig, args

    async def cut_all(self) -> None:
        """Cut every prompt in flight: clients get an error or a broken stream. Returns when all have ended."""
        await _ended(exchange.cut() for exchange in self._in_flight)

    async def cut(self, request_id: str) -> None:
        """Cut the prompts of this request's lease, like ``cut_all``."""
        await _ended(exchange.cut() for exchange, grant in self._in_flight.items() if grant.request_id == request_id)

    async def over(self) -> None:
        """Return when every prompt now in flight has ended; bounded by ``prompt_max_s``."""
        await _ended(exchange.task for exchange in self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, or Serve's lifespan."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            raise RuntimeError(f"{scope['type']} connections are not served")

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        openai = "/v1/" in path
        token, path, headers = lease_call(path, scope["headers"])
        exchange = _Exchange(receive, send)
        try:
            grant = self._gate.check(token)
            match (scope["method"], path):
                case ("GET", "/get_status"):
                    await JSONResponse(self._status())(scope, receive, send)
                case ("POST", "/process_prompt"):
                    await self._tracked(grant, exchange, self._process_prompt(self._args_of(grant), scope, exchange))
                case (method, inner) if public_path(method, inner):
                    _require_json(scope)
                    await self._tracked(grant, exchange, self._native(inner, scope, headers, exchange))
                case (method, inner):
                    raise NoSuchPath(method, inner)
        except RegistryError as error:
            if exchange.started:
                await exchange.tell(error)
                raise  # the status is sent: break off, so that the answer does not look complete
            await registry_error(error, openai=openai)(scope, receive, send)
        except Exception as error:
            # As text: some renderers of tracebacks show local variables, and one of them is the token.
            log.error("a prompt failed", traceback=traceback.format_exc())  # noqa: TRY400
            if exchange.started:
                raise
            await registry_error(EngineFailed(type(error).__name__), openai=openai)(scope, receive, send)

    def _status(self) -> dict[str, Any]:
        running, state = self._engine()
        message = "ready" if running is not None else "not ready"
        try:
            self._gate.require_heard()
        except RegistryUnheard as error:
            message, state = "not ready", str(error)
        return {"status": "success", "message": message, "detail": state, "energy": self._meter.use()}

    async def _tracked(self, grant: LeaseGrant, exchange: _Exchange, work: Coroutine[Any, Any, None]) -> None:
        """Run a prompt as a separate task, so that the end of the lease can cut it.

        Raises:
            RegistryError: the prompt is refused (registry unheard, too many prompts, budget spent);
                or it was cut (EngineNotReady, LeaseEnded, PromptTooLong); or the work raised it.
        """
        try:
            self._gate.require_heard()
            if len(self._in_flight) >= self._max_in_flight:
                raise TooManyPrompts(self._max_in_flight)
            self._meter.require_budget()
        except RegistryError:
            work.close()
            raise
        task = exchange.run(work)
        self._in_flight[exchange] = grant
        self._gate.enter()
        task.add_done_callback(lambda ended: self._over(grant, exchange, ended))
        try:
            await self._until_over(grant, exchange, task)
        except asyncio.CancelledError:  # the client hung up, and Serve cancels this call
            exchange.cut()
            raise
        if exchange.was_cut:
            self._gate.check(grant.token)
            running, state = self._engine()
            raise EngineNotReady("the prompt was cut" if running is not None else state)
        if not exchange.client_gone:
            task.result()

    async def _until_over(self, grant: LeaseGrant, exchange: _Exchange, task: asyncio.Task[None]) -> None:
        """Wait for the end of a prompt; cut it after ``prompt_max_s`` or at its lease's deadline.

        Raises:
            PromptTooLong: it was cut after ``prompt_max_s``.
        """
        loop = asyncio.get_running_loop()
        limit_s = loop.time() + self._prompt_max_s
        while not task.done():
            left_s = limit_s - loop.time()
            # D15: at the deadline prompts are cut or finished
            lease_left_s = math.inf if self._finish else self._gate.left_s(grant)
            if min(left_s, lease_left_s) <= 0:
                await asyncio.wait({exchange.cut()})
                if lease_left_s > 0:
                    raise PromptTooLong(self._prompt_max_s)
            else:
                await asyncio.wait({task}, timeout=min(left_s, lease_left_s))

    def _over(self, grant: LeaseGrant, exchange: _Exchange, ended: asyncio.Task[None]) -> None:
        del self._in_flight[exchange]
        self._gate.leave(grant)
        if exchange.given_up and not ended.cancelled() and (error := ended.exception()) is not None:
            log.info("a prompt that was no longer waited for ended with an error", error=type(error).__name__)

    def _args_of(self, grant: LeaseGrant) -> PromptArgs:
        """Return the prompting arguments of the bound lease. Raises InvalidField if they can't be mapped here."""
        assert grant.llmconfig == self._llmconfig, "lease_changed is called at every bind"
        assert self._args is not None  # lease_changed sets both
        if isinstance(self._args, InvalidField):  # a new object, because each raise adds to an object's traceback
            raise InvalidField(self._args.field, self._args.problem)
        return self._args

    def _running(self) -> RunningLLM:
        running, state = self._engine()
        if running is None:
            raise EngineNotReady(state)
        return running

    async def _native(self, path: str, scope: Scope, headers: Headers, exchange: _Exchange) -> None:
        receive: Receive = exchange.receive
        if scope["method"] == "POST":
            body = await Request(scope, receive).body()
            require_within_limits(read_json(body), self._running().max_model_len)
            receive = with_body(body, receive)
        running = self._running()
        inner = dict(scope, path=path, raw_path=path.encode(), root_path="", headers=headers)
        errors = ErrorsInOurWords(exchange.send, NoSuchPath(scope["method"], path))
        if scope["method"] == "GET" or path in WITHOUT_THE_LLM:
            await running.asgi(inner, receive, errors.send)
            return

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._unless_dead(running, message["status"])
            await answer.send(message)

        with self._meter.prompt(path, **_marks(scope)) as prompt, counting_tokens() as count:
            answer = AccountedAnswer(
                prompt, errors.send, counts_words=self._meter.counts_words, given_up=lambda: exchange.given_up
            )
            try:
                await running.asgi(inner, receive, send)
            finally:
                answer.close(count.tokens)

    async def _unless_dead(self, running: RunningLLM, status: int) -> None:
        """Raise EngineNotReady with the reason if ``status`` is a 5xx because the engine has died."""
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR and running.failed:
            with suppress(TimeoutError):
                await asyncio.wait_for(running.died.wait(), DEATH_GRACE_S)
            raise EngineNotReady(self._engine()[1])

    async def _process_prompt(self, args: PromptArgs, scope: Scope, exchange: _Exchange) -> None:
        try:
            question = Question.model_validate(read_json(await Request(scope, exchange.receive).body()))
        except ValidationError as error:
            found = error.errors(include_url=False)
            field, message = ".".join(map(str, found[0]["loc"])) or "body", found[0]["msg"]
            problems = [{**each, "loc": ("body", *each["loc"])} for each in found]
            response = error_answer(
                422, "invalid_field", f"{field}: {message}", field=field, detail=fastapi_detail(problems)
            )
        else:
            response = await self._answer(args, question.question, exchange, _marks(scope))
        await response(scope, exchange.receive, exchange.send)

    async def _answer(self, args: PromptArgs, question: str, exchange: _Exchange, marks: _Marks) -> JSONResponse:
        running = self._running()
        if not args.task.generates:
            raise WritesNoText(args.modeltyp, " or ".join(args.task.paths))
        require_short_text({"question": question}, running.max_model_len)
        path, body = native_prompt(running.served_model_name, args, question)
        with self._meter.prompt(**marks) as prompt:
            try:
                status, answer = await call(running.asgi, path, body, exchange)
            finally:
                if exchange.given_up:
                    prompt.flight.status = "cut"
        await self._unless_dead(running, status)
        if status != HTTPStatus.OK:
            if status in REFUSED:
                prompt.refused()
            return error_answer(status, "prompt_refused", problem_of(answer))
        answered = json.loads(answer)
        choice, usage = answered["choices"][0], answered["usage"]
        text = (choice["message"]["content"] if "message" in choice else choice["text"]) or ""
        prompt.flight.answer_id = answered.get("id")
        energy = prompt.account(usage=usage, answer=text)
        return JSONResponse({"answer": text, "finish_reason": choice["finish_reason"], "usage": usage, **energy})


def _require_json(scope: Scope) -> None:
    """Raise NotJSON for a POST without JSON's Content-Type, which vLLM would call a bad request."""
    given = content_type_of(scope["headers"]).decode("latin-1")
    if scope["method"] == "POST" and given.split(";")[0].strip().lower() != "application/json":
        raise NotJSON(given)


def _marks(scope: Scope) -> _Marks:
    """Return the warm-up flag and prompt id from a prompt's headers. Raises InvalidField."""
    return {"warmup": is_warmup(scope["headers"]), "prompt_id": prompt_id_of(scope["headers"])}


class _Exchange:
    """A client's request and its answer. After ``cut``, the app sees a client that has hung up."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._was_cut = False
        self._listening: set[asyncio.Timeout] = set()
        self._task: asyncio.Task[None] | None = None
        self._streams_events = False
        self.started = False
        """Whether a part of the answer has been sent."""
        self.client_gone = False

    @property
    def was_cut(self) -> bool:
        """Whether ``cut`` was called before the answer was complete."""
        return self._was_cut

    @property
    def given_up(self) -> bool:
        """Whether it was cut, or its client has hung up."""
        return self._was_cut or self.client_gone

    @property
    def task(self) -> asyncio.Task[None]:
        """The task that answers; call ``run`` first."""
        assert self._task is not None  # run() comes first
        return self._task

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start the task that answers."""
        self._task = spawn_awaited("answer a prompt", work)
        return self._task

    def cut(self) -> asyncio.Task[None]:
        """Tell the app that the client hung up, and return the task that answers. Idempotent.

        A task that has not ended after CUT_GRACE_S is cancelled.
        """
        task = self.task
        if not self._was_cut and not task.done():
            self._was_cut = True
            loop = asyncio.get_running_loop()
            for listening in self._listening:
                listening.reschedule(loop.time())
            loop.call_later(CUT_GRACE_S, task.cancel)
        return task

    async def receive(self) -> Message:
        """Return the client's next message: ``http.disconnect`` if it has hung up or was cut."""
        if self._was_cut:
            return {"type": "http.disconnect"}
        listening = asyncio.timeout(None)
        self._listening.add(listening)
        try:
            async with listening:
                received = await self._receive()
        except TimeoutError:
            if not listening.expired():
                raise
            return {"type": "http.disconnect"}
        finally:
            self._listening.discard(listening)
            # D48: a prompt leaves no garbage
            del listening  # it refers to the task; a cancelled task keeps its traceback, which refers to this frame
        self.client_gone = received["type"] == "http.disconnect"
        return received

    async def send(self, message: Message) -> None:
        """Send a part of the answer, with Retry-After if its status is in TRY_AGAIN. No effect after a cut."""
        if not self._was_cut:
            self.started = True
            if message["type"] == "http.response.start":
                headers = message["headers"]
                self._streams_events = content_type_of(headers).startswith(EVENT_STREAM)
                if message["status"] in TRY_AGAIN and all(name != b"retry-after" for name, _ in headers):
                    message = {**message, "headers": [*headers, (b"retry-after", str(RETRY_AFTER_S).encode())]}
            await self._send(message)

    async def tell(self, error: RegistryError) -> None:
        """Send an error in OpenAI's form as the last event of a stream. No effect on other answers."""
        if self._streams_events:
            problem = openai_problem(error.http_status, error.code, str(error))
            event = f"data: {json.dumps({'error': problem})}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event, "more_body": True})


async def _ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Wait until all tasks are done, however they ended."""
    waited_for = set(tasks)
    if waited_for:
        await asyncio.wait(waited_for)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return
