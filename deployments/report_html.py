"""The report of a measurement as one HTML page: no script, and nothing that is loaded from anywhere."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from deployments.notation import LEGEND, MEASURED, figure, number
from deployments.report_table import coefficient_text, headline, mean_text, missing, names
from registry.report import COUNTED, LLMReport, MeasurementReport, Spread, WindowReport

ROWS_SHOWN = 500
"""Most windows that the page lists; CSV and JSON have all."""

NAME_SHOWN = 32
"""Most characters of an LLM's name beside its row of a plot; of a longer one the end is shown."""

POINTS_SHOWN = 300
"""Most prompts of an LLM that a plot shows as points; of more, some at even distances."""

_TIME_UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
_USES = {"active": "#2e7d5b", "idle": "#d9a441", "load": "#5b7db1", "wake": "#9a6fb0"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be found, copied and read aloud
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
}


def report_html(report: MeasurementReport) -> str:
    """The whole page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        figure=figure, number=number, mean_text=mean_text, coefficient_text=coefficient_text, measured=MEASURED
    )
    text = resources.files("deployments").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        report=report,
        headline=headline(report),
        legend=LEGEND,
        llms=list(zip(names(report), report.llms, strict=True)),
        missing=list(missing(report)),
        windows=report.windows[:ROWS_SHOWN],
        plots=list(plots(report)),
    )


def plots(report: MeasurementReport) -> Iterator[tuple[str, str, str]]:
    """(name, what it shows, SVG) of each plot for which anything is known."""
    labels = names(report)
    scores = [llm.score_per_prompt for llm in report.llms]
    joules = [llm.joules_per_token for llm in report.llms]
    if any(spread.n for spread in scores):
        points = [_of_prompts(report, llm, "sci_score") for llm in report.llms]
        yield _plot("score", "gCO2eq per functional unit, by LLM", _spreads(labels, scores, points))
    if any(spread.n for spread in joules):
        points = [_of_prompts(report, llm, "joules") for llm in report.llms]
        yield _plot("joules", "Joules per output token, by LLM", _spreads(labels, joules, points))
    times_s, watts = power(report.windows)
    if any(not math.isnan(each) for each in watts):
        yield _plot("power", "Power over time, mean of each window", _power(times_s, watts, report.windows))
    if any(llm.costs[use].joules for llm in report.llms for use in _USES):
        yield _plot("uses", "Idle against active: what the energy was used for", _shares(labels, report.llms))


def power(windows: Sequence[WindowReport]) -> tuple[list[datetime], list[float]]:
    """Times, and the power [W] from each on; NaN where it is not known. Prompts at the same time add up."""
    steps: list[tuple[datetime, float, int, int]] = []
    for window in windows:
        if window.kind == COUNTED["lease"] or window.seconds <= 0:
            continue  # a lease is its prompts and its idle time once more
        begun, ended = datetime.fromisoformat(window.begunAt), datetime.fromisoformat(window.endedAt)
        watts, known = (0.0, 0) if window.joules is None else (window.joules / window.seconds, 1)
        steps += [(begun, watts, known, 1 - known), (ended, -watts, -known, known - 1)]
    steps.sort(key=lambda step: step[0])
    times, levels = [], []
    watts, known, unknown = 0.0, 0, 0
    for n, (time, step_w, step_known, step_unknown) in enumerate(steps):
        watts, known, unknown = watts + step_w, known + step_known, unknown + step_unknown
        if n + 1 == len(steps) or steps[n + 1][0] != time:
            times.append(time)
            levels.append(max(watts, 0.0) if known and not unknown else math.nan)
    return times, levels


def _of_prompts(report: MeasurementReport, llm: LLMReport, what: str) -> list[float]:
    """The figures of an LLM's prompts that are known, as its spreads have them."""
    found = []
    for window in report.windows:
        if window.kind != COUNTED["active"] or window.requestId not in llm.requestIds:
            continue
        value = getattr(window, what)
        if what == "joules" and value is not None:
            value = value / window.output_tokens if window.output_tokens else None
        if value is not None:
            found.append(value)
    return found[:: max(1, len(found) // POINTS_SHOWN)]


def _spreads(labels: Sequence[str], spreads: Sequence[Spread], points: Sequence[Sequence[float]]) -> Figure:
    """A row for each LLM: its prompts as points, their mean, and the mean's 95 % confidence interval."""
    plot, axes = _rows(labels, [bool(spread.n) and spread.label not in MEASURED for spread in spreads])
    for row, (spread, of_prompts) in enumerate(zip(spreads, points, strict=True)):
        if spread.mean is None:
            axes.text(0.02, row, "not known", transform=axes.get_yaxis_transform(), va="center", color="#777777")
            continue
        axes.plot(of_prompts, [row] * len(of_prompts), "|", color=_USES["active"], alpha=0.35, markersize=14)
        half = 0.0 if spread.ci95_high is None else spread.ci95_high - spread.mean
        axes.errorbar(spread.mean, row, xerr=half, fmt="o", color="#12372a", capsize=5, markersize=6, linewidth=2)
    axes.set_xlim(left=0)
    unit = spreads[0].unit
    axes.xaxis.set_major_formatter(EngFormatter(unit="J" if unit.startswith("J") else "g"))
    axes.set_xlabel(f"{unit}: prompts, their mean and its 95 % interval")
    return plot


def _power(times: Sequence[datetime], watts: Sequence[float], windows: Sequence[WindowReport]) -> Figure:
    plot, axes = _axes(height=2.6)
    since_s = [(time - times[0]).total_seconds() for time in times]
    unit, size = next((unit, size) for unit, size in _TIME_UNITS.items() if since_s[-1] >= 3 * size or size == 1)
    axes.step([each / size for each in since_s], watts, where="post", color=_USES["active"], linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{unit} since {times[0]:%Y-%m-%d %H:%M:%S} UTC")
    estimate = any(window.joules is not None and window.label not in MEASURED for window in windows)
    axes.set_ylabel(f"W{', estimate' if estimate else ''}")
    axes.yaxis.grid(visible=True, color="#e5e5e5")
    return plot


def _shares(labels: Sequence[str], llms: Sequence[LLMReport]) -> Figure:
    """A bar for each LLM, of what its prompts, its idle time and its starts took."""
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
        lacks = [use for use in shown if llm.costs[use].windows and llm.costs[use].joules is None]
        if lacks:
            axes.annotate(f" not known: {', '.join(lacks)}", (left_j, row), va="center", color="#777777")
    for use in shown:
        axes.barh(0, 0, color=_USES[use], label=use)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(shown), frameon=False)
    axes.set_xlabel("J")
    return plot


def _rows(labels: Sequence[str], estimates: Sequence[bool]) -> tuple[Figure, Axes]:
    """An empty plot with a row for each of these, the first at the top; which of them are estimates is told."""
    plot, axes = _axes(height=1.1 + 0.5 * len(labels))
    short = [label if len(label) <= NAME_SHOWN else f"…{label[1 - NAME_SHOWN :]}" for label in labels]
    told = [f"{label}\n~ estimate" if estimate else label for label, estimate in zip(short, estimates, strict=True)]
    axes.set_yticks(range(len(labels)), told)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    return plot, axes


def _axes(height: float) -> tuple[Figure, Axes]:
    """An empty plot, its height in inches."""
    with rc_context(_STYLE):
        plot = Figure(figsize=(8.5, height), layout="constrained")
        return plot, plot.add_subplot()


def _plot(name: str, shows: str, plot: Figure) -> tuple[str, str, str]:
    svg = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):  # ids of several plots on one page must differ
        plot.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = svg.getvalue()
    return name, shows, text[text.index("<svg") :]
