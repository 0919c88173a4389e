"""The report of a measurement for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, floor

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from greenprompt_client.figures_table import READING, Row, batch_table, label_words, problems, prompts_table, rows_of
from greenprompt_client.figures_table import parts as score_parts
from greenprompt_client.notation import LEGEND, UNKNOWN, figure, in_range, number
from registry.accounting.figures import MachineFigures
from registry.accounting.report import Coefficient, Cost, MeasurementReport


def report_table(report: MeasurementReport) -> RenderableType:
    """Return the energy and carbon of each LLM and each kind of time, the methods used, and what is unknown."""
    rows = figure_rows(report)
    parts: list[RenderableType] = [Text(headline(report)), Text(f"Figures are {report.how}.")]
    parts += [Text(warning, style="bold") for warning in unfinished(report)]
    parts += [Text(), prompts_table(rows)]
    parts += [Text(line, style="dim") for line in (READING, *score_parts(rows))]
    parts += [Text()]
    if (batch := batch_table(rows)) is not None:
        parts += [batch, Text()]
    parts += [_costs(report), Text(), _basis(report)]
    if lacks := list(missing(report)):
        parts += [Text(), Text("Not known, or left out:"), *(Text(f"  {each}") for each in lacks)]
    parts += [Text(), Text(f"{LEGEND}.")]
    return Group(*parts)


def headline(report: MeasurementReport) -> str:
    """Return the measurement's id, machines, numbers of LLMs, prompts and warm-ups, and its flags."""
    where = f" on {', '.join(report.machines)}" if report.machines else ""
    prompts = sum(figures.prompts for llm in report.llms for figures in llm.figures)
    warmups = sum(figures.warmups for llm in report.llms for figures in llm.figures)
    besides = f" and {warmups} warm-up(s)" if warmups else ""
    flags = f"; flags: {', '.join(report.flags)}" if report.flags else ""
    return f"Measurement {report.measurementId}{where}: {len(report.llms)} LLM(s), {prompts} prompt(s){besides}{flags}"


def names(report: MeasurementReport) -> list[str]:
    """Return a unique name for each LLM: those that differ only in their arguments are numbered."""
    models = [llm.llm for llm in report.llms]
    seen: dict[str, int] = {}
    found = []
    for model in models:
        seen[model] = seen.get(model, 0) + 1
        found.append(model if models.count(model) == 1 else f"{model} #{seen[model]}")
    return found


def figure_rows(report: MeasurementReport) -> list[Row]:
    """Return the figures by LLM and machine. An LLM without any window has no row."""
    figures: list[tuple[str, tuple[MachineFigures, ...]]] = [
        (name, llm.figures) for name, llm in zip(names(report), report.llms, strict=True)
    ]
    return rows_of(figures)


def unfinished(report: MeasurementReport) -> Iterator[str]:
    """Yield why the report is not final: leases that still run, and time that is in no window."""
    if report.running:
        open_leases = f"{len(report.running)} lease(s) have not ended: {', '.join(report.running)}"
        yield f"Not finished: more windows will arrive, because {open_leases}"
    for hole in report.holes:
        yield f"Lost: {hole.text}"


def missing(report: MeasurementReport) -> Iterator[str]:
    """Yield what is unknown or left out, and why, as text."""
    for name, llm in zip(names(report), report.llms, strict=True):
        if not llm.figures:
            yield f"{name}: there are no windows"
    yield from problems(figure_rows(report))
    for what, cost in report.costs.items():
        if cost.windows and cost.reason is not None:
            yield f"{what}: {cost.reason}; {cost.missing_s:.3g} s without joules"


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """Return a cost in joules and grams. Grams depend on published factors, so they are never marked as measured."""
    return (
        in_range(cost.joules, cost.low_j, cost.high_j, cost.label, missing=cost.missing or cost.lost),
        in_range(cost.o_g, cost.o_low_g, cost.o_high_g, "sourced", missing=cost.missing_o or cost.lost),
        in_range(cost.m_g, cost.m_low_g, cost.m_high_g, "sourced", missing=cost.missing_m or cost.lost),
    )


def coefficient_text(coefficient: Coefficient) -> str:
    """Return a coefficient with its range and unit, marked with ``~`` because it is an assumption."""
    value = figure(coefficient.value, "sourced")
    if coefficient.low is not None and coefficient.high is not None:
        value += f" ({number(coefficient.low, floor)} to {number(coefficient.high, ceil)})"
    return value if coefficient.unit == "1" else f"{value} {coefficient.unit}"


def _costs(report: MeasurementReport) -> Table:
    table = _table("time", "windows", "seconds", "joules", "gCO2eq, energy", "gCO2eq, embodied", "label")
    for what, cost in report.costs.items():
        if cost.windows:
            cells = cost_cells(cost)
            table.add_row(what, str(cost.windows), f"{cost.seconds:.4g}", *cells, label_words(cost.label))
    if not table.row_count:
        table.add_row(UNKNOWN, "0", *([UNKNOWN] * 5))
    return table


def _basis(report: MeasurementReport) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("methods", Text(", ".join(f"{letter} {method}" for letter, method in report.methods.items())))
    inside = ", ".join(report.boundary) or UNKNOWN
    left_out = f"; without a counter: {', '.join(report.not_covered)}" if report.not_covered else ""
    table.add_row("boundary", Text(f"{inside}{left_out}"))
    for coefficient in report.coefficients:
        source = f"  ({coefficient.source})" if coefficient.source else ""
        table.add_row(Text(coefficient.name), Text(f"{coefficient_text(coefficient)}{source}"))
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.overflow = "fold"  # a truncated figure would be wrong
    return table
