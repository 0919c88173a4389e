"""The report of a measurement as one HTML page, without scripts and external resources."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import cycle
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from greenprompt_client.figures_table import READING, label_words
from greenprompt_client.notation import LEGEND, bounded_text, estimate_text, figure, number
from greenprompt_client.report.power import Curve, powers
from greenprompt_client.report.table import (
    coefficient_text,
    cost_cells,
    figure_rows,
    headline,
    missing,
    names,
    unfinished,
)
from registry.accounting import figures
from registry.accounting.report import COUNTED, LLMReport, MeasurementReport
from registry.wire.labels import MEASURED

ROWS_SHOWN = 500
"""Most windows that the page lists; CSV and JSON have all."""

NAME_SHOWN = 32
"""Most characters of an LLM's name beside a plot's row; of a longer name, the end is shown."""

POINTS_SHOWN = 300
"""From this many prompts of an LLM on, a plot shows every n-th as a point, n = prompts // POINTS_SHOWN."""

_TIME_UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
_USES = {"active": "#2e7d5b", "idle": "#d9a441", "load": "#5b7db1", "wake": "#9a6fb0"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, copyable, and readable for screen readers
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
}


# D98: the page loads nothing
def report_html(report: MeasurementReport) -> str:
    """Return the HTML page of a report, with its plots."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        figure=figure,
        number=number,
        estimate_text=estimate_text,
        bounded_text=bounded_text,
        cost_cells=cost_cells,
        coefficient_text=coefficient_text,
        label_words=label_words,
        measured=MEASURED,
    )
    text = resources.files("greenprompt_client.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        report=report,
        headline=headline(report),
        legend=LEGEND,
        unfinished=list(unfinished(report)),
        reading=READING,
        rows=figure_rows(report),
        missing=list(missing(report)),
        windows=report.windows[:ROWS_SHOWN],
        plots=list(plots(report)),
    )


def plots(report: MeasurementReport) -> Iterator[tuple[str, str, str]]:
    """Yield (name, description, SVG) of each plot that has data."""
    rows = [
        (name, llm, of_machine)
        for name, llm in zip(names(report), report.llms, strict=True)
        for of_machine in llm.figures
    ]
    labels = [name if len(llm.figures) == 1 else f"{name} on {found.machine}" for name, llm, found in rows]
    for plot, shows, name, what in (
        ("score", "gCO2eq per functional unit, by LLM", "gco2eq_per_unit", "sci_score"),
        ("joules", "Joules per output token, by LLM", "joules_per_token", "joules"),
    ):
        estimates = [getattr(found, name) for _, _, found in rows]
        if any(estimate.value is not None for estimate in estimates):
            points = [_of_prompts(report, llm, found.machine, what) for _, llm, found in rows]
            yield _plot(plot, shows, _spreads(labels, estimates, points))
    known = {machine: curve for machine, curve in powers(report.windows).items() if not all(map(math.isnan, curve[1]))}
    if known:
        yield _plot("power", "Mean power of each busy and each idle period, over time", _power(known, report))
    if any(llm.costs[use].joules for llm in report.llms for use in _USES):
        yield _plot("uses", "Idle against active: what the energy was used for", _shares(names(report), report.llms))


def _of_prompts(report: MeasurementReport, llm: LLMReport, machine: str | None, what: str) -> list[float]:
    """Return the known figures of an LLM's prompts on a machine, without warm-ups."""
    found = []
    for window in report.windows:
        if window.kind != COUNTED["active"] or window.requestId not in llm.requestIds or window.machine != machine:
            continue
        value = None if window.warmup else getattr(window, what)
        if what == "joules" and value is not None:
            value = value / window.output_tokens if window.output_tokens else None
        if value is not None:
            found.append(value)
    return found[:: max(1, len(found) // POINTS_SHOWN)]


def _spreads(labels: Sequence[str], estimates: Sequence[figures.Figure], points: Sequence[Sequence[float]]) -> Figure:
    """Return a plot with a row per LLM: its prompts as points, the overall value, and its 95 % interval if known."""
    plot, axes = _rows(labels, [found.value is not None and found.label not in MEASURED for found in estimates])
    for row, (found, of_prompts) in enumerate(zip(estimates, points, strict=True)):
        if found.value is None:
            axes.text(0.02, row, "not known", transform=axes.get_yaxis_transform(), va="center", color="#777777")
            continue
        axes.plot(of_prompts, [row] * len(of_prompts), "|", color=_USES["active"], alpha=0.35, markersize=14)
        low, high = (found.value if each is None else each for each in (found.low, found.high))
        error = [[found.value - low], [high - found.value]]
        axes.errorbar(found.value, row, xerr=error, fmt="o", color="#12372a", capsize=5, markersize=6, linewidth=2)
    axes.set_xlim(left=0)
    unit = estimates[0].unit
    axes.xaxis.set_major_formatter(EngFormatter(unit="J" if unit.startswith("J") else "g"))
    axes.set_xlabel(f"{unit}: each prompt, and the overall value with its 95 % interval")
    return plot


def _power(curves: Mapping[str | None, Curve], report: MeasurementReport) -> Figure:
    """Return a plot with a line per machine."""
    plot, axes = _axes(height=2.6)
    first, last = min(times[0] for times, _ in curves.values()), max(times[-1] for times, _ in curves.values())
    whole_s = (last - first).total_seconds()
    unit, size = next((unit, size) for unit, size in _TIME_UNITS.items() if whole_s >= 3 * size or size == 1)
    for color, (machine, (times, watts)) in zip(cycle(_USES.values()), curves.items(), strict=False):
        since = [(time - first).total_seconds() / size for time in times]
        axes.step(since, watts, where="post", color=color, linewidth=1.2, label=machine or "an unknown machine")
    if len(curves) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(curves), frameon=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{unit} since {first:%Y-%m-%d %H:%M:%S} UTC")
    estimate = any(window.joules is not None and window.label not in MEASURED for window in report.windows)
    axes.set_ylabel(f"W{', estimate' if estimate else ''}")
    axes.yaxis.grid(visible=True, color="#e5e5e5")
    return plot


def _shares(labels: Sequence[str], llms: Sequence[LLMReport]) -> Figure:
    """Return a plot with a bar per LLM: the energy of its prompts, its idle time and its starts."""
    shown = [use for use in _USES if any(llm.costs[use].windows for llm in llms)]
    known = [[llm.costs[use] for use in shown if llm.costs[use].joules is not None] for llm in llms]
    plot, axes = _rows(labels, [any(cost.label not in MEASURED for cost in costs) for costs in known])
    for row, llm in enumerate(llms):
        left_j = 0.0
        for use in shown:
            joules = llm.costs[use].joules
            if joules is not None:
                axes.barh(row, joules, left=left_j, color=_USES[use], height=0.6)
                left_j += joules
        lacks = [use for use in shown if llm.costs[use].missing or llm.costs[use].lost]
        if lacks:
            axes.annotate(f" partly unknown: {', '.join(lacks)}", (left_j, row), va="center", color="#777777")
    for use in shown:
        axes.barh(0, 0, color=_USES[use], label=use)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(shown), frameon=False)
    axes.set_xlabel("J")
    return plot


def _rows(labels: Sequence[str], estimates: Sequence[bool]) -> tuple[Figure, Axes]:
    """Return an empty plot with a row per label, the first at the top; estimates are marked."""
    plot, axes = _axes(height=1.1 + 0.5 * len(labels))
    short = [label if len(label) <= NAME_SHOWN else f"…{label[1 - NAME_SHOWN :]}" for label in labels]
    told = [f"{label}\n~ estimate" if estimate else label for label, estimate in zip(short, estimates, strict=True)]
    axes.set_yticks(range(len(labels)), told)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    return plot, axes


def _axes(height: float) -> tuple[Figure, Axes]:
    """Return an empty plot; ``height`` is in inches."""
    with rc_context(_STYLE):
        plot = Figure(figsize=(8.5, height), layout="constrained")
        return plot, plot.add_subplot()


def _plot(name: str, shows: str, plot: Figure) -> tuple[str, str, str]:
    svg = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):  # the ids of several plots on a page must differ
        plot.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = svg.getvalue()
    return name, shows, text[text.index("<svg") :]
