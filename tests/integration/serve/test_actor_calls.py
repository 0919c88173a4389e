"""The ingress's calls to the registry's actor."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import stamina
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from deployments.serve import actor_calls
from deployments.serve.actor_calls import ActorCalls
from registry.errors import (
    InternalError,
    RegistryUnavailable,
    UnknownRequest,
)


class FakeMethod:
    """A remote method: each call takes the next of ``outcomes``; errors are raised, awaitables awaited."""

    def __init__(self, outcomes: list[object]) -> None:
        self.outcomes = outcomes
        self.calls: list[tuple[object, ...]] = []

    def remote(self, *args: object) -> Awaitable[object]:
        self.calls.append(args)
        outcome = self.outcomes.pop(0)

        async def answer() -> object:
            if isinstance(outcome, Exception):
                raise outcome
            if callable(outcome):
                return await outcome()
            return outcome

        return answer()


class FakeActor:
    def __init__(self, *outcomes: object) -> None:
        self.state = FakeMethod(list(outcomes))


def task_error(cause: Exception) -> Exception:
    """An exception of an actor's method as Ray delivers it."""
    error: Exception = RayTaskError("state", "a traceback", cause).as_instanceof_cause()
    return error


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets ``ray.get_actor`` find these, one after the other; what is returned counts the searches."""

    def find(*found: FakeActor | Exception) -> list[str]:
        left, searches = list(found), list[str]()

        def get_actor(name: str, _namespace: str) -> FakeActor:
            searches.append(name)
            actor = left.pop(0)
            if isinstance(actor, Exception):
                raise actor
            return actor

        monkeypatch.setattr(ray, "get_actor", get_actor)
        return searches

    return find


@pytest.fixture(autouse=True)
def no_pauses():
    """Calls are tried again five times, without a pause."""
    with stamina.set_testing(True, attempts=5):
        yield


async def test_actor_is_found_once(find: Callable[..., list[str]]) -> None:
    """The actor is looked up by name for the first call and kept."""
    actor = FakeActor("one", "two")
    searches = find(actor)
    client = ActorCalls(Path("/"))
    assert [await client.call("state", "x", 1.0, wait_s=1.0), await client.call("state", "y")] == ["one", "two"]
    assert searches == ["greenprompt-registry"]
    assert actor.state.calls == [("x", 1.0), ("y",)]


async def test_call_outlasts_a_restart(find: Callable[..., list[str]]) -> None:
    """An actor that dies, is not there for a moment and comes back answers the same call, with the same arguments."""
    old, new = FakeActor(ActorUnavailableError("restarting", None), ActorDiedError()), FakeActor("answer")
    find(old, old, ValueError("no such actor"), new)
    assert await ActorCalls(Path("/")).call("state", "x") == "answer"
    assert [*old.state.calls, *new.state.calls] == [("x",)] * 3


async def test_actor_that_stays_away_is_unavailable(find: Callable[..., list[str]]) -> None:
    """An actor that does not come back is a RegistryUnavailable, which clients may try again."""
    find(*[ValueError("no such actor")] * 5)
    with pytest.raises(RegistryUnavailable):
        await ActorCalls(Path("/")).call("state", "x")


async def test_a_full_disk_is_said(find: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that can't write ends, again and again: the answer says that the disk is full."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=0))
    find(*[ValueError("no such actor")] * 5)
    with pytest.raises(RegistryUnavailable, match=r"\(_NoActor; the disk of /state is full \(0 MiB are free\)\)"):
        await ActorCalls(Path("/state")).call("healthz")


async def test_errors_of_the_registry_come_through(find: Callable[..., list[str]]) -> None:
    """What the registry raised is raised here as it was, and not tried again."""
    actor = FakeActor(task_error(UnknownRequest("x")), "never")
    find(actor)
    with pytest.raises(UnknownRequest) as caught:
        await ActorCalls(Path("/")).call("state", "x")
    assert type(caught.value) is UnknownRequest
    assert len(actor.state.calls) == 1


async def test_unforeseen_errors_are_told_as_such(find: Callable[..., list[str]]) -> None:
    """A fault inside the registry is an internal error that names it, and is not tried again."""
    actor = FakeActor(task_error(ZeroDivisionError("boom")), "never")
    find(actor)
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        await ActorCalls(Path("/")).call("state", "x")
    assert len(actor.state.calls) == 1


async def test_reads_wait_for_one_another_and_nothing_waits_for_them(find: Callable[..., list[str]]) -> None:
    """Of each kind of read only so many are in flight at the registry; control and health go past those that wait."""
    answered = asyncio.Event()
    actor = FakeActor(*[answered.wait] * 200)
    find(actor)
    for method in ("request", "release", "health", *actor_calls.AT_ONCE):
        setattr(actor, method, FakeMethod([answered.wait] * 200))
    client = ActorCalls(Path("/"))
    reads = [asyncio.create_task(client.call(method, "x")) for method in actor_calls.AT_ONCE for _ in range(100)]
    await asyncio.sleep(0)
    others = [asyncio.create_task(client.call(method, "x")) for method in ("request", "release", "health")]
    for _ in range(10):
        await asyncio.sleep(0)
    assert {method: len(getattr(actor, method).calls) for method in actor_calls.AT_ONCE} == actor_calls.AT_ONCE
    assert [len(getattr(actor, method).calls) for method in ("request", "release", "health")] == [1, 1, 1]
    answered.set()
    assert all(await asyncio.gather(*reads, *others))


async def test_call_has_a_time_limit(find: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that does not answer is unavailable after the limit, plus what the client asked to wait."""
    monkeypatch.setattr(actor_calls, "CALL_TIMEOUT_S", 0.0)
    find(FakeActor(asyncio.Event().wait))
    with pytest.raises(RegistryUnavailable, match=r"no answer within 0\.01 s"):
        await ActorCalls(Path("/")).call("state", "x", wait_s=0.01)


async def test_turn_of_a_read_has_a_time_limit(find: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that does not get its turn among others is unavailable after the limit; the next read gets it."""
    monkeypatch.setattr(actor_calls, "AT_ONCE", {"state": 1})
    answered = asyncio.Event()
    find(actor := FakeActor(answered.wait, "answer"))
    client = ActorCalls(Path("/"))
    first = asyncio.create_task(client.call("state", "x"))
    for _ in range(10):
        await asyncio.sleep(0)
    monkeypatch.setattr(actor_calls, "CALL_TIMEOUT_S", 0.0)
    with pytest.raises(RegistryUnavailable, match="too many calls of state were in progress for 0 s"):
        await client.call("state", "y")
    monkeypatch.setattr(actor_calls, "CALL_TIMEOUT_S", 30.0)
    answered.set()
    assert await first
    assert await client.call("state", "z") == "answer"
    assert actor.state.calls == [("x",), ("z",)]
