"""What the tests of this folder do with their host; no test leaves an LLM running."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from deployments.engine.gpu_memory import GPUMemory
from deployments.engine.host import EngineHost
from deployments.engine.sleep_mode import SleepMode
from tests.engine.host.started import Brake, engines_of


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def empty_afterwards(host: EngineHost) -> AsyncIterator[None]:
    """No test leaves an LLM running, nor a process of one."""
    yield
    await host.stop()
    assert engines_of(host) == set()


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Brake:
    monkeypatch.setenv("GREENPROMPT_TEST_BRAKE", str(tmp_path / "brake"))
    return Brake(tmp_path / "brake")


@pytest_asyncio.fixture(loop_scope="session")
async def sleeping(host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """LLMs sleep, as they do on a GPU whose memory is back at once."""
    monkeypatch.setattr(host, "_sleep", SleepMode(2**30, GPUMemory(0), host._endings.end_at_once))
    yield
    await host.stop_asleep()
