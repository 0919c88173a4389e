"""A vLLM of another shape: engines start the normal way. And what is left of a host in the end: nothing."""

import asyncio
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from structlog.testing import capture_logs

from deployments.engine.host import EngineHost
from deployments.engine.phases import Phase
from deployments.machine import process_tree
from tests.engine.calls import FAST, complete, still_running

pytestmark = pytest.mark.vllm


def directories() -> set[Path]:
    """What hosts have for temporary files."""
    return set(Path(tempfile.gettempdir()).glob("gp-engine-*"))


def cold_start_of(logs: Sequence[Mapping[str, Any]]) -> object:
    """The reason in the one line that says that LLMs start slowly."""
    (line,) = [line for line in logs if line["event"].startswith("LLMs will start slowly")]
    assert line["log_level"] == "warning"
    return line["reason"]


async def test_cold_start(llms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM lacks the shape that a warm start needs, an LLM starts slowly, with a warning that says why."""
    import vllm.v1.engine.utils as launching

    original = launching.CoreEngineProcManager.__init__

    def moved(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)

    monkeypatch.setattr(launching.CoreEngineProcManager, "__init__", moved)
    host = EngineHost(gpus=0, kv_cache_gib=0.125, cache_dir=tmp_path)
    try:
        with capture_logs() as logs:
            await host.prepare()
        assert not host.warm
        assert host.cold_reason is not None
        assert "CoreEngineProcManager" in host.cold_reason
        assert cold_start_of(logs) == host.cold_reason
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


ASYNC_LLM = "vllm.v1.engine.async_llm"


def fill_with_renamed_internals(module: ModuleType) -> None:
    """Make a module a copy of vLLM's ``async_llm`` in which ``AsyncLLM.output_processor`` has another name."""
    spec = importlib.util.find_spec("vllm.v1.engine")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).with_name("async_llm.py")
    source = file.read_text().replace("self.output_processor", "self.outputs")
    module.__dict__.update(__file__=str(file), __package__="vllm.v1.engine")
    exec(compile(source, file, "exec"), module.__dict__)


async def test_a_vllm_with_other_internals_is_not_left_unwatched(
    llms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `output_processor` renamed in a copy of vLLM, LLMs start cold, and one without its hang watch is ended.

    Both log lines name what was renamed.
    """
    monkeypatch.setitem(sys.modules, ASYNC_LLM, renamed := ModuleType(ASYNC_LLM))
    fill_with_renamed_internals(renamed)
    host = EngineHost(gpus=0, kv_cache_gib=0.125, cache_dir=tmp_path)
    try:
        with capture_logs() as logs:
            await host.prepare()
            llm = await host.start(str(llms / "a"), engine_args=FAST)
            await asyncio.wait_for(llm.died.wait(), 10)
        assert host.cold_reason is not None
        assert "AsyncLLM.__init__ no longer uses output_processor" in host.cold_reason
        assert cold_start_of(logs) == host.cold_reason
        assert llm.death_reason is not None
        assert "its hang watch failed: AttributeError" in llm.death_reason
        assert "output_processor" in llm.death_reason
        (died,) = [line for line in logs if line["event"] == "the engine of an LLM is dead"]
        assert died["model"] == llm.served_model_name
        assert died["reason"] in llm.death_reason
        assert "output_processor" in died["reason"]
        assert (await host.stop()).problem is None
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
