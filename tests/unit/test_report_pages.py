"""A measurement's report as people get it: on a terminal, as a page, as a table of windows."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import TypeAdapter
from rich.console import Console
from typer.testing import CliRunner

from deployments import cli
from deployments.notation import figure, in_range
from deployments.report_csv import COLUMNS, windows_csv
from deployments.report_files import write_report
from deployments.report_html import POINTS_SHOWN, ROWS_SHOWN, plots, power, report_html
from deployments.report_table import names, report_table
from registry.errors import BadSettings
from registry.report import MeasurementReport, report_of
from registry.state import Measurement, WindowKind
from tests.energy_windows import BEGUN_S, an_experiment, iso, kept, request, window

NOTHING = report_of(Measurement(7, 1), [request("r-1", "org/tiny")], [], iso)


def shown(report: MeasurementReport, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(report_table(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


# --- figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "label", "text"),
    [
        (None, "unavailable", "-"),
        (1234.5, "measured", "1,230"),
        (0.000012345, "measured_sampled", "1.23e-05"),
        (0.012345, "modeled", "~0.0123"),
        (5.0, "simulated", "~5"),
    ],
)
def test_figures(value: float | None, label: str, text: str) -> None:
    """Three digits; a ``~`` before everything that no hardware has measured; a dash, not 0, for what is not known."""
    assert figure(value, label) == text


def test_range() -> None:
    """An estimate is shown with its range; what has none is shown alone."""
    assert in_range(1.0, 0.5, 2.0, "modeled") == "~1 (0.5 to 2)"
    assert in_range(1.0, None, None, "measured") == "1"


# --- terminal -----------------------------------------------------------------------------------------------


def test_terminal() -> None:
    """Scores by LLM, costs by use, how it was found, and what is not known with the reason."""
    text = shown(an_experiment())
    assert "Measurement 7 on gpu-1: 2 LLM(s), 17 prompt(s)" in text
    assert "computed with the SCI formula" in text
    assert "conform" not in text
    assert re.search(r"org/small +8 +0\.000595 +0\.000913 +0\.000595 ± 9\.2e-06 +1\.95 ± 0\.1\n", text)
    assert re.search(r"org/large +9 +- +~0\.00101 ", text)
    assert re.search(r"lease +2 +48 +~2,920 .* estimate\n", text)
    assert "330 gCO2eq/kWh  (ecologits 0.11.1 DEU)" in text
    assert "org/large: score: 1 of 9 windows have no score in gCO2eq/output_token (too_short)" in text
    assert "~ is an estimate" in text


def test_terminal_without_estimates() -> None:
    """Where all is measured, nothing is said of estimates, and nothing of what is not known."""
    windows = kept(window(1), window(2, WindowKind.LEASE, flags=("dram_not_covered",)))
    text = shown(report_of(Measurement(7, 1, flags=("machine_changed",)), [request("r-1", "org/tiny")], windows, iso))
    assert "~" not in text
    assert "estimate" not in text
    assert "Not known" not in text
    assert "flags: machine_changed" in text
    assert "not counted by anything: dram" in text


def test_terminal_with_nothing() -> None:
    """A measurement of which nothing is known is shown as that, in 80 columns too."""
    text = shown(NOTHING, width=80)
    assert "org/tiny: score: there are no such windows" in text
    assert max(map(len, text.splitlines())) <= 80


def test_llms_of_one_name_are_numbered() -> None:
    """Two LLMs that differ only in their arguments can be told apart."""
    other = replace(request("r-2", "org/tiny", 2), llmconfig='{"model":"org/tiny","t":1}')
    report = report_of(Measurement(7, 1), [request("r-1", "org/tiny"), other, request("r-3", "org/b", 3)], [], iso)
    assert names(report) == ["org/tiny #1", "org/tiny #2", "org/b"]


# --- page ---------------------------------------------------------------------------------------------------


def test_page_loads_nothing() -> None:
    """The page is one file: no script, no address that a browser would load, and a policy that forbids both."""
    page = report_html(an_experiment())
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(\s*['\"]?(?!#)|(?:src|href)=\"(?!#)", page)
    assert not re.search(r"<\?xml|<!DOCTYPE svg", page)


def test_page_has_its_plots() -> None:
    """Score and joules by LLM, power over time, idle against active: each with its caption."""
    assert [name for name, _, _ in plots(an_experiment())] == ["score", "joules", "power", "uses"]
    page = report_html(an_experiment())
    assert re.findall(r'<figure id="plot-(\w+)">', page) == ["score", "joules", "power", "uses"]
    assert page.count("<svg") == 4
    assert "not known: active" in page
    assert 'class="estimate">estimate' in page
    assert "~ estimate" in {name: svg for name, _, svg in plots(an_experiment())}["joules"]


def test_page_with_nothing() -> None:
    """Where nothing is known there is no plot, and the page says so."""
    page = report_html(NOTHING)
    assert "<svg" not in page
    assert "There is nothing to plot" in page
    assert "there are no such windows" in page


def test_page_of_what_is_partly_known() -> None:
    """An LLM of which nothing is known has its row in the plots all the same, and says so there."""
    requests = [request("r-1", "org/known"), request("r-2", "org/unknown", 2)]
    windows = kept(window(1), window(2, request_id="r-2", joules=None))
    svgs = {name: svg for name, _, svg in plots(report_of(Measurement(7, 1), requests, windows, iso))}
    assert "not known" in svgs["score"]
    assert "org/unknown" in svgs["joules"]


def test_long_names_leave_room() -> None:
    """Of a long path a plot shows the end; the tables have all of it."""
    name = "/llms/" + "x" * 40 + "/the-end"
    report = report_of(Measurement(7, 1), [request("r-1", name)], kept(window(1)), iso)
    assert all(name not in svg for _, _, svg in plots(report))
    assert "x/the-end" in report_html(report)
    assert f"<td>{name}</td>" in report_html(report)


def test_page_escapes_names() -> None:
    """A model's name can't write into the page."""
    evil = "<script>alert(1)</script>"
    report = report_of(Measurement(7, 1), [request("r-1", evil)], kept(window(1, flags=(evil,))), iso)
    assert "<script" not in report_html(report)


def test_a_long_page_lists_the_first_windows() -> None:
    """Thousands of prompts make no endless page, and no endless plot; all of them count."""
    count = ROWS_SHOWN + 200
    windows = kept(*(window(n, begun_s=BEGUN_S + 3 * n) for n in range(count)))
    report = report_of(Measurement(7, 1), [request("r-1", "org/tiny")], windows, iso)
    page = report_html(report)
    assert f"The first {ROWS_SHOWN}" in page
    assert len(re.findall(r"<td>process 1-\d+</td>", page)) == ROWS_SHOWN
    marks = re.search(r'id="line2d_\d+">(?:(?!</g>).)*?(<use[^>]*/>\s*){100,}', page, re.DOTALL)
    assert marks is None or marks[0].count("<use") <= 2 * POINTS_SHOWN
    assert report.llms[0].score_per_prompt.n == count


def test_power_adds_up_and_knows_holes() -> None:
    """Prompts at the same time add up; where a window has no figure, or there is none, there is no power, not 0 W."""
    report = report_of(
        Measurement(7, 1),
        [],
        kept(
            window(1, begun_s=0.0, seconds=4, joules=40.0),
            window(2, begun_s=2.0, seconds=4, joules=80.0),
            window(3, begun_s=8.0, seconds=2, joules=10.0),
            window(4, begun_s=9.0, seconds=2, joules=None),
            window(5, WindowKind.LEASE, begun_s=0.0, seconds=11, joules=130.0),
            window(6, begun_s=3.0, seconds=0, joules=None),
        ),
        iso,
    )
    times, watts = power(report.windows)
    assert [time.timestamp() for time in times] == [0, 2, 4, 6, 8, 9, 10, 11]
    assert watts[:3] == [10.0, 30.0, 20.0]
    assert [math.isnan(each) for each in watts] == [False, False, False, True, False, True, True, True]
    assert power([]) == ([], [])


@pytest.mark.parametrize(("seconds", "unit"), [(5, "seconds"), (500, "minutes"), (50_000, "hours")])
def test_time_has_a_fitting_unit(seconds: float, unit: str) -> None:
    """The power of a long measurement is drawn over hours, that of a short one over seconds."""
    report = report_of(Measurement(7, 1), [], kept(window(1, seconds=seconds)), iso)
    (svg,) = (svg for name, _, svg in plots(report) if name == "power")
    assert f"{unit} since 2027-01-15 08:00:00 UTC" in svg


# --- files --------------------------------------------------------------------------------------------------


def test_csv() -> None:
    """One row per window, with a heading; what is not known is an empty cell, never 0."""
    rows = list(csv.DictReader(io.StringIO(windows_csv(map(asdict, an_experiment().windows)))))
    assert len(rows) == len(an_experiment().windows)
    assert tuple(rows[0]) == COLUMNS
    assert rows[1]["joules"] == "90.0"
    assert rows[1]["output_tokens"] == "50"
    assert (rows[-1]["joules"], rows[-1]["sci_score"], rows[-1]["flags"]) == ("", "", "too_short")


def test_files(tmp_path: Path) -> None:
    """Each file that is named is written, and no other; one that can't be is told."""
    report = an_experiment()
    paths = {kind: tmp_path / f"report.{kind}" for kind in ("json", "csv", "html")}
    assert list(write_report(report, **paths)) == list(paths.values())
    assert TypeAdapter(MeasurementReport).validate_json(paths["json"].read_bytes()) == report
    assert paths["csv"].read_bytes().count(b"\r\n") == len(report.windows) + 1
    assert "<svg" in paths["html"].read_text(encoding="utf-8")
    assert list(write_report(report)) == []
    with pytest.raises(BadSettings, match="can't be written"):
        list(write_report(report, csv=tmp_path / "missing" / "report.csv"))


class StandIn:
    """A client of a registry that has one measurement."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def report(self, measurement_id: int) -> MeasurementReport:
        return an_experiment(measurement_id)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(cli, "RegistryClient", StandIn)
    return lambda *args: CliRunner().invoke(cli.app, ["report", *map(str, args)])


def test_command(run: Callable[..., Any], tmp_path: Path) -> None:
    """`greenprompt report ID` shows the table, and writes the files that it is told to."""
    page = tmp_path / "report.html"
    result = run(42, "--html", page)
    assert result.exit_code == 0
    assert "Measurement 42 on gpu-1" in result.output
    assert f"Written: {page}" in result.output
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_command_wants_an_id(run: Callable[..., Any]) -> None:
    """A measurementId is a positive number."""
    assert run(0).exit_code == 2
