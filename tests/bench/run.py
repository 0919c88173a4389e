"""All benchmarks, or one: ``python -m tests.bench.run [--part NAME [arguments of the part]]``.

Each part is a program of its own, so that none inherits another's memory or environment; all write to build/bench.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

PARTS = {
    "allocator": "tests.bench.allocator",
    "control": "tests.bench.control",
    "coverage": "tests.bench.coverage",
    "energy": "tests.bench.energy",
    "engine": "tests.bench.engine",
    "kills": "tests.bench.kills",
    "meter": "tests.bench.meter_overhead",
    "reads": "tests.bench.reads",
    "simulation": "tests.bench.simulation",
    "strangers": "tests.bench.strangers",
}


def main(arguments: list[str]) -> int:
    """Run the parts one after another; 1 if any of them failed or missed a target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="only this one; what follows is for it")
    chosen, rest = parser.parse_known_args(arguments)
    if rest and chosen.part is None:
        parser.error(f"which part is {' '.join(rest)} for? Name it with --part")
    failed = []
    for part in [chosen.part] if chosen.part else PARTS:
        print(f"== {part}", flush=True)
        if subprocess.run([sys.executable, "-m", PARTS[part], *rest], check=False).returncode:
            failed.append(part)
    if failed:
        print(f"failed, or missed a target: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
