"""The HTTP side of a wrapper: the holder of the lease, and nobody else, for as long as it lasts."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self, cast

import pytest
import structlog
from starlette.types import Message

from deployments.energy.flights import Flight
from deployments.energy.prompt_meter import PromptMeter, tokens_of
from deployments.engine.vllm_api import _PUBLIC, RunningLLM
from deployments.models.args.mapping import PromptArgs, prompt_args
from deployments.tokens import Tokens
from deployments.wrapper import prompt_gate as prompts
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.prompt_gate import PromptGate
from registry.contract.messages import LeaseGrant
from registry.errors import BudgetUsed, InvalidField, LeaseEnded
from tests.support.fake_counters import ManualClock
from tests.support.fake_engine import USAGE, FakeEngine

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


@pytest.fixture
async def wrapper(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Wrapper]:
    wrapper = Wrapper()
    yield wrapper
    wrapper.engine.go.set()
    await wrapper.app.cut_all()
    gc.collect(1)  # a task's exception that nobody has looked at is logged when the task goes
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
    assert wrapper.gate.in_flight == 0
    assert len(wrapper.meter.ended) == len(wrapper.meter.begun)


# --- the lease ---------------------------------------------------------------------------------------------

PATHS = [("GET", "/get_status"), ("POST", "/process_prompt"), ("POST", "/v1/chat/completions"), ("GET", "/nowhere")]


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_only_the_holder_gets_in(wrapper: Wrapper, method: str, path: str) -> None:
    """Any other token is refused on every path, and nothing reaches the engine."""
    answer = await wrapper.call(method, path, {"question": "Why?"}, token="another").done()
    assert (answer.status, answer.code) == (403, "no_such_lease")
    assert wrapper.engine.bodies == []


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_address_of_an_ended_lease_is_gone(wrapper: Wrapper, method: str, path: str) -> None:
    """After the end of the lease its address answers 410 everywhere, and says how it ended."""
    wrapper.gate.unbind("released")
    answer = await wrapper.call(method, path, {"question": "Why?"}).done()
    assert (answer.status, answer.code) == (410, "lease_ended")
    assert "released" in answer.message
    assert wrapper.engine.bodies == []


async def test_lease_expires_without_the_registry(wrapper: Wrapper) -> None:
    """The wrapper ends an idle lease by itself; prompts, and nothing else, keep it."""
    for _ in range(3):
        wrapper.clock.now_s += 9
        assert (await wrapper.prompt()).status == 200
    wrapper.clock.now_s += 9
    assert (await wrapper.call("GET", "/get_status").done()).status == 200
    wrapper.clock.now_s += 1
    assert (await wrapper.prompt()).status == 410


@pytest.mark.parametrize("path", ["", "/", "/other", "/process_prompt/x", "/v1", "/v1/chat/completions/../../sleep"])
async def test_unknown_paths_are_404(wrapper: Wrapper, path: str) -> None:
    """A path that is not served says which are."""
    answer = await wrapper.call("POST", path).done()
    assert (answer.status, answer.code) == (404, "no_such_path")
    assert "process_prompt" in answer.message


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/sleep"),
        ("POST", "/wake_up"),
        ("GET", "/is_sleeping"),
        ("POST", "/release_kv_cache_memory"),
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/get_status"),
        ("GET", "/docs"),
    ],
)
async def test_operators_paths_are_not_for_holders(wrapper: Wrapper, method: str, path: str) -> None:
    """Of the engine's own app only the listed methods and paths are reachable: no sleep, no docs."""
    assert (await wrapper.call(method, path).done()).status == 404
    assert wrapper.engine.scopes == []


# --- the token in a header ---------------------------------------------------------------------------------

LEASE = "lease_of-the-header"
OTHER_LEASE = "lease_of-another"
KEY = "gp_0a1b2c3d_secret"
WITH_BODIES: list[tuple[str, object]] = [
    ("/process_prompt", {"question": "Why?"}),
    ("/v1/completions", {"prompt": "Why?"}),
]


def by_header(wrapper: Wrapper, method: str, path: str, body: object = None, *values: str) -> Call:
    headers = [(b"authorization", value.encode()) for value in values]
    return Call(wrapper.app, method, path, body, headers=headers)


@pytest.fixture
def held(wrapper: Wrapper) -> Wrapper:
    """A wrapper whose lease has a token that a header can have."""
    wrapper.bind(replace(GRANT, token=LEASE))
    return wrapper


