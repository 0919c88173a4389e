"""Answers of a real vLLM: streams, the prefix cache, and what the engine still computes for clients that have left."""

import asyncio
import json
import shutil
import time
from pathlib import Path

import pytest

from deployments.energy.prompt_meter import tokens_of
from deployments.engine import checkpoint_trial, vllm_api
from deployments.engine.host import EngineHost
from deployments.engine.rest import EngineRest
from deployments.engine.vllm_api import RunningLLM, public_path
from registry.errors import EngineNotReady, EngineStartFailed
from tests.engine.calls import Stream, client, complete
from tests.engine.host.started import engines_of, start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="package"),
    # After a start that failed vLLM leaves its message queue to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{{ range(99999) | sum }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP, "more than 2 s of processor time"),
        ("{% if tools %}" + LOOP + "{% endif %}", "more than 2 s of processor time"),
        ("{{ ('a' * 6000000000) | length }}", "more than 4 GiB of memory"),
    ],
    ids=["a loop", "a loop for tools", "memory"],
)
async def test_a_chat_template_that_never_ends_is_the_llms_fault(
    host: EngineHost, llms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    """It is found in a process with limits; the start fails for good, and the event loop is free all the time."""
    monkeypatch.setattr(checkpoint_trial, "CPU_S", 2)
    shutil.copytree(llms / "a", tmp_path / "evil")
    settings = json.loads((tmp_path / "evil" / "tokenizer_config.json").read_text())
    (tmp_path / "evil" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (tmp_path / "evil" / "chat_template.jinja").write_text(template)
    starting = asyncio.create_task(start(host, tmp_path / "evil"))
    longest_s, last_s = 0.0, time.monotonic()
    while not starting.done():
        await asyncio.wait({starting}, timeout=0.05)
        longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
    with pytest.raises(EngineStartFailed, match="its tokenizer and chat template") as caught:
        starting.result()
    assert reason in caught.value.reason
    assert caught.value.permanent
    assert longest_s < 2.0
    assert engines_of(host) == set()
    assert (await complete(await start(host, llms / "a")))["usage"]["completion_tokens"] == 12


async def test_a_grammar_that_nobody_waits_for_is_ended_before_the_next_lease(host: EngineHost, llms: Path) -> None:
    """VLLM compiles a schema of 30,000 properties for half a minute, and does not stop when the client disconnects.

    The engine is ended 5 s after the lease. One that has done what it was asked for is at rest in a moment, and the
    next lease's structured output is answered at once.
    """
    inner = {f"q{n}": {"type": "string", "maxLength": 200} for n in range(100)}
    schema = {"type": "object", "properties": {f"p{n}": {"type": "object", "properties": inner} for n in range(300)}}
    llm = await start(host, llms / "a")

    async def cut() -> None:
        await vllm_api.abort_all(llm.engine)

    rest = EngineRest(cut, host.give_up)
    await rest.reached(llm)
    asked = asyncio.create_task(complete(llm, structured_outputs={"json": schema}))
    while not llm.unfinished:
        await asyncio.wait({asked}, timeout=0.05)
        assert not asked.done()
    begun_s = time.monotonic()
    rest.begin(llm)
    with pytest.raises(EngineNotReady, match="still worked 5 s after the end of a lease"):
        await rest.reached(llm)
    assert time.monotonic() - begun_s < 10
    await asyncio.wait({asked})
    assert (await host.stop()).problem is None

    llm = await start(host, llms / "a")
    await rest.reached(llm)
    answer = await complete(llm, structured_outputs={"regex": "[ab]{3}"})
    assert set(answer["choices"][0]["text"]) <= {"a", "b"}
    rest.begin(llm)
    await rest.reached(llm)
    assert not llm.died.is_set()


async def test_streamed_chat(host: EngineHost, llms: Path) -> None:
    """A chat streams token by token, with the usage at its end, under the name that was asked for."""
    llm = await start(host, llms / "a", served_model_name="tiny")
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Wie viel CO₂? 🌍"}],
        "max_completion_tokens": 100,  # what is ready at once comes as one chunk
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client(llm) as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        models = (await http.get("/v1/models")).json()["data"]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert len(chunks) > 3
    assert chunks[-1]["usage"]["completion_tokens"] == 100
    assert [model["id"] for model in models] == ["tiny"]


async def test_a_stopped_llm_answers_nobody(host: EngineHost, llms: Path) -> None:
    """A prompt to an LLM that was stopped fails, and says that the engine is not ready."""
    llm = await start(host, llms / "a")
    await host.stop()
    with pytest.raises(EngineNotReady):
        await complete(llm)


LONG_PROMPT = "The registry hands a machine to one measurement at a time. " * 24  # more than one block of the cache


async def cached_of(llm: RunningLLM) -> int:
    """How much of LONG_PROMPT the engine has in its cache, in tokens, as its answer says."""
    usage = (await complete(llm, prompt=LONG_PROMPT, max_tokens=1))["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


async def test_answers_tell_what_was_cached(host: EngineHost, llms: Path) -> None:
    """The usage of an answer says how many of its prompt's tokens were cached: 0 for a new one, more for a repeated.

    OpenAI's two forms and the responses count cached tokens in the prompt; Anthropic's leaves them out of it.
    """
    llm = await start(host, llms / "a")
    assert await cached_of(llm) == 0
    assert await cached_of(llm) > 0
    chat = {"model": llm.served_model_name, "messages": [{"role": "user", "content": LONG_PROMPT}]}
    async with client(llm) as http:
        usages = [
            (await http.post(path, json=body)).json()["usage"]
            for path, body in (
                ("/v1/chat/completions", chat | {"max_completion_tokens": 1}),
                ("/v1/chat/completions", chat | {"max_completion_tokens": 1}),
                ("/v1/responses", {"model": chat["model"], "input": LONG_PROMPT, "max_output_tokens": 1}),
                ("/v1/messages", chat | {"max_tokens": 1}),
            )
        ]
    tokens = [tokens_of(usage) for usage in usages]
    assert tokens[0].cached == 0
    assert (tokens[1].cached or 0) > 0
    assert tokens[2].cached == tokens[3].cached == tokens[1].cached
    assert tokens[0].prompt == tokens[1].prompt == tokens[2].prompt == tokens[3].prompt


async def test_streams_tell_what_was_cached(host: EngineHost, llms: Path) -> None:
    """The usage at the end of a stream says it as well."""
    llm = await start(host, llms / "a")
    stream = Stream(llm, prompt=LONG_PROMPT, max_tokens=1, stream_options={"include_usage": True})
    await stream.run()
    usage = json.loads(stream.text.split("data: ")[-2])["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


async def test_prompts_are_forgotten(host: EngineHost, llms: Path) -> None:
    """After ``forget_prompts`` the same prompt is computed from its first token again."""
    llm = await start(host, llms / "a")
    assert await cached_of(llm) == 0
    assert await cached_of(llm) > 0
    assert await llm.forget_prompts()
    assert await cached_of(llm) == 0


async def test_forgetting_waits_for_the_engine_to_be_at_rest(
    host: EngineHost, llms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a prompt runs nothing is forgotten, and that is said; once it is cut, everything is."""
    llm = await start(host, llms / "a")
    assert await cached_of(llm) == 0
    long = Stream(llm, max_tokens=500, ignore_eos=True)
    running = asyncio.create_task(long.run())
    await long.begun.wait()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_api, "FORGET_TIMEOUT_S", 0.05)
        assert not await llm.forget_prompts()
    await vllm_api.abort_all(llm.engine)
    await running
    assert await llm.forget_prompts()
    assert await cached_of(llm) == 0


async def test_abort_all(host: EngineHost, llms: Path) -> None:
    """What is in flight ends at once, keeps what it has, and the LLM goes on answering."""
    llm = await start(host, llms / "a")
    long = Stream(llm, max_tokens=500, ignore_eos=True)
    running = asyncio.create_task(long.run())
    await long.begun.wait()
    await vllm_api.abort_all(llm.engine)
    await running
    assert '"finish_reason":"abort"' in long.text
    assert (await complete(llm))["choices"][0]["finish_reason"] == "length"


async def test_public_paths(host: EngineHost, llms: Path) -> None:
    """Of all that vLLM serves for a text LLM, a lease holder reaches exactly what asks the LLM something."""
    llm = await start(host, llms / "a")
    served = {(method, route.path) for route in llm.app.routes for method in getattr(route, "methods", None) or ()}  # type: ignore[attr-defined]
    assert {path for method, path in served if public_path(method, path)} == {
        "/health", "/version", "/tokenize", "/detokenize",
        "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    }  # fmt: skip
    for path in (
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/release_kv_cache_memory",
        "/pause",
        "/resume",
        "/collective_rpc",
        "/server_info",
        "/v1/load_lora_adapter",
        "/start_profile",
    ):
        assert not public_path("POST", path)
        assert not public_path("GET", path)
    assert not public_path("POST", "/v1/chat/completions/../../sleep")
