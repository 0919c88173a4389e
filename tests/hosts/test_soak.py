"""Half an hour of leases while something breaks every 20 s: `make soak`."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from tests.bench.control import REQUEST
from tests.bench.kills import Client, Lease, Seen
from tests.bench.wire import Connection
from tests.hosts.conftest import READY_LIMIT_S, Cluster, llmconfig, start_databases
from tests.hosts.hosts import Host

pytestmark = [pytest.mark.hosts, pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(5400)]

SOAK_S = float(os.environ.get("SOAK_S", "1800"))
SEED = int(os.environ.get("SOAK_SEED", str(time.time_ns() % 1_000_000)))
CLIENTS, FAULT_PERIOD_S, BROKEN_S = 16, 20.0, 8.0
AFTER_S = 300.0
"""How long clients may take to finish when nothing breaks any more."""
GROWTH = 1.25
"""At most so much more memory and files than before the first fault, on any host; both are read when all is quiet."""


class Told(Client):
    """A client for whom a lease that it was given may end by a fault, if it is told so."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.told: list[str] = []

    def _ended(self, lease: Lease, state: dict[str, Any]) -> None:
        if state["status"] == "failed" and state["reason"] and state["deployedAt"]:
            self.told.append(f"{lease.request_id}: {state['reason']}")
        else:
            super()._ended(lease, state)

    async def _refused(self, lease: Lease, answer: str) -> None:
        status, text = await self._answered("GET", f"{REQUEST}/{lease.request_id}")
        if status == HTTPStatus.OK and b'"failed"' in text:
            self.told.append(f"{lease.request_id}: {answer}")
        else:
            await super()._refused(lease, f"{answer}, but {text!r}")


Fault = Callable[[Cluster, Host], Awaitable[None]]


def killed(part: str, *, on_head: bool = False) -> Fault:
    """SIGKILL for what has this part in its command line, if it is there."""

    async def act(cluster: Cluster, victim: Host) -> None:
        host = cluster.head if on_head else victim
        for pid in host.pids(part):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has just ended by itself

    return act


def for_a_while(breaks: Callable[[Host], None]) -> Fault:
    """Something about a machine's cable."""

    async def act(_cluster: Cluster, victim: Host) -> None:
        breaks(victim)
        await asyncio.sleep(BROKEN_S)
        victim.heal()

    return act


def restarted(part: str) -> Fault:
    """One of the databases, killed and started again."""

    async def act(cluster: Cluster, _victim: Host) -> None:
        database = cluster.net.host("db")
        for pid in database.pids(part):
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(2)
        await asyncio.to_thread(start_databases, database)

    return act


async def without_power(_cluster: Cluster, victim: Host) -> None:
    """A machine, off and on; the launcher starts Ray on it again."""
    await asyncio.to_thread(victim.power_off)
    await asyncio.sleep(2)
    await asyncio.to_thread(victim.boot)


FAULTS: dict[str, Fault] = {
    "registry actor killed": killed("ray::RegistryActor", on_head=True),
    "Serve controller killed": killed("ray::ServeController", on_head=True),
    "ingress killed": killed("ray::ServeReplica:registry", on_head=True),
    "HAProxy of the head killed": killed("bin/haproxy", on_head=True),
    "wrapper replica killed": killed("ray::ServeReplica:wrapper"),
    "engines killed": killed("multiprocessing.forkserver"),
    "raylet killed": killed("raylet/raylet"),
    "machine without power": without_power,
    "machine cut off": for_a_while(Host.cut),
    "nothing reaches a machine": for_a_while(lambda host: host.deaf("input")),
    "nothing comes from a machine": for_a_while(lambda host: host.deaf("output")),
    "slow network": for_a_while(lambda host: host.throttle(512)),
    "lossy network": for_a_while(lambda host: host.lose(10)),
    "PostgreSQL restarted": restarted("bin/postgres -D"),
}


Holdings = dict[str, Counter[str]]
"""By host: what its processes take up, by their names."""


