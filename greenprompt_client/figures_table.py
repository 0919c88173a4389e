"""The figures of LLMs as tables, for both `greenprompt measure` and `greenprompt report`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from greenprompt_client.notation import UNKNOWN, bounded_text, estimate_text, figure, number
from registry.accounting.figures import Figure, MachineFigures

Row = tuple[str, MachineFigures]
"""The name of an LLM (with its machine, if it has several) and its figures."""

READING = (
    "A figure is the sum over all prompts divided by the sum of their units. Below it is its 95 % interval. "
    'Warm-ups are excluded, except from "with idle time", which covers whole leases.'
)

_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
_WORDS = {"modeled": "estimate", "measured_sampled": "measured (sampled)", "unavailable": "unknown"}


def rows_of(llms: Sequence[tuple[str, Sequence[MachineFigures]]]) -> list[Row]:
    """Return a row for each LLM and each machine that it was measured on."""
    rows = []
    for name, of_machines in llms:
        short = short_name(name)
        for figures in of_machines:
            several = len(of_machines) > 1
            rows.append((f"{short} on {figures.machine or 'an unknown machine'}" if several else short, figures))
    return rows


def prompts_table(rows: Sequence[Row]) -> Table:
    """Return the table of prompts: carbon per unit (overall and mean), joules per output token and per prompt."""
    scale, unit = _scale([figures.gco2eq_per_unit for _, figures in rows])
    columns = ("with idle time", "mean of prompts", "J per output token", "J per prompt", "seconds", "label")
    table = _table("LLM", "prompts", unit, *columns)
    for name, figures in rows:
        score, joules = figures.gco2eq_per_unit, figures.joules_per_prompt
        mean = None if score.mean_of_ratios is None else score.mean_of_ratios / scale
        table.add_row(
            Text(name),
            str(figures.prompts),
            _cell(score, scale),
            _cell(figures.with_idle, scale),
            figure(mean, score.label),
            _cell(figures.joules_per_token),
            _cell(joules),
            _cell(figures.seconds_per_prompt),
            label_words(joules.label) if figures.prompts else UNKNOWN,
        )
    return table


def batch_table(rows: Sequence[Row]) -> Table | None:
    """Return the table of leases' counted stretches (all prompts as one); None if no lease has such a stretch."""
    batches = [(name, figures.batch) for name, figures in rows if figures.batch is not None]
    if not batches:
        return None
    scale, unit = _scale([batch.gco2eq_per_unit for _, batch in batches])
    table = _table("LLM, all prompts as one", "leases", "in flight", "J per output token", unit, "counters")
    for name, batch in batches:
        mean = UNKNOWN if batch.in_flight_mean is None else number(batch.in_flight_mean)
        most = UNKNOWN if batch.in_flight_max is None else str(batch.in_flight_max)
        table.add_row(
            Text(name),
            str(batch.leases),
            f"{mean} (at most {most})",
            _batch_cell(batch.joules_per_token),
            _batch_cell(batch.gco2eq_per_unit, scale),
            label_words(batch.joules_per_token.label),
        )
    return table


def parts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield for each score its energy part and its embodied carbon part, with their bounds."""
    scale, _ = _scale([figures.gco2eq_per_unit for _, figures in rows])
    for name, figures in rows:
        if figures.gco2eq_per_unit.value is not None:
            energy, embodied = (
                bounded_text(part, scale) for part in (figures.operational_per_unit, figures.embodied_per_unit)
            )
            yield f"{name}: the score's part for energy is {energy}, and for embodied carbon {embodied}."


def problems(rows: Sequence[Row]) -> Iterator[str]:
    """Yield remarks on the figures, as text: what is left out or unknown, flags, and why an interval is missing."""
    for name, figures in rows:
        if not figures.prompts:
            yield f"{name}: no prompt has a final window."
            continue
        for what, found in (
            ("score", figures.gco2eq_per_unit),
            ("score with idle time", figures.with_idle),
            ("J per output token", figures.joules_per_token),
        ):
            if found.reason is not None:
                known = "is not known" if found.value is None else f"leaves out {found.left_out}"
                yield f"{name}: {what} {known}: {found.reason}"
        if figures.batch is not None:
            batch = figures.batch
            if batch.joules_per_token.value is None or batch.gco2eq_per_unit.value is None:
                said = {batch.joules_per_token.reason, batch.gco2eq_per_unit.reason} - {None}
                yield from (f"{name}: all prompts as one: not known: {reason}" for reason in sorted(map(str, said)))
            if batch.flags:
                flags = ", ".join(f"{flag} ({count})" for flag, count in batch.flags.items())
                yield f"{name}: all prompts as one: flags: {flags}"
        reasons = {found.too_few for found in (figures.gco2eq_per_unit, figures.joules_per_token)} - {None}
        yield from (f"{name}: no 95 % interval: {reason}" for reason in sorted(map(str, reasons)))
        if figures.with_idle.value is not None and figures.with_idle.too_few not in {None, *reasons}:
            yield f"{name}: score with idle time: no 95 % interval: {figures.with_idle.too_few}"
        if figures.unmarked:
            yield f"{name}: {figures.unmarked} prompts don't say whether they are warm-ups, and are counted as prompts."
    machines = sorted({figures.machine or "an unknown one" for _, figures in rows})
    if len(machines) > 1:
        yield f"Figures of different machines are not comparable, and not averaged: {', '.join(machines)}."


def label_words(label: str) -> str:
    """Return a label as words."""
    return _WORDS.get(label, label)


def short_name(llm: str) -> str:
    """Return the last two parts of a path, or a hub id unchanged."""
    path = Path(llm)
    return f"{path.parent.name}/{path.name}" if path.is_absolute() else llm


def _scale(scores: Sequence[Figure]) -> tuple[float, str]:
    """Return a unit in which the largest score needs no exponent: its part of a gram, and its name."""
    largest = max((score.value for score in scores if score.value), default=1.0)
    scale, prefix = next(((s, prefix) for s, prefix in _PREFIXES if largest >= s), _PREFIXES[-1])
    units = {score.unit for score in scores}
    unit = units.pop().removeprefix("gCO2eq/") if len(units) == 1 else "unit"
    return scale, f"{prefix}gCO2eq per {unit.replace('_', ' ')}"


def _cell(found: Figure, scale: float = 1.0) -> Text:
    value, _, interval = estimate_text(found, scale).partition(" (")
    return Text(f"{value}\n{interval.removesuffix(')')}" if interval else value)


def _batch_cell(found: Figure, scale: float = 1.0) -> Text:
    """Return a value with its bounds and, if there are enough leases, its interval."""
    lines = bounded_text(found, scale).replace(" (", "\nwithin ").removesuffix(")")
    if found.low is not None and found.high is not None:
        lines += "\n95 %: " + estimate_text(found, scale).partition(" (")[2].removesuffix(")")
    return Text(lines)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if 0 < n < len(columns) - 1 else "left", overflow="fold")
    return table
