"""What is noted of prompts for their records, and the budget that refuses them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from registry.errors import BudgetUsed
from tests.support.prompt_gate import TOKEN, Call, Wrapper

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
