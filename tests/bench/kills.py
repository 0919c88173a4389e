"""Leases while the registry's process is killed again and again: nothing lost, granted twice, or left behind.

``python -m tests.bench.kills [--kills 200] [--cycles 2000] [--clients 16] [--seed N] [--limit-s 2400]``. A real
``greenprompt up`` with two wrappers; clients ask over HTTP, wait, prompt now and then, give back, and ask again where
they got no answer, as every client should. What they saw is judged, not what the registry says of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import psutil

from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.bench.control import REQUEST, llmconfig
from tests.bench.report import OUTPUT, Result, counted, measured, publish
from tests.bench.wire import Connection
from tests.cluster.conftest import Registry, start, stop

PART = "kills"
WRAPPERS = 2

PROMPT_SHARE, OTHER_LLM_SHARE, ASK_TWICE_SHARE = 0.1, 0.02, 0.1
"""How many leases are prompted, want an LLM that has to be started, and are asked for again after the answer."""
AGAIN_SHARE = 0.1
"""How many kills hit a registry that is just coming back, rather than one that hands out leases."""

CALL_LIMIT_S, PAUSE_S, LONG_POLL_S = 60.0, 0.05, 10
QUIET_LIMIT_S = 60.0
"""How long the last leases, and each old address, may take to end."""


@dataclass
class Lease:
    """What a client saw of one lease: it certainly held from ``seen_s`` to ``until_s``, UTC seconds.

    ``granted_s`` is when the registry says that it was handed over.
    """

    request_id: str
    wrapper: str = ""
    granted_s: float = 0.0
    seen_s: float = 0.0
    until_s: float = 0.0


@dataclass
class Seen:
    """All that the clients saw, and when the registry was killed."""

    accepted: list[str] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    kills_s: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused_prompts: list[str] = field(default_factory=list)
    open_addresses: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    took_s: float = 0.0
    granted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def double_grants(self) -> list[str]:
        """Leases of one wrapper that held at the same time."""
        by_wrapper: dict[str, list[Lease]] = defaultdict(list)
        for lease in self.leases:
            by_wrapper[lease.wrapper].append(lease)
        found = []
        for leases in by_wrapper.values():
            leases.sort(key=lambda lease: lease.seen_s)
            holder = leases[0]
            for lease in leases[1:]:
                if lease.seen_s < holder.until_s:
                    found.append(f"{lease} while {holder}")
                holder = max(holder, lease, key=lambda lease: lease.until_s)
        return found + self.open_addresses

    @property
    def kill_to_next_grant_s(self) -> list[float]:
        """From each kill until a client saw the first lease that was granted after it, seconds.

        Of several kills without a grant in between only the last counts.
        """
        moments = [(kill_s, 0.0) for kill_s in self.kills_s] + [(it.granted_s, it.seen_s) for it in self.leases]
        return [
            seen_s - kill_s
            for (kill_s, none_s), (_, seen_s) in itertools.pairwise(sorted(moments))
            if seen_s and not none_s
        ]

    @property
    def faults(self) -> list[str]:
        """Everything that must not be."""
        return self.lost + self.double_grants + self.orphans + self.refused_prompts


class Client:
    """One Prompting Service. Calls that get no answer, or a 503, are made again until they get one."""

    def __init__(self, http: Connection, llms: Sequence[dict[str, Any]], seen: Seen, random: Random) -> None:
        self._http = http
        self._llms = llms
        self._seen = seen
        self._random = random

    async def cycle(self, number: int) -> None:
        """Ask, wait, perhaps prompt, give back, and look whether the address is closed."""
        llm = self._llms[1 if self._random.random() < OTHER_LLM_SHARE else 0]
        lease = Lease(await self._ask(number, llm))
        self._seen.accepted.append(lease.request_id)
        address = await self._granted(lease)
        if address is None:
            return
        path = urlsplit(address).path
        lease.wrapper = path.rpartition("/")[0]
        lease.until_s = lease.seen_s
        self._seen.leases.append(lease)
        self._seen.granted.set()
        if self._random.random() < PROMPT_SHARE:
            status, answer = await self._answered("POST", f"{path}/process_prompt", {"question": "Still there?"})
            if status != HTTPStatus.OK:
                await self._refused(lease, f"{status} {answer!r}")
        lease.until_s = time.time()
        status, answer = await self._answered("DELETE", f"{REQUEST}/{lease.request_id}")
        if status != HTTPStatus.NO_CONTENT:
            self._seen.lost.append(f"{lease}: released, answered {status} {answer!r}")
        await self._closed(path, lease)

    async def _ask(self, number: int, llm: dict[str, Any]) -> str:
        """Accepted under one Idempotency-Key, however often it had to be asked; its request id."""
        body = {"measurementId": number, "llms": [llm]}
        first = await self._id(body, f"kills-{number}")
        if self._random.random() < ASK_TWICE_SHARE and (again := await self._id(body, f"kills-{number}")) != first:
            self._seen.lost.append(f"{first}: asked again with the same key it became {again}")
        return first

    async def _id(self, body: dict[str, Any], key: str) -> str:
        status, answer = await self._answered("POST", REQUEST, body, {"idempotency-key": key})
        if status != HTTPStatus.CREATED:
            raise RuntimeError(f"not accepted: {status} {answer!r}")
        request_id: str = json.loads(answer)["requests"][0]["requestId"]
        return request_id

    async def _granted(self, lease: Lease) -> str | None:
        """The address, as soon as the LLM is ours; None when the request was lost."""
        query = ""
        while True:
            status, answer = await self._answered("GET", f"{REQUEST}/{lease.request_id}{query}")
            if status != HTTPStatus.OK:
                self._seen.lost.append(f"{lease}: {status} {answer!r}")
                return None
            state = json.loads(answer)
            if state["status"] == "deployed":
                lease.seen_s = time.time()
                lease.granted_s = datetime.fromisoformat(state["deployedAt"]).timestamp()
                return str(state["url"])
            if state["endedAt"] is not None:
                self._ended(lease, state)
                return None
            query = f"?wait={LONG_POLL_S}&seen={state['status']}"

    def _ended(self, lease: Lease, state: dict[str, Any]) -> None:
        """The request ended before it was handed over, which here nothing should make it do."""
        self._seen.lost.append(f"{lease}: ended before it was handed over: {state}")

    async def _refused(self, lease: Lease, answer: str) -> None:
        """A prompt of a lease that holds was refused, which nothing here is a reason for."""
        self._seen.refused_prompts.append(f"{lease}: {answer}")

    async def _closed(self, path: str, lease: Lease) -> None:
        """Wait until the old address answers no more; every 200 means that the lease still held."""
        give_up_s = time.monotonic() + QUIET_LIMIT_S
        while time.monotonic() < give_up_s:
            asked_s = time.time()
            status, _ = await self._answered("GET", f"{path}/get_status")
            if status != HTTPStatus.OK:
                return
            lease.until_s = asked_s
            await asyncio.sleep(PAUSE_S)
        self._seen.open_addresses.append(f"{lease}: its address is open {QUIET_LIMIT_S:g} s after it was released")

    async def _answered(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        content = b"" if body is None else json.dumps(body).encode()
        while True:
            try:
                async with asyncio.timeout(CALL_LIMIT_S):
                    status, answer = await self._http.call(method, path, content, headers)
                if status != HTTPStatus.SERVICE_UNAVAILABLE:
                    return status, answer
            except (OSError, EOFError):
                pass  # nobody answered: as good as a 503
            await asyncio.sleep(PAUSE_S)


async def storm(
    registry: Registry,
    llms: Sequence[dict[str, Any]],
    *,
    kills: int,
    cycles: int,
    clients: int,
    seed: int,
    limit_s: float,
    say: Callable[[str], object] = print,
) -> Seen:
    """Kill the registry at random moments while clients hold their leases; what they saw.

    ``llms``: the one that nearly everybody wants, and another. ``kills`` is at most ``cycles`` less ``clients``. After
    ``limit_s`` seconds no cycle and no kill begins any more; a client that is not through soon after has lost its
    request.
    """
    random, seen, begun_s = Random(seed), Seen(), time.monotonic()
    numbers = itertools.count(time.time_ns())
    left = iter(range(cycles))

    def in_time() -> bool:
        return time.monotonic() < begun_s + limit_s

    async def client(own: Random) -> None:
        async with Connection(registry.url) as http:
            one = Client(http, llms, seen, own)
            while in_time() and next(left, None) is not None:
                await one.cycle(next(numbers))

    async def killer() -> None:
        for granted in sorted(random.sample(range(clients, cycles), kills)):  # the LLMs are warm by then
            if seen.kills_s and random.random() < AGAIN_SHARE:
                await asyncio.sleep(random.uniform(0, 3))
            else:
                while len(seen.leases) < granted:
                    seen.granted.clear()
                    await seen.granted.wait()
                await asyncio.sleep(random.uniform(0, 0.1))
            await kill(registry, seen)
            if len(seen.kills_s) % 10 == 0:
                say(f"{len(seen.kills_s)} kills, {len(seen.leases)} leases, {time.monotonic() - begun_s:.0f} s")

    killing = asyncio.create_task(killer())
    working = [asyncio.create_task(client(Random(random.random()))) for _ in range(clients)]
    await asyncio.wait(working, timeout=limit_s + 2 * QUIET_LIMIT_S)
    for task in (killing, *working):
        task.cancel()
    for ended in await asyncio.gather(killing, *working, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    seen.took_s = time.monotonic() - begun_s
    await judge(registry, seen)
    return seen


async def kill(registry: Registry, seen: Seen) -> None:
    """SIGKILL for the registry actor's process, as soon as there is one."""
    while True:
        found = [process for process in registry.processes() if is_actor(process)]
        if found:
            seen.kills_s.append(time.time())
            found[0].kill()
            return
        await asyncio.sleep(PAUSE_S)