def holdings(cluster: Cluster) -> tuple[Holdings, Holdings]:
    """Memory (PSS, bytes) and open files."""
    memory: Holdings = defaultdict(Counter)
    files: Holdings = defaultdict(Counter)
    for host in (cluster.head, *(cluster.net.host(name) for name in cluster.workers)):
        for pid, line in host.processes().items():
            process, name = psutil.Process(pid), named(line)
            memory[host.name][name] += process.memory_full_info().pss
            files[host.name][name] += process.num_fds()
    return memory, files


def named(line: str) -> str:
    """What a process is called, from its command line: Ray's own name for it, else its program's or script's."""
    words = [word for word in line.split() if not word.startswith("-")]
    scripts = [word for word in words if word.endswith(".py")]
    return line.partition(".")[0] if line.startswith("ray::") else Path((scripts or words)[0]).name


def grown(before: tuple[Holdings, Holdings], after: tuple[Holdings, Holdings]) -> list[str]:
    """What takes up more than GROWTH times of before, in words."""
    return [
        f"{unit} of {host}: {then[host].total()} before, {now[host].total()} after"
        for unit, then, now in zip(("bytes", "files"), before, after, strict=True)
        for host in now
        if now[host].total() > GROWTH * then[host].total()
    ]


async def storm(cluster: Cluster, seen: Seen) -> list[str]:
    """Clients and faults for SOAK_S seconds; what clients were told."""
    random, begun_s, numbers = Random(SEED), time.monotonic(), itertools.count(time.time_ns())
    llms = [llmconfig("a"), llmconfig("b")]
    told: list[str] = []

    async def client(own: Random) -> None:
        async with Connection(cluster.url) as http:
            one = Told(http, llms, seen, own)
            one.told = told
            while time.monotonic() < begun_s + SOAK_S:
                await one.cycle(next(numbers))

    async def faults() -> None:
        while time.monotonic() < begun_s + SOAK_S:
            await asyncio.sleep(FAULT_PERIOD_S)
            name = random.choice(list(FAULTS))
            victim = cluster.net.host(random.choice(cluster.workers))
            print(f"{time.monotonic() - begun_s:.0f} s, {len(seen.leases)} leases: {name} ({victim.name})", flush=True)
            await FAULTS[name](cluster, victim)

    breaking = asyncio.create_task(faults())
    working = [asyncio.create_task(client(Random(random.random()))) for _ in range(CLIENTS)]
    try:
        # The first client or fault that fails ends it all: without clients faults prove nothing.
        async with asyncio.timeout(SOAK_S + AFTER_S):
            await asyncio.gather(breaking, *working)
    finally:
        for task in (breaking, *working):
            task.cancel()
    return told


def test_soak(cluster: Cluster) -> None:
    """Nothing accepted is lost, nothing is leased twice, and nothing grows."""
    print(f"seed {SEED}")
    cluster.until_ready(*cluster.workers)
    warm = [cluster.until(cluster.post(time.time_ns(), "a")[0], "deployed") for _ in cluster.workers]
    for lease in warm:
        cluster.release(lease["requestId"])
    before, seen = holdings(cluster), Seen()
    told = asyncio.run(storm(cluster, seen))
    cluster.until_ready(*cluster.workers, limit_s=2 * READY_LIMIT_S)
    for request_id in seen.accepted:
        state = cluster.state(request_id)
        assert state["endedAt"] is not None, state
    after = holdings(cluster)
    print(f"{len(seen.accepted)} requests, {len(seen.leases)} leases, {len(told)} told of their end by a fault")
    for unit, then, now in zip(("bytes", "files"), before, after, strict=True):
        for host in now:
            more = dict((now[host] - then[host]).most_common(5))
            print(f"{unit} of {host}: {then[host].total()} before, {now[host].total()} after; most grown: {more}")
    assert seen.lost == []
    assert seen.double_grants == []
    assert seen.refused_prompts == []
    assert grown(before, after) == []
