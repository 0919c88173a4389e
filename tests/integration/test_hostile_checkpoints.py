"""Hostile checkpoints against a wrapper whose engine is a fake: what is refused before an engine reads it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import psutil
import pytest

from deployments.models.sources import ModelSources
from deployments.wrapper import llm_wrapper as wrapper_module
from deployments.wrapper.config import WrapperConfig
from registry.core.records import LLMSpec
from registry.errors import EngineStartFailed
from registry.settings import EnergySettings, ModelSettings, WrapperSettings
from tests.support.hostile.checkpoints import NAMES, ROWS, SECRET, HostileCheckpoint
from tests.support.hostile.rows import LEAKS
from tests.support.llm_wrapper import FakeHost
from tests.support.undying_wrapper import started_wrapper

BOUND_S = 30.0
"""Longest time of a start, seconds: a read that does not end fails the test instead of the whole run."""


def left_behind() -> tuple[int, set[str]]:
    """Processes that this one has, and its threads that run or wait in a call without an end."""
    return len(psutil.Process().children(recursive=True)), {
        thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")
    }


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_there_are_enough_rows() -> None:
    """No two rows have the same name, and an accident in the table does not make it shorter."""
    assert len(NAMES) == len(ROWS) >= 100


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_nothing_comes_of_a_hostile_checkpoint(
    row: HostileCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start fails with the documented error, or the engine gets the folder; nothing of it runs or is left."""
    monkeypatch.setattr(wrapper_module, "EngineHost", FakeHost)
    monkeypatch.setattr(wrapper_module, "raise_score", lambda _: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text(SECRET)
    folder = tmp_path / "local" / "llm"
    row.write(folder)
    files = names_in(folder)
    allowed = () if "not allowed" in row.name else (str(folder),)
    wrapper = await started_wrapper(
        WrapperConfig(
            "a-0", 0, WrapperSettings(kv_cache_gib=1), EnergySettings(),
            ModelSources(False, (tmp_path / "local",), tmp_path), tmp_path / "cache",
            ModelSettings(allow_remote_code=allowed),
        )
    )  # fmt: skip
    before = left_behind()
    deploy = asyncio.create_task(
        wrapper.deploy(1, LLMSpec(str(folder), "text-generation", engine_args=row.engine_args), None)
    )
    done, _ = await asyncio.wait({deploy}, timeout=BOUND_S)
    assert done, "the start does not end"
    if row.refused is None:
        deploy.result()
        assert wrapper.host.running is not None
    else:
        with pytest.raises(EngineStartFailed, match=row.refused) as failed:
            deploy.result()
        assert [leak for leak in (*LEAKS, SECRET) if leak in failed.value.reason] == []
        assert len(failed.value.reason) < 1000
        assert wrapper.host.running is None
    await wrapper.stop(2)
    assert left_behind() == before
    assert names_in(folder) == files
    assert not (tmp_path / "executed").exists()