@pytest.mark.parametrize(("path", "body"), WITH_BODIES)
@pytest.mark.parametrize(
    ("prefix", "values"),
    [
        ("", [f"Bearer {LEASE}"]),
        ("", [f"bearer {LEASE}"]),
        (f"/{LEASE}", [f"Bearer {LEASE}"]),
        (f"/{LEASE}", ["Bearer none"]),
        (f"/{LEASE}", [f"Bearer {KEY}"]),
        (f"/{LEASE}", [f"Bearer {KEY}", "Bearer none"]),
    ],
)
async def test_holder_prompts_with_a_header(
    held: Wrapper, path: str, body: object, prefix: str, values: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The token is enough in path or header; what the header has does not reach the engine, an answer or a log."""
    answer = await by_header(held, "POST", f"{prefix}{path}", body, *values).done()
    assert answer.status == 200
    (scope,) = held.engine.scopes
    assert [name for name, _ in scope["headers"] if name == b"authorization"] == []
    held.engine.error = RuntimeError("boom")
    with suppress(RuntimeError):
        await by_header(held, "POST", f"{prefix}{path}", body, *values).done()
    written = "".join(capsys.readouterr())
    assert ("a prompt failed" in written) == path.startswith("/v1")  # the other path answers with the error
    seen = f"{held.engine.scopes}{held.engine.bodies}{answer.headers}{answer.body!r}{written}"
    assert LEASE not in seen
    assert KEY not in seen


@pytest.mark.parametrize(("path", "body"), WITH_BODIES)
@pytest.mark.parametrize(
    ("prefix", "values"),
    [
        ("", [f"Bearer {OTHER_LEASE}"]),
        ("", [f"Bearer {KEY}"]),
        ("", [f"Basic {LEASE}"]),
        ("", [f"Bearer {LEASE}", f"Bearer {LEASE}"]),
        ("", [f"Bearer {KEY}", f"Bearer {LEASE}"]),
        (f"/{LEASE}", [f"Bearer {OTHER_LEASE}"]),
        (f"/{OTHER_LEASE}", [f"Bearer {LEASE}"]),
        (f"/{OTHER_LEASE}", [f"Bearer {OTHER_LEASE}"]),
        (f"/{OTHER_LEASE}", [f"Bearer {KEY}"]),
    ],
)
async def test_strangers_are_refused_with_a_header(
    held: Wrapper, path: str, body: object, prefix: str, values: list[str]
) -> None:
    """An unknown token, contradictory ones, and a key in place of a token are one error, also without a lease."""
    answers = []
    for _ in range(2):
        answers.append(await by_header(held, "POST", f"{prefix}{path}", body, *values).done())
        held.gate.unbind("released")
        held.gate._ended.clear()  # as in a wrapper that never had this lease
    assert {(answer.status, answer.body) for answer in answers} == {(403, answers[0].body)}
    assert b"no_such_lease" in answers[0].body
    assert KEY.encode() not in answers[0].body
    assert held.engine.scopes == []


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/completions"), ("GET", "/get_status"), ("GET", "/")])
async def test_without_a_token_nothing_is_learned(held: Wrapper, method: str, path: str) -> None:
    """A path without a token, and without a header, answers as a wrong token does, whether or not there is a lease."""
    answers = [await by_header(held, method, path).done(), await held.call(method, path, token="x").done()]
    held.gate.unbind("released")
    answers += [await by_header(held, method, path).done(), await held.call(method, path, token="x").done()]
    assert {(answer.status, answer.body) for answer in answers} == {(403, answers[0].body)}
    assert answers[0].code == "no_such_lease"


async def test_ends_of_a_lease_are_told_to_a_header(held: Wrapper) -> None:
    """410 after the end, 404 for unknown paths, 503 while fenced or just started: all as with the token in the path."""
    bearer = f"Bearer {LEASE}"
    answer = await by_header(held, "GET", "/v1/nowhere", None, bearer).done()
    assert (answer.status, answer.code) == (404, "no_such_path")
    held.gate.believe(None, held.gate.moment)
    answer = await by_header(held, "POST", "/v1/completions", {}, bearer).done()
    assert (answer.status, answer.code) == (503, "registry_unheard")
    held.gate.unbind("released")
    for path in ("/v1/completions", "/process_prompt", "/nowhere"):
        answer = await by_header(held, "POST", path, {}, bearer).done()
        assert (answer.status, answer.code) == (410, "lease_ended")
    held.gate._ended.clear()
    held.gate.commanded = False
    assert (await by_header(held, "GET", "/get_status", None, bearer).done()).status == 503


# --- get_status --------------------------------------------------------------------------------------------


async def test_status_is_the_contracts(wrapper: Wrapper) -> None:
    """The status is ``ready`` when the LLM answers."""
    answer = await wrapper.call("GET", "/get_status").done()
    assert answer.json == {"status": "success", "message": "ready", "detail": "ready", "energy": SO_FAR}


async def test_status_says_that_the_llm_is_being_started(wrapper: Wrapper) -> None:
    """A lease whose LLM is being started again is told so; its prompts answer 503 and may be tried again."""
    wrapper.state = (None, "being started (loading)")
    answer = await wrapper.call("GET", "/get_status").done()
    detail = "being started (loading)"
    assert answer.json == {"status": "success", "message": "not ready", "detail": detail, "energy": SO_FAR}
    for path, body in (("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})):
        refused = await wrapper.call("POST", path, body).done()
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "engine_not_ready", "1")
        assert "loading" in refused.message


async def test_fresh_wrapper_says_try_again(wrapper: Wrapper) -> None:
    """A wrapper whose process is new does not call a lease over that the registry is about to bind again."""
    wrapper.gate = LeaseGate(wrapper.clock, fence_s=FENCE_S, process="new")
    wrapper.make()
    for method, path in PATHS:
        answer = await wrapper.call(method, path, {"question": "Why?"}).done()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")


async def test_status_answers_while_prompts_run(wrapper: Wrapper) -> None:
    """The status never waits for a prompt, not even when as many are in flight as may be."""
    wrapper.make(max_in_flight=1)
    await wrapper.begin()
    assert (await wrapper.call("GET", "/get_status").done()).json["message"] == "ready"


# --- process_prompt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_question_may_have_any_type(wrapper: Wrapper, content_type: str | None) -> None:
    """A question that is JSON is taken whatever its Content-Type says: the Prompting Service's client sends none."""
    body = {"question": "Why?"}
    answer = await Call(wrapper.app, "POST", f"/{TOKEN}/process_prompt", body, content_type=content_type).done()
    assert answer.status == 200


@pytest.mark.parametrize("path", sorted(path for method, path in _PUBLIC if method != "GET"))
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/jsonl"])
async def test_wrong_type_is_named(wrapper: Wrapper, path: str, content_type: str | None) -> None:
    """The engine's own API takes JSON that says so: another type is a 415 that names it, and nothing is counted."""
    answer = await Call(wrapper.app, "POST", f"/{TOKEN}{path}", {}, content_type=content_type).done()
    assert (answer.status, answer.code) == (415, "unsupported_media_type")
    assert (content_type or "no Content-Type") in answer.body.decode()
    assert wrapper.meter.begun == []


@pytest.mark.parametrize("path", ["/process_prompt", *sorted(path for method, path in _PUBLIC if method == "POST")])
@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"question": "Why?", "question": "How?"}', "body: the key 'question' occurs twice"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "body: the key 'role' occurs twice"),
        (b'{"temperature": NaN}', "body: NaN is not a number in JSON"),
        (b'{"question": ', "body: is not JSON: "),
        (b"\xff", "body: is not JSON: "),
        (b"[" * 100_000, "body: is nested too deeply"),
    ],
    ids=["twice", "twice within", "NaN", "cut off", "no text", "deep"],
)
async def test_body_is_json_to_the_letter(wrapper: Wrapper, path: str, body: bytes, told: str) -> None:
    """A body that is not JSON, or has a key twice, is refused on every path: no engine sees it, nothing is counted."""
    answer = await wrapper.call("POST", path, body).done()
    assert (answer.status, answer.code) == (422, "invalid_field")
    assert answer.message.startswith(told)
    assert wrapper.meter.begun == []
    assert wrapper.engine.bodies == []


