"""vLLM's own API: what is passed on, and what native answers cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from fastapi import FastAPI

from deployments.energy.prompt_meter import tokens_of
from deployments.tokens import Tokens
from tests.support.fake_engine import USAGE
from tests.support.prompt_gate import BRIEF, Wrapper

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


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize"])
async def test_path_of_another_task_is_our_error(wrapper: Wrapper, path: str) -> None:
    """VLLM has no such path for this LLM: the error is ours, in OpenAI's form below /v1, and no prompt fails."""
    wrapper.engine.asgi = FastAPI()
    answer = await wrapper.call("POST", path, {"input": "Why?"}).done()
    assert (answer.status, answer.code) == (404, "no_such_path")
    assert "for the task of this LLM" in answer.message
    assert all(flight.status == "refused" for flight in wrapper.meter.ended)


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