def is_actor(process: psutil.Process) -> bool:
    """Whether this is the living process of the registry actor."""
    try:
        return process.name().startswith("ray::Registry") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def judge(registry: Registry, seen: Seen) -> None:
    """Every accepted request has been released, and every wrapper is free."""
    ended = {lease.request_id for lease in seen.leases}
    for request_id in seen.accepted:
        state = await asyncio.to_thread(registry.get, request_id)
        if state["status"] != "released":
            what = "is" if request_id in ended else "was never handed over, and is"
            seen.lost.append(f"{request_id} {what} {state['status']}: {state['reason']}")
    give_up_s = time.monotonic() + QUIET_LIMIT_S
    while True:
        wrappers = [
            wrapper for machine in await asyncio.to_thread(registry.machines) for wrapper in machine["wrappers"]
        ]
        busy = [str(w) for w in wrappers if w["leased"] or w["status"] not in ("idle", "ready")]
        if not busy or time.monotonic() > give_up_s:
            seen.orphans += busy
            return
        await asyncio.sleep(0.5)


def results_of(seen: Seen) -> list[Result]:
    """The figures."""
    n, kills = len(seen.accepted), len(seen.kills_s)
    back_s = seen.kill_to_next_grant_s
    return [
        counted(PART, "requests_lost", len(seen.lost), "1", of=n),
        counted(PART, "double_grants", len(seen.double_grants), "1", of=len(seen.leases)),
        counted(PART, "orphaned_leases", len(seen.orphans), "1", of=len(seen.leases)),
        counted(PART, "prompts_refused", len(seen.refused_prompts), "1", of=len(seen.leases)),
        measured(PART, "kill_to_next_grant_p50_s", back_s, "s", pick=statistics.median),
        measured(PART, "kill_to_next_grant_max_s", back_s, "s", pick=max),
        counted(PART, "kills", kills, "1", of=kills),
        counted(PART, "lease_cycles_per_s_under_kills", len(seen.leases) / seen.took_s, "1/s", of=len(seen.leases)),
    ]


