"""What can't be started on a real vLLM, and starts that are given up."""

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest

from deployments.engine.host import EngineHost
from deployments.engine.phases import Phase
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from registry.errors import EngineStartFailed
from tests.engine.calls import FAST, complete
from tests.engine.host.started import engines_of, failure, start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="package"),
    # After a start that failed vLLM leaves its message queue to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]


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
