"""An engine host whose start is a fake: what holds without vLLM."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deployments.engine.host import EngineHost
from registry.errors import EngineStartFailed


async def test_close_gives_up_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is closed while an LLM starts does not wait for that; who waited for the LLM is told."""
    host, starting = EngineHost(gpus=0, cache_dir=tmp_path), asyncio.Event()

    async def prepare() -> None:
        pass

    async def start(*_: object) -> None:
        async with host._busy:
            starting.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(host._prepared, "prepare", prepare)
    monkeypatch.setattr(host, "_start", start)
    started = asyncio.create_task(host.start("org/tiny"))
    await starting.wait()
    await asyncio.wait_for(host.close(), 5.0)
    with pytest.raises(EngineStartFailed, match="it was stopped while it started"):
        await started
