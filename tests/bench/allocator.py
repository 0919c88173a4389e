"""What a decision costs, from a laptop to a cluster: the allocator alone, without database, Ray or HTTP.

``python -m tests.bench.allocator [--events 20000]``. Every size is brought to the state of a busy cluster (all wrappers
leased, the queue full) and kept there by a mix of events as clients and wrappers make them. Measured is the CPU time
of ``handle`` in its thread, garbage collection included, so that others on the machine don't count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random
from typing import TypeVar

from rich.table import Table

from registry.core.allocator import Allocator
from registry.core.commands import BindLease, DeployLLM
from registry.core.decision import Decision, Limits
from registry.core.events import (
    Event,
    LeaseBound,
    LeaseReleased,
    LeaseRequested,
    LeaseUsed,
    LLMDeployed,
    MachineJoined,
    NewRequest,
    TimePassed,
    WrapperAdded,
    WrapperStarted,
)
from registry.core.fit import GIB
from registry.core.records import LLMMemory, LLMSpec, Machine, StoredToken
from registry.wire.words import Priority, RequestStatus
from tests.bench.report import OUTPUT, Result, console, counted, measured, percentile, publish
from tests.support.allocator_scene import next_deadline_s

PART = "allocator"
WRAPPERS = (10, 100, 1_000, 10_000)
QUEUED = (100, 10_000, 100_000)
P99_TARGET_MS, GROWTH_TARGET = 1.0, 3.0

GPUS = (1, 1, 2, 4, 8)
"""GPUs of the wrappers, in turn."""
GPU_GIB = {"A100": 40, "H100": 80, "L4": 24}
LLM_GPUS = (1,) * 48 + (2,) * 6 + (4,) * 3 + (8,) * 3
"""GPUs that the LLMs need, the most wanted LLM first."""
LLM_GIB_PER_GPU = (2, 6, 15, 3, 16, 8, 30, 22, 1, 65)
"""Memory that the LLMs take on each of their GPUs, in turn; a whole number of GiB apart, so that many needs differ."""
NAMES_TYPE = 0.1
"""Share of the measurements that ask for a GPU type."""
TENANTS = 8
LONGEST_MEASUREMENT = 4
SETTLE_EVENTS = 2_000
EVENT_S = 0.001
"""Time from event to event."""

MASS, MASS_QUEUED = (100, 1_000), 10_000

T = TypeVar("T")


class Load:
    """A busy cluster: makes the next event from what has happened, and takes note of what the allocator decides."""

    def __init__(self, wrappers: int, queued: int, seed: int) -> None:
        """Fill an allocator with this many wrappers, all of them leased, and this many queued requests."""
        self.wrappers = wrappers
        self.queued = queued
        self.now_s = 1_000.0
        self.random = Random(seed)
        self.ids = count(1)
        self.measurements = count(1)
        tokens = count(1)
        # Leases began a second apart and outlive the filling; one at a time expires, because time jumps to its end.
        # So only how often a request may be overtaken limits that here, not for how long.
        limits = Limits(
            lease_max_s=1e9,
            lease_idle_s=1e6,
            max_overtake_s=float("inf"),
            max_queued=2 * (queued + wrappers),
            max_queued_per_tenant=2 * (queued + wrappers),
        )
        self.allocator = Allocator(limits, lambda: StoredToken(f"token-{next(tokens)}", ""))
        self.asked: list[str] = []
        self.held: list[str] = []
        self.used: set[str] = set()
        self.answers: list[Event] = []
        self.specs = [LLMSpec(f"org/llm-{n}", "text-generation", gpus=gpus) for n, gpus in enumerate(LLM_GPUS)]
        self.memory = [
            LLMMemory(gpus * LLM_GIB_PER_GPU[n % len(LLM_GIB_PER_GPU)] * GIB, gpus=gpus)
            for n, gpus in enumerate(LLM_GPUS)
        ]
        self.fill(wrappers)

    def fill(self, wrappers: int) -> None:
        """Machines of one wrapper each join and are leased; then requests queue up."""
        for n in range(wrappers):
            machine, gpus = f"m{n:05}", GPUS[n % len(GPUS)]
            gpu_type = tuple(GPU_GIB)[n % len(GPU_GIB)]
            joined = Machine(machine, f"node-{n}", "10.0.0.1", gpus=gpus, gpu_type=gpu_type)
            self.happen(MachineJoined(replace(joined, gpu_memory_bytes=GPU_GIB[gpu_type] * GIB)))
            self.happen(WrapperAdded(f"{machine}-0", machine, f"http://{machine}/wrappers/{machine}-0", gpus))
            self.happen(WrapperStarted(f"{machine}-0"))
        for _ in range(wrappers):
            self.happen(self.request(longest=1, llms=LLM_GPUS.count(1)))
        while self.answers:
            self.happen(_take(self.answers, self.random))
        while self.allocator.queued_count() < self.queued:
            self.happen(self.request())

    def happen(self, event: Event, *, after_s: float = 1.0) -> int:
        """Let an event happen ``after_s`` later; the CPU time that its decision took, in nanoseconds."""
        self.now_s += after_s
        begun_ns = time.thread_time_ns()
        decision = self.allocator.handle(event, self.now_s)
        took_ns = time.thread_time_ns() - begun_ns
        self.note(decision)
        return took_ns

    def note(self, decision: Decision) -> None:
        """Wrappers do as they are told; clients see that they were served."""
        for effect in decision.effects:
            match effect:
                case DeployLLM(wrapper_id, epoch):
                    self.answers.append(LLMDeployed(wrapper_id, epoch))
                case BindLease(wrapper_id, epoch):
                    self.answers.append(LeaseBound(wrapper_id, epoch))
        for wrapper in decision.changes.wrappers:
            (self.used.discard if wrapper.request_id is None else self.used.add)(wrapper.wrapper_id)
        self.held += [r.request_id for r in decision.changes.requests if r.status is RequestStatus.DEPLOYED]

    def next(self) -> tuple[str, Event]:
        """What happens next, and what to call it: queue and wrappers stay full, half of the rest are answers."""
        waiting = self.allocator.queued_count()
        if waiting < self.queued:
            return "request", self.request()
        if len(self.used) < self.wrappers and waiting < self.queued + self.queued // 5:
            return "request", self.request(longest=1)  # all who wait are behind others of their measurements
        if self.answers and self.random.random() < 0.5:
            answer = _take(self.answers, self.random)
            return ("deploy done" if isinstance(answer, LLMDeployed) else "bound"), answer
        chance = self.random.random()
        if chance < 0.05:
            due_s = next_deadline_s(self.allocator)
            if due_s is not None:
                self.now_s = max(self.now_s, due_s)
                return "expiry", TimePassed()
        if chance < 0.10 and (cancelled := self.waiting()) is not None:
            return "cancel", LeaseReleased(cancelled)
        if self.held and chance < 0.55:
            return "used", LeaseUsed(self.random.choice(self.held), self.now_s)
        if self.held:
            return "release", LeaseReleased(_take(self.held, self.random))
        return "request", self.request()

    def waiting(self) -> str | None:
        """A request that is queued, from anywhere in the queue."""
        while self.asked:
            request_id = _take(self.asked, self.random)
            if self.allocator.request(request_id).status is RequestStatus.QUEUED:
                return request_id
        return None

    def request(self, *, longest: int = LONGEST_MEASUREMENT, llms: int = len(LLM_GPUS)) -> LeaseRequested:
        """A measurement of a few LLMs; some LLMs are asked for far more often than others."""
        chosen = self.random
        ranks = [int(llms * chosen.random() ** 3) for _ in range(chosen.randint(1, longest))]
        new = tuple(
            NewRequest(f"r{next(self.ids):08}", self.specs[rank], "{}", memory=self.memory[rank]) for rank in ranks
        )
        self.asked += [request.request_id for request in new]
        priority = chosen.choices(tuple(Priority), weights=(1, 8, 1))[0]
        tenant = f"tenant-{chosen.randrange(TENANTS)}"
        gpu_type = "H100" if longest > 1 and chosen.random() < NAMES_TYPE else None
        return LeaseRequested(next(self.measurements), new, tenant, priority, gpu_type)


def _take(items: list[T], random: Random) -> T:
    """One of the items, which is then no longer among them. O(1)."""
    at = random.randrange(len(items))
    items[at], items[-1] = items[-1], items[at]
    return items.pop()


def measure(wrappers: int, queued: int, events: int) -> dict[str, list[float]]:
    """Milliseconds of each decision, by kind of event."""
    load = Load(wrappers, queued, seed=wrappers + queued)
    for _ in range(SETTLE_EVENTS):
        load.happen(load.next()[1], after_s=EVENT_S)
    took_ms: dict[str, list[float]] = defaultdict(list)
    for _ in range(events):
        kind, event = load.next()
        took_ms[kind].append(load.happen(event, after_s=EVENT_S) / 1e6)
    return took_ms


def mass_expiry_ms(wrappers: int, queued: int) -> float:
    """Milliseconds of the one decision in which all leases end, as after a registry that was down for long."""
    load = Load(wrappers, queued, seed=wrappers)
    return load.happen(TimePassed(), after_s=1e9) / 1e6


def main(arguments: list[str]) -> int:
    """Measure, print, write; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=20_000, help="decisions per size (default: 20000)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    sizes = [(wrappers, queued) for wrappers in WRAPPERS for queued in QUEUED]
    by_kind = {size: measure(*size, chosen.events) for size in sizes}
    all_ms = {size: [ms for kind in by_kind[size].values() for ms in kind] for size in sizes}
    show_kinds(by_kind[sizes[0]], by_kind[sizes[-1]])

    smallest_ms, largest_ms = statistics.median(all_ms[sizes[0]]), statistics.median(all_ms[sizes[-1]])
    worst = measured(PART, "decision_p99_ms", all_ms[sizes[-1]], "ms", pick=percentile(0.99))
    growth = Result(
        part=PART,
        name="decision_growth",
        value=largest_ms / smallest_ms,
        unit="1",
        n=chosen.events,
        median=largest_ms,
        baseline=smallest_ms,
        ratio=largest_ms / smallest_ms,
    )
    results = [worst, growth, counted(PART, "decisions_per_s", per_s(all_ms[sizes[-1]]), "1/s", of=chosen.events)]
    for (wrappers, queued), took_ms in all_ms.items():
        size = f"{wrappers}_wrappers_{queued}_queued"
        results.append(measured(PART, f"decision_p99_ms_{size}", took_ms, "ms", pick=percentile(0.99)))
        results.append(counted(PART, f"decisions_per_s_{size}", per_s(took_ms), "1/s", of=chosen.events))
    few, many = (mass_expiry_ms(wrappers, MASS_QUEUED) for wrappers in MASS)
    results.append(measured(PART, "mass_expiry_ms", [many], "ms", baseline=few * MASS[1] / MASS[0]))
    targets = {"decision_p99_ms": f"≤ {P99_TARGET_MS:g}", "decision_growth": f"≤ {GROWTH_TARGET:g}"}
    publish(results, output=chosen.output, targets=targets)
    print("decision_p99_ms: the largest size. decision_growth: median decision of the largest size ÷ of the smallest.")
    print(
        f"mass_expiry_ms: {MASS[1]} leases end in one decision; baseline: {MASS[0]} leases, times {MASS[1] // MASS[0]}."
    )
    return 0 if worst.value <= P99_TARGET_MS and growth.value <= GROWTH_TARGET else 1


def per_s(took_ms: list[float]) -> float:
    """Decisions per second of CPU time, one after another."""
    return 1000 * len(took_ms) / sum(took_ms)


def show_kinds(smallest: dict[str, list[float]], largest: dict[str, list[float]]) -> None:
    """Print what each kind of event costs, at the two ends."""
    table = Table(title="decisions by event, µs: smallest size → largest size")
    for column in ("event", "n", "median", "p99", "n", "median", "p99"):
        table.add_column(column, justify="right")
    for kind in sorted(smallest.keys() | largest.keys()):
        row = [kind]
        for took_ms in (smallest.get(kind), largest.get(kind)):
            picked = [statistics.median(took_ms), percentile(0.99)(took_ms)] if took_ms else []
            row += [str(len(took_ms or ())), *(f"{1000 * ms:.0f}" for ms in picked)]
        table.add_row(*row)
    console().print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
