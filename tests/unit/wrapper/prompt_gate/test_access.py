"""Who gets in: the holder of the lease, and nobody else, for as long as it lasts, with the token in path or header."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace

import pytest
from starlette.types import Message

from deployments.wrapper.lease_gate import LeaseGate
from tests.support.prompt_gate import FENCE_S, GRANT, TOKEN, Call, Wrapper

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


# --- the rest ----------------------------------------------------------------------------------------------


async def test_fresh_wrapper_says_try_again(wrapper: Wrapper) -> None:
    """A wrapper whose process is new does not call a lease over that the registry is about to bind again."""
    wrapper.gate = LeaseGate(wrapper.clock, fence_s=FENCE_S, process="new")
    wrapper.make()
    for method, path in PATHS:
        answer = await wrapper.call(method, path, {"question": "Why?"}).done()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")


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
