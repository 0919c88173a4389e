"""Hostile checkpoints against a wrapper whose engine is a fake: what is refused before an engine reads it."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from deployments.models.sources import ModelSources
from deployments.wrapper import llm_wrapper as wrapper_module
from deployments.wrapper.config import WrapperConfig
from registry.core.records import LLMSpec
from registry.errors import EngineStartFailed
from registry.settings import EnergySettings, ModelSettings, WrapperSettings
from tests.support.hostile.checkpoints import NAMES, ROWS, SECRET, HostileCheckpoint
from tests.support.hostile.rows import LEAKS
from tests.support.llm_wrapper import FakeHost
from tests.support.undying_wrapper import UndyingWrapper, started_wrapper

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOUND_S = 30.0
"""Longest time of a start, seconds: a read that does not end fails the test instead of the whole run."""


@dataclass
class Machine:
    """A wrapper, and the folder of local models that it may load."""

    wrapper: UndyingWrapper
    root: Path
    epochs: Iterator[int] = field(default_factory=lambda: count(1))

    def folder(self, row: HostileCheckpoint) -> Path:
        """The folder of a row."""
        return self.root / "local" / str(ROWS.index(row))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machine]:
    """A wrapper that may run the code of some rows, if it is code of their own folder."""
    root = tmp_path_factory.mktemp("machine")
    (root / "secret.txt").write_text(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper_module, "EngineHost", FakeHost)
        patch.setattr(wrapper_module, "raise_score", lambda _: None)
        patch.chdir(root)
        allowed = tuple(str(root / "local" / str(n)) for n, row in enumerate(ROWS) if row.code_allowed)
        sources = ModelSources(False, (root / "local",), root)
        models = ModelSettings(allow_remote_code=allowed)
        settings = WrapperSettings(kv_cache_gib=1)
        wrapper = await started_wrapper(
            WrapperConfig("a-0", 0, settings, EnergySettings(), sources, root / "cache", models)
        )
        patch.setattr(wrapper._rest, "_is_working_here", lambda: False)  # threads of other tests may work
        yield Machine(wrapper, root)


def left_behind() -> tuple[int, set[str]]:
    """The number of this process's children, and the names of its threads without those of asyncio's pool."""
    threads = {thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}
    return len(psutil.Process().children(recursive=True)), threads


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


async def test_there_are_enough_rows() -> None:
    """No two rows have the same name, and an accident in the table does not make it shorter."""
    assert len(NAMES) == len(ROWS) >= 100


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_nothing_comes_of_a_hostile_checkpoint(machine: Machine, row: HostileCheckpoint) -> None:
    """The start fails with the documented error, or the engine gets the folder; nothing of it runs or is left."""
    wrapper, folder = machine.wrapper, machine.folder(row)
    row.write(folder)
    files, before = names_in(folder), left_behind()
    spec = LLMSpec(str(folder), "text-generation", engine_args=row.engine_args)
    deploy = asyncio.create_task(wrapper.deploy(next(machine.epochs), spec, None))
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
    await wrapper.stop(next(machine.epochs))
    assert left_behind() == before
    assert names_in(folder) == files
    assert not (machine.root / "executed").exists()
    shutil.rmtree(folder)
