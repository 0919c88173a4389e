"""What a benchmark found: one table for people, one JSON file for programs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUTPUT = Path("build/bench.json")
"""Where all parts write, relative to the repository's root."""


LOG_WIDTH = 160
"""Columns of a table that no terminal shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One figure. ``n`` values were measured, of which ``min``, ``median`` and ``max`` tell the spread.

    ``ratio`` is ``value ÷ baseline``, where there is something to compare with.
    """

    part: str
    name: str
    value: float
    unit: str
    n: int = 1
    min: float | None = None
    median: float | None = None
    max: float | None = None
    baseline: float | None = None
    ratio: float | None = None


def measured(
    part: str,
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    pick: Callable[[Sequence[float]], float] = statistics.median,
    baseline: float | None = None,
) -> Result:
    """A figure picked from measured values (the median unless said otherwise), none of which may be missing."""
    value = pick(values)
    return Result(
        part=part,
        name=name,
        value=value,
        unit=unit,
        n=len(values),
        min=min(values),
        median=statistics.median(values),
        max=max(values),
        baseline=baseline,
        ratio=None if baseline is None else value / baseline,
    )


def counted(part: str, name: str, count: float, unit: str, *, of: int, baseline: float | None = None) -> Result:
    """A single figure that ``of`` things went into: a count of them, or a rate."""
    return Result(
        part=part,
        name=name,
        value=count,
        unit=unit,
        n=of,
        baseline=baseline,
        ratio=None if baseline is None else count / baseline,
    )


def percentile(fraction: float) -> Callable[[Sequence[float]], float]:
    """Picks the smallest value that at least this fraction of all values do not exceed (0.99: the p99)."""

    def pick(values: Sequence[float]) -> float:
        ordered = sorted(values)
        return ordered[math.ceil(fraction * len(ordered)) - 1]

    return pick


def publish(results: Sequence[Result], *, output: Path, targets: Mapping[str, str] | None = None) -> None:
    """Print the results, with what was aimed at, and put them in the file in place of older ones of their names."""
    table = Table(title=results[0].part)
    for column in ("name", "value", "unit", "n", "min", "median", "max", "baseline", "ratio", "target"):
        table.add_column(column, justify="left" if column in ("name", "unit", "target") else "right")
    for result in results:
        numbers = (result.min, result.median, result.max, result.baseline, result.ratio)
        table.add_row(
            result.name,
            _short(result.value),
            result.unit,
            str(result.n),
            *map(_short, numbers),
            (targets or {}).get(result.name, ""),
        )
    console().print(table)
    merge(output, [asdict(result) for result in results])


def console() -> Console:
    """Standard output; wide enough for our tables where it is no terminal (a log)."""
    own = Console()
    return own if own.is_terminal else Console(width=LOG_WIDTH)


def merge(output: Path, results: Sequence[Mapping[str, object]]) -> None:
    """Replace the entries with the same part and name in the file, and keep the others."""
    others = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
    new = {(entry["part"], entry["name"]) for entry in results}
    kept = [entry for entry in others if (entry["part"], entry["name"]) not in new]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([*kept, *results], indent=2) + "\n", encoding="utf-8")


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
