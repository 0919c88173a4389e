"""What the meter costs: a mark, a window, an attribution, and the polling thread. Prints, asserts nothing.

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

from deployments.attribution import Prompt
from deployments.cpu_time import CPUTimeTree
from deployments.energy import CPUModel, SCISettings
from deployments.energy_sources import CPUModelSource, PowercapZone, Source, probe_sources
from deployments.meter import Meter
from tests.fake_counters import ManualClock, write_zone

MODEL = CPUModel(0.74, 3.5, 0.5, 2.5, "bench")


def per_call_us(call: object, number: int) -> float:
    return min(timeit.repeat(call, number=number, repeat=5)) / number * 1e6  # type: ignore[arg-type]


def sources(root: Path, kind: str) -> list[Source]:
    if kind == "2 powercap zones":
        return [
            PowercapZone(name, write_zone(root, zone, name))
            for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram-0"))
        ]
    return [CPUModelSource(MODEL, CPUTimeTree(os.getpid()), cpus=2)]


def main() -> None:
    clock = ManualClock()
    model = CPUModelSource(MODEL, CPUTimeTree(os.getpid()), cpus=2)
    meter = Meter([model], clock=clock)
    for _ in range(72_000):  # an hour of polls, with this process' real CPU time
        meter.poll_once()
        clock.now_s += 0.05
    end_s = clock.now_s - 1
    prompts = [Prompt(end_s - 3000 + index, end_s - 2998 + index, 100) for index in range(1000)]
    real = Meter([], clock=time.monotonic)
    print(f"mark()                    {per_call_us(real.mark, 100_000):10.2f} us")
    print(f"window() of 2 s           {per_call_us(lambda: meter.window(end_s - 2, end_s), 5000):10.2f} us")
    print(f"attribute() 1000 prompts  {per_call_us(lambda: meter.attribute(end_s - 3500, end_s, prompts), 1):10.0f} us")
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
