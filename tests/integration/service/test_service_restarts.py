"""The service when it ends: killed in the middle, shut down, failing itself, or told what nobody foresaw."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.contract.messages import WrapperReport
from registry.core.events import Event, WrapperFailed, WrapperStarted
from registry.core.records import Lease, WrapperStatus
from registry.errors import (
    InternalError,
    ShuttingDown,
    StoreUnavailable,
    UnknownMeasurement,
    WrapperUnreachable,
)
from registry.service import service as service_module
from registry.service import views
from registry.settings import Settings
from registry.wire.lease_token import LEASE_TOKEN
from registry.wire.words import RequestStatus as Status
from tests.support.service_world import LIMIT_S, OTHER, THIRD, TINY, ServiceWorld

Make = Callable[..., ServiceWorld]


# --- restarts of the registry ------------------------------------------------------------------------------


async def test_lease_survives_the_registry(world: ServiceWorld) -> None:
    """A registry that was killed comes back to its leases: same address, same times, and the prompts never stopped."""
    request_id = await world.deployed(1)
    (waits,) = world.ask(2, OTHER)
    before, lease = world.url(request_id), world.service.allocator.lease_of(request_id)
    await world.restart()
    assert world.url(request_id) == before
    assert world.service.allocator.lease_of(request_id) == lease
    await world.until(lambda: any(isinstance(event, WrapperStarted) for event in world.journal.events))
    await world.looked()
    assert world.request(request_id).status is Status.DEPLOYED
    assert world.wrapper().grant is not None
    assert world.wrapper().starts == 1
    assert world.wrapper().ended == []
    world.service.release(request_id)
    await world.until_status(waits, Status.DEPLOYED)


async def test_half_done_start_goes_on(world: ServiceWorld) -> None:
    """A start that was under way when the registry was killed is taken up again, not begun anew."""
    gate = world.cluster.hold("a-0", "deploy")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: gate.arrived)
    await world.restart()
    assert world.request(request_id).status is Status.DEPLOYING
    await world.until(lambda: any(isinstance(event, WrapperStarted) for event in world.journal.events))
    gate.open()
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.wrapper().starts == 1


async def test_start_that_ended_meanwhile_is_found(world: ServiceWorld) -> None:
    """An LLM that came up while the registry was away is handed over when it is back."""
    gate = world.cluster.hold("a-0", "deploy")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: gate.arrived)
    await world.crash()
    gate.open()
    await world.until(lambda: world.wrapper().runs)
    await world.start()
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.wrapper().starts == 1


async def test_half_done_hand_over_is_finished(world: ServiceWorld) -> None:
    """A lease that the wrapper had not been told of when the registry was killed is told by the next."""
    binding = world.cluster.hold("a-0", "bind")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: binding.arrived)
    await world.crash()
    binding.open()
    await world.start()
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.wrapper().grant is not None


async def test_half_done_release_is_finished(world: ServiceWorld) -> None:
    """A release that the wrapper had not been told of when the registry was killed is told by the next."""
    request_id = await world.deployed(1)
    gate = world.cluster.hold("a-0", "unbind")
    world.service.release(request_id)
    await world.until(lambda: gate.arrived)
    await world.crash()
    gate.open()
    await world.start()
    assert world.request(request_id).status is Status.RELEASED
    await world.until(lambda: world.wrapper().grant is None)
    assert world.wrapper().starts == 1


async def test_lease_that_ran_out_while_nobody_watched(world: ServiceWorld) -> None:
    """A lease whose time passed while the registry was away ends, unless its wrapper says that it was used."""
    request_id = await world.deployed(1)
    await world.crash()
    world.clock.now_s += 500.0
    world.wrapper().idle_for_s = 1.0
    await world.start()
    await world.looked(times=4)
    assert world.request(request_id).status is Status.DEPLOYED
    await world.crash()
    world.clock.now_s += 500.0
    await world.start()
    await world.until_status(request_id, Status.EXPIRED)
    await world.until(lambda: world.wrapper().grant is None)


async def test_machine_that_left_while_nobody_watched(world: ServiceWorld) -> None:
    """A machine that went while the registry was away is found lost, and its lease fails."""
    request_id = await world.deployed(1)
    await world.crash()
    world.cluster.leave("a")
    await world.start()
    await world.until_status(request_id, Status.FAILED)


async def test_database_that_is_new_finds_wrappers(world: ServiceWorld, tmp_path: Path) -> None:
    """A registry whose database is gone takes over the wrappers that run, and empties them of what it does not know."""
    await world.deployed(1)
    await world.crash()
    (tmp_path / "registry.db").unlink()
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE)
    assert world.wrapper().grant is None
    await world.deployed(1)


# --- shutdown ----------------------------------------------------------------------------------------------


async def test_shutdown_stops_everything_and_keeps_the_queue(two: ServiceWorld) -> None:
    """Shutdown ends leases, stops every LLM, removes every wrapper; what waits is there at the next start, in order."""
    held = await two.deployed(1)
    two.service.release(await two.deployed(2, OTHER))
    gate = two.cluster.hold("b-0", "deploy")
    (deploying,) = two.ask(3, THIRD)
    (queued,) = two.ask(4, TINY)
    await two.until(lambda: gate.arrived)
    await two.service.shutdown()
    assert two.cluster.wrappers == {}
    assert sorted(two.cluster.removed) == ["a-0", "b-0"]
    assert two.cluster.calls["a-0", "stop"] == two.cluster.calls["b-0", "stop"] == 1
    assert two.request(held).status is Status.EXPIRED
    assert {two.request(each).status for each in (deploying, queued)} == {Status.QUEUED}
    gate.open()
    await two.start()
    await two.until_status(deploying, Status.DEPLOYED)
    await two.until_status(queued, Status.DEPLOYED)
    assert two.request(held).status is Status.EXPIRED


async def test_shutdown_takes_no_new_requests(world: ServiceWorld) -> None:
    """From the first moment of a shutdown requests are refused, and states are still told."""
    request_id = await world.deployed(1)
    gate = world.cluster.hold("a-0", "stop")
    ending = asyncio.create_task(world.service.shutdown())
    await world.until(lambda: gate.arrived)
    with pytest.raises(ShuttingDown):
        world.ask(2, TINY)
    assert (await world.service.wait_for_change(request_id, 0)).status is Status.EXPIRED
    gate.open()
    async with asyncio.timeout(LIMIT_S):
        await ending
    assert world.cluster.wrappers == {}


async def test_nothing_is_changed_after_the_end(world: ServiceWorld) -> None:
    """A call that comes when the database is closed is refused; it does not end the process as a failure would."""
    held = await world.deployed(1)
    (queued,) = world.ask(2, OTHER)
    await world.service.shutdown()
    with pytest.raises(ShuttingDown):
        world.service.release(queued)
    with pytest.raises(ShuttingDown):
        world.ask(3, TINY)
    assert world.request(held).status is Status.EXPIRED
    assert world.fatal == []
    async with asyncio.timeout(LIMIT_S):
        await world.service.shutdown()


async def test_shutdown_does_not_wait_for_the_dead(world: ServiceWorld) -> None:
    """A wrapper that does not answer to its stop is given up and removed all the same."""
    await world.deployed(1)
    world.cluster.fail("a-0", "stop", WrapperUnreachable("a-0", "no answer"))
    async with asyncio.timeout(LIMIT_S):
        await world.service.shutdown()
    assert world.cluster.removed == ["a-0"]


async def test_shutdown_does_not_wait_for_ever(
    world: ServiceWorld, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    """A stop that does not come back in its time is told, and the wrapper removed all the same."""
    monkeypatch.setattr(service_module, "STOP_MARGIN_S", 0.01)
    world.settings = world.service.settings = Settings.model_validate({"wrappers": {"stop_timeout_s": 0.01}})
    await world.deployed(1)
    world.cluster.hold("a-0", "stop")
    async with asyncio.timeout(LIMIT_S):
        await world.service.shutdown()
    assert world.cluster.removed == ["a-0"]
    assert [entry["wrappers"] for entry in logs if "did not stop in time" in entry["event"]] == [["a-0"]]


@pytest.mark.parametrize("error", [WrapperUnreachable("cluster", "no answer"), TimeoutError()], ids=["gone", "late"])
async def test_shutdown_ends_though_wrappers_stay(world: ServiceWorld, error: Exception) -> None:
    """Wrappers that can't be removed are left to whoever ends the cluster; the database is closed."""
    world.expected_problems = ["wrappers could not be removed"]
    world.cluster.fail("cluster", "remove", error)
    async with asyncio.timeout(LIMIT_S):
        await world.service.shutdown()
    with pytest.raises(ShuttingDown):
        world.ask(1, TINY)


