"""Clients that go away, and what their prompts leave behind."""

from __future__ import annotations

import asyncio
import gc
from typing import Any, cast

import pytest
import structlog

from deployments.wrapper import prompt_gate as prompts
from tests.support.prompt_gate import Wrapper


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
