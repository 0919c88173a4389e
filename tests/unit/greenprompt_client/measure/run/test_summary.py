"""The summary is made of the final energy windows."""

from __future__ import annotations

import csv
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from greenprompt_client.measure import run as measure_module
from greenprompt_client.measure.results import Results
from registry.accounting.figures import figures_of
from registry.accounting.window_report import WindowReport
from registry.errors import BadSettings
from registry.wire.words import WindowKind
from tests.support.energy_windows import record
from tests.support.fake_registry_http import HttpRegistry
from tests.support.measure_runs import Measure, lines, summary_of


@pytest.mark.parametrize("in_flight", [1, 4, 16])
def test_the_summary_is_that_of_the_final_windows(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, in_flight: int
) -> None:
    """Answers say 2 J each; the final windows have 20, 21 … J. The summary is theirs, and so is the report's figure."""
    registry.window = lambda each: replace(each, joules=20.0 + int(each.window.rpartition("-")[2].lstrip("p")))
    assert measure(llms=["org/a"], repetitions=2, concurrency=in_flight)
    counted = [each for each in registry.windows if each.kind == "prompt" and not each.warmup]
    assert len(counted) == 10
    (llm,) = summary_of(tmp_path / "out")["llms"]
    (figures,) = llm["figures"]
    found, (report,) = figures["joules_per_token"], figures_of(registry.windows)
    assert found["value"] == pytest.approx(sum(each.joules or 0 for each in counted) / 100, rel=1e-9)
    assert found == asdict(report.joules_per_token)
    assert figures["gco2eq_per_unit"] == asdict(report.gco2eq_per_unit)
    assert (found["leases"], found["prompts"], figures["warmups"], llm["provisional"]) == (2, 5, 4, 0)


def test_a_lease_that_a_dead_run_did_not_note_is_in_the_summary(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run dies between a hand-over and its note of it; the lease idles, 30 kJ. The next run ends it and counts it.

    The report has 30,100 J per 50 tokens with idle time: 5 prompts of 20 J and 10 tokens. So has the summary.
    """

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add_lease", dies)
        with pytest.raises(KeyboardInterrupt):
            measure(llms=["org/a"])
    registry._measured(record(1000, WindowKind.IDLE, request_id="r0", joules=30e3))
    assert measure(llms=["org/a"])
    (llm,) = summary_of(tmp_path / "out")["llms"]
    (figures,) = llm["figures"]
    (report,) = figures_of(registry.windows)
    assert figures["with_idle"] == asdict(report.with_idle)
    assert figures["with_idle"]["leases"] == 2
    assert [line["requestId"] for line in lines(tmp_path / "out", "leases.jsonl")] == ["r1", "r0"]


def test_windows_are_kept_once_with_the_name_of_their_prompt(
    measure: Measure, registry: HttpRegistry, tmp_path: Path
) -> None:
    """The folder has every final window, and a table that joins it with the client's prompt."""
    measure(llms=["org/a"])
    ids = [each["window"] for each in lines(tmp_path / "out", "windows.jsonl")]
    assert sorted(ids) == sorted(each.window for each in registry.windows)
    assert len(ids) == 8  # two warm-ups, five prompts, the lease
    with (tmp_path / "out" / "windows.csv").open(newline="") as file:
        table = {row["window"]: row["prompt"] for row in csv.DictReader(file)}
    named = {line["window"]: line["prompt"] for line in lines(tmp_path / "out")}
    assert {window: prompt for window, prompt in table.items() if prompt} == named


def test_late_windows_are_waited_for(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that come some looks later are in the summary."""
    looks = []

    def late(windows: list[WindowReport]) -> list[WindowReport]:
        looks.append(len(windows))
        return windows if len(looks) > 4 else windows[:2]

    registry.on_windows = late
    monkeypatch.setattr(measure_module, "WINDOWS_POLL_S", 0.0)
    assert measure(llms=["org/a"])
    assert summary_of(tmp_path / "out")["complete"]


def test_what_does_not_come_is_provisional_until_the_next_run(
    measure: Measure, registry: HttpRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the limit it is counted and named, and in no figure; the same command fetches it and asks nothing."""
    monkeypatch.setattr(measure_module, "WINDOWS_WAIT_S", 0.0)
    registry.on_windows = lambda windows: windows[:3]
    assert not measure(llms=["org/a"])
    summary = summary_of(tmp_path / "out")
    (llm,) = summary["llms"]
    assert (summary["complete"], llm["provisional"], llm["figures"][0]["prompts"]) == (False, 4, 1)
    assert "4 answers have no final window yet: repeat the command to fetch it." in measure.shown
    path = tmp_path / "out" / "windows.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # as if it was killed while it wrote
    registry.on_windows = lambda windows: windows
    assert measure(llms=["org/a"])
    assert summary_of(tmp_path / "out")["llms"][0]["figures"][0]["prompts"] == 5
    assert len(registry.posted) == 1


def test_a_registry_that_has_forgotten_the_windows(measure: Measure, registry: HttpRegistry, tmp_path: Path) -> None:
    """What can't be fetched is provisional, with the reason; nothing is waited for in vain."""

    def forgotten(windows: list[WindowReport]) -> list[WindowReport]:
        registry.requests.clear()
        return windows

    registry.on_windows = forgotten
    assert not measure(llms=["org/a"], warmup=6)
    assert "Final windows can't be fetched: it says unknown_measurement" in measure.shown


def test_windows_of_another_kind_are_refused(measure: Measure, tmp_path: Path) -> None:
    """A windows.jsonl that no run has written is left as it is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "windows.jsonl").write_text("{}\n")
    with pytest.raises(BadSettings, match="has a line that is not an energy window"):
        measure()
