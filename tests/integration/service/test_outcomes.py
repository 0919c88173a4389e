"""What becomes of a request when something comes while something else is going on: the table in registry/DESIGN.md."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from registry.wire.words import RequestStatus as Status
from tests.support.service_world import TINY, ServiceWorld

DESIGN = Path(__file__).resolve().parents[3] / "registry" / "DESIGN.md"

Begun = tuple[str, Callable[[], object]]
"""A request, and what lets that which is going on come to its end."""


def outcomes() -> dict[tuple[str, str], Status]:
    """The cells of the design's table, by what comes (row) and what is going on (column)."""
    _, _, rest = DESIGN.read_text(encoding="utf-8").partition("<!-- outcomes:begin -->")
    table, _, _ = rest.partition("<!-- outcomes:end -->")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    (_, *columns), _, *body = rows
    return {
        (row[0], column): Status(cell.strip("`")) for row in body for column, cell in zip(columns, row[1:], strict=True)
    }


# --- what is going on --------------------------------------------------------------------------------------


async def waits(world: ServiceWorld) -> Begun:
    holder = await world.deployed(9)
    (request_id,) = world.ask(1, TINY)
    return request_id, lambda: world.service.release(holder)


async def is_started(world: ServiceWorld) -> Begun:
    gate = world.cluster.hold("a-0", "deploy")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: gate.arrived)
    return request_id, gate.open


async def is_handed_over(world: ServiceWorld) -> Begun:
    world.service.release(await world.deployed(9))
    await world.until(lambda: world.wrapper().grant is None)
    gate = world.cluster.hold("a-0", "bind")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: gate.arrived)
    return request_id, gate.open


async def is_held(world: ServiceWorld) -> Begun:
    return await world.deployed(1), lambda: None


async def is_started_again(world: ServiceWorld) -> Begun:
    request_id = await world.deployed(1)
    gate = world.cluster.hold("a-0", "deploy")
    world.cluster.kill_engine("a-0")
    await world.until(lambda: gate.arrived)
    return request_id, gate.open


async def has_ended(world: ServiceWorld) -> Begun:
    request_id = await world.deployed(1)
    world.service.release(request_id)
    return request_id, lambda: None


GOING_ON = {
    "it waits": waits,
    "its LLM is being started": is_started,
    "it is being handed over": is_handed_over,
    "it is deployed": is_held,
    "its LLM is being started again": is_started_again,
    "it was released": has_ended,
}


# --- what comes --------------------------------------------------------------------------------------------


async def release(world: ServiceWorld, request_id: str) -> None:
    world.service.release(request_id)


async def release_twice(world: ServiceWorld, request_id: str) -> None:
    world.service.release(request_id)
    world.service.release(request_id)


async def deadline(world: ServiceWorld, _request_id: str) -> None:
    world.clock.now_s += world.settings.leases.max_s
    await world.until(lambda: world.service.allocator.leases_due(world.clock.now_s) == ())


async def wrapper_dies(world: ServiceWorld, _request_id: str) -> None:
    world.cluster.kill_process("a-0")


async def machine_goes(world: ServiceWorld, _request_id: str) -> None:
    world.cluster.leave("a")
    await world.until(lambda: not all(machine.alive for machine in world.service.allocator.machines()))
    world.cluster.wrappers.clear()
    world.cluster.join("a")


async def drain_and_undrain(world: ServiceWorld, _request_id: str) -> None:
    world.service.drain("a")
    world.service.undrain("a")


async def registry_dies(world: ServiceWorld, _request_id: str) -> None:
    await world.restart()


async def shutdown(world: ServiceWorld, _request_id: str) -> None:
    await world.service.shutdown()
    await world.restart()


async def everything_dies(world: ServiceWorld, _request_id: str) -> None:
    await world.crash()
    world.cluster.leave("a")
    world.cluster.wrappers.clear()
    world.cluster.join("a")
    world.cluster.machines["a"] = replace(world.cluster.machines["a"], node_id="node-of-the-next-cluster")
    await world.start()


COMES: dict[str, Callable[[ServiceWorld, str], Awaitable[None]]] = {
    "`DELETE`": release,
    "`DELETE`, twice": release_twice,
    "the lease's deadline": deadline,
    "the wrapper's process dies": wrapper_dies,
    "its machine goes, and comes back": machine_goes,
    "its machine is drained, and undrained": drain_and_undrain,
    "the registry actor is killed": registry_dies,
    "shutdown, and the next start": shutdown,
    "everything is killed, and the next start": everything_dies,
}


def test_the_table_is_complete() -> None:
    """The design tells the outcome of everything that can come, in everything that can be going on."""
    assert set(outcomes()) == {(comes, going_on) for comes in COMES for going_on in GOING_ON}


_SETTLED = {status for status in Status if status.ended or status is Status.DEPLOYED}


@pytest.mark.parametrize("going_on", GOING_ON)
@pytest.mark.parametrize("comes", COMES)
async def test_every_race_has_one_outcome(world: ServiceWorld, comes: str, going_on: str) -> None:
    """The request ends up as the design says: it has its LLM, or the next in line has, and nobody else."""
    expected = outcomes()[comes, going_on]
    request_id, go = await GOING_ON[going_on](world)
    (after,) = world.ask(2, TINY)
    await COMES[comes](world, request_id)
    go()
    await world.until_status(request_id, expected)
    served = after if expected.ended else request_id
    if going_on == "it was released":  # the next one has its LLM at once, so that what comes may hit that one
        await world.until(lambda: world.request(after).status in _SETTLED)
        if world.request(after).status.ended:
            (after,) = world.ask(3, TINY)
            served = after
    await world.until_status(served, Status.DEPLOYED)
    await world.until(lambda: world.wrapper().runs)
    grant = world.wrapper().grant
    assert grant is not None
    assert grant.request_id == served
    world.service.release(served)
    if served != after:
        await world.until_status(after, Status.DEPLOYED)
    assert world.request(request_id).status is (expected if expected.ended else Status.RELEASED)
