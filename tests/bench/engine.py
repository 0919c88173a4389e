"""The engine and the way to it against vLLM's own server, on the same machine, in turn.

``python -m tests.bench.engine [--only starts|prompts] [--starts 5] [--swaps 50] [--rounds 8] [--seconds 3]``
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from tests.bench import prompt_path, starts
from tests.bench.report import OUTPUT, publish

TARGETS = {
    "cold_start_ratio": 0.10,
    "swap_ratio": 0.12,
    "rss_ratio": 1.3,
    "ttft_extra_ms": 2.0,
    "inter_token_p99_ratio": 1.1,
    **{f"swaps_growth_{name}": 1.05 for name in ("processes", "threads", "files", "memory")},
}
"""At most."""
FLOORS = {f"throughput_ratio_c{connections}": 0.95 for connections in prompt_path.CONNECTIONS}
"""At least."""


def main(arguments: list[str]) -> int:
    """Measure, print, write; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("starts", "prompts"), help="half of it")
    parser.add_argument("--starts", type=int, default=5, help="pairs of starts and of swaps, ≥ 1 (default: 5)")
    parser.add_argument("--swaps", type=int, default=50, help="swaps in a row, > 5 (default: 50)")
    parser.add_argument("--rounds", type=int, default=8, help="pairs of each load, ≥ 1 (default: 8)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a slice of a load (default: 3)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of the host, 0 for the CPU (default)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if chosen.gpus:  # as Ray does it for a wrapper; without it the host does not know which GPUs are its own
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(chosen.gpus))))
    results = []
    with tempfile.TemporaryDirectory(prefix="gprompt-bench-") as scratch:
        if chosen.only != "prompts":
            results += asyncio.run(starts.measure(Path(scratch), chosen.starts, chosen.swaps, chosen.gpus))
        if chosen.only != "starts":
            results += prompt_path.measure(Path(scratch), chosen.rounds, chosen.seconds)
    targets = {name: f"≤ {limit:g}" for name, limit in TARGETS.items()}
    targets |= {name: f"≥ {limit:g}" for name, limit in FLOORS.items()}
    publish(results, output=chosen.output, targets=targets)
    missed = [result.name for result in results if result.value > TARGETS.get(result.name, result.value)]
    missed += [result.name for result in results if result.value < FLOORS.get(result.name, result.value)]
    print("by hand, and baseline of the prompts: vLLM's own server with the same LLM, arguments and threads.")
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
