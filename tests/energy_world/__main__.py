"""Prints how often published energy figures contain the truth, as Markdown: python -m tests.energy_world."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from tests.energy_world.driver import drive
from tests.energy_world.judge import EqualPrompt, Finding, Judge, Wrong
from tests.energy_world.machine import KINDS, RARE_KINDS
from tests.energy_world.world import EnergyWorld

FIRST_SEED = 10_000
WANTED = 0.95
"""Part of the intervals that contain the truth, at least."""


@dataclass
class Cell:
    """Figures of one sort: how many intervals contain the truth, how many don't, and how many are not known."""

    held: int = 0
    missed: int = 0
    unknown: int = 0
    widths: list[float] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Count a figure."""
        if finding.holds is None:
            self.unknown += 1
        elif finding.holds:
            self.held += 1
        else:
            self.missed += 1
        if finding.value and finding.low is not None and finding.high is not None:
            self.widths.append((finding.high - finding.low) / 2 / finding.value)

    def merge(self, other: Cell) -> None:
        """Add what another has counted."""
        self.held += other.held
        self.missed += other.missed
        self.unknown += other.unknown
        self.widths += other.widths

    @property
    def coverage(self) -> float | None:
        """Part of the known intervals that contain the truth; None without any."""
        known = self.held + self.missed
        return self.held / known if known else None

    def row(self, *names: str) -> str:
        """Return a line of a table."""
        coverage = "-" if self.coverage is None else f"{100 * self.coverage:.2f} %"
        width = f"{100 * median(self.widths):.2g} %" if self.widths else "-"
        known = self.held + self.missed
        return f"| {' | '.join(names)} | {known:,} | {coverage} | {width} | {self.unknown:,} |"


@dataclass
class Tally:
    """What was found in many histories."""

    histories: int = 0
    by_figure: dict[tuple[str, ...], Cell] = field(default_factory=partial(defaultdict, Cell))
    by_machine: dict[tuple[str, ...], Cell] = field(default_factory=partial(defaultdict, Cell))
    wrong: list[tuple[int, Wrong]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    equal: list[EqualPrompt] = field(default_factory=list)

    def add(self, seed: int, kind: str | None = None, horizon_s: float | None = None) -> None:
        """Drive one more history; its kind of machine and its length are random if they are not given."""
        with EnergyWorld(seed, kind, horizon_s=horizon_s) as world, tempfile.TemporaryDirectory() as root:
            judge = Judge(drive(world, Path(root)))
            self.histories += 1
            self.faults.update({fault.kind for fault in world.faults})
            for finding in judge.findings:
                self.by_figure[finding.figure, finding.label].add(finding)
                self.by_machine[world.kind, finding.label].add(finding)
            self.equal += [p for prompts in judge.equal_prompts().values() for p in prompts if p.label == "measured"]
            self.wrong += [(seed, wrong) for wrong in judge.wrong()]

    def merge(self, other: Tally) -> None:
        """Add what another has counted."""
        self.histories += other.histories
        for mine, theirs in ((self.by_figure, other.by_figure), (self.by_machine, other.by_machine)):
            for name, cell in theirs.items():
                mine[name].merge(cell)
        self.wrong += other.wrong
        self.faults.update(other.faults)
        self.equal += other.equal

    def too_low(self) -> list[tuple[str, ...]]:
        """Return the sorts of figures whose intervals contain the truth too seldom, of those with 20 or more."""
        cells = {**self.by_figure, **self.by_machine}
        return [
            name for name, cell in cells.items() if cell.held + cell.missed >= 20 and (cell.coverage or 0.0) < WANTED
        ]

    def bias(self) -> tuple[float, float, float]:
        """Return by how much all measured equal prompts together are wrong, their systematic terms, and chance [J].

        Chance: 4 times the standard error of a sum of independent errors.
        """
        errors = [p.joules - p.truth_j for p in self.equal]
        return sum(errors), sum(p.systematic_j for p in self.equal), 4 * sum(e * e for e in errors) ** 0.5

    def tables(self) -> Iterator[str]:
        """Yield the lines of the tables."""
        yield "| figure | label | known | contain the truth | ± (median) | not known |"
        yield "| --- | --- | --: | --: | --: | --: |"
        yield from _rows(self.by_figure.items())
        yield ""
        yield "| machine | label | known | contain the truth | ± (median) | not known |"
        yield "| --- | --- | --: | --: | --: | --: |"
        yield from _rows(self.by_machine.items())


def _rows(cells: Iterable[tuple[tuple[str, ...], Cell]]) -> Iterator[str]:
    for name, cell in sorted(cells, key=lambda each: each[0]):
        yield cell.row(*name)


def _tally(kind: str | None, seed: int) -> Tally:
    tally = Tally()
    tally.add(seed, kind)
    return tally


def main() -> int:
    """Drive histories; 1 if a figure breaks its promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.energy_world", description=__doc__)
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--kind", choices=[*KINDS, *RARE_KINDS], help="all histories on this kind of machine")
    parser.add_argument("--processes", type=int, default=1, help="histories at one time")
    parser.add_argument("--output", type=Path, help="file for the tables, written anew after each hundred histories")
    chosen = parser.parse_args()
    tally = Tally()
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.histories)
    with multiprocessing.Pool(chosen.processes, maxtasksperchild=50) as pool:
        for number, one in enumerate(pool.imap(partial(_tally, chosen.kind), seeds), start=1):
            tally.merge(one)
            if number % 100 == 0:
                print(f"{number} histories, {len(tally.wrong)} broken rules", file=sys.stderr, flush=True)
                if chosen.output is not None:
                    chosen.output.write_text(
                        "\n".join([f"{number} histories", "", *tally.tables(), ""]), encoding="utf-8"
                    )
    print("\n".join(tally.tables()))
    error_j, systematic_j, chance_j = tally.bias()
    true_j = sum(p.truth_j for p in tally.equal)
    print(
        f"\n{len(tally.equal):,} measured equal prompts, {true_j:,.0f} J: wrong by {error_j:+.1f} J,"
        f" systematic {systematic_j:.1f} J, chance {chance_j:.1f} J."
    )
    faults = ", ".join(f"{kind} in {count}" for kind, count in tally.faults.most_common())
    print(f"\n{tally.histories} histories; faults of counters: {faults or 'none'}.")
    for seed, wrong in tally.wrong:
        print(f"WRONG in history {seed}: {wrong.what} ({wrong.name})", file=sys.stderr)
    for name in tally.too_low():
        print(f"TOO SELDOM: {', '.join(name)}", file=sys.stderr)
    biased = abs(error_j) > systematic_j + chance_j
    return 1 if tally.wrong or tally.too_low() or biased else 0


if __name__ == "__main__":
    sys.exit(main())
