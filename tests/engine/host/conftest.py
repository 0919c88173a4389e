"""One host, and so one import of vLLM, for all tests of this folder; no test leaves an LLM running."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from deployments.engine.gpu_memory import GPUMemory
from deployments.engine.host import EngineHost
from deployments.engine.sleep_mode import SleepMode
from tests.engine.host.started import Brake, engines_of


@pytest_asyncio.fixture(scope="package", loop_scope="package")
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


@pytest_asyncio.fixture(loop_scope="package", autouse=True)
async def empty_afterwards(host: EngineHost) -> AsyncIterator[None]:
    """No test leaves an LLM running, nor a process of one."""
    yield
    await host.stop()
    assert engines_of(host) == set()


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Brake:
    monkeypatch.setenv("GREENPROMPT_TEST_BRAKE", str(tmp_path / "brake"))
    return Brake(tmp_path / "brake")


@pytest_asyncio.fixture(loop_scope="package")
async def sleeping(host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """LLMs sleep, as they do on a GPU whose memory is back at once."""
    monkeypatch.setattr(host, "_sleep", SleepMode(2**30, GPUMemory(0), host._endings.end_at_once))
    yield
    await host.stop_asleep()
