"""A real vLLM on the CPU with tiny LLMs; one host, and so one import of vLLM, for the whole module."""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest.mock import ANY

import psutil
import pytest
import pytest_asyncio

from deployments.energy.prompt_meter import tokens_of
from deployments.engine import checkpoint_trial, vllm_api
from deployments.engine.environment import remove_orphans
from deployments.engine.gpu_memory import GPUMemory
from deployments.engine.host import EngineHost
from deployments.engine.order import Order, StopOutcome
from deployments.engine.phases import Phase
from deployments.engine.rest import EngineRest
from deployments.engine.sleep_mode import SleepMode
from deployments.engine.vllm_api import RunningLLM, public_path
from deployments.machine import process_tree
from deployments.machine.out_of_memory import ENGINE_SCORE
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from registry.errors import EngineNotReady, EngineStartFailed
from tests.engine.calls import FAST, Stream, at_the_gate, client, complete, has_ended, still_running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # After a start that failed vLLM leaves its message queue to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineHost]:
    host = EngineHost(
        gpus=0,
        kv_cache_gib=0.125,
        cache_dir=tmp_path_factory.mktemp("cache"),
        preload=("vllm.model_executor.models.llama", "tests.engine.brake", "no.such.llm"),
    )
    await host.prepare()
    yield host
    await host.close()


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def empty_afterwards(host: EngineHost) -> AsyncIterator[None]:
    """No test leaves an LLM running, nor a process of one."""
    yield
    await host.stop()
    assert engines_of(host) == set()


def engines_of(host: EngineHost) -> set[int]:
    """Pids of everything that the host's forkserver has forked and that still runs."""
    assert host._prepared.forkserver is not None
    assert host._prepared.forkserver.pid is not None
    return {process.pid for process in process_tree.alive(process_tree.descendants(host._prepared.forkserver.pid))}


class Brake:
    """Slows the steps of engines that are started from now on; see ``brake.py``."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pull(self, step: float | Literal["hang"]) -> None:
        """Each step takes ``step`` seconds longer, or does not end."""
        self._file.write_text(str(step), encoding="utf-8")

    def release(self) -> None:
        self._file.unlink()


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Brake:
    monkeypatch.setenv("GREENPROMPT_TEST_BRAKE", str(tmp_path / "brake"))
    return Brake(tmp_path / "brake")


async def start(host: EngineHost, model: Path, **more: Any) -> RunningLLM:
    return await host.start(str(model), **({"engine_args": FAST} | more))


async def test_prepared_host_is_warm(host: EngineHost) -> None:
    """With the vLLM that we pin, engines are forked from a warm forkserver."""
    assert host.cold_reason is None
    assert host.warm


async def test_what_can_not_be_preloaded_is_passed_over(host: EngineHost) -> None:
    """A wrong name among the LLMs to import ahead costs a warning, not the warm start."""
    assert host._prepared.forkserver is not None
    (problem,) = host._prepared.forkserver.not_preloaded
    assert problem.startswith("no.such.llm: ModuleNotFoundError")


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
    """30,000 properties take vLLM half a minute to compile, which it goes on with when its client has gone.

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


async def test_engines_are_what_the_kernel_ends_first(host: EngineHost, llms: Path) -> None:
    """Every process of an engine has the highest score of ours."""
    llm = await start(host, llms / "a")
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in llm.pids]  # noqa: ASYNC240 - of the kernel
    assert scores
    assert min(scores) >= ENGINE_SCORE


async def test_swap(host: EngineHost, llms: Path) -> None:
    """One LLM after another runs in the same host, each answering as itself, each gone before the next."""
    answers = []
    for name in ("a", "b", "a"):
        llm = await start(host, llms / name)
        assert host.running is llm
        answer = await complete(llm)
        assert answer["usage"]["completion_tokens"] == 12
        answers.append(answer["choices"][0]["text"])
        pids = llm.pids
        assert len(pids) >= 2
        report = await host.stop()
        assert (report.killed, report.leftover) == ((), ())
        assert still_running(pids) == set()
    assert answers[0] == answers[2] != answers[1]


