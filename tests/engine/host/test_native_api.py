"""vLLM's OpenAI API as the holder of a lease sees it, through the openai package; HTTP adds nothing here."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from deployments.engine.host import EngineHost
from deployments.engine.token_count import counting_tokens
from deployments.engine.vllm_api import RunningLLM
from tests.engine.calls import FAST, at_the_gate, client
from tests.support.tool_calls import GREEN, NAMED, TOOL

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="package")]

ASK: Any = [{"role": "user", "content": "Is the grid green?"}]


@pytest.fixture(autouse=True)
def empty_afterwards() -> None:
    """All tests of this file use one LLM, which its fixture stops."""


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def llm(host: EngineHost, llms: Path) -> AsyncIterator[RunningLLM]:
    """The tiny LLM, with a parser for the calls that it makes of its own accord."""
    args = {**FAST, "tool_call_parser": "hermes"}
    yield await host.start(str(llms / "a"), served_model_name="tiny", engine_args=args)
    await host.stop()


def api(llm: RunningLLM) -> openai.AsyncOpenAI:
    transport = httpx.ASGITransport(llm.asgi)
    http: Any = httpx.AsyncClient(transport=transport, timeout=60)  # the package's own is another, of the same form
    return openai.AsyncOpenAI(base_url="http://engine/v1", api_key="none", http_client=http)


async def test_chat_with_usage(llm: RunningLLM) -> None:
    """A chat answers with text, a reason for its end, and the tokens that it took."""
    async with api(llm) as ai:
        answer = await ai.chat.completions.create(
            model="tiny", messages=ASK, max_completion_tokens=8, extra_body={"ignore_eos": True}
        )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


@pytest.mark.parametrize("n", [1, 2])
async def test_tokens_of_a_plain_stream_are_counted(llm: RunningLLM, n: int) -> None:
    """A stream that tells no usage has the tokens that it would have told; so has one answer, or two at once."""
    body = {"model": "tiny", "messages": ASK, "max_completion_tokens": 8, "n": n, "stream": True, "ignore_eos": True}
    counts, usage = [], None
    async with client(llm) as http:
        for more in ({}, {"stream_options": {"include_usage": True}}):
            with counting_tokens() as count:
                text = (await http.post("/v1/chat/completions", json=body | more)).text
            counts.append(count.tokens)
            usage = json.loads(text.split("data: ")[-2]).get("usage")
    assert usage is not None
    for found in counts:
        assert found is not None
        assert (found.prompt, found.output) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert found.cached is not None
        assert found.output == 8 * n


async def test_streams_tell_usage(llm: RunningLLM) -> None:
    """A stream says at its end what it took, for chats and for completions, when it is asked to."""
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    async with api(llm) as ai:
        chat = [
            piece
            async for piece in await ai.chat.completions.create(
                model="tiny", messages=ASK, max_completion_tokens=8, **options
            )
        ]
        text = [
            piece async for piece in await ai.completions.create(model="tiny", prompt="Is", max_tokens=8, **options)
        ]
    for pieces in (chat, text):
        assert [piece.usage for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].usage.total_tokens > pieces[-1].usage.completion_tokens > 0


async def test_a_tool_that_must_be_called(llm: RunningLLM) -> None:
    """Asked to call a tool, even an LLM of random weights calls it, with arguments of its schema."""
    async with api(llm) as ai:
        answer = await ai.chat.completions.create(
            model="tiny", messages=ASK, tools=[TOOL], tool_choice=NAMED, max_completion_tokens=200, seed=1
        )
    calls = answer.choices[0].message.tool_calls
    assert calls
    for call in calls:
        assert call.type == "function"
        assert call.function.name == "report_grid"
        assert json.loads(call.function.arguments).keys() == {"green", "grid"}


async def test_tools_that_may_be_called(llm: RunningLLM) -> None:
    """With a tool_call_parser the LLM may choose."""
    async with api(llm) as ai:
        answer = await ai.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL], max_completion_tokens=8)
    assert answer.choices[0].message.role == "assistant"


async def test_structured_output(llm: RunningLLM) -> None:
    """An answer is JSON of the schema that was asked for."""
    schema: Any = {"type": "json_schema", "json_schema": {"name": "grid", "schema": GREEN, "strict": True}}
    async with api(llm) as ai:
        answer = await ai.chat.completions.create(
            model="tiny", messages=ASK, response_format=schema, max_completion_tokens=200, seed=1
        )
    found = json.loads(answer.choices[0].message.content or "")
    assert isinstance(found["green"], bool)
    assert found["grid"] in ("DEU", "FRA")


async def test_nothing_is_counted_for_metrics_that_nobody_reads(llm: RunningLLM) -> None:
    """An answer does not pass through vLLM's counter of HTTP requests, whose /metrics is not served."""
    async with client(llm) as http:
        await http.get("/v1/models")
    layer: Any = llm.app
    layers = [type(layer := layer.middleware_stack).__name__]
    while (layer := getattr(layer, "app", None)) is not None:
        layers.append(type(layer).__name__)
    assert "CORSMiddleware" in layers
    assert "PrometheusInstrumentatorMiddleware" not in layers