async def test_type_may_have_parameters(wrapper: Wrapper) -> None:
    """The type counts, not what stands behind it."""
    body = {"model": "m", "prompt": "x"}
    type_ = "Application/JSON; charset=utf-8"
    answer = await Call(wrapper.app, "POST", f"/{TOKEN}/v1/completions", body, content_type=type_).done()
    assert answer.status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing"])
async def test_errors_below_v1_are_openais(wrapper: Wrapper, path: str) -> None:
    """Below /v1 an error of ours has OpenAI's shape, and the same code and sentence as elsewhere."""
    wrapper.gate.unbind("released")
    ours = (await wrapper.call("GET", "/get_status").done()).json
    openais = await wrapper.call("GET", path).done()
    assert openais.status == 410
    assert openais.json == {
        "error": {
            "message": ours["message"],
            "type": "invalid_request_error",
            "param": None,
            "code": ours["code"],
        }
    }


async def test_question_is_answered(wrapper: Wrapper) -> None:
    """The answer is the LLM's text alone, with its account beside it."""
    answer = await wrapper.prompt("Why?")
    assert answer.status == 200
    assert answer.json == {"answer": "an answer", "finish_reason": "stop", "usage": USAGE, **COST}
    assert wrapper.meter.accounts == [(wrapper.meter.begun[0], USAGE, "an answer")]


async def test_chat_template_is_used_when_asked_for(wrapper: Wrapper) -> None:
    """With uses_chat_template a question is a chat message, and the prompting args come along in vLLM's words."""
    await wrapper.prompt("Why?")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 5, "temperature": 0.0}
    assert wrapper.engine.bodies == [("/v1/chat/completions", body)]


async def test_raw_prompt_without_chat_template(wrapper: Wrapper) -> None:
    """Without it the question goes to the LLM as it is."""
    config = {**LLMCONFIG, "uses_chat_template": False, "args": {"prompting": {"top_k": 7}, "deployment": {}}}
    wrapper.bind(replace(GRANT, llmconfig=json.dumps(config)))
    answer = await wrapper.prompt("Why?")
    assert answer.json["answer"] == "an answer"
    assert wrapper.engine.bodies == [("/v1/completions", {"model": "tiny", "prompt": "Why?", "top_k": 7})]


async def test_arguments_are_mapped_when_the_lease_is_bound(wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all prompts of a lease, also if it is bound again; another lease's arguments are its own."""
    mapped: list[str] = []

    def counted(llmconfig: str) -> PromptArgs:
        mapped.append(llmconfig)
        return prompt_args(llmconfig)

    monkeypatch.setattr(prompts, "prompt_args", counted)
    wrapper.gate.unbind("released")
    config = json.dumps({**LLMCONFIG, "args": {"prompting": {"max_new_tokens": 9}, "deployment": {}}})
    for _ in range(2):
        wrapper.bind(replace(GRANT, token="token-2", llmconfig=config))
        for _ in range(2):
            assert (await wrapper.prompt(token="token-2")).status == 200
    assert mapped == [config]
    assert {body["max_tokens"] for _, body in wrapper.engine.bodies} == {9}
    wrapper.bind(GRANT)
    await wrapper.prompt()
    assert wrapper.engine.bodies[-1][1]["max_tokens"] == 5


async def test_arguments_that_cannot_be_mapped_are_refused_per_prompt(wrapper: Wrapper) -> None:
    """A lease from an ingress of another version is bound all the same: vLLM's own API needs no arguments of ours."""
    config = {**LLMCONFIG, "args": {"prompting": {"word_of_tomorrow": 1}, "deployment": {}}}
    wrapper.bind(replace(GRANT, llmconfig=json.dumps(config)))
    answer = await wrapper.prompt()
    assert (answer.status, answer.json["field"]) == (422, "args.prompting.word_of_tomorrow")
    kept = wrapper.app._args  # the error; what it kept alive would grow with each prompt
    await wrapper.prompt()
    assert isinstance(kept, InvalidField)
    assert kept.__traceback__ is None
    native = await wrapper.call("POST", "/v1/completions", {"model": "tiny", "prompt": "Why?"}).done()
    assert native.status == 200


@pytest.mark.parametrize("llmconfig", ["{}", '{"modeltyp": "of tomorrow", "args": {"prompting": {}}}', "no JSON"])
async def test_arguments_of_another_lease_are_never_used(wrapper: Wrapper, llmconfig: str) -> None:
    """Prompts of a lease whose llmconfig can't be read fail; they don't run with the arguments of the lease before."""
    wrapper.bind(GRANT)
    assert (await wrapper.prompt()).status == 200
    with suppress(Exception):
        wrapper.bind(replace(GRANT, request_id="request-2", token="token-2", llmconfig=llmconfig))
    assert (await wrapper.prompt(token="token-2")).status in (422, 500)


async def test_no_text_is_an_empty_answer(wrapper: Wrapper) -> None:
    """An LLM that said nothing has answered with an empty text."""
    wrapper.engine.text = None
    assert (await wrapper.prompt()).json["answer"] == ""


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "question"),
        ({"question": ""}, "question"),
        ({"question": 5}, "question"),
        ({"question": None}, "question"),
        ({"question": "Why?", "temperature": 1}, "temperature"),
        ([], "body"),
        (b"", "body"),
        (b"{", "body"),
        (b"\xff", "body"),
    ],
)
async def test_wrong_bodies_are_named(wrapper: Wrapper, body: object, field: str) -> None:
    """A body that is not a question is a 422 that names the field; the engine is not asked."""
    answer = await wrapper.call("POST", "/process_prompt", body).done()
    assert (answer.status, answer.code, answer.json["field"]) == (422, "invalid_field", field)
    assert answer.json["detail"][0]["loc"] == ["body", *([field] if field != "body" else [])]
    assert wrapper.engine.bodies == []


