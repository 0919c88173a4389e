"""Engines of a host: starts, the LLM that takes the place of another one, and the processes that there are."""

from pathlib import Path
from typing import Any, Literal

import pytest

from deployments.engine.host import EngineHost
from deployments.engine.vllm_api import RunningLLM
from deployments.machine import process_tree
from registry.errors import EngineStartFailed
from tests.engine.calls import FAST


def engines_of(host: EngineHost) -> set[int]:
    """Pids of everything that the host's forkserver has forked and that still runs."""
    assert host._prepared.forkserver is not None
    assert host._prepared.forkserver.pid is not None
    return {process.pid for process in process_tree.alive(process_tree.descendants(host._prepared.forkserver.pid))}


class Brake:
    """Slows the steps of engines that are started from now on; see ``tests/engine/brake.py``."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pull(self, step: float | Literal["hang"]) -> None:
        """Each step takes ``step`` seconds longer, or does not end."""
        self._file.write_text(str(step), encoding="utf-8")

    def release(self) -> None:
        self._file.unlink()


async def start(host: EngineHost, model: Path, **more: Any) -> RunningLLM:
    return await host.start(str(model), **({"engine_args": FAST} | more))


async def swap(host: EngineHost, model: Path) -> RunningLLM:
    await host.vacate(wanted_next=str(model))
    return await start(host, model)


async def failure(host: EngineHost, model: Path, **more: Any) -> EngineStartFailed:
    """Why it can't be started; asserts that nothing of it is left and that the host still works."""
    with pytest.raises(EngineStartFailed) as caught:
        await start(host, model, **more)
    assert host.running is None
    assert engines_of(host) == set()
    return caught.value
