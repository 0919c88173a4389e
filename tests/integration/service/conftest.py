"""The registry's service in a world of its own. After every test the books must balance."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from registry.core.records import WrapperStatus
from registry.service import commands, watch
from registry.store.store import Store
from tests.support.service_world import ServiceWorld


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for seconds in life waits for a moment here."""
    monkeypatch.setattr(commands, "RESEND_DELAYS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(watch, "FAILED_RETRY_S", 0.005)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    """All that was logged."""
    with structlog.testing.capture_logs() as logs:
        yield logs


Make = Callable[..., ServiceWorld]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all its tables and nothing in them."""
    path = tmp_path_factory.mktemp("empty") / "registry.db"
    Store.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture
async def make(tmp_path: Path, empty_database: Path, logs: list[Any]) -> AsyncIterator[Make]:
    """Makes a world that is not started yet: ``make(**settings)``."""
    made: list[ServiceWorld] = []
    shutil.copy(empty_database, tmp_path / "registry.db")

    def make(**settings: Any) -> ServiceWorld:
        made.append(ServiceWorld(f"sqlite:///{tmp_path}/registry.db", logs, **settings))
        return made[-1]

    yield make
    for world in made:
        await world.close()


@pytest.fixture
async def world(make: Make) -> ServiceWorld:
    """A registry with one machine, ``a``, whose wrapper ``a-0`` is idle."""
    world = make()
    world.cluster.join("a")
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE)
    return world


@pytest.fixture
async def two(make: Make) -> ServiceWorld:
    """A registry with two machines, ``a`` and ``b``."""
    world = make()
    world.cluster.join("a")
    world.cluster.join("b")
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE, "a-0")
    await world.until_wrapper(WrapperStatus.IDLE, "b-0")
    return world
