"""How many prompts run and how long; which of them the end of a lease cuts."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, cast

import pytest

from deployments.wrapper import prompt_gate as prompts
from registry.errors import LeaseEnded
from tests.support.prompt_gate import GRANT, Wrapper

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
