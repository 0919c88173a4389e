"""What people see of an experiment's figures: a table, and what has to be known to read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from deployments.energy import Label
from deployments.figures import CONFIDENCE, LLMFigures, Spread
from registry.api import MeasurementState

_MEASURED = (Label.MEASURED, Label.MEASURED_SAMPLED)
_OF_ENERGY = ("gco2eq_per_unit", "energy_j")
_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
_WORDS = {Label.MODELED: "estimate", Label.MEASURED_SAMPLED: "measured (sampled)", Label.UNAVAILABLE: "unknown"}


def results_table(figures: Sequence[LLMFigures]) -> Table:
    """A row per LLM: the mean of each figure, with its confidence interval below it; ``~`` where it is an estimate."""
    scale, prefix = _prefix(figures)
    units = {each.unit for each in figures} - {None}
    unit = units.pop() if len(units) == 1 else None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("LLM", overflow="fold")
    table.add_column("answers", justify="right")
    for name in (f"{prefix}gCO2eq per {(unit or 'unit').replace('_', ' ')}", "joules", "output tokens", "seconds"):
        table.add_column(name, justify="right", min_width=7)
    table.add_column("label")
    for each in figures:
        mark = "" if each.known_label in _MEASURED else "~"
        table.add_row(
            Text(_short(each.llm)),
            str(each.answers),
            *(
                _cell(
                    spread,
                    scale if name == "gco2eq_per_unit" else 1.0,
                    mark if name in _OF_ENERGY else "",
                )
                for name, spread in each.spreads.items()
            ),
            _WORDS.get(each.label, each.label.value) if each.answers else "-",
        )
    return table


def notes(figures: Sequence[LLMFigures], measurement: MeasurementState | None) -> Iterator[str]:
    """What has to be known to read the table: a sentence each."""
    scale, prefix = _prefix(figures)
    yield f"Means per prompt, and below them their {CONFIDENCE:.0%} confidence intervals. Warm-ups are not in them."
    for each in figures:
        name = _short(each.llm)
        if each.known_label not in (*_MEASURED, Label.UNAVAILABLE):
            between = ""
            if each.estimate_low is not None and each.estimate_high is not None:
                low, high = _number(each.estimate_low / scale), _number(each.estimate_high / scale)
                between = f"; the score may lie between {low} and {high} {prefix}g"
            yield f"{name}: ~ is an estimate ({each.known_label}), not a measurement{between}."
        if each.errors:
            yield f"{name}: refused prompts: {each.errors}; answers.jsonl says why."
        if each.missing:
            yield f"{name}: answers still missing: {each.missing}."
        for figure, what in (("gco2eq_per_unit", "score"), ("energy_j", "energy")):
            if unknown := each.spreads[figure].unknown:
                yield f"{name}: answers whose {what} is not known, and not in the mean: {unknown}."
        if each.flags:
            yield f"{name}: flags: {', '.join(f'{flag} ({count})' for flag, count in each.flags.items())}"
    machines = sorted({machine for each in figures for machine in each.machines})
    if len(machines) > 1:
        yield f"The answers are from {len(machines)} machines, whose figures don't compare: {', '.join(machines)}."
    if measurement is not None and measurement.flags:
        yield f"The measurement's flags: {', '.join(measurement.flags)}"


def _cell(spread: Spread, scale: float, mark: str) -> Text:
    if spread.mean is None:
        return Text("unknown" if spread.unknown else "-")
    mean = mark + _number(spread.mean / scale)
    if spread.low is None or spread.high is None:
        return Text(mean)
    low, high = _number(spread.low / scale), _number(spread.high / scale)
    return Text(mean if low == high else f"{mean}\n{low} to {high}")


def _prefix(figures: Sequence[LLMFigures]) -> tuple[float, str]:
    """The part of a gram in which the largest score is a number that people like to read."""
    scores = [each.spreads["gco2eq_per_unit"].mean for each in figures]
    largest = max((score for score in scores if score is not None), default=1.0)
    return next(((scale, prefix) for scale, prefix in _PREFIXES if largest >= scale), _PREFIXES[-1])


def _number(value: float) -> str:
    """Three digits, without an exponent where people want none."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _short(llm: str) -> str:
    """A path by its end; an id of the hub in full."""
    path = Path(llm)
    return f"{path.parent.name}/{path.name}" if path.is_absolute() else llm
