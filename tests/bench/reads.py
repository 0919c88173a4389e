"""What reads, forgetting and crowds cost everybody else: how long the registry's one thread is held, and a real one.

``python -m tests.bench.reads [--in-process | --cluster]``. In process: the service over SQLite, without Ray, beside a
task that wants its turn every 2 ms and notes how late it gets it. On a cluster: a real ``greenprompt up``, whose
``/healthz`` is asked again and again, beside prompts, while thousands of clients hang up or sit on idle connections.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection as ConnectionOf
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psutil
import structlog

from deployments.serve.energy_pages import EnergyPages
from registry.accounting.windows import KeptWindow
from registry.contract.messages import Cluster, Observation
from registry.core.decision import Changes
from registry.core.events import Event, MachineJoined, MachineLost, NewRequest, WrapperAdded, WrapperStarted
from registry.core.records import LLMSpec, Machine, Measurement, MeasurementKey, Request
from registry.errors import RegistryError
from registry.service import views
from registry.service.accounts import Accounts
from registry.service.lease_tokens import LeaseTokens
from registry.service.service import Service
from registry.settings import Settings, TenantBudget
from registry.store.rows import EventRow
from registry.store.store import Store
from registry.wire.words import RequestStatus
from tests.bench.control import registry_with_llm
from tests.bench.report import OUTPUT, Result, counted, measured, percentile, publish
from tests.bench.wire import Connection
from tests.support.energy_windows import record

PART = "reads"
NOW_S = 1_800_000_000.0
DAY_S = 86_400.0
LLMS, TENANTS, ENDED, WINDOWS, MACHINES = 15_000, 10_000, 100_000, 500_000, 1_000
REPORTED = 50_000
IDLE_S = 20.0
"""How long the crowd of idle connections stays, seconds."""
SPEC = LLMSpec("org/tiny", "text-generation")
TARGETS = {
    "page_of_15000_ms": "≤ 50",
    "place_of_10000_ms": "≤ 1",
    "held_by_report_p99_ms": "≤ 50",
    "budget_of_50000_ms": "≤ 1",
    "held_by_forgetting_p99_ms": "≤ 50",
    "held_by_lost_machines_p99_ms": "≤ 50",
    "healthz_p99_ms.hang_ups": "≤ 50",
    "healthz_p99_ms.idle": "≤ 50",
}
p99 = percentile(0.99)


class Nothing:
    """A cluster without machines, in which commands never end."""

    async def observe(self) -> Observation:
        return Observation((), frozenset())

    async def remove(self, _wrapper_ids: Sequence[str]) -> None:
        return None

    async def deploy(self, *_: object) -> None:
        await asyncio.Event().wait()

    async def report(self, *_: object) -> None:
        await asyncio.Event().wait()


def service_over(store: Store) -> Service:
    """A service that is not started."""

    def fatal(error: RegistryError) -> None:
        raise error

    settings = Settings()
    tokens = iter(range(10**9))
    return Service(
        settings,
        store,
        cast("Cluster", Nothing()),
        now_s=lambda: NOW_S,
        tokens=LeaseTokens(b"a key", lambda: f"token-{next(tokens)}"),
        homes={},
        on_fatal=fatal,
    )


@contextlib.asynccontextmanager
async def beside(late_ms: list[float]) -> AsyncIterator[None]:
    """Want a turn every 2 ms, and note how late it comes, ms."""

    async def beat() -> None:
        while True:
            due_s = time.perf_counter() + 0.002
            await asyncio.sleep(0.002)
            late_ms.append(1000 * (time.perf_counter() - due_s))

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        await asyncio.sleep(0.004)
        task.cancel()


def held(name: str, late_ms: list[float]) -> list[Result]:
    return [measured(PART, f"held_by_{name}_p99_ms", late_ms, "ms", pick=p99)]


def took_ms(repeat: int, work: Any) -> list[float]:
    times = []
    for _ in range(repeat):
        begun_s = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - begun_s))
    return times


# --- in process -------------------------------------------------------------------------------------------------


def pages(store: Store) -> list[Result]:
    """A measurement of many LLMs, and the status of one of many tenants' requests."""
    service = service_over(store)
    for first in range(0, LLMS, 1000):
        new = [NewRequest(f"l{n}", SPEC, "{}") for n in range(first, min(first + 1000, LLMS))]
        service.request(1, new)
    for n in range(TENANTS):
        service.request(1, [NewRequest(f"t{n}", SPEC, "{}")], tenant=f"tenant-{n}")
    key = "default", 1
    middle = service.archive.requests_of(key, limit=LLMS // 2)[-1].seq
    last = service.known(f"t{TENANTS - 1}")
    return [
        measured(PART, "page_of_15000_ms", took_ms(20, lambda: views.measurement_state(service, key)), "ms"),
        measured(
            PART,
            "page_in_the_middle_ms",
            took_ms(20, lambda: views.measurement_state(service, key, after_seq=middle)),
            "ms",
        ),
        measured(PART, "place_of_10000_ms", took_ms(100, lambda: views.request_state(service, last)), "ms"),
    ]


def fill(store: Store) -> None:
    """What has ended long ago: requests of many measurements, their events, and their windows."""
    old_s = NOW_S - 100 * DAY_S
    for first in range(0, ENDED, 5000):
        numbers = range(first, first + 5000)
        ended = [
            Request(f"o{n}", n, n, SPEC, "{}", RequestStatus.RELEASED, created_s=old_s, deployed_s=old_s, ended_s=old_s)
            for n in numbers
        ]
        store.commit(
            Changes(measurements=tuple(Measurement(n, n) for n in numbers), requests=tuple(ended)),
            events=[EventRow("LeaseReleased", old_s, request_id=f"o{n}") for n in numbers],
        )
        some = [
            replace(record(n * 5 + k, request_id=f"o{n}", begun_s=old_s - 60), measurement_id=n)
            for n in numbers
            for k in range(WINDOWS // ENDED)
        ]
        store.keep_windows([KeptWindow(each, "m", "default") for each in some])
    store.commit(Changes(), events=[EventRow("TimePassed", NOW_S)])  # the registry has run since


async def forgetting(store: Store) -> list[Result]:
    """The start on a long history, and forgetting it."""
    service = service_over(store)
    begun_s = time.perf_counter()
    await service.start()
    started_ms = 1000 * (time.perf_counter() - begun_s)
    late_ms: list[float] = []
    begun_s = time.perf_counter()
    async with beside(late_ms):
        await service._retention.forget()
    took_s = time.perf_counter() - begun_s
    await service._tasks.stop()
    assert store.requests(["o0"]) == ()
    return [
        counted(PART, "start_on_100000_ended_ms", started_ms, "ms", of=ENDED),
        counted(PART, "forgetting_s", took_s, "s", of=ENDED + WINDOWS),
        *held("forgetting", late_ms),
    ]


async def machines(store: Store) -> list[Result]:
    """Many machines join at once, each serves a measurement that has one more LLM to wait for, and all are lost."""
    service = service_over(store)
    events: list[Event] = [MachineJoined(Machine(f"m{n}", f"n{n}", "10.0.0.1")) for n in range(MACHINES)]
    events += [WrapperAdded(f"m{n}-0", f"m{n}", "http://m", 0, None) for n in range(MACHINES)]
    events += [WrapperStarted(f"m{n}-0", 0, None) for n in range(MACHINES)]
    joining_ms: list[float] = []
    async with beside(joining_ms):
        await service._loop.apply_all(events)
    for n in range(MACHINES):
        service.request(n + 1, [NewRequest(f"{n}{k}", SPEC, "{}") for k in "ab"])
    losing_ms: list[float] = []
    begun_s = time.perf_counter()
    async with beside(losing_ms):
        await service._loop.apply_all([MachineLost(f"m{n}", "gone") for n in range(MACHINES)])
    lost_s = time.perf_counter() - begun_s
    await service._tasks.stop()
    return [
        *held("joining_machines", joining_ms),
        counted(PART, "losing_1000_machines_s", lost_s, "s", of=MACHINES),
        *held("lost_machines", losing_ms),
    ]


def ingress(calls: ConnectionOf[Any, Any], key: MeasurementKey) -> None:
    """Make a report as the ingress does, in a process of its own. Sends each call, at last the answer and its time."""

    async def call(*asked: object) -> Any:
        await asyncio.to_thread(calls.send, asked)
        return await asyncio.to_thread(calls.recv)

    async def report() -> tuple[int, float]:
        begun_s = time.perf_counter()
        text = await EnergyPages(call).report(key)
        return len(text), time.perf_counter() - begun_s

    calls.send(asyncio.run(report()))


async def reports(store: Store) -> list[Result]:
    """The report of a measurement of many windows: how long it takes, and how long it holds the registry's thread."""
    key, service = ("default", 7), service_over(store)
    asked = Request("r-1", 7, 1, SPEC, "{}", RequestStatus.RELEASED, deployed_s=NOW_S, ended_s=NOW_S + 1)
    store.commit(Changes(measurements=(Measurement(7, 1),), requests=(asked,)))
    for first in range(0, REPORTED, 1000):
        some = [record(n, begun_s=NOW_S + n, status="answered", warmup=False) for n in range(first, first + 1000)]
        store.keep_windows([KeptWindow(each, "m", "default") for each in some])
    ours, its = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=ingress, args=(its, key))
    late_ms: list[float] = []
    process.start()
    asked_of = await asyncio.to_thread(ours.recv)
    async with beside(late_ms):
        while isinstance(asked_of[0], str):
            method, _, *how = asked_of
            if method == "measured":
                after_seq, limit = how
                ours.send(
                    (
                        service.archive.measurement(key),
                        service.archive.requests_of(key, after_seq=after_seq, limit=limit),
                    )
                )
            else:
                request_id, after, limit = how
                page = service.accounts.page(key, request_id=request_id, after=after, limit=limit)
                ours.send((service.archive.find_requests({each.window.request_id or "" for each in page}), page))
            asked_of = await asyncio.to_thread(ours.recv)
    process.join()
    size_bytes, took_s = asked_of
    budgets = {"default": TenantBudget(max_joules_per_month=1e15)}
    parts = store, service.allocator, service.archive
    accounts = Accounts(*parts, budgets=budgets, now_s=lambda: NOW_S, on_kept=lambda _: None)
    first_ms = took_ms(1, lambda: accounts.notes("default"))
    return [
        counted(PART, "report_of_50000_s", took_s, "s", of=REPORTED),
        counted(PART, "report_of_50000_kb", size_bytes / 1000, "kB", of=REPORTED),
        *held("report", late_ms),
        counted(PART, "first_budget_of_50000_ms", first_ms[0], "ms", of=REPORTED),
        measured(PART, "budget_of_50000_ms", took_ms(100, lambda: accounts.notes("default")), "ms"),
    ]


async def in_process(folder: Path) -> list[Result]:
    """All that needs no cluster."""
    results: list[Result] = []
    for name in ("pages", "reports", "forgetting", "machines"):
        store = Store.open(f"sqlite:///{folder}/{name}.db")
        if name == "pages":
            results += pages(store)
        elif name == "reports":
            results += await reports(store)
        elif name == "forgetting":
            fill(store)
            results += await forgetting(store)
        else:
            results += await machines(store)
        store.close()
    return results


# --- on a cluster -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def asking(url: str, lease: str, health_ms: list[float], prompt_ms: list[float]) -> AsyncIterator[None]:
    """Ask for the health every 20 ms, each time on a new connection, and prompt one after another on one connection."""

    async def often(
        server: str, method: str, path: str, body: bytes, times: list[float], pause_s: float, anew: bool
    ) -> None:
        async with Connection(server) as http:
            while True:
                begun_s = time.perf_counter()
                status, answer = await http.call(method, path, body)
                assert status == 200, answer
                times.append(1000 * (time.perf_counter() - begun_s))
                if anew:
                    http.close()
                await asyncio.sleep(pause_s)

    prompt = b'{"question": "why?"}'
    path = f"{urlsplit(lease).path}/process_prompt"
    tasks = [
        asyncio.create_task(often(url, "GET", "/healthz", b"", health_ms, 0.02, anew=True)),
        asyncio.create_task(often(url, "POST", path, prompt, prompt_ms, 0.05, anew=False)),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [each for each in done if not isinstance(each, asyncio.CancelledError)]
        if failed:
            raise RuntimeError(f"health or prompts failed: {failed}")


def parts_of(registry: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """The processes that a read goes through, by name."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(registry.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            for name, word in {"ingress": ":Ingress", "actor": "ray::RegistryActor", "haproxy": "haproxy.cfg"}.items():
                if word in line:
                    found[name] = process
    return found


def cpu_s(process: psutil.Process) -> float:
    """CPU time that a process has used, seconds."""
    times = process.cpu_times()
    return times.user + times.system


async def crowd(*arguments: str) -> dict[str, float]:
    """Run the crowd in a process of its own; what it says that it did."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.crowd", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    said: dict[str, float] = json.loads(output)
    return said


async def on_a_cluster(url: str, llm: dict[str, Any], registry: subprocess.Popen[bytes]) -> list[Result]:
    """Clients that hang up, and idle ones, beside prompts and control."""
    async with Connection(url) as http:
        (first,) = (await http.json("POST", "/promptingservice/request", {"measurementId": 1, "llms": [llm]}))[
            "requests"
        ]
        state: dict[str, Any] = {"status": ""}
        while state["status"] != "deployed":
            state = await http.json("GET", f"/promptingservice/request/{first['requestId']}?wait=10")
        (waits,) = (await http.json("POST", "/promptingservice/request", {"measurementId": 2, "llms": [llm]}))[
            "requests"
        ]
    results: list[Result] = []

    async def phase(name: str, seconds: float, *arguments: str) -> None:
        health_ms: list[float] = []
        prompt_ms: list[float] = []
        parts = parts_of(registry)
        before = {part: (cpu_s(process), process.memory_info().rss) for part, process in parts.items()}
        begun_s = time.perf_counter()
        async with asking(url, state["url"], health_ms, prompt_ms):
            if arguments:
                did = await crowd(*arguments)
                results.extend(counted(PART, f"crowd_{key}.{name}", value, "", of=1) for key, value in did.items())
            await asyncio.sleep(seconds)
        took_s = time.perf_counter() - begun_s
        results.append(measured(PART, f"healthz_p99_ms.{name}", health_ms, "ms", pick=p99))
        results.append(measured(PART, f"prompt_p50_ms.{name}", prompt_ms, "ms"))
        replaced = [part for part, process in parts_of(registry).items() if process != parts[part]]
        results.append(counted(PART, f"replaced_processes.{name}", len(replaced), " ".join(replaced), of=len(parts)))
        for part, (used_s, rss) in before.items():
            if part in replaced:
                continue
            share = 100 * (cpu_s(parts[part]) - used_s) / took_s
            now = parts[part].memory_info().rss
            results.append(counted(PART, f"{part}_cpu_percent.{name}", share, "%", of=1))
            results.append(counted(PART, f"{part}_rss_mb.{name}", now / 1e6, "MB", of=1, baseline=rss / 1e6))
        load, _, _ = os.getloadavg()
        results.append(counted(PART, f"load.{name}", load, "", of=1))

    await phase("quiet", 10)
    await phase("hang_ups", 5, "hang-ups", url, waits["requestId"])
    await phase("idle", 1, "idle", url, str(IDLE_S))
    return results


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--in-process", action="store_true", help="only what needs no cluster")
    only.add_argument("--cluster", action="store_true", help="only what needs one")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    results: list[Result] = []
    if not chosen.cluster:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
        with tempfile.TemporaryDirectory(prefix="gprompt-bench-") as scratch:
            results += asyncio.run(in_process(Path(scratch)))
    if not chosen.in_process:
        with registry_with_llm() as (registry, llm):
            results += asyncio.run(on_a_cluster(registry.url, llm, registry.process))
    publish(results, output=chosen.output, targets=TARGETS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
