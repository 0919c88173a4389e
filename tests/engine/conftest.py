from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from deployments.engine.host import EngineHost
from greenprompt_client.demo.tiny_llm import make_tiny_llm


@pytest.fixture(scope="package")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two tiny LLMs, a and b."""
    directory = tmp_path_factory.mktemp("llms")
    make_tiny_llm(directory / "a", seed=1)
    make_tiny_llm(directory / "b", seed=2)
    return directory


@pytest.fixture(scope="package", autouse=True)
def offline() -> Iterator[None]:
    """Nothing is looked for on a hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def host(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineHost]:
    """One host, and so one import of vLLM by its forkserver, for the tests that need no other."""
    host = EngineHost(
        gpus=0,
        kv_cache_gib=0.125,
        cache_dir=tmp_path_factory.mktemp("cache"),
        preload=("vllm.model_executor.models.llama", "tests.engine.brake", "no.such.llm"),
    )
    await host.prepare()
    yield host
    await host.close()