# --- failures of the registry itself -----------------------------------------------------------------------


async def test_commit_that_fails_is_fatal_and_answers_nothing(
    world: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a decision can't be written, the process is to end: no answer, no command; what is written holds."""
    world.expected_problems = ["a background task failed"]
    await world.looked()
    error = StoreUnavailable("the disk is full")

    def commit(*_args: object, **_more: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(world.store, "commit", commit)
        with pytest.raises(StoreUnavailable):
            world.ask(1, TINY)
        assert world.fatal == [error]
        assert world.cluster.calls["a-0", "deploy"] == 0
        await world.service._tasks.stop()
    world.store.close()
    world.fatal.clear()
    await world.start()
    with pytest.raises(UnknownMeasurement):
        views.measurement_state(world.service, ("default", 1))
    await world.until_wrapper(WrapperStatus.IDLE)
    await world.deployed(1)


async def test_decision_that_fails_is_fatal(world: ServiceWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in a decision may have left half of it in memory: the process is to end, and nothing is written."""
    world.expected_problems = ["a decision failed"]

    def handle(_event: Event, _now_s: float) -> None:
        raise ZeroDivisionError("boom")

    with monkeypatch.context() as broken:
        broken.setattr(world.service.allocator, "handle", handle)
        with pytest.raises(ZeroDivisionError):
            world.ask(1, TINY)
    (fatal,) = world.fatal
    assert isinstance(fatal, InternalError)
    assert "boom" in str(fatal)


async def test_watching_survives_what_nobody_foresaw(world: ServiceWorld, logs: list[Any]) -> None:
    """An error of a kind that nobody foresaw is logged with its story, and the watching goes on."""
    world.expected_problems = ["could not be"]
    world.cluster.fail("cluster", "observe", ZeroDivisionError("in observe"), WrapperUnreachable("cluster", "away"))
    world.cluster.fail("cluster", "create", TimeoutError("in create"))
    world.cluster.fail("a-0", "report", ZeroDivisionError("in report"), KeyError("again"))
    await world.until(lambda: world.cluster.calls["cluster", "observe"] > 10)
    await world.looked()
    world.cluster.join("b")
    await world.until_wrapper(WrapperStatus.IDLE, "b-0")
    await world.deployed(1)
    told = [entry for entry in logs if entry["log_level"] == "error"]
    assert {entry["event"] for entry in told} == {
        "the cluster could not be reconciled",
        "wrapper a-0 could not be looked after",
    }
    assert all(entry["exc_info"] for entry in told)


async def test_start_of_the_watching_survives_too(make: Make) -> None:
    """A wrapper whose first report is an error of a kind that nobody foresaw is asked again."""
    world = make()
    world.expected_problems = ["could not be looked after"]
    world.cluster.join("a")
    world.cluster.fail("a-0", "report", ZeroDivisionError("at first"))
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE)


async def test_watcher_that_ended_is_replaced(world: ServiceWorld) -> None:
    """A wrapper whose watcher has ended, for whatever reason, gets another one."""
    world.service._watches._watches["a-0"][1].cancel()
    await world.looked(times=3)
    assert not world.service._watches._watches["a-0"][1].done()


async def test_expiry_survives_what_nobody_foresaw(world: ServiceWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while leases are being ended does not keep later ones from ending."""
    world.expected_problems = ["leases could not be ended"]
    request_id = await world.deployed(1)
    real, failures = world.service.allocator.leases_due, [ZeroDivisionError("boom")]

    def leases_due(now_s: float) -> tuple[Lease, ...]:
        if failures:
            raise failures.pop()
        return real(now_s)

    monkeypatch.setattr(world.service.allocator, "leases_due", leases_due)
    world.wrapper().idle_for_s = 100.0
    world.clock.now_s += 100.0
    await world.until_status(request_id, Status.EXPIRED)
    assert failures == []


@pytest.mark.parametrize("method", ["deploy", "bind"])
async def test_command_that_fails_as_nobody_foresaw(world: ServiceWorld, method: str) -> None:
    """A command that ends in an error of no known kind is a failure of the wrapper, told as an internal error."""
    world.expected_problems = ["a command failed"]
    world.cluster.fail("a-0", method, ZeroDivisionError("boom"))
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: any(isinstance(event, WrapperFailed) for event in world.journal.events))
    (failed,) = [event for event in world.journal.events if isinstance(event, WrapperFailed)]
    assert failed == WrapperFailed("a-0", "internal error: ZeroDivisionError: boom")
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.cluster.calls["a-0", "restart"] == 1


async def test_stop_of_a_stale_command_is_no_failure(world: ServiceWorld) -> None:
    """A command that a newer one has overtaken fails without harm: its wrapper is not restarted."""
    gate = world.cluster.hold("a-0", "deploy")
    (first,) = world.ask(1, TINY)
    await world.until(lambda: gate.arrived)
    world.service.release(first)
    (second,) = world.ask(2, OTHER)  # takes the place of the start that nobody waits for
    gate.open()
    await world.until_status(second, Status.DEPLOYED)
    await world.looked()
    assert world.cluster.calls["a-0", "restart"] == 0
    assert world.wrapper().spec == OTHER


async def test_tokens_are_not_logged(world: ServiceWorld, logs: list[Any]) -> None:
    """No log line has a token in it, whatever happens to the lease."""
    request_id = await world.deployed(1)
    world.cluster.kill_engine("a-0")
    await world.until(lambda: world.wrapper().starts == 2)
    await world.until_status(request_id, Status.DEPLOYED)
    world.cluster.fail("a-0", "unbind", WrapperUnreachable("a-0", "no answer"))
    world.service.release(request_id)
    await world.until(lambda: world.wrapper().grant is None)
    assert len(logs) > 5
    assert LEASE_TOKEN not in repr(logs)
    assert any(entry.get("kind") == "LeaseReleased" for entry in logs)


async def test_reports_are_shown(world: ServiceWorld) -> None:
    """What a wrapper says of itself is shown with its machine."""
    await world.deployed(1)
    await world.looked()
    assert isinstance(world.service.wrapper_reports["a-0"], WrapperReport)
    (machine,) = views.machine_states(world.service)
    (wrapper,) = machine.wrappers
    assert (machine.machine, machine.alive) == ("a", True)
    assert (wrapper.wrapper, wrapper.status, wrapper.llm, wrapper.leased) == ("a-0", "leased", "org/tiny", True)
    assert wrapper.starts == 1
    assert [llm.status for llm in views.llm_states(world.service)] == ["leased"]