async def test_tokens(llm: RunningLLM) -> None:
    """A text becomes tokens and these the text again."""
    text = "Wie viel CO₂?"
    async with client(llm) as http:
        tokens = (await http.post("/tokenize", json={"model": "tiny", "prompt": text})).json()
        again = (await http.post("/detokenize", json={"model": "tiny", "tokens": tokens["tokens"]})).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    assert again["prompt"] == text


async def test_errors_are_vllm_s(llm: RunningLLM) -> None:
    """What can't be done is refused as vLLM refuses it: another model 404, nonsense 400; an unknown path by us."""
    async with api(llm) as ai:
        with pytest.raises(openai.NotFoundError):
            await ai.chat.completions.create(model="other", messages=ASK)
        with pytest.raises(openai.BadRequestError):
            await ai.completions.create(model="tiny", prompt="x", max_tokens=10_000)
    async with holder(llm) as ai:
        with pytest.raises(openai.NotFoundError) as refused:  # this LLM generates
            await ai.embeddings.create(model="tiny", input="x")
        assert refused.value.code == "no_such_path"


async def test_arguments_of_processors_are_refused(llm: RunningLLM) -> None:
    """They may name URLs, which transformers would load."""
    asked: Any = {"mm_processor_kwargs": {"images": ["http://127.0.0.1/image"]}}
    async with api(llm) as ai:
        with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs"):
            await ai.chat.completions.create(model="tiny", messages=ASK, extra_body=asked)


def holder(llm: RunningLLM) -> openai.AsyncOpenAI:
    """The openai package at the address of a lease."""
    http: Any = at_the_gate(llm)
    return openai.AsyncOpenAI(base_url=f"{http.base_url}v1", api_key="none", http_client=http)


async def test_answers_tell_what_they_cost(llm: RunningLLM) -> None:
    """At a lease's address an answer has its account in a header, a stream in its last chunk."""
    asked: Any = {"model": "tiny", "messages": ASK, "max_completion_tokens": 8, "extra_body": {"ignore_eos": True}}
    streamed: Any = {"stream": True, "stream_options": {"include_usage": True}}
    async with holder(llm) as ai:
        raw = await ai.chat.completions.with_raw_response.create(**asked)
        chat = [piece async for piece in await ai.chat.completions.create(**asked, **streamed)]
        text = [
            piece async for piece in await ai.completions.create(model="tiny", prompt="Is", max_tokens=8, **streamed)
        ]
        plain = [piece async for piece in await ai.chat.completions.create(**asked, stream=True)]
    answer = raw.parse()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    for pieces in (chat, text):
        assert pieces[-1].usage.completion_tokens > 0
        assert not [piece for piece in pieces[:-1] if piece.model_extra and "greenprompt" in piece.model_extra]
    for told in (json.loads(raw.headers["x-greenprompt-energy"]), chat[-1].greenprompt, text[-1].greenprompt):
        assert told.keys() >= {
            "window",
            "final",
            "sci_score",
            "sci_method",
            "unit",
            "joules",
            "label",
            "o_g",
            "m_g",
            "flags",
        }
        assert told["unit"] == "output_token"
        assert (told["joules"] is None) == (told["label"] == "unavailable")
    assert all(piece.choices for piece in plain)


async def test_embeddings(host: EngineHost, llms: Path) -> None:
    """A modeltyp that embeds has vLLM's embeddings, one vector a text, and nothing that generates."""
    await host.stop()
    embedder = await host.start(
        str(llms / "b"), served_model_name="tiny", engine_args=FAST, modeltyp="feature-extraction"
    )
    async with api(embedder) as ai:
        answer = await ai.embeddings.create(model="tiny", input=["one", "two"], encoding_format="float")
        with pytest.raises(openai.NotFoundError):
            await ai.chat.completions.create(model="tiny", messages=ASK)
    first, second = (entry.embedding for entry in answer.data)
    assert len(first) == len(second) == 64
    assert first != second
    assert answer.usage.prompt_tokens > 0
    await host.stop()
