"""``process_prompt``: its answers, the arguments of a lease, and errors of the engine."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import pytest
import structlog

from deployments.models.args.mapping import PromptArgs, prompt_args
from deployments.wrapper import prompt_gate as prompts
from registry.errors import InvalidField
from tests.support.fake_engine import USAGE
from tests.support.prompt_gate import COST, GRANT, LLMCONFIG, Wrapper


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
