"""The report of a measurement on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deployments.notation import LEGEND, MEASURED, UNKNOWN, figure, in_range
from registry.report import Coefficient, MeasurementReport, Spread


def report_table(report: MeasurementReport) -> RenderableType:
    """What each LLM cost, what the measurement's time was used for, how that was found, and what is not known."""
    parts: list[RenderableType] = [Text(headline(report)), Text(f"Figures are {report.how}."), Text()]
    parts += [_llms(report), Text(), _costs(report), Text(), _basis(report)]
    if problems := list(missing(report)):
        parts += [Text(), Text("Not known:"), *(Text(f"  {problem}") for problem in problems)]
    if any(label not in MEASURED for label in _labels(report)):
        parts += [Text(), Text(f"{LEGEND}.")]
    return Group(*parts)


def headline(report: MeasurementReport) -> str:
    """Which measurement, where, and how much of it there is."""
    where = f" on {', '.join(report.machines)}" if report.machines else ""
    prompts = sum(llm.prompts for llm in report.llms)
    flags = f"; flags: {', '.join(report.flags)}" if report.flags else ""
    return f"Measurement {report.measurementId}{where}: {len(report.llms)} LLM(s), {prompts} prompt(s){flags}"


def names(report: MeasurementReport) -> list[str]:
    """A name for each LLM that no other has: those that differ in their arguments only are numbered."""
    models = [llm.llm for llm in report.llms]
    seen: dict[str, int] = {}
    found = []
    for model in models:
        seen[model] = seen.get(model, 0) + 1
        found.append(model if models.count(model) == 1 else f"{model} #{seen[model]}")
    return found


def missing(report: MeasurementReport) -> Iterator[str]:
    """What is not known, and why, in words."""
    for name, llm in zip(names(report), report.llms, strict=True):
        for what, reason in (
            ("score", llm.score.reason),
            ("score with idle time", llm.lease_score.reason),
            ("joules per token", llm.joules_per_token.reason),
        ):
            if reason is not None:
                yield f"{name}: {what}: {reason}"
    for what, cost in report.costs.items():
        if cost.windows and cost.reason is not None:
            yield f"{what}: {cost.reason}"


def mean_text(spread: Spread) -> str:
    """The mean of the prompts, half its 95 % confidence interval, and of how many it is where some are not known."""
    text = figure(spread.mean, spread.label)
    if spread.mean is not None and spread.ci95_high is not None:
        text += f" ± {spread.ci95_high - spread.mean:.2g}"
    return f"{text} (of {spread.n})" if spread.n and spread.unknown else text


def coefficient_text(coefficient: Coefficient) -> str:
    """A coefficient with its range and unit."""
    value = in_range(coefficient.value, coefficient.low, coefficient.high, "measured")
    return value if coefficient.unit == "1" else f"{value} {coefficient.unit}"


def _labels(report: MeasurementReport) -> Iterator[str]:
    yield from (cost.label for cost in report.costs.values() if cost.windows)
    yield from (llm.score.label for llm in report.llms)


def _llms(report: MeasurementReport) -> Table:
    units = {llm.score.unit for llm in report.llms}
    unit = units.pop() if len(units) == 1 else "gCO2eq/unit"
    table = _table("LLM", "prompts", unit, "with idle time", "per prompt, ± 95 %", "J/token, ± 95 %")
    for name, llm in zip(names(report), report.llms, strict=True):
        score, lease = llm.score, llm.lease_score
        table.add_row(
            Text(name),
            str(llm.prompts),
            Text(in_range(score.value, score.low, score.high, score.label)),
            Text(figure(lease.value, lease.label)),
            Text(mean_text(llm.score_per_prompt)),
            Text(mean_text(llm.joules_per_token)),
        )
    return table


def _costs(report: MeasurementReport) -> Table:
    table = _table("time", "windows", "seconds", "joules", "gCO2eq, energy", "gCO2eq, embodied", "from")
    for what, cost in report.costs.items():
        if cost.windows:
            table.add_row(
                what,
                str(cost.windows),
                f"{cost.seconds:.4g}",
                figure(cost.joules, cost.label),
                figure(cost.o_g, cost.label),
                figure(cost.m_g, "measured"),
                "estimate" if cost.label == "modeled" else cost.label,
            )
    if not table.row_count:
        table.add_row(UNKNOWN, "0", *([UNKNOWN] * 5))
    return table


def _basis(report: MeasurementReport) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("methods", Text(", ".join(f"{letter} {method}" for letter, method in report.methods.items())))
    inside = ", ".join(report.boundary) or UNKNOWN
    left_out = f"; not counted by anything: {', '.join(report.not_covered)}" if report.not_covered else ""
    table.add_row("boundary", Text(f"{inside}{left_out}"))
    for coefficient in report.coefficients:
        source = f"  ({coefficient.source})" if coefficient.source else ""
        table.add_row(Text(coefficient.name), Text(f"{coefficient_text(coefficient)}{source}"))
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.overflow = "fold"  # a cut figure is a wrong one
    return table
