"""What the meter costs: a mark, a window, a share, and the polling thread. Prints, asserts nothing.

``python -m tests.bench.meter_overhead``; on a machine without counters the powercap zones are files of a fake tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

from deployments.energy.counters.probe import CPUModelSource, PowercapZone, Source, probe_sources
from deployments.energy.figures import CPUModel, SCISettings
from deployments.energy.flights import Flight, Flights
from deployments.energy.meter import Meter
from deployments.machine.cpu_time import CPUTimeTree
from deployments.tokens import Tokens
from tests.support.fake_counters import ManualClock, write_zone

MODEL = CPUModel(0.74, 3.5, 0.37, 1.85, 1.75, 8.75, "bench")


def per_call_us(call: object, number: int) -> float:
    return min(timeit.repeat(call, number=number, repeat=5)) / number * 1e6  # type: ignore[arg-type]


def sources(root: Path, kind: str) -> list[Source]:
    if kind == "2 powercap zones":
        return [
            PowercapZone(name, write_zone(root, zone, name))
            for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram-0"))
        ]
    return [CPUModelSource(MODEL, CPUTimeTree(os.getpid()), cpus=2)]


def company(end_s: float) -> tuple[Flights, Flight]:
    """A prompt that has just ended, as one of 32 connections that ask again as soon as they are answered."""
    flights = Flights()
    flying = [Flight(end_s - 10 + number / 32) for number in range(32)]
    for flight in flying:
        flights.begin(flight)
    for number in range(160):
        at_s = end_s - 9 + number / 32
        flights.end(flying[number], at_s)
        flights.counted(flying[number], Tokens(6, 0, 32))
        flying.append(Flight(at_s))
        flights.begin(flying[-1])
    return flights, flying[159]


def main() -> None:
    clock = ManualClock()
    model = CPUModelSource(MODEL, CPUTimeTree(os.getpid()), cpus=2)
    meter = Meter([model], clock=clock)
    for _ in range(72_000):  # an hour of polls, with this process' real CPU time
        meter.poll_once()
        clock.now_s += 0.05
    end_s = clock.now_s - 1
    flights, flight = company(end_s)
    real = Meter([], clock=time.monotonic)
    print(f"mark()                    {per_call_us(real.mark, 100_000):10.2f} us")
    print(f"window() of 2 s           {per_call_us(lambda: meter.window(end_s - 2, end_s), 5000):10.2f} us")
    print(f"share() beside 32         {per_call_us(lambda: meter.share(flights.parts(flight)[0]), 1000):10.2f} us")
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(8)]
    try:
        for kind in ("2 powercap zones", "CPU model, 9 processes"):
            with tempfile.TemporaryDirectory() as folder:
                meter = Meter(sources(Path(folder), kind))
                meter.start()
                wall_s, cpu_s = time.monotonic(), time.process_time()
                time.sleep(5)
                used = (time.process_time() - cpu_s) / (time.monotonic() - wall_s)
                meter.stop()
                print(f"polling every 50 ms: {kind:24s} {used:8.2%} of a CPU")
    finally:
        for child in children:
            child.communicate(b"\n")
    settings = SCISettings(1.0, "output_token", allow_estimates=True, cpu_model=MODEL)
    print(f"probe_sources()           {per_call_us(lambda: probe_sources([], pid=1, settings=settings), 10):10.2f} us")


if __name__ == "__main__":
    main()
