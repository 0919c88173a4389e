"""Leases of a wrapper that does not hear from the registry, or hears something else."""

from __future__ import annotations

import asyncio

import pytest

from registry.contract.messages import Belief
from tests.support.fake_counters import ManualClock
from tests.support.llm_wrapper import SECOND, Make


async def test_a_wrapper_that_hears_nothing_takes_no_new_prompts(make: Make) -> None:
    """Its registry may have ended the lease: new prompts answer 503 until it is heard, those in flight go on."""
    clock = ManualClock()
    client = await make(finish=False, clock=clock)
    heard = client.wrapper._gate.moment
    running = await client.begin("token-1")
    clock.now_s += 30.0
    refused, status = await client.prompt("token-1"), await client.status("token-1")
    assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (503, "registry_unheard", True)
    assert refused.headers["retry-after"] == "1"
    assert "has not heard from the registry for 30 s" in refused.json()["message"]
    assert (status.json()["message"], status.json()["detail"]) == ("not ready", refused.json()["message"])
    client.engine.go.set()
    assert (await running).status_code == 200
    await client.wrapper.report(Belief(2, "request-1", heard))  # it has been on its way for long
    assert (await client.prompt("token-1")).status_code == 503
    await client.wrapper.report(Belief(2, "request-1", client.wrapper._gate.moment))
    assert (await client.prompt("token-1")).status_code == 200
    assert (await client.status("token-1")).json()["message"] == "ready"


@pytest.mark.parametrize("believed", [None, "request-2"])
async def test_a_lease_that_the_registry_does_not_know_ends(make: Make, believed: str | None) -> None:
    """A machine that was given up and is heard of again serves its old lease to nobody, whatever comes afterwards."""
    client = await make(finish=True)
    before = client.wrapper._gate.moment
    prompt = await client.begin("token-1")
    report = await client.wrapper.report(Belief(2, believed, before))
    assert report.bound is None
    for answer in (await prompt, await client.prompt("token-1")):
        assert (answer.status_code, answer.json()["code"]) == (410, "lease_ended")
        assert "withdrawn" in answer.json()["message"]
    await client.wrapper.report(Belief(2, "request-1", client.wrapper._gate.moment))
    assert (await client.prompt("token-1")).status_code == 410


async def test_the_end_of_a_lease_is_its_commands_to_tell(make: Make) -> None:
    """A report that overtakes the command which ends a lease shuts the gate; how it ended the command says."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.report(Belief(3, None, client.wrapper._gate.moment))
    assert (await client.prompt("token-1")).json()["code"] == "registry_unheard"
    await client.wrapper.unbind(3, "request-1", "expired")
    assert "expired" in (await client.prompt("token-1")).json()["message"]
    client.engine.go.set()
    assert (await prompt).status_code == 200


async def test_an_older_word_counts_for_nothing(make: Make) -> None:
    """A report that was asked for before a command, and comes after it, neither ends a lease nor vouches for one."""
    clock = ManualClock()
    client = await make(finish=False, clock=clock)
    clock.now_s += 29.0
    await client.wrapper.report(Belief(1, None, client.wrapper._gate.moment))
    assert (await client.prompt("token-1")).status_code == 200
    await client.wrapper.report(Belief(1, "request-1", client.wrapper._gate.moment))
    clock.now_s += 1.0
    assert (await client.prompt("token-1")).json()["code"] == "registry_unheard"


async def test_a_lease_that_waits_to_be_bound_is_heard_of(make: Make) -> None:
    """The next lease may wait for the last prompt of the one before for longer than the fence: it is open at once."""
    clock = ManualClock()
    client = await make(finish=True, clock=clock)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    bind = asyncio.create_task(client.bind(4, SECOND))
    await asyncio.wait({bind}, timeout=0)
    clock.now_s += 31.0
    report = await client.wrapper.report(Belief(4, "request-2", client.wrapper._gate.moment))
    assert report.epoch == 4
    client.engine.go.set()
    assert (await prompt).status_code == 200
    await bind
    assert (await client.prompt("token-2")).status_code == 200
