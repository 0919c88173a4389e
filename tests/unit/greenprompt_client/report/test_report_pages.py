"""A measurement's report as people get it: on a terminal, as a page, as a table of windows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from rich.console import Console
from typer.testing import CliRunner

from greenprompt_client.cli import app as cli_app
from greenprompt_client.cli import main as cli
from greenprompt_client.notation import figure, in_range
from greenprompt_client.report.files import write_report
from greenprompt_client.report.html import POINTS_SHOWN, ROWS_SHOWN, plots, report_html
from greenprompt_client.report.table import coefficient_text, names, report_table
from registry.accounting.report import Coefficient, MeasurementReport
from registry.accounting.report_csv import COLUMNS, windows_csv
from registry.accounting.window_report import WindowReport
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow
from registry.core.records import Measurement, Request
from registry.errors import BadSettings
from registry.wire.words import RequestStatus, WindowKind
from tests.support.energy_windows import BEGUN_S, an_experiment, iso, kept, record, report_of, request, window

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


def test_a_figure_that_is_no_total_says_so() -> None:
    """The known part of a sum is marked as such, and rounded down: of 81.66 J it is at least 81.6, and not 81.7.

    With bounds of 80.4 to 82.9 half is 1.25, one place: 81.6, too.
    """
    assert figure(1234.5, "modeled", missing=2) == "≥ ~1,230"
    assert figure(81.66, "measured", missing=1) == "≥ 81.6"
    assert in_range(81.66, 80.4, 82.9, "measured", missing=1) == "≥ 81.6 (80.4 to 82.9)"
    assert in_range(None, None, None, "measured", missing=1) == "-"


positive = st.floats(1e-12, 1e12)


@given(positive, positive, positive)
@example(12.17, 0.3, 6580.0)
@example(0.2116, 0.0, 1526.0)
def test_a_figure_is_not_rounded_away_by_its_interval(value: float, below: float, above: float) -> None:
    """However wide the interval is, the figure has two digits, and the printed bounds contain the true ones."""
    low, high = max(value - below, 0.0), value + above
    text = in_range(value, low, high, "modeled").replace(",", "").replace("~", "")
    middle, _, rest = text.partition(" (")
    assert float(middle) == pytest.approx(value, rel=0.0501)
    if rest:
        least, most = (float(bound) for bound in rest.removesuffix(")").split(" to "))
        assert least <= low or least == pytest.approx(low, rel=1e-14)
        assert most >= high or most == pytest.approx(high, rel=1e-14)


@pytest.mark.parametrize(
    ("low", "high", "text"), [(16.74, 49.01, "~37.5 (16.7 to 49.1) g"), (16.7, 49.0, "~37.5 (16.7 to 49) g")]
)
def test_the_range_of_a_coefficient_is_rounded_outwards(low: float, high: float, text: str) -> None:
    """Of 16.74 to 49.01 three digits are 16.7 to 49.1; rounded to the nearest, 49.01 would lie outside of 49."""
    assert coefficient_text(Coefficient("embodied", 37.5, "g", None, low, high)) == text


@pytest.mark.parametrize(
    ("value", "low", "high", "label", "text"),
    [
        (1.0, 0.5, 2.0, "modeled", "~1 (0.5 to 2)"),
        (1.0, None, None, "measured", "1"),
        (None, 1.0, 2.0, "measured", "-"),
        (1.94567, 1.87123, 2.04321, "measured", "1.946 (1.871 to 2.044)"),
        (1.94567, 1.2, 3.7, "measured", "1.9 (1.2 to 3.7)"),
        (12345.6, 11100.0, 13400.0, "measured", "12,300 (11,100 to 13,400)"),
        (1.3456e-05, 1.21e-05, 1.49e-05, "sourced", "~1.35e-05 (1.21e-05 to 1.49e-05)"),
        (2.0, 2.0, 2.0, "measured", "2"),
        (100.0, 99.951, 100.049, "measured", "100 (99.951 to 100.049)"),
        (100.0, 87.4, 113.6, "measured", "100 (87 to 114)"),
        (-1.0, -12.4, 10.4, "measured", "-1 (-13 to 11)"),
    ],
)
def test_a_figure_has_the_digits_that_its_interval_allows(
    value: float | None, low: float | None, high: float | None, label: str, text: str
) -> None:
    """Half the interval has two digits, and the figure as many places; what has no interval is shown alone.

    Of 1.87 to 2.04 half is 0.086: three places. Of 1.2 to 3.7 it is 1.25: one place. Bounds are rounded outwards: of
    87.4 to 113.6 half is 13.1, no place, and 87 to 114 contain them, where 12.4 below 0 would be printed as 12.
    """
    assert in_range(value, low, high, label) == text


# --- terminal -----------------------------------------------------------------------------------------------


def test_terminal() -> None:
    """Scores by LLM, costs by use, how it was found, and what is not known with the reason."""
    text = shown(an_experiment())
    assert "Measurement 7 on gpu-1: 2 LLM(s), 17 prompt(s)" in text
    assert "computed with the SCI formula" in text
    assert "conform" not in text
    assert re.search(r"org/small +8 +~595 +~913 +~595 +1\.95 +97\.5 +2 +measured\n", text)
    assert re.search(r"org/large +9 +~687 +~1,010 +~687 +~2\.95 +~148 +2 +estimate\n", text)
    assert re.search(r"lease +33 +50 +≥ ~2,920 .* estimate\n", text)
    assert "~330 gCO2eq/kWh  (ecologits 0.11.1 DEU)" in text
    assert "org/large: score leaves out 1: 1 of 9 windows have no known amount (too_short)" in text
    assert "active: 1 of 17 windows lack joules or gCO2eq (too_short); 2 s without joules" in text
    assert "org/small: no 95 % interval: too few prompts: 8 (at least 10)" in text
    assert "org/small: score with idle time: no 95 % interval: too few leases: 1 (at least 10)" in text
    assert "~: not measured" in text


def full(*more: EnergyWindow, requests: list[Request] | None = None) -> MeasurementReport:
    """Twelve prompts in each of three leases of one LLM, with full records."""
    windows = [
        record(n, request_id=f"r-{n % 3}", begun_s=BEGUN_S + 3 * n, joules=100.0 + n // 3, prompt_id=f"p{n // 3}")
        for n in range(36)
    ]
    requests = requests or [request(f"r-{n}", "org/tiny", n) for n in range(3)]
    return report_of(Measurement(7, 1), requests, kept(*windows, *more), iso)


def test_intervals_and_batches_are_shown() -> None:
    """A figure has its 95 % interval below it, and a finished lease its figure of all prompts as one, with bounds."""
    text = shown(full(record(99, WindowKind.LEASE, request_id="r-1", joules=1000.0, units=500)), width=120)
    assert re.search(r"\n +[\d.]+ to [\d.]+ ", text)
    assert re.search(r"org/tiny +1 +1 \(at most 1\) +2 +~", text)
    assert "within 1.996 to 2.004" in text


def test_a_batch_over_ten_leases_has_its_interval() -> None:
    """With enough leases the interval stands below the bounds."""
    leases = [record(n, WindowKind.LEASE, request_id=f"r-{n}", joules=1000.0 + n, units=500) for n in range(10)]
    requests = [request(f"r-{n}", "org/tiny", n) for n in range(10)]
    report = report_of(Measurement(7, 1), requests, kept(*leases), iso)
    assert "95 %: " in shown(report)
    assert "95 %: " in report_html(report)


def test_machines_have_rows_of_their_own() -> None:
    """An LLM on two machines has a row for each, and it is said that they don't compare."""
    rows = [KeptWindow(record(1), "gpu-1", None), KeptWindow(record(2), "gpu-2", None)]
    report = report_of(Measurement(7, 1), [request("r-1", "org/tiny")], rows, iso)
    text = shown(report)
    assert "org/tiny on gpu-2" in text.replace("\n", " ")
    assert "Figures of different machines are not comparable, and not averaged: gpu-1, gpu-2." in text
    page = report_html(report)
    assert "org/tiny on gpu-2" in page