async def test_engines_wait_asleep(host: EngineHost, llms: Path) -> None:
    """An engine without a prompt leaves the processors to others, also in the second after one, when vLLM's don't."""
    llm = await start(host, llms / "a")
    await complete(llm)
    await asyncio.sleep(0.2)
    processes = [psutil.Process(pid) for pid in llm.pids]
    before_s = sum(sum(process.cpu_times()[:2]) for process in processes)
    await asyncio.sleep(0.7)
    used_s = sum(sum(process.cpu_times()[:2]) for process in processes) - before_s
    assert used_s < 0.35, "a worker that does not sleep takes 0.7 s by itself"


async def test_first_prompt_may_be_short(host: EngineHost, llms: Path) -> None:
    """The first prompt of an LLM may be a single word: nothing before it has to have set the processor up."""
    llm = await start(host, llms / "a")
    assert (await complete(llm, prompt="x"))["usage"]["completion_tokens"] == 12


async def test_phases(host: EngineHost, llms: Path) -> None:
    """The phases of a start are told in their order, and their times add up to the time that it took."""
    told: list[Phase] = []
    llm = await start(host, llms / "a", on_phase=told.append)
    assert told == [Phase.CONFIGURING, Phase.LOADING, Phase.WARMING_UP, Phase.READY]
    assert list(llm.phases) == ["configuring", "loading", "warming_up"]
    assert sum(llm.phases.values()) == pytest.approx(llm.started_s)
    assert llm.max_model_len == 512


async def test_compiling_is_told(host: EngineHost, llms: Path) -> None:
    """An LLM that is not eager says when it is compiled, amid its warming up."""
    told: list[Phase] = []
    llm = await start(host, llms / "a", engine_args={"max_model_len": 512}, on_phase=told.append)
    assert told[:4] == [Phase.CONFIGURING, Phase.LOADING, Phase.WARMING_UP, Phase.COMPILING]
    assert told[-2:] == [Phase.WARMING_UP, Phase.READY]
    assert sum(llm.phases.values()) == pytest.approx(llm.started_s)


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


async def test_nothing_listens_to_the_network(host: EngineHost, llms: Path) -> None:
    """An engine and its workers accept connections from their own machine only."""
    llm = await start(host, llms / "a")
    listening = [
        connection.laddr.ip
        for pid in llm.pids
        for connection in psutil.Process(pid).net_connections()
        if connection.status in {psutil.CONN_LISTEN, psutil.CONN_NONE} and connection.laddr
    ]
    assert [address for address in listening if address not in {"127.0.0.1", "::1"}] == []


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


