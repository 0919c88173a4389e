"""A vLLM of another shape: engines start the normal way. And what is left of a host in the end: nothing."""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.host import EngineHost
from deployments.engine.phases import Phase
from deployments.machine import process_tree
from tests.engine.calls import FAST, complete, still_running

pytestmark = pytest.mark.vllm


def directories() -> set[Path]:
    """What hosts have for temporary files."""
    return set(Path(tempfile.gettempdir()).glob("gp-engine-*"))


async def test_cold_start(
    llms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where vLLM lacks the shape that a warm start needs, an LLM starts slowly, with a warning that says why."""
    import vllm.v1.engine.utils as launching

    original = launching.CoreEngineProcManager.__init__

    def moved(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)

    monkeypatch.setattr(launching.CoreEngineProcManager, "__init__", moved)
    host = EngineHost(gpus=0, kv_cache_gib=0.125, cache_dir=tmp_path)
    try:
        await host.prepare()
        assert not host.warm
        assert host.cold_reason is not None
        assert "CoreEngineProcManager" in host.cold_reason
        assert host.cold_reason in caplog.text
        phases: list[Phase] = []
        llm = await host.start(str(llms / "a"), engine_args=FAST, on_phase=phases.append)
        assert phases == [Phase.CONFIGURING, Phase.LOADING, Phase.WARMING_UP, Phase.READY]
        assert len(llm.pids) == 2
        assert await complete(llm)
        report = await host.stop()
        assert (report.killed, report.leftover) == ((), ())
        assert still_running(llm.pids) == set()
    finally:
        await host.close()


async def test_nothing_is_left_of_a_closed_host(llms: Path, tmp_path: Path) -> None:
    """Closing a host ends its processes and threads, removes its files, and gives the environment back."""
    environment = dict(os.environ)
    family = process_tree.descendants(os.getpid())
    threads = set(threading.enumerate())
    files = directories()
    host = EngineHost(gpus=0, kv_cache_gib=0.125, cache_dir=tmp_path, preload=())
    await host.prepare()
    assert host.warm
    await host.start(str(llms / "a"), engine_args=FAST)
    await host.close()
    await host.close()
    assert process_tree.alive(process_tree.descendants(os.getpid())) - family == set()
    assert [thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("engine")] == []
    assert directories() <= files
    for name in ("OMP_NUM_THREADS", "PYTHONPATH", "TMPDIR", "VLLM_LOGGING_CONFIG_PATH", "VLLM_RPC_BASE_PATH"):
        assert os.environ.get(name) == environment.get(name)
    with pytest.raises(RuntimeError, match="closed"):
        await host.prepare()