def test_what_is_not_finished_is_said() -> None:
    """A lease that still runs, and time that is lost, stand above all figures, on the page too."""
    running = request("r-1", "org/tiny", deployed_s=BEGUN_S, status=RequestStatus.DEPLOYED)
    dead = request("r-2", "org/tiny", 2, deployed_s=BEGUN_S, ended_s=BEGUN_S + 5, status=RequestStatus.FAILED)
    report = report_of(Measurement(7, 1), [running, dead], kept(record(1, warmup=True)), iso)
    for text in (shown(report), report_html(report)):
        assert "Not finished: more windows will arrive, because 1 lease(s) have not ended: r-1" in text
        assert "Lost: 5 s of r-2 are in no window (wrapper_died)" in text
        assert "0 prompt(s) and 1 warm-up(s)" in text
    assert "org/tiny: no prompt has a final window." in shown(report)


def test_terminal_without_estimates() -> None:
    """Where all joules are measured, they are shown plain; grams and factors have their mark all the same."""
    windows = kept(window(1), window(2, WindowKind.LEASE, flags=("dram_not_covered",)))
    text = shown(report_of(Measurement(7, 1, flags=("machine_changed",)), [request("r-1", "org/tiny")], windows, iso))
    assert re.search(r"active +1 +2 +100 +~0\.00916 +~0\.0208 +measured\n", text)
    assert re.search(r"I: grid intensity +~330 gCO2eq/kWh", text)
    assert re.search(r"M: embodied carbon +~37\.5 \(16\.7 to 49\) gCO2eq/h", text)
    assert re.search(r"E: PUE +~1\.2", text)
    assert "flags: machine_changed" in text
    assert "without a counter: dram" in text


