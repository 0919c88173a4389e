"""What a decision and its commit cost, from 10 machines to 1,000: the real service and store in a simulated cluster.

``python -m tests.bench.simulation [--clients 20]``. Both worlds have as many clients, and as much trouble, per machine.
Measured is the CPU time of each decision with its commit, in its thread, on SQLite without waiting for the disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from tests.bench.report import OUTPUT, Result, counted, measured, percentile, publish
from tests.simulation.shape import OF_MACHINES
from tests.simulation.world import Verdict, large_world, run

PART = "simulation"
FEW, MANY = 10, 1_000
GROWTH_TARGET = 3.0
BUSY_S = 1_800.0
TROUBLE_PAUSE_S = 1_000.0
"""Time from trouble to trouble of one machine, on average."""


def simulated(machines: int, clients: int) -> Verdict:
    """A world of machines with this many clients each, which keeps its promises."""
    shape = large_world(machines, machines * clients, BUSY_S, kinds=OF_MACHINES, pause_s=TROUBLE_PAUSE_S / machines)
    verdict = run(shape, seed=machines)
    if verdict.violations:
        raise SystemExit(str(verdict))
    return verdict


def main(arguments: list[str]) -> int:
    """Measure, print, write; 1 if the target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20, help="clients per machine (default: 20)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    simulated(FEW, chosen.clients)  # statements are compiled, caches are filled
    few, many = (simulated(machines, chosen.clients) for machines in (FEW, MANY))
    few_ms, many_ms = ([ns / 1e6 for ns in verdict.took_ns] for verdict in (few, many))
    growth = Result(
        part=PART,
        name="decision_cost_growth",
        value=statistics.mean(many_ms) / statistics.mean(few_ms),
        unit="1",
        n=len(many_ms),
        baseline=statistics.mean(few_ms),
        ratio=statistics.mean(many_ms) / statistics.mean(few_ms),
    )
    results = [
        growth,
        measured(PART, f"decision_and_commit_ms_{FEW}_machines", few_ms, "ms"),
        measured(PART, f"decision_and_commit_ms_{MANY}_machines", many_ms, "ms"),
        measured(PART, f"decision_and_commit_p99_ms_{MANY}_machines", many_ms, "ms", pick=percentile(0.99)),
        counted(PART, "requests", many.requests, "1", of=MANY),
        counted(PART, "simulated_h", many.simulated_s / 3600, "h", of=MANY),
    ]
    publish(results, output=chosen.output, targets={"decision_cost_growth": f"≤ {GROWTH_TARGET:g}"})
    print(f"decision_cost_growth: mean ms of {MANY} machines ÷ mean ms of {FEW} (baseline).")
    return 0 if growth.value <= GROWTH_TARGET else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