def main(arguments: list[str]) -> int:
    """Run it, print, write; 1 if anything was lost, granted twice or left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--cycles", type=int, default=2000, help="leases of all clients together (default: 2000)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--limit-s", type=float, default=2400.0, help="begin no cycle after that long (default: 2400)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gprompt-bench-") as scratch:
        folder = Path(scratch)
        llms = [llmconfig(make_tiny_llm(folder / "llms" / name, seed=seed)) for seed, name in enumerate("ab")]
        registry = start(folder, wrappers={"per_machine": WRAPPERS})
        try:
            seen = asyncio.run(
                storm(
                    registry,
                    llms,
                    kills=chosen.kills,
                    cycles=chosen.cycles,
                    clients=chosen.clients,
                    seed=chosen.seed,
                    limit_s=chosen.limit_s,
                    say=lambda line: print(line, flush=True),
                )
            )
        finally:
            stop(registry)
    zero = dict.fromkeys(("requests_lost", "double_grants", "orphaned_leases", "prompts_refused"), "0")
    publish(results_of(seen), output=chosen.output, targets=zero | {"kill_to_next_grant_max_s": "≤ 5"})
    for fault in seen.faults:
        print(fault)
    if len(seen.kills_s) < chosen.kills or len(seen.leases) < chosen.cycles:
        print(f"not done within {chosen.limit_s:g} s: {len(seen.kills_s)} kills, {len(seen.leases)} cycles")
    return 1 if seen.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