def test_terminal_with_nothing() -> None:
    """A measurement of which nothing is known is shown as that, in 80 columns too."""
    text = shown(NOTHING, width=80)
    assert "org/tiny: there are no windows" in text
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
    assert "partly unknown: active" in page
    assert 'class="estimate">estimate' in page
    assert "~ estimate" in {name: svg for name, _, svg in plots(an_experiment())}["joules"]


def test_page_with_nothing() -> None:
    """Where nothing is known there is no plot, and the page says so."""
    page = report_html(NOTHING)
    assert "<svg" not in page
    assert "There is nothing to plot" in page
    assert "there are no windows" in page


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
    assert report.llms[0].figures[0].joules_per_token.n == count


@pytest.mark.parametrize(("seconds", "unit"), [(5, "seconds"), (500, "minutes"), (50_000, "hours")])
def test_time_has_a_fitting_unit(seconds: float, unit: str) -> None:
    """The power of a long measurement is drawn over hours, that of a short one over seconds."""
    report = report_of(Measurement(7, 1), [], kept(window(1, seconds=seconds)), iso)
    (svg,) = (svg for name, _, svg in plots(report) if name == "power")
    assert f"{unit} since 2027-01-15 08:00:00 UTC" in svg


# --- files --------------------------------------------------------------------------------------------------


def test_csv() -> None:
    """One row per window, with a heading; what is not known is an empty cell, never 0."""
    rows = list(csv.DictReader(io.StringIO(windows_csv(an_experiment().windows))))
    assert len(rows) == len(an_experiment().windows)
    assert tuple(rows[0]) == COLUMNS
    assert rows[1]["joules"] == "90.0"
    assert rows[1]["output_tokens"] == "50"
    assert (rows[-1]["joules"], rows[-1]["sci_score"], rows[-1]["flags"]) == ("", "", "too_short")


def test_csv_of_a_later_page_has_no_heading() -> None:
    """Pages that are written one after another are one table."""
    windows = an_experiment().windows
    whole = windows_csv(windows)
    assert windows_csv(windows[:1]) + windows_csv(windows[1:], heading=False) == whole


def test_csv_can_be_added_up() -> None:
    """A prompt of 60 J, 20 J idle and the lease window of both: rows that add up are 80 J, not 160."""
    windows = kept(
        record(1, joules=60.0), record(2, WindowKind.IDLE, joules=20.0), record(3, WindowKind.LEASE, joules=80.0)
    )
    report = report_of(Measurement(7, 1), [request("r-1", "org/tiny")], windows, iso)
    rows = list(csv.DictReader(io.StringIO(windows_csv(report.windows))))
    assert sum(float(row["joules"]) for row in rows if row["adds_up"] == "True") == 80.0
    assert (rows[0]["gpu_j"], rows[0]["low_j"], rows[0]["systematic_j"], rows[0]["warmup"]) == (
        "54.0",
        "58.0",
        "0.5",
        "False",
    )
    assert (rows[0]["status"], rows[0]["in_flight_max"], rows[0]["answer_id"]) == ("answered", "1", "chatcmpl-1")


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

    asked_for: ClassVar[list[str | None]] = []
    """The tenants in whose name it was asked."""

    def __init__(self, url: str, *, tenant: str | None, connect_for_s: float, **_: object) -> None:
        self.url, self.connect_for_s = url, connect_for_s
        self.asked_for.append(tenant)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def report(self, measurement_id: int) -> MeasurementReport:
        return replace(an_experiment(measurement_id), windows=())

    def windows(self, measurement_id: int, *, detail: bool) -> Iterator[WindowReport]:
        for each in an_experiment(measurement_id).windows:
            yield each if detail else replace(each, detail=None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(cli_app, "RegistryClient", StandIn)
    return lambda *args: CliRunner().invoke(cli.app, ["report", *map(str, args)])


def test_command(run: Callable[..., Any], tmp_path: Path) -> None:
    """`greenprompt report ID` shows the table, and writes the files that it is told to."""
    page = tmp_path / "report.html"
    result = run(42, "--html", page)
    assert result.exit_code == 0
    assert "Measurement 42 on gpu-1" in result.output
    assert f"Written: {page}" in result.output
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_command_of_another_tenant(run: Callable[..., Any]) -> None:
    """Measurements are known by tenant and id: the report of another tenant's is asked for in its name."""
    StandIn.asked_for.clear()
    assert run(42, "--tenant", "lab").exit_code == run(42).exit_code == 0
    assert StandIn.asked_for == ["lab", None]


def test_command_wants_an_id(run: Callable[..., Any]) -> None:
    """A measurementId is a positive number."""
    assert run(0).exit_code == 2