async def test_answers_before_it_is_handed_over(host: EngineHost, llms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LLM that fails to answer once has not started, and leaves nothing behind."""

    async def fails(_: RunningLLM) -> None:
        raise RuntimeError("illegal instruction")

    with monkeypatch.context() as patch:
        patch.setattr(RunningLLM, "warm_up", fails)
        error = await failure(host, llms / "a")
    assert "illegal instruction" in error.reason
    assert not error.permanent


@pytest.mark.parametrize("modeltyp", ["feature-extraction", "text-classification"])
async def test_pooling_llms_warm_up(host: EngineHost, llms: Path, modeltyp: str) -> None:
    """What does not generate text is asked once, too, in its own way."""
    llm = await start(host, llms / "a", modeltyp=modeltyp)
    assert "generate" not in await llm.engine.get_supported_tasks()
    await llm.warm_up()


# --- sleep -------------------------------------------------------------------------------------------------
#
# On the CPU vLLM frees no memory, and only stops to take prompts; all the rest is as it is on a GPU.


@pytest_asyncio.fixture(loop_scope="module")
async def sleeping(host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """LLMs sleep, as they do on a GPU whose memory is back at once."""
    monkeypatch.setattr(host, "_sleep", SleepMode(2**30, GPUMemory(0), host._endings.end_at_once))
    yield
    await host.stop_asleep()


async def test_sleep_mode_is_for_gpus(llms: Path, tmp_path: Path) -> None:
    """Only an engine on a GPU is made to sleep, and only where LLMs may."""
    order = Order(str(llms / "a"), "a", None, {}, "text-generation")
    made = {
        (gpus, gib): EngineHost(gpus=gpus, cache_dir=tmp_path, sleep_host_gib=gib)
        ._vllm.arguments(order)
        .enable_sleep_mode
        for gpus in (0, 1)
        for gib in (0, 64)
    }
    assert made == {(0, 0): False, (0, 64): False, (1, 0): False, (1, 64): True}


@pytest.mark.usefixtures("sleeping")
async def test_sleep_and_wake(host: EngineHost, llms: Path) -> None:
    """An LLM that sleeps lives on beside another, and wakes as itself, without having been started again."""
    told: list[Phase] = []
    a = await start(host, llms / "a")
    answer = await complete(a)
    assert await host.vacate() == StopOutcome(took_s=ANY)
    assert (host.running, host.asleep) == (None, [str(llms / "a")])
    b = await start(host, llms / "b")
    assert (await complete(b))["choices"] != answer["choices"]
    await host.vacate(wanted_next=str(llms / "a"))
    assert host.asleep == [str(llms / "a"), str(llms / "b")]
    assert await start(host, llms / "a", on_phase=told.append) is a
    assert told == [Phase.WAKING, Phase.WARMING_UP, Phase.READY]
    assert list(a.phases) == ["waking", "warming_up"]
    assert host.asleep == [str(llms / "b")]
    assert (await complete(a))["choices"] == answer["choices"]
    await host.stop()
    assert host.asleep == [str(llms / "b")]
    assert still_running((*a.pids, *b.pids)) == set(b.pids)


@pytest.mark.usefixtures("sleeping")
async def test_another_llm_does_not_wake(host: EngineHost, tmp_path: Path) -> None:
    """An LLM whose weights or arguments have changed since it went to sleep is started anew."""
    model = make_tiny_llm(tmp_path / "changing", seed=3)
    first = await start(host, model)
    await host.vacate()
    second = await start(host, model, engine_args=FAST | {"max_model_len": 256})
    assert second is not first
    await host.stop()
    make_tiny_llm(model, seed=4)
    third = await start(host, model)
    assert third is not first
    assert await complete(third)


@pytest.mark.usefixtures("sleeping")
async def test_killed_in_its_sleep(host: EngineHost, llms: Path) -> None:
    """An LLM that dies in its sleep is forgotten with all its processes; the one that runs takes no notice."""
    a = await start(host, llms / "a")
    await host.vacate()
    b = await start(host, llms / "b")
    os.kill(a.pids[0], signal.SIGKILL)
    async with asyncio.timeout(2):
        await a.died.wait()
    await asyncio.gather(*host._dead_sleepers)
    assert host.asleep == []
    assert still_running(a.pids) == set()
    assert not b.died.is_set()
    assert await complete(b)
    assert await complete(await swap(host, llms / "a"))


async def swap(host: EngineHost, model: Path) -> RunningLLM:
    await host.vacate(wanted_next=str(model))
    return await start(host, model)


@pytest.mark.usefixtures("sleeping")
async def test_wakes_and_does_not_answer(host: EngineHost, llms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LLM that has woken and fails to answer once is started anew."""
    a = await start(host, llms / "a")
    await host.vacate()
    warm_up = RunningLLM.warm_up

    async def fails(llm: RunningLLM) -> None:
        if llm is a:
            raise RuntimeError("illegal address")
        await warm_up(llm)

    monkeypatch.setattr(RunningLLM, "warm_up", fails)
    again = await start(host, llms / "a")
    assert still_running(a.pids) == set()
    assert await complete(again)


@pytest.mark.usefixtures("sleeping")
async def test_dead_llm_does_not_sleep(host: EngineHost, llms: Path) -> None:
    """An LLM that has died is stopped, whoever wanted it to sleep."""
    a = await start(host, llms / "a")
    os.kill(a.pids[-1], signal.SIGKILL)
    await a.died.wait()
    await host.vacate()
    assert host.asleep == []
    assert still_running(a.pids) == set()


# --- what can't be started ---------------------------------------------------------------------------------


async def failure(host: EngineHost, model: Path, **more: Any) -> EngineStartFailed:
    """Why it can't be started; asserts that nothing of it is left and that the host still works."""
    with pytest.raises(EngineStartFailed) as caught:
        await start(host, model, **more)
    assert host.running is None
    assert engines_of(host) == set()
    return caught.value


async def test_wrong_path(host: EngineHost, llms: Path) -> None:
    """An LLM that does not exist fails for good, in the words that tell why; then another one starts."""
    error = await failure(host, llms / "nowhere")
    assert "nowhere" in error.reason
    assert "root cause" not in error.reason
    assert error.permanent
    assert await complete(await start(host, llms / "a"))


async def test_unknown_architecture(host: EngineHost, llms: Path, tmp_path: Path) -> None:
    """An LLM of a kind that vLLM does not know fails for good, and the reason names the kind."""
    model = make_tiny_llm(tmp_path / "odd", seed=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["PerpetuumForCausalLM"]}))
    error = await failure(host, model)
    assert "PerpetuumForCausalLM" in error.reason
    assert error.permanent


