"""What strangers cost a client: connections that say nothing or speak slowly, large bodies, methods that do not exist.

``python -m tests.bench.strangers [--seconds 60]``, against a real ``greenprompt up`` on this machine. The strangers are
processes of the lowest priority with addresses of their own; they stand for other machines.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import string
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.bench.control import REQUEST, Clock, cycle, registry_with_llm
from tests.bench.reads import parts_of
from tests.bench.report import OUTPUT, Result, counted, measured, percentile, publish
from tests.bench.wire import Connection
from tests.cluster.conftest import Registry

PART = "strangers"
BODIES, BODY_BYTES, BODIES_AT_ONCE = 100, 10_000_000, 10
METHODS, METHODS_AT_ONCE = 100_000, 16
REST_S = 10.0
"""How long processes have to give memory back, seconds."""

TARGETS = {
    "cycle_p99_ms_in_a_crowd": "≤ 5 x quiet",
    "rss_after_bodies_mb": "≤ 1.1 x before",
    "rss_after_methods_mb": "≤ 1.1 x before",
}

p99 = percentile(0.99)


async def cycles(url: str, llm: dict[str, Any], seconds: float) -> list[float]:
    """Milliseconds of each lease cycle of a client that connects anew for each."""
    clock, end_s = Clock(), time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        async with Connection(url) as http:
            await cycle(http, llm, clock)
    return clock.took_ms["cycle"]


async def in_a_crowd(url: str, llm: dict[str, Any], seconds: float) -> list[Result]:
    """Lease cycles without strangers, then beside 10,000 idle and 200 slow connections."""
    quiet_ms = await cycles(url, llm, seconds / 3)
    crowd = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.crowd", "slow-too", url, str(seconds), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(seconds + 120):
            assert crowd.stdout is not None
            await crowd.stdout.readline()  # all of them are there
            beside_ms = await cycles(url, llm, seconds - 5)
            told, _ = await crowd.communicate()
    finally:
        if crowd.returncode is None:
            crowd.kill()
            await crowd.wait()
    print("the crowd:", told.decode().strip())
    return [
        measured(PART, "cycle_p50_ms_quiet", quiet_ms, "ms"),
        measured(PART, "cycle_p99_ms_quiet", quiet_ms, "ms", pick=p99),
        measured(PART, "cycle_p50_ms_in_a_crowd", beside_ms, "ms", baseline=percentile(0.5)(quiet_ms)),
        measured(PART, "cycle_p99_ms_in_a_crowd", beside_ms, "ms", pick=p99, baseline=p99(quiet_ms)),
    ]


def rss_mb(processes: Iterable[psutil.Process]) -> float:
    """Memory of processes together, MB."""
    return sum(process.memory_info().rss for process in processes) / 1e6


async def remembered(name: str, registry: Registry, work: Any) -> list[Result]:
    """The memory of the servers after some work, and before it; and the statuses of its answers."""
    processes = parts_of(registry.process).values()
    before_mb = rss_mb(processes)
    statuses: Counter[int] = await work
    await asyncio.sleep(REST_S)
    print(f"{name}:", dict(statuses))
    return [counted(PART, f"rss_after_{name}_mb", rss_mb(processes), "MB", of=statuses.total(), baseline=before_mb)]


async def shared(url: str, count: int, at_once: int, calls: Iterator[tuple[str, str, bytes]]) -> Counter[int]:
    """Make calls on some connections; how many answers had each status (0: the connection was closed)."""
    statuses: Counter[int] = Counter()
    left = itertools.islice(calls, count)

    async def client() -> None:
        async with Connection(url) as http:
            for method, path, body in left:
                try:
                    status, _ = await http.call(method, path, body, {"Content-Type": "application/json"})
                except (OSError, EOFError):
                    status = 0
                statuses[status] += 1

    await asyncio.gather(*(client() for _ in range(at_once)))
    return statuses


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """POSTs that are too long."""
    while True:
        yield "POST", REQUEST, b'{"measurementId": 1, "llms": "' + b"a" * BODY_BYTES + b'"}'


def methods() -> Iterator[tuple[str, str, bytes]]:
    """Calls with random methods, of paths that exist and that do not."""
    chance = random.Random(18)
    while True:
        method = "".join(chance.choices(string.ascii_uppercase, k=chance.randint(1, 12)))
        path = chance.choice(("/", "/machines", REQUEST, f"/{chance.random()}"))
        yield method, path, b""


async def measure(registry: Registry, llm: dict[str, Any], seconds: float) -> list[Result]:
    """All figures, one after another."""
    async with Connection(registry.url) as http:
        await cycle(http, llm, Clock())  # the LLM is started
    results = await in_a_crowd(registry.url, llm, seconds)
    results += await remembered("bodies", registry, shared(registry.url, BODIES, BODIES_AT_ONCE, bodies()))
    results += await remembered("methods", registry, shared(registry.url, METHODS, METHODS_AT_ONCE, methods()))
    return results


def main(arguments: list[str]) -> int:
    """Start a registry, measure, print, write, end it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the crowd stays (default: 60)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    with registry_with_llm() as (registry, llm):
        results = asyncio.run(measure(registry, llm, chosen.seconds))
    publish(results, output=chosen.output, targets=TARGETS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
