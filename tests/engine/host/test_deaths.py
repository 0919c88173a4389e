"""Engines of a real vLLM that die, hang or lose their owner."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.environment import remove_orphans
from deployments.engine.host import EngineHost
from deployments.machine import process_tree
from tests.engine.calls import at_the_gate, complete, has_ended, still_running
from tests.engine.host.started import Brake, start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="package"),
    # After a start that failed vLLM leaves its message queue to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]


@pytest.mark.parametrize("victim", [0, -1], ids=["engine", "worker"])
async def test_killed_engine(host: EngineHost, llms: Path, victim: int) -> None:
    """The death of any process of an engine is reported at once. Nothing of it is left, and a new start works."""
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
    """An engine whose step never ends is found after ``stall_s``. Its prompts get an error; nothing of it is left."""
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
    """If the engine is killed during a prompt, the client gets an error that allows a retry, with the reason."""
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