async def test_question_has_a_longest(wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question of absurd length is refused before the engine has it."""
    answer = await wrapper.prompt("x" * (prompts.MAX_QUESTION_CHARS + 1))
    assert (answer.status, answer.json["field"]) == (422, "question")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        ((400, {"error": {"message": "the prompt is too long", "code": 400}}), 400, "the prompt is too long"),
        ((404, {"detail": "no such model"}), 404, "no such model"),
        ((400, {"message": "plain form"}), 400, "plain form"),
        ((422, ["a", "list"]), 422, "['a', 'list']"),
        ((500, {"error": "just words"}), 500, "just words"),
        ((503, "Service Unavailable"), 503, "Service Unavailable"),
        ((500, ""), 500, ""),
    ],
)
async def test_errors_of_the_engine_are_passed_on(
    wrapper: Wrapper, error: tuple[int, Any], status: int, text: str
) -> None:
    """What the engine refuses is answered with its own status and words, and costs nothing."""
    wrapper.engine.error = error
    answer = await wrapper.prompt()
    assert (answer.status, answer.code) == (status, "prompt_refused")
    assert text in answer.message
    assert wrapper.meter.accounts == []


@pytest.mark.parametrize(
    ("path", "body"), [("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})]
)
async def test_error_of_a_dying_engine_is_its_death(wrapper: Wrapper, path: str, body: object) -> None:
    """The 500 of an engine that has died is told as its death, with the reason, as soon as that is known."""
    wrapper.engine.error = (500, {"error": {"message": "EngineCore encountered an issue"}})
    assert (await wrapper.call("POST", path, body).done()).status == 500
    wrapper.engine.failed = True
    call = wrapper.call("POST", path, body)
    while len(wrapper.engine.bodies) < 2:
        await asyncio.wait({call.task}, timeout=0)
    wrapper.state = (None, "process 7 ended by itself")
    wrapper.engine.died.set()
    answer = await call.done()
    assert (answer.status, answer.code) == (503, "engine_not_ready")
    assert "process 7 ended by itself" in answer.message


async def test_engine_that_fails_is_an_error_of_ours(wrapper: Wrapper) -> None:
    """An exception in the engine's app becomes a JSON error, and is logged with its traceback."""

    async def broken(_scope: object, _receive: object, _send: object) -> None:
        raise RuntimeError("boom")

    wrapper.engine.asgi = cast("Any", broken)
    with structlog.testing.capture_logs() as logs:
        for path, body in (("/process_prompt", {"question": "Why?"}), ("/v1/completions", {})):
            answer = await wrapper.call("POST", path, body).done()
            assert (answer.status, answer.code) == (500, "engine_failed")
    assert [("RuntimeError: boom" in entry["traceback"], entry["log_level"]) for entry in logs] == [(True, "error")] * 2


async def test_answered_error_of_the_app_counts(wrapper: Wrapper) -> None:
    """An app that answers 500 and raises then (as Starlette's do) has answered: its own words are passed on."""
    wrapper.engine.error = RuntimeError("boom")
    answer = await wrapper.prompt()
    assert (answer.status, answer.code) == (500, "prompt_refused")
    assert answer.message == "Internal Server Error"


# --- limits ------------------------------------------------------------------------------------------------


async def test_prompts_run_side_by_side(wrapper: Wrapper) -> None:
    """Prompts don't wait for one another."""
    calls = [await wrapper.begin() for _ in range(3)]
    assert wrapper.gate.in_flight == 3
    wrapper.engine.go.set()
    assert [(await call.done()).status for call in calls] == [200, 200, 200]


async def test_too_many_prompts_are_sent_away(wrapper: Wrapper) -> None:
    """One prompt more than allowed is a 429 with Retry-After; when one has ended, the next is let in."""
    wrapper.make(max_in_flight=1)
    first = await wrapper.begin()
    for path, body in (("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})):
        answer = await wrapper.call("POST", path, body).done()
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "too_many_prompts", "1")
    wrapper.engine.go.set()
    assert (await first.done()).status == 200
    assert (await wrapper.prompt()).status == 200


@pytest.mark.parametrize(
    ("path", "body"), [("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})]
)
async def test_prompt_that_takes_too_long_is_cut(wrapper: Wrapper, path: str, body: object) -> None:
    """A prompt over the limit is a 504, and its generation is aborted in the engine."""
    wrapper.make(prompt_max_s=0.01)
    answer = await (await wrapper.begin(path, body)).done()
    assert (answer.status, answer.code) == (504, "prompt_too_long")
    assert wrapper.engine.aborted == 1
    assert wrapper.gate.grant is not None


# --- cutting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"), [("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})]
)
async def test_end_of_the_lease_cuts_its_prompts(wrapper: Wrapper, path: str, body: object) -> None:
    """When the lease ends, prompts in flight answer 410 with the reason and are aborted in the engine."""
    calls = [await wrapper.begin(path, body) for _ in range(2)]
    wrapper.gate.unbind("released")
    await wrapper.app.cut_all()
    assert wrapper.engine.aborted == 2
    assert wrapper.gate.in_flight == 0
    for call in calls:
        answer = await call.done()
        assert (answer.status, answer.code) == (410, "lease_ended")
        assert "released" in answer.message


async def test_cut_under_a_lease_that_stays(wrapper: Wrapper) -> None:
    """When only the engine is replaced, its prompts answer 503 and may be tried again; the lease stays."""
    call = await wrapper.begin()
    wrapper.state = (None, "its processes are gone")
    await wrapper.app.cut_all()
    answer = await call.done()
    assert (answer.status, answer.code) == (503, "engine_not_ready")
    assert "its processes are gone" in answer.message
    wrapper.state = (wrapper.engine, "ready")
    assert (await wrapper.call("GET", "/get_status").done()).status == 200


async def test_cut_while_the_engine_still_runs(wrapper: Wrapper) -> None:
    """A prompt that was cut for another reason says so, not that the LLM is ready."""
    call = await wrapper.begin()
    await wrapper.app.cut_all()
    answer = await call.done()
    assert answer.status == 503
    assert "was cut" in answer.message


async def test_cutting_nothing(wrapper: Wrapper) -> None:
    """Where nothing is in flight there is nothing to cut; and what comes afterwards is answered."""
    await wrapper.app.cut_all()
    assert (await wrapper.prompt()).status == 200


async def test_engine_that_does_not_listen_is_cancelled(wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """An app that does not notice that its client has gone is cancelled after a moment."""
    monkeypatch.setattr(prompts, "CUT_GRACE_S", 0.01)
    wrapper.engine.listens = False
    call = await wrapper.begin()
    wrapper.gate.unbind("released")
    await wrapper.app.cut_all()
    assert (await call.done()).status == 410


async def test_stream_is_broken_by_the_end_of_the_lease(wrapper: Wrapper) -> None:
    """A stream that has begun can't say 410 any more: it breaks off, so that nobody takes it for complete."""
    call = wrapper.call("POST", "/v1/chat/completions", {"stream": True})
    wrapper.engine.pieces.put_nowait("one")
    assert await call.next_piece() == b'data: "one"\n\n'
    wrapper.gate.unbind("expired")
    await wrapper.app.cut_all()
    with pytest.raises(LeaseEnded, match="expired"):
        await call.done()
    assert wrapper.engine.aborted == 1
    one, told, rest = call.body.split(b"\n\n")
    assert (one, rest) == (b'data: "one"', b"")
    error = json.loads(told.removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "lease_ended")
    assert "expired" in error["message"]


async def test_other_bodies_that_have_begun_just_break(wrapper: Wrapper) -> None:
    """Only an event stream can say why it ends: nothing is written into the middle of any other answer."""

    async def slow(_scope: object, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"half":', "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    wrapper.engine.asgi = cast("Any", slow)
    call = wrapper.call("POST", "/v1/completions", {})
    await call.next_piece()
    wrapper.gate.unbind("released")
    await wrapper.app.cut_all()
    with pytest.raises(LeaseEnded):
        await call.done()
    assert call.body == b'{"half":'


@pytest.mark.parametrize(
    ("path", "body"), [("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})]
)
async def test_deadline_cuts_prompts_by_itself(wrapper: Wrapper, path: str, body: object) -> None:
    """At the lease's deadline its prompts answer 410 "expired", though nobody told the wrapper of it."""
    wrapper.bind(replace(GRANT, ends_in_s=0.02))
    call = await wrapper.begin(path, body)
    wrapper.clock.now_s += 0.02
    answer = await call.done()
    assert (answer.status, answer.code) == (410, "lease_ended")
    assert "expired" in answer.message
    assert wrapper.engine.aborted == 1


async def test_deadline_breaks_a_stream_and_says_so(wrapper: Wrapper) -> None:
    """A stream that is cut by the deadline ends with an error that says it, and is not complete."""
    wrapper.bind(replace(GRANT, ends_in_s=0.02))
    call = wrapper.call("POST", "/v1/chat/completions", {"stream": True})
    wrapper.engine.pieces.put_nowait("one")
    await call.next_piece()
    wrapper.clock.now_s += 0.02
    with pytest.raises(LeaseEnded, match="expired"):
        await call.done()
    assert b'"code": "lease_ended"' in call.body


async def test_renewed_lease_keeps_its_prompts(wrapper: Wrapper) -> None:
    """A lease that is bound again with more time before its old deadline: its prompt is not cut at the old one."""
    wrapper.bind(replace(GRANT, ends_in_s=0.02))
    call = await wrapper.begin()
    wrapper.bind(GRANT)
    wrapper.clock.now_s += 0.02
    done, _ = await asyncio.wait({call.task}, timeout=0.06)
    assert not done
    wrapper.engine.go.set()
    assert (await call.done()).status == 200


async def test_prompts_may_be_finished(wrapper: Wrapper) -> None:
    """Where prompts may finish, the one in flight at the deadline is answered, and none begins after it."""
    wrapper.make(finish=True)
    call = await wrapper.begin()
    over = asyncio.create_task(wrapper.app.over())
    wrapper.clock.now_s += 100.0
    late = await wrapper.prompt()
    assert (late.status, late.code) == (410, "lease_ended")
    assert not over.done()
    wrapper.engine.go.set()
    answer = await call.done()
    assert (answer.status, answer.json["answer"]) == (200, "an answer")
    await over


async def test_prompts_that_may_finish_have_a_longest(wrapper: Wrapper) -> None:
    """Finishing is no way to hold a wrapper for ever: the limit of a prompt stands."""
    wrapper.make(finish=True, prompt_max_s=0.01)
    call = await wrapper.begin()
    wrapper.clock.now_s += 100.0
    answer = await call.done()
    assert (answer.status, answer.code) == (504, "prompt_too_long")


async def test_only_one_leases_prompts_are_cut(wrapper: Wrapper) -> None:
    """Cutting a request's prompts leaves those of a lease before it, which it waits for, alone."""
    wrapper.make(finish=True)
    old = await wrapper.begin()
    wrapper.clock.now_s += 100.0
    wrapper.bind(replace(GRANT, request_id="request-2", token="another"))
    new = wrapper.call("POST", "/process_prompt", {"question": "Why?"}, token="another")
    await wrapper.engine.generating.wait()
    wrapper.gate.unbind("released")
    await wrapper.app.cut("request-2")
    assert (await new.done()).status == 410
    assert not old.task.done()
    wrapper.engine.go.set()
    assert (await old.done()).status == 200


# --- clients that go away ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"), [("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})]
)
async def test_client_that_hangs_up_aborts_its_prompt(wrapper: Wrapper, path: str, body: object) -> None:
    """When the client hangs up, the engine stops generating; nobody is charged, and the lease goes on."""
    call = await wrapper.begin(path, body)
    call.hang_up()
    await call.done()
    assert wrapper.engine.aborted == 1
    assert wrapper.meter.accounts == []
    assert wrapper.gate.in_flight == 0
    wrapper.engine.go.set()
    assert (await wrapper.prompt()).status == 200


@pytest.mark.parametrize(
    ("path", "body"), [("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})]
)
async def test_cancelled_request_aborts_its_prompt(wrapper: Wrapper, path: str, body: object) -> None:
    """Serve may cancel the request of a client that hung up: the engine stops generating then, too."""
    call = await wrapper.begin(path, body)
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.done()
    await wrapper.engine.aborted_one.wait()
    await wrapper.app.cut_all()
    assert wrapper.gate.in_flight == 0


@pytest.mark.parametrize(
    ("path", "body"), [("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})]
)
async def test_answered_prompts_leave_nothing_to_search_for(wrapper: Wrapper, path: str, body: object) -> None:
    """What an answered prompt held is free at once: searching for it took 7 % of the process's time."""

    def held() -> int:
        # isinstance() would ask each object what it is, and some of torch's answer with a warning.
        return sum(type(each) is prompts._Exchange for each in gc.get_objects())

    gc.collect()
    before = held()  # other tests' own
    gc.disable()
    try:
        for _ in range(3):
            assert (await wrapper.call("POST", path, body).done()).status == 200
            await asyncio.sleep(0)  # whoever listened for its hanging up ends
        assert held() == before
    finally:
        gc.enable()


async def test_error_of_a_prompt_that_was_given_up_is_logged(wrapper: Wrapper) -> None:
    """What goes wrong after the client has gone can be told to nobody, but is not lost."""

    async def sulking(_scope: object, receive: Any, _send: object) -> None:
        wrapper.engine.generating.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        raise RuntimeError("so what")

    wrapper.engine.asgi = cast("Any", sulking)
    with structlog.testing.capture_logs() as logs:
        call = await wrapper.begin("/v1/completions")
        call.hang_up()
        await call.done()
    assert [entry["error"] for entry in logs] == ["RuntimeError"]


async def test_client_that_leaves_a_stream_aborts_it(wrapper: Wrapper) -> None:
    """A stream whose client hangs up is aborted in the engine."""
    call = wrapper.call("POST", "/v1/chat/completions", {"stream": True})
    wrapper.engine.pieces.put_nowait("one")
    await call.next_piece()
    call.hang_up()
    await call.done()
    assert wrapper.engine.aborted == 1


# --- vLLM's own API ----------------------------------------------------------------------------------------


async def test_native_api_is_passed_through(wrapper: Wrapper) -> None:
    """A request to /v1 reaches vLLM's app as it came, without the token, and its answer comes back untouched."""
    body = {"model": "tiny", "prompt": "Why?", "temperature": 1.5}
    answer = await wrapper.call("POST", "/v1/completions", body).done()
    assert answer.status == 200
    assert answer.json["choices"][0]["text"] == "an answer"
    assert wrapper.engine.bodies == [("/v1/completions", body)]
    scope = wrapper.engine.scopes[0]
    assert (scope["path"], scope["raw_path"], scope["root_path"]) == ("/v1/completions", b"/v1/completions", "")
    assert (await wrapper.call("GET", "/v1/models").done()).json["data"] == [{"id": "tiny"}]


async def test_a_large_grammar_does_not_reach_the_engine(wrapper: Wrapper) -> None:
    """The engine could not stop to compile it; the refusal has OpenAI's form and names the field."""
    body = {"prompt": "Why?", "structured_outputs": {"regex": "x" * 5000}}
    answer = await wrapper.call("POST", "/v1/completions", body).done()
    assert (answer.status, answer.json["error"]["param"]) == (422, "structured_outputs.regex")
    assert wrapper.engine.bodies == []


async def test_thousands_of_answers_are_not_asked_of_the_engine(wrapper: Wrapper) -> None:
    """A prompt counts as one in flight, so its number of answers has a limit."""
    answer = await wrapper.call("POST", "/v1/chat/completions", {"messages": [], "n": 16384}).done()
    assert (answer.status, answer.json["error"]["param"]) == (422, "n")
    assert wrapper.engine.bodies == []


@pytest.mark.parametrize("status", [429, 503])
async def test_native_errors_that_pass_say_when_to_try_again(wrapper: Wrapper, status: int) -> None:
    """What vLLM itself sends away for a while comes with a Retry-After, and is otherwise as it was."""
    wrapper.engine.error = (status, {"error": {"message": "overloaded"}})
    answer = await wrapper.call("POST", "/v1/completions", {"prompt": "Why?"}).done()
    assert (answer.status, answer.json) == (status, {"error": {"message": "overloaded"}})
    assert int(answer.headers["retry-after"]) > 0
    wrapper.engine.error = (400, {})
    assert "retry-after" not in (await wrapper.call("POST", "/v1/completions", {}).done()).headers


async def test_native_errors_are_vllms_own(wrapper: Wrapper) -> None:
    """An error of vLLM's API keeps its own form: OpenAI clients know it."""
    wrapper.engine.error = (400, {"error": {"message": "no", "code": 400}})
    answer = await wrapper.call("POST", "/v1/completions", {}).done()
    assert (answer.status, answer.json) == (400, {"error": {"message": "no", "code": 400}})


async def test_native_prompts_are_metered_and_listings_are_not(wrapper: Wrapper) -> None:
    """Prompts by vLLM's API take part in the sharing of energy; a list of models does not."""
    await wrapper.call("GET", "/v1/models").done()
    assert wrapper.meter.begun == []
    await wrapper.call("POST", "/v1/completions", {}).done()
    assert len(wrapper.meter.ended) == 1


async def test_streams_are_not_buffered(wrapper: Wrapper) -> None:
    """Each piece of a stream is with the client before the engine makes the next one."""
    call = wrapper.call("POST", "/v1/chat/completions", {"stream": True})
    for piece in ("one", "two", "three"):
        wrapper.engine.pieces.put_nowait(piece)
        assert await call.next_piece() == f'data: "{piece}"\n\n'.encode()
    assert wrapper.gate.in_flight == 1
    wrapper.engine.pieces.put_nowait(None)
    assert (await call.done()).status == 200
    assert call.headers["content-type"].startswith("text/event-stream")


# --- what native answers cost ------------------------------------------------------------------------------


async def test_native_answer_tells_its_cost_in_a_header(wrapper: Wrapper) -> None:
    """An answer in one piece has its account in a header, from the tokens that it tells, and is not changed."""
    answer = await wrapper.call("POST", "/v1/completions", {"prompt": "Why?"}).done()
    assert json.loads(answer.headers["x-greenprompt-energy"]) == BRIEF
    assert answer.json["usage"] == USAGE
    assert wrapper.meter.accounts == [(wrapper.meter.begun[0], USAGE, None)]
    assert wrapper.meter.begun[0].endpoint == "/v1/completions"


async def test_native_answer_is_read_where_words_count(wrapper: Wrapper) -> None:
    """Where the functional unit is words, those of the answer are counted."""
    wrapper.meter.counts_words = True
    for path in ("/v1/completions", "/v1/chat/completions"):
        await wrapper.call("POST", path, {}).done()
    assert [text for _, _, text in wrapper.meter.accounts] == ["an answer", "an answer"]


async def test_last_chunk_of_a_stream_tells_its_cost(wrapper: Wrapper) -> None:
    """The chunk with the usage gets one more field; the others are as they came, also one whose text looks like it."""
    call = wrapper.call("POST", "/v1/chat/completions", {"stream": True, "stream_options": {"include_usage": True}})
    tricky = {"choices": [{"delta": {"content": '"choices":[],"usage":{"prompt_tokens":1}'}}], "usage": None}
    pieces: list[Any] = [tricky, {"id": "chatcmpl-1a", "choices": [], "usage": USAGE}]
    for piece in pieces:
        wrapper.engine.pieces.put_nowait(piece)
    wrapper.engine.pieces.put_nowait(None)
    answer = await call.done()
    first, last, end = (json.loads(event.removeprefix(b"data: ") or b"0") for event in answer.body.split(b"\n\n"))
    assert (first, end) == (tricky, 0)
    assert last == {**pieces[1], "greenprompt": BRIEF}
    assert "x-greenprompt-energy" not in answer.headers
    assert wrapper.meter.accounts == [(wrapper.meter.begun[0], USAGE, None)]
    assert wrapper.meter.begun[0].answer_id == "chatcmpl-1a"


@pytest.mark.parametrize(
    ("pieces", "tokens"),
    [
        ([{"choices": [{"delta": {}}]}], None),
        ([{"choices": [{}], "usage": USAGE}], Tokens(7, None, 3)),
        ([{"type": "response.completed", "response": {"usage": {"input_tokens": 7, "output_tokens": 3}}}],
         Tokens(7, None, 3)),
        ([{"usage": {"something": 5}}], None),
    ],
    ids=["no usage", "usage in every chunk", "another API", "unknown usage"],
)  # fmt: skip
async def test_tokens_of_other_streams(wrapper: Wrapper, pieces: list[Any], tokens: Tokens | None) -> None:
    """A stream without a chunk of its own for usage is passed on as it is; its tokens are what it says, or unknown."""
    call = wrapper.call("POST", "/v1/chat/completions", {"stream": True})
    for piece in (*pieces, None):
        wrapper.engine.pieces.put_nowait(piece)
    answer = await call.done()
    assert [json.loads(event.removeprefix(b"data: ")) for event in answer.body.split(b"\n\n")[:-1]] == pieces
    assert wrapper.meter.begun[0].tokens == tokens
    assert wrapper.meter.accounts == []


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (USAGE, Tokens(7, None, 3)),
        (USAGE | {"prompt_tokens_details": None}, Tokens(7, None, 3)),
        (USAGE | {"prompt_tokens_details": {"cached_tokens": None}}, Tokens(7, None, 3)),
        (USAGE | {"prompt_tokens_details": {"cached_tokens": 0}}, Tokens(7, 0, 3)),
        (USAGE | {"prompt_tokens_details": {"cached_tokens": 4}}, Tokens(7, 4, 3)),
        ({"input_tokens": 7, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4}}, Tokens(7, 4, 3)),
        ({"input_tokens": 7, "output_tokens": 3}, Tokens(7, None, 3)),
        ({"input_tokens": 1, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 2, "output_tokens": 3},
         Tokens(7, 4, 3)),
        ({"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 3}, Tokens(7, 4, 3)),
    ],
)  # fmt: skip
def test_cached_tokens_that_are_not_told_are_not_zero(usage: Mapping[str, Any], tokens: Tokens) -> None:
    """Each API of vLLM has its own words; 0 cached is only where it says 0.

    Anthropic's input tokens leave out those of the cache: 1 + 4 read + 2 written are a prompt of 7.
    """
    assert tokens_of(usage) == tokens


async def test_refused_prompts_have_no_tokens(wrapper: Wrapper) -> None:
    """A prompt that vLLM refuses took none, and has no header; of one that failed nobody knows."""
    for status, tokens, name in ((400, Tokens(0, 0, 0), "refused"), (500, None, "failed")):
        wrapper.engine.error = (status, {"error": {"message": "no"}})
        for path, body in (("/v1/completions", {}), ("/process_prompt", {"question": "Why?"})):
            answer = await wrapper.call("POST", path, body).done()
            assert "x-greenprompt-energy" not in answer.headers
            assert (wrapper.meter.begun[-1].tokens, wrapper.meter.begun[-1].status) == (tokens, name)


# --- what is noted of prompts ------------------------------------------------------------------------------

PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("/process_prompt", {"question": "Why?"}),
    ("/v1/completions", {"prompt": "Why?"}),
]


@pytest.mark.parametrize(("path", "body"), PROMPTS)
async def test_a_client_marks_its_warm_ups(wrapper: Wrapper, path: str, body: object) -> None:
    """The header makes a prompt a warm-up when it says true, and nothing else does."""
    for value in (None, b"false", b"true"):
        headers = [] if value is None else [(b"x-greenprompt-warmup", value)]
        assert (await Call(wrapper.app, "POST", f"/{TOKEN}{path}", body, headers=headers).done()).status == 200
    assert [flight.warmup for flight in wrapper.meter.begun] == [False, False, True]


@pytest.mark.parametrize(("path", "body"), PROMPTS)
async def test_a_client_names_its_prompts(wrapper: Wrapper, path: str, body: object) -> None:
    """The name is kept for the record, percent-decoded; one that is too long is refused, and reaches no engine."""
    for value in (None, b"", b"%C3%A4%201"):
        headers = [] if value is None else [(b"x-greenprompt-prompt", value)]
        assert (await Call(wrapper.app, "POST", f"/{TOKEN}{path}", body, headers=headers).done()).status == 200
    assert [flight.prompt_id for flight in wrapper.meter.begun] == [None, None, "ä 1"]
    long = [(b"x-greenprompt-prompt", b"x" * 1025)]
    answer = await Call(wrapper.app, "POST", f"/{TOKEN}{path}", body, headers=long).done()
    field = answer.json["error"]["param"] if path.startswith("/v1/") else answer.json["field"]
    assert (answer.status, field) == (422, "X-GreenPrompt-Prompt")
    assert len(wrapper.meter.begun) == 3


@pytest.mark.parametrize("values", [[b"yes"], [b""], [b"True"], [b"true", b"false"]])
@pytest.mark.parametrize(("path", "body"), PROMPTS)
async def test_other_marks_are_refused(wrapper: Wrapper, path: str, body: object, values: list[bytes]) -> None:
    """A header that says neither true nor false is an error that names it; the engine never sees the prompt."""
    headers = [(b"x-greenprompt-warmup", value) for value in values]
    answer = await Call(wrapper.app, "POST", f"/{TOKEN}{path}", body, headers=headers).done()
    told = answer.json["error"] if path.startswith("/v1/") else answer.json
    field = told["param"] if path.startswith("/v1/") else told["field"]
    assert (answer.status, told["code"], field) == (422, "invalid_field", "X-GreenPrompt-Warmup")
    assert wrapper.meter.begun == []
    assert wrapper.engine.bodies == []


@pytest.mark.parametrize(("path", "body"), [*PROMPTS, ("/v1/completions", {"stream": True})])
async def test_how_a_prompt_ended_is_noted(wrapper: Wrapper, path: str, body: dict[str, Any]) -> None:
    """Answered is what was answered to the end; cut is what a client, or the end of its lease, gave up."""
    if "stream" in body:
        wrapper.engine.pieces.put_nowait(None)
    await wrapper.call("POST", path, body).done()
    for given_up_by in ("client", "lease"):
        call = await wrapper.begin(path, body)
        if given_up_by == "client":
            call.hang_up()
        else:
            await wrapper.app.cut_all()
        await asyncio.wait({call.task})
        call.task.exception()
    assert [flight.status for flight in wrapper.meter.begun] == ["answered", "cut", "cut"]


async def test_a_stream_that_ends_with_an_error_has_failed(wrapper: Wrapper) -> None:
    """An engine that fails within a stream says so in its last event: that is no answer."""
    pieces: list[Any] = [{"choices": [{"delta": {}}]}, {"error": {"message": "the engine died"}}, None]
    for piece in pieces:
        wrapper.engine.pieces.put_nowait(piece)
    await wrapper.call("POST", "/v1/chat/completions", {"stream": True}).done()
    assert wrapper.meter.begun[0].status == "failed"


async def test_an_engine_that_breaks_off_has_failed(wrapper: Wrapper) -> None:
    """An exception in place of an answer is a failure."""
    wrapper.engine.error = RuntimeError("broken")
    for path, body in PROMPTS:
        call = wrapper.call("POST", path, body)
        with suppress(RuntimeError):  # vLLM's app raises what it has answered
            await call.done()
        assert call.status == 500
    assert [flight.status for flight in wrapper.meter.begun] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("path", "body"), [("/process_prompt", {"question": "Why?"}), ("/v1/completions", {"prompt": "Why?"})]
)
async def test_used_up_budget_refuses_prompts(wrapper: Wrapper, path: str, body: object) -> None:
    """A lease that has used up its budget is told so, and not to try again; its status still answers."""
    wrapper.meter.used_up = BudgetUsed("J", 12.5, 10.0)
    answer = await wrapper.call("POST", path, body).done()
    assert (answer.status, answer.code, "retry-after" in answer.headers) == (429, "budget_used", False)
    assert "12.5 J" in answer.message
    assert "retry-after" not in answer.headers
    assert wrapper.engine.bodies == []
    assert (await wrapper.call("GET", "/get_status").done()).json["message"] == "ready"


# --- the rest ----------------------------------------------------------------------------------------------


async def test_works_at_the_root_too(wrapper: Wrapper) -> None:
    """The address is found with and without a prefix of Serve's."""
    answer = await Call(wrapper.app, "GET", f"/{TOKEN}/get_status", root="").done()
    assert answer.status == 200


async def test_lifespan_and_websockets(wrapper: Wrapper) -> None:
    """Serve's lifespan is answered; a connection that is not HTTP is none of ours."""
    todo: list[Message] = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return todo.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    await wrapper.app({"type": "lifespan"}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    with pytest.raises(RuntimeError, match="websocket"):
        await wrapper.app({"type": "websocket"}, receive, send)


async def test_token_is_written_nowhere(
    wrapper: Wrapper, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever happens to a prompt, the token is in no log, no answer and nothing that the engine gets to see."""
    caplog.set_level(logging.DEBUG)
    answers = [await wrapper.prompt(), await wrapper.call("GET", "/get_status").done(), await wrapper.prompt("")]
    wrapper.engine.error = (400, {"error": {"message": "no"}})
    answers += [await wrapper.prompt(), await wrapper.call("POST", "/sleep").done()]
    wrapper.engine.error = RuntimeError("boom")
    answers.append(await wrapper.prompt())
    with pytest.raises(RuntimeError, match="boom"):
        await wrapper.call("POST", "/v1/completions", {}).done()
    wrapper.engine.error = None
    call = await wrapper.begin()
    wrapper.gate.unbind("released")
    await wrapper.app.cut_all()
    answers += [await call.done(), await wrapper.prompt()]
    written = caplog.text + "".join(capsys.readouterr())
    assert "a prompt failed" in written
    assert TOKEN not in written
    assert [answer.body for answer in answers if TOKEN.encode() in answer.body] == []
    assert TOKEN not in repr(wrapper.engine.scopes)
