"""Starts of LLMs on a real vLLM: the warm host, their phases, and what a swap leaves."""

import asyncio
from pathlib import Path

import psutil
import pytest

from deployments.engine.host import EngineHost
from deployments.engine.phases import Phase
from deployments.engine.vllm_api import RunningLLM
from deployments.machine.out_of_memory import ENGINE_SCORE
from tests.engine.calls import complete, still_running
from tests.engine.host.started import failure, start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="package"),
    # After a start that failed vLLM leaves its message queue to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]


async def test_prepared_host_is_warm(host: EngineHost) -> None:
    """With the vLLM that we pin, engines are forked from a warm forkserver."""
    assert host.cold_reason is None
    assert host.warm


async def test_what_can_not_be_preloaded_is_passed_over(host: EngineHost) -> None:
    """A wrong name among the LLMs to import ahead costs a warning, not the warm start."""
    assert host._prepared.forkserver is not None
    (problem,) = host._prepared.forkserver.not_preloaded
    assert problem.startswith("no.such.llm: ModuleNotFoundError")


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


@pytest.mark.long
async def test_compiling_is_told(host: EngineHost, llms: Path) -> None:
    """An LLM that is not eager says when it is compiled, amid its warming up."""
    told: list[Phase] = []
    llm = await start(host, llms / "a", engine_args={"max_model_len": 512}, on_phase=told.append)
    assert told[:4] == [Phase.CONFIGURING, Phase.LOADING, Phase.WARMING_UP, Phase.COMPILING]
    assert told[-2:] == [Phase.WARMING_UP, Phase.READY]
    assert sum(llm.phases.values()) == pytest.approx(llm.started_s)


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
