"""A PromptGate with the gate of a lease, a fake meter and a fake engine, and requests to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self, cast

from starlette.types import Message

from deployments.energy.flights import Flight
from deployments.energy.prompt_meter import PromptMeter
from deployments.engine.vllm_api import RunningLLM
from deployments.tokens import Tokens
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.prompt_gate import PromptGate
from registry.contract.messages import LeaseGrant
from registry.errors import BudgetUsed
from tests.support.fake_counters import ManualClock
from tests.support.fake_engine import FakeEngine

TOKEN = "t0ken-of-the-lease"

ROOT = "/wrappers/a-0"

LLMCONFIG = {
    "modeltyp": "text-generation",
    "model": "org/tiny",
    "uses_chat_template": True,
    "args": {"prompting": {"max_new_tokens": 5, "do_sample": False}, "deployment": {}},
}

GRANT = LeaseGrant("request-1", 1, TOKEN, json.dumps(LLMCONFIG), ends_in_s=100.0, idle_limit_s=10.0)

FENCE_S = 30.0

COST: Mapping[str, Any] = {
    "sci_score": None,
    "sci_method": "unavailable",
    "unit": "output_token",
    "energy": {"total_j": None, "label": "unavailable"},
    "carbon": {"o_g": None, "m_g": None},
    "flags": ["no_source"],
}

BRIEF = {
    "sci_score": None,
    "sci_method": "unavailable",
    "unit": "output_token",
    "joules": None,
    "label": "unavailable",
    "o_g": None,
    "m_g": None,
    "flags": ["no_source"],
}

SO_FAR: Mapping[str, Any] = {"total_j": 7.5, "idle_j": 5.0, "label": "measured"}


class FakeMeter:
    """Notes what it was told, and gives every prompt the same account."""

    def __init__(self) -> None:
        self.begun: list[Flight] = []
        self.ended: list[Flight] = []
        self.accounts: list[tuple[Flight, Mapping[str, Any], str | None]] = []
        self.counts_words = False
        self.used_up: BudgetUsed | None = None

    def prompt(
        self, endpoint: str = "process_prompt", *, warmup: bool = False, prompt_id: str | None = None
    ) -> FakePrompt:
        self.begun.append(Flight(0.0, endpoint=endpoint, warmup=warmup, prompt_id=prompt_id))
        return FakePrompt(self, self.begun[-1])

    def use(self) -> Mapping[str, Any]:
        return SO_FAR

    def require_budget(self) -> None:
        if self.used_up is not None:
            raise self.used_up


class FakePrompt:
    """A prompt on a FakeMeter."""

    def __init__(self, meter: FakeMeter, flight: Flight) -> None:
        self.meter = meter
        self.flight = flight

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if self.flight not in self.meter.ended:
            self.meter.ended.append(self.flight)

    def account(self, *, usage: Mapping[str, Any], answer: str | None) -> Mapping[str, Any]:
        assert self.flight in self.meter.ended
        self.meter.accounts.append((self.flight, usage, answer))
        self.flight.status = "answered"
        return COST

    def brief(self, *, usage: Mapping[str, Any], answer: str | None) -> Mapping[str, Any]:
        self.account(usage=usage, answer=answer)
        return BRIEF

    def counted(self, tokens: Tokens) -> None:
        self.flight.tokens = tokens

    def refused(self) -> None:
        self.flight.status, self.flight.tokens = "refused", Tokens(0, 0, 0)


JSON = "application/json"


class Call:
    """A client's request to an ASGI app, by hand: it sees what has come so far, and can hang up."""

    def __init__(
        self,
        app: PromptGate,
        method: str,
        path: str,
        body: object = None,
        *,
        root: str = ROOT,
        headers: Iterable[tuple[bytes, bytes]] = (),
        content_type: str | None = JSON,
    ) -> None:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self._path = path
        self._todo: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
        self._hung_up = asyncio.Event()
        self._come: asyncio.Queue[Message] = asyncio.Queue()
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": f"{root}{path}",
            "raw_path": f"{root}{path}".encode(),
            "root_path": root,
            "query_string": b"",
            "headers": [
                (b"host", b"x"),
                *([] if content_type is None else [(b"content-type", content_type.encode())]),
                *headers,
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._todo:
            return self._todo.pop()
        await self._hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        self.body += message.get("body", b"")
        self._come.put_nowait(message)

    def hang_up(self) -> None:
        self._hung_up.set()

    async def next_piece(self) -> bytes:
        """The next piece of the body, as soon as it comes."""
        while not (piece := (await self._come.get()).get("body", b"")):
            pass
        return bytes(piece)

    async def done(self) -> Call:
        """This call, once the app has returned."""
        await self.task
        return self

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable code of an error."""
        return str(self._error["code"])

    @property
    def message(self) -> str:
        """What an error says."""
        return str(self._error["message"])

    @property
    def _error(self) -> Any:
        """An error of ours: in OpenAI's shape below /v1, in our own elsewhere."""
        return self.json["error"] if "/v1/" in self._path else self.json


class Wrapper:
    """What a wrapper puts together around its PromptGate."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.gate = LeaseGate(
            self.clock, fence_s=FENCE_S, process="this", on_change=lambda grant, _: self.app.lease_changed(grant)
        )
        self.meter = FakeMeter()
        self.engine = FakeEngine()
        self.state: tuple[FakeEngine | None, str] = (self.engine, "ready")
        self.app = self.make()
        self.bind(GRANT)

    def bind(self, grant: LeaseGrant) -> None:
        """As the registry does, having heard of this wrapper just now."""
        self.gate.bind(replace(grant, as_of=self.gate.moment))

    def make(self, *, max_in_flight: int = 4, prompt_max_s: float = 60.0, finish: bool = False) -> PromptGate:
        self.app = PromptGate(
            self.gate,
            cast("PromptMeter", self.meter),
            engine=lambda: (cast("RunningLLM | None", self.state[0]), self.state[1]),
            max_in_flight=max_in_flight,
            prompt_max_s=prompt_max_s,
            finish=finish,
        )
        return self.app

    def call(self, method: str, path: str, body: object = None, *, token: str = TOKEN) -> Call:
        return Call(self.app, method, f"/{token}{path}", body)

    async def prompt(self, question: object = "Why?", *, token: str = TOKEN) -> Call:
        return await self.call("POST", "/process_prompt", {"question": question}, token=token).done()

    async def begin(self, path: str = "/process_prompt", body: object = None) -> Call:
        """A prompt that is in flight in the engine, and stays there until ``engine.go`` is set."""
        self.engine.go.clear()
        self.engine.generating.clear()
        call = self.call("POST", path, body or {"question": "Why?"})
        await self.engine.generating.wait()
        return call