async def test_truncated_weights(host: EngineHost, llms: Path, tmp_path: Path) -> None:
    """A half-copied LLM fails with the error that reading its weights gave, deep inside a worker."""
    weights = make_tiny_llm(tmp_path / "half", seed=1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    error = await failure(host, weights.parent)
    assert "SafetensorError" in error.reason
    assert not error.permanent


async def test_kv_cache_too_small(host: EngineHost, llms: Path) -> None:
    """What the engine process refuses is told in its words; another machine may have more memory."""
    error = await failure(host, llms / "a", engine_args=FAST | {"kv_cache_memory_bytes": 2048})
    assert "memory for the cache blocks" in error.reason
    assert not error.permanent


async def test_unknown_argument(host: EngineHost, llms: Path) -> None:
    """An engine argument that vLLM does not have fails for good, and is named."""
    error = await failure(host, llms / "a", engine_args={"warp_factor": 9})
    assert "warp_factor" in error.reason
    assert error.permanent


async def test_bad_argument(host: EngineHost, llms: Path) -> None:
    """A value that vLLM does not take fails for good, and its argument is named."""
    error = await failure(host, llms / "a", engine_args={"dtype": "colourful"})
    assert error.reason.startswith("dtype: ")
    assert error.permanent


async def test_timeout(host: EngineHost, llms: Path) -> None:
    """A start that takes too long is given up, and says in which phase."""
    error = await failure(host, llms / "a", timeout_s=0.3)
    assert "0.3 s" in error.reason
    assert "phase" in error.reason
    assert not error.permanent


@pytest.mark.parametrize("phase", [Phase.CONFIGURING, Phase.LOADING, Phase.WARMING_UP])
async def test_cancel(host: EngineHost, llms: Path, phase: Phase) -> None:
    """A start can be cancelled in every phase; no process of it is left, and the next start works."""
    reached = asyncio.Event()
    starting = asyncio.create_task(
        start(host, llms / "a", on_phase=lambda told: reached.set() if told is phase else None)
    )
    await reached.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert engines_of(host) == set()
    assert await complete(await start(host, llms / "b"))


async def test_stop_while_starting(host: EngineHost, llms: Path) -> None:
    """Stopping an LLM that starts ends the start, and whoever waits for it is told."""
    reached = asyncio.Event()
    starting = asyncio.create_task(
        start(host, llms / "a", on_phase=lambda told: reached.set() if told is Phase.LOADING else None)
    )
    await reached.wait()
    await host.stop()
    with pytest.raises(EngineStartFailed, match="stopped"):
        await starting


async def test_a_start_that_hangs_is_cut(host: EngineHost, llms: Path, tmp_path: Path) -> None:
    """Weights that never come: the start ends at its deadline with what the engine said last; the next one works."""
    hanging = tmp_path / "hanging"
    shutil.copytree(llms / "a", hanging, ignore=shutil.ignore_patterns("model.safetensors"))
    os.mkfifo(hanging / "model.safetensors")
    with pytest.raises(
        EngineStartFailed, match=r"not ready after 8 s \(phase: loading\); the engine said last:\n"
    ) as cut:
        await start(host, hanging, timeout_s=8)
    assert not cut.value.permanent
    assert len(cut.value.reason.splitlines()) > 1
    assert engines_of(host) == set()
    assert await complete(await start(host, llms / "a"))


# --- death -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, -1], ids=["engine", "worker"])
async def test_killed_engine(host: EngineHost, llms: Path, victim: int) -> None:
    """The death of any process of an engine is told at once; then nothing of it is left, and a start works."""
    llm = await start(host, llms / "a")
    shared = process_tree.shared_memory(llm.processes)
    assert shared
    os.kill(llm.pids[victim], signal.SIGKILL)
    async with asyncio.timeout(2):
        await llm.died.wait()
    assert llm.death_reason is not None
    assert str(llms / "a") in llm.death_reason
    report = await host.stop()
    assert report.leftover == ()
    assert still_running(llm.pids) == set()
    assert await complete(await start(host, llms / "a"))
    assert [file for file in shared if file.exists()] == []


@pytest.mark.parametrize("victim", [0, -1], ids=["engine", "worker"])
async def test_stopped_engine(host: EngineHost, llms: Path, victim: int) -> None:
    """An engine of which a process was stopped is found, idle as it is, and ended; then a start works."""
    llm = await start(host, llms / "a")
    shared = process_tree.shared_memory(llm.processes)
    os.kill(llm.pids[victim], signal.SIGSTOP)
    await llm.died.wait()
    assert llm.death_reason is not None
    assert f"process {llm.pids[victim]} was stopped" in llm.death_reason
    report = await host.stop()
    assert report.problem is None
    assert still_running(llm.pids) == set()
    assert [file for file in shared if file.exists()] == []
    assert await complete(await start(host, llms / "a"))


async def test_engine_that_hangs_in_a_step(
    host: EngineHost, llms: Path, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose step never ends is found after ``stall_s``; its prompts are told, and nothing of it is left."""
    monkeypatch.setattr(host._watch, "stall_s", 1.0)
    llm = await start(host, llms / "a")
    gate = at_the_gate(llm)
    brake.pull("hang")
    prompt = asyncio.create_task(gate.post("/process_prompt", json={"question": "Are you there?"}))
    await llm.died.wait()
    assert llm.death_reason is not None
    assert "for 1 s" in llm.death_reason
    assert (await host.stop()).problem is None
    assert still_running(llm.pids) == set()
    answer = await prompt
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_not_ready")
    assert llm.death_reason in answer.json()["message"]
    brake.release()
    assert await complete(await start(host, llms / "a"))


async def test_slow_engine_is_no_hanging_one(
    host: EngineHost, llms: Path, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes its time for each token, but gives them, goes on for longer than ``stall_s``."""
    monkeypatch.setattr(host._watch, "stall_s", 2.0)
    llm = await start(host, llms / "a")
    brake.pull(0.3)
    assert (await complete(llm, max_tokens=20))["usage"]["completion_tokens"] == 20
    assert not llm.died.is_set()


@pytest.mark.parametrize("body", [{"question": "Go on"}, {"prompt": "Go on"}, {"prompt": "Go on", "stream": True}])
async def test_endless_answer_is_cut(host: EngineHost, llms: Path, brake: Brake, body: dict[str, Any]) -> None:
    """An answer that takes longer than prompts may is cut, in the engine too, and the LLM goes on answering."""
    llm = await start(host, llms / "a")
    brake.pull(0.05)
    gate = at_the_gate(llm, prompt_max_s=0.3)
    if "question" in body:
        answer = await gate.post("/process_prompt", json=body)
    else:
        answer = await gate.post("/v1/completions", json={**body, "max_tokens": 500, "ignore_eos": True})
    assert answer.status_code == (200 if "stream" in body else 504)
    assert "prompt_too_long" in answer.text
    assert llm.unfinished == 0
    assert await has_ended(llm)
    brake.release()
    assert (await complete(llm))["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_dead_engine_is_told_to_its_prompts(host: EngineHost, llms: Path, brake: Brake, *, stream: bool) -> None:
    """A prompt under which the engine is killed is told so, as a passing error with the reason."""
    llm = await start(host, llms / "a")
    brake.pull(0.05)
    gate = at_the_gate(llm)
    body = {"prompt": "Go on", "max_tokens": 500, "ignore_eos": True, "stream": stream}
    prompt = asyncio.create_task(gate.post("/v1/completions", json=body))
    while not llm.unfinished:
        await asyncio.wait({prompt}, timeout=0.01)
    os.kill(llm.pids[0], signal.SIGKILL)
    answer = await prompt
    if stream:
        assert '"error"' in answer.text
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "engine_not_ready")
    assert llm.death_reason is not None
    assert llm.death_reason in error["message"]


OWNER = """
import asyncio, sys
from pathlib import Path
from deployments.engine.host import EngineHost
from deployments.serve.logs import configure_logging

async def main():
    configure_logging()  # to standard error, as in a wrapper
    host = EngineHost(gpus=0, kv_cache_gib=0.125, cache_dir=Path(sys.argv[2]), preload=())
    llm = await host.start(sys.argv[1], engine_args={"enforce_eager": True, "max_model_len": 512})
    print(*llm.pids, flush=True)
    await asyncio.sleep(3600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def left_behind(directory: Path) -> list[Path]:
    return list(directory.glob("gp-engine-*"))


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files of the test's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


async def test_killed_owner(llms: Path, tmp_path: Path, temporary: Path) -> None:
    """When the owner is killed, its forkserver, engine and workers die with it; the next owner tidies up."""
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(llms / "a"), str(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary), "VLLM_LOGGING_CONFIG_PATH": "", "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert owner.stdout is not None
    pids = {int(pid) for pid in (await owner.stdout.readline()).split()}
    family = process_tree.descendants(owner.pid)
    assert len(pids) >= 2
    assert pids < {process.pid for process in family}
    shared = process_tree.shared_memory(family)
    owner.kill()
    await owner.wait()
    assert await process_tree.ended(family, 10) == set()
    assert len(left_behind(temporary)) == 1
    remove_orphans()
    assert left_behind(temporary) == []
    assert [file for file in shared if file.exists()] == []


async def test_nothing_grows(host: EngineHost, llms: Path) -> None:
    """After many swaps the wrapper has no more processes, threads and open files than after a few."""

    def counted() -> tuple[int, int, int]:
        me = psutil.Process()
        return len(me.children(recursive=True)), me.num_threads(), me.num_fds()

    counts = []
    for number in range(5):
        llm = await start(host, llms / "ab"[number % 2])
        assert await complete(llm)
        del llm
        await host.stop()
        counts.append(counted())
    assert all(last <= early for last, early in zip(counts[-1], counts[1], strict=True)), counts
