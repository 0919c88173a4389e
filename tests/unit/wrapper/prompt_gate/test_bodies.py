"""Bodies of prompts: their types, JSON to the letter, and what is told of wrong ones."""

from __future__ import annotations

import pytest

from deployments.engine.vllm_api import _PUBLIC
from deployments.wrapper import prompt_gate as prompts
from tests.support.prompt_gate import TOKEN, Call, Wrapper


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
