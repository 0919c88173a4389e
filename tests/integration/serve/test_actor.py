"""The start of the registry actor, first and after its process has ended."""

from __future__ import annotations

import asyncio
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from deployments.serve.actor import EXIT_FAILED, RegistryActor
from registry.errors import StoreUnavailable
from registry.settings import Settings


class Ended(Exception):
    """The process has ended."""


class BrokenService:
    """A service whose database can't be loaded."""

    async def start(self) -> None:
        raise StoreUnavailable("it does not answer")


def no_store(*_: Any) -> Any:
    raise StoreUnavailable("it does not answer")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit statuses, in place of ends; pauses are not waited for."""
    statuses: list[int] = []

    def leave(status: int) -> None:
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", lambda _s: None)
    return statuses


def restarted(monkeypatch: pytest.MonkeyPatch, *, is_so: bool) -> None:
    context = SimpleNamespace(was_current_actor_reconstructed=is_so)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


async def test_who_starts_a_registry_is_told(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start whose database can't be opened, or loaded, raises."""
    restarted(monkeypatch, is_so=False)
    with pytest.raises(StoreUnavailable):
        RegistryActor(Settings(), no_store)
    actor = RegistryActor(Settings(), lambda *_: BrokenService())  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable):
        await actor.ready()
    assert ends == []


async def test_a_restarted_registry_tries_until_its_database_is_back(
    ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends, so that Ray restarts it once more: an actor whose constructor raises would be dead for good."""
    restarted(monkeypatch, is_so=True)
    with pytest.raises(Ended):
        RegistryActor(Settings(), no_store)
    actor = RegistryActor(Settings(), lambda *_: BrokenService())  # type: ignore[arg-type]
    with pytest.raises(Ended):
        await asyncio.wait_for(actor.ready(), 10)
    assert ends == [EXIT_FAILED] * 2
