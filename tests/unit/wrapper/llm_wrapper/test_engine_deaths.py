"""Engines that die, and what they leave."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments.engine import rest as engine_rest
from deployments.engine.order import StopOutcome
from deployments.wrapper.commands import WrapperCommands
from registry.errors import EngineNotReady, WrapperUnreachable
from tests.support.fake_cluster import UNTOLD
from tests.support.llm_wrapper import FIRST, OTHER_SPEC, SECOND, SPEC, Make


@pytest.mark.parametrize("left", [StopOutcome(), StopOutcome(leftover=(7,))], ids=["nothing", "a process"])
async def test_death_of_the_engine_is_reported(make: Make, left: StopOutcome) -> None:
    """An engine that dies or hangs ends its prompts with the reason, and the next report says it, too."""
    client = await make(finish=False)
    host: Any = client.wrapper._host
    host.left = left
    assert (await client.wrapper.report(UNTOLD)).unfinished == 0
    prompt = await client.begin("token-1")
    client.engine.die("it has not answered for 6 s")
    answer = await prompt
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_not_ready")
    assert "it has not answered for 6 s" in answer.json()["message"]
    assert client.wrapper._commands._death_watch is not None
    await asyncio.wait({client.wrapper._commands._death_watch})
    report = await client.wrapper.report(UNTOLD)
    assert report.died == "; ".join(filter(None, ["it has not answered for 6 s", left.problem]))
    assert (report.running, report.unfinished, report.bound) == (None, None, "request-1")
    late = await client.prompt("token-1")
    assert report.died in late.json()["message"]


async def test_an_llm_whose_death_watch_fails_is_not_trusted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported as dead, so that the registry restarts it; the report says why."""
    client = await make(finish=False)

    async def fails(*_: object) -> None:
        raise AttributeError("no died")

    monkeypatch.setattr(WrapperCommands, "_notice_death", fails)
    await client.wrapper.deploy(3, OTHER_SPEC, None)
    await asyncio.sleep(0.01)
    report = await client.wrapper.report(UNTOLD)
    assert (report.running, report.died) == (None, "its death watch failed: AttributeError: no died")


@pytest.mark.parametrize(("out_of_memory", "flags"), [(True, ("engine_out_of_memory",)), (False, ())])
async def test_an_engine_that_the_kernel_ended_for_memory_is_flagged(
    make: Make, out_of_memory: bool, flags: tuple[str, ...]
) -> None:
    """The report says what the measurement is flagged with, and no more of it once an LLM runs again."""
    client = await make(finish=False)
    client.engine.out_of_memory = out_of_memory
    client.engine.die("main memory ran out")
    assert client.wrapper._commands._death_watch is not None
    await asyncio.wait({client.wrapper._commands._death_watch})
    assert (await client.wrapper.report(UNTOLD)).death_flags == flags
    await client.wrapper.deploy(3, SPEC, FIRST)
    assert (await client.wrapper.report(UNTOLD)).death_flags == ()


async def test_an_engine_that_a_lease_leaves_at_work_is_ended_before_the_next_has_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next lease is not handed over, with the reason; after a new start it is."""
    monkeypatch.setattr(engine_rest, "REST_LIMIT_S", 0.01)
    client = await make(finish=False)
    engine = client.engine
    working = {engine}
    monkeypatch.setattr(client.wrapper._rest, "_is_working", lambda _: client.engine in working)
    monkeypatch.setattr(client.wrapper._rest, "_tells", True)
    await client.wrapper.unbind(3, "request-1", "released")
    with pytest.raises(EngineNotReady, match=r"it still worked 0\.01 s after the end of a lease"):
        await client.bind(4, SECOND)
    assert client.wrapper._gate.grant is None
    assert engine.forgot == 1  # for the first lease
    assert client.wrapper._commands._death_watch is not None
    await asyncio.wait({client.wrapper._commands._death_watch})
    assert "still worked" in str((await client.wrapper.report(UNTOLD)).died)
    await client.wrapper.deploy(5, SPEC, None)
    await client.bind(6, SECOND)
    assert (await client.prompt("token-2")).status_code == 200


async def test_an_engine_that_a_lease_leaves_at_work_does_not_sleep(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asleep it would go on working beside the leases of others, and be handed over like that when it wakes."""
    monkeypatch.setattr(engine_rest, "REST_LIMIT_S", 0.01)
    client = await make(finish=False)
    engine, host = client.engine, client.wrapper._host
    vacate, ended = host.vacate, list[bool]()

    async def vacate_seen(*, wanted_next: str) -> StopOutcome:
        ended.append(engine.died.is_set())
        return await vacate(wanted_next=wanted_next)

    monkeypatch.setattr(host, "vacate", vacate_seen)
    monkeypatch.setattr(client.wrapper._rest, "_is_working", lambda _: client.engine is engine)
    monkeypatch.setattr(client.wrapper._rest, "_tells", True)
    await client.wrapper.unbind(3, "request-1", "released")
    await client.wrapper.deploy(4, OTHER_SPEC, None)
    assert ended == [True]
    report = await client.wrapper.report(UNTOLD)
    assert (report.running, report.died) == (OTHER_SPEC.fingerprint, None)


async def test_a_process_that_a_lease_leaves_at_work_serves_no_lease(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No LLM is started in it, Serve's check fails so that it is replaced, and the registry hears why."""
    monkeypatch.setattr(engine_rest, "REST_LIMIT_S", 0.01)
    client = await make(finish=False)
    rest = client.wrapper._rest
    monkeypatch.setattr(rest, "_is_working_here", lambda: True)
    monkeypatch.setattr(rest, "_tells_here", True)
    monkeypatch.setattr(client.wrapper._meter.meter, "check", lambda: None)
    client.wrapper.check_health()
    await client.wrapper.unbind(3, "request-1", "released")
    busy = r"the wrapper's process still worked 0\.01 s after the end of a lease"
    with pytest.raises(EngineNotReady, match=busy):
        await client.bind(4, SECOND)
    with pytest.raises(WrapperUnreachable, match=busy):
        await client.wrapper.deploy(5, OTHER_SPEC, None)
    with pytest.raises(EngineNotReady, match=busy):
        client.wrapper.check_health()


async def test_death_of_an_llm_that_is_being_replaced(make: Make) -> None:
    """An LLM that dies while it finishes its prompts for the next one is none of the next one's business."""
    client = await make(finish=True)
    prompt, deploy = await client.replace_while_it_answers()
    client.engine.die("killed")
    assert (await prompt).status_code == 410
    await deploy
    report = await client.wrapper.report(UNTOLD)
    assert (report.running, report.died) == (OTHER_SPEC.fingerprint, None)


async def test_what_an_engine_leaves_makes_its_wrapper_unusable(make: Make) -> None:
    """As long as something of an engine is left, commands fail as if the wrapper were gone: it has to be replaced."""
    client = await make(finish=False)
    host: Any = client.wrapper._host
    host.left = StopOutcome(gpu_excess_bytes={"GPU-1": 2**30})
    with pytest.raises(WrapperUnreachable, match="GPU-1 holds 1024 MiB too much"):
        await client.wrapper.stop(3)
    with pytest.raises(WrapperUnreachable, match="GPU-1 holds 1024 MiB too much"):
        await client.wrapper.deploy(4, SPEC, None)
    host.left = StopOutcome()
    await client.wrapper.deploy(5, SPEC, None)
    assert (await client.wrapper.report(UNTOLD)).running == SPEC.fingerprint
