"""The summary of an experiment: made of final windows, with what is provisional, refused or missing counted."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from greenprompt_client.measure.figures import LLMSummary, as_csv, summarized
from greenprompt_client.measure.table import notes, results_table
from registry.accounting.window_report import WindowReport, window_report
from registry.contract.windows import EnergyWindow
from registry.wire.schemas import MeasurementState
from registry.wire.words import WindowKind
from tests.support.energy_windows import iso, kept, record, request
from tests.support.fake_registry_http import CREATED, answer

MEASUREMENT = MeasurementState(
    measurementId=1, machine="gpu-1", flags=["machine_changed"], createdAt=CREATED, requests=[]
)


def line(window: str | None = None, prompt: str = "1", llm: str = "org/a", **more: Any) -> dict[str, Any]:
    about = {"llm": llm, "prompt": prompt, "warmup": False, "error": None, "machine": "gpu-1", "request_id": "r-1"}
    return about | answer() | ({} if window is None else {"window": window}) | more


def rows(*windows: EnergyWindow) -> list[WindowReport]:
    return [window_report(row, request("r-1", "org/a"), iso) for row in kept(*windows)]


def summary(lines: list[dict[str, Any]], *windows: EnergyWindow, expected: int = 2, llm: str = "org/a") -> LLMSummary:
    return summarized(llm, lines, rows(*windows), expected=expected)


def shown(*summaries: LLMSummary, width: int = 100) -> str:
    """Tables and notes on a terminal of this width."""
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(results_table(summaries))
    for note in notes(summaries, MEASUREMENT):
        console.print(note, soft_wrap=True)
    return out.getvalue()


# --- what it is made of -------------------------------------------------------------------------------------


def test_figures_are_those_of_the_final_windows() -> None:
    """An answer said 2 J for 10 tokens; its final window says 20 J: the summary says 2 J per token."""
    found = summary([line("process 1-p1")], record(1, joules=20.0, units=10), expected=1)
    assert found.figures[0].joules_per_token.value == 2.0
    assert (found.answers, found.provisional, found.complete) == (1, 0, True)


def test_what_has_no_final_window_is_counted_and_left_out() -> None:
    """Of three answers one has its window: the other two are provisional, and in no figure."""
    lines = [line(f"process 1-p{n}", str(n)) for n in (1, 2, 3)]
    found = summary(lines, record(1, joules=20.0, units=10), expected=3)
    assert (found.provisional, found.complete) == (2, False)
    assert found.figures[0].joules_per_token.n == 1
    assert "org/a: provisional: 2 of 3 answers have no final window yet, and are in no figure." in shown(found)


def test_an_answer_without_a_window_is_final_with_its_lease() -> None:
    """A wrapper of an earlier version names no window: once the lease's own is there, all of its prompts' are."""
    assert summary([line()], record(1), expected=1).provisional == 1
    assert summary([line()], record(1), record(2, WindowKind.LEASE), expected=1).provisional == 0


def test_warm_ups_and_others_are_not_in_it() -> None:
    """Warm-ups and other LLMs' answers are passed over, errors and what is missing counted."""
    refused = line("process 1-p2", "2", error={"code": "x"})
    lines = [line("process 1-p1"), line("x", warmup=True), line("y", llm="org/b"), refused]
    found = summary(lines, record(1), expected=5)
    assert (found.answers, found.errors, found.missing, found.provisional) == (1, 1, 3, 0)


def test_csv_has_a_row_per_llm_and_machine() -> None:
    """Every figure has its columns; what is not known is empty."""
    one = summary([line("process 1-p1")], record(1), record(2, WindowKind.LEASE, units=50))
    two = summarized("org/b", [], [*rows(record(1)), replace(rows(record(2))[0], machine="gpu-2")], expected=1)
    none = summarized("org/c", [], [], expected=1)
    found = list(csv.DictReader(io.StringIO(as_csv([one, two, none]))))
    assert [(row["llm"], row["machine"]) for row in found] == [
        ("org/a", "gpu-1"),
        ("org/b", "gpu-1"),
        ("org/b", "gpu-2"),
        ("org/c", ""),
    ]
    first = found[0]
    assert (first["joules_per_token_value"], first["joules_per_token_low"], first["missing"]) == ("2.0", "", "1")
    assert (first["batch_joules_per_token_value"], first["batch_in_flight_max"]) == ("2.0", "1")
    assert (found[3]["joules_per_token_value"], found[1]["batch_leases"]) == ("", "")


# --- shown -------------------------------------------------------------------------------------------------


def test_measured_joules_are_shown_plain_and_scores_are_not() -> None:
    """Joules of a counter have no mark; a score rests on published factors and has one."""
    text = shown(summary([line("process 1-p1")], record(1), expected=1))
    assert "~600" in text
    assert " 2 " in text
    assert "~2 " not in text
    assert "µgCO2eq" in text.replace("\n", "")
    assert "measured" in text


def test_estimates_are_marked() -> None:
    """Joules that rest on an estimate have their mark and the word."""
    text = shown(summary([line("process 1-p1")], record(1, label="modeled"), expected=1))
    assert "~2" in text
    assert "~100" in text
    assert "estimate" in text


def test_what_is_not_known_is_said() -> None:
    """Refused, missing and unknown are words, never a zero; wide names are folded, and none is cut."""
    wide = "an-organisation-with-a-long-name/a-model-with-a-very-long-name-Instruct"
    lines = [line("process 1-p1", llm=wide), line("process 1-p2", "2", llm=wide, error={"code": "x"})]
    unknown = summary(lines, record(1, joules=None, flags=("too_short",)), expected=3, llm=wide)
    text = shown(unknown, summary([], llm="/srv/build/llms/a"))
    assert "refused prompts: 1" in text
    assert "answers still missing: 1" in text
    assert f"{wide}: score is not known: 1 of 1 windows have no known amount (too_short)" in text
    assert "llms/a: no final window has arrived, so no figure is known." in text
    assert "flags: too_short (1)" in text
    assert "The measurement's flags: machine_changed" in text
    assert not list(notes([], None))[2:]


def test_large_figures_have_no_exponent() -> None:
    """Thousands of joules are read as such, with the digits that their bounds allow."""
    found = summary([line("process 1-p1")], record(1, joules=12345.6, resolution_j=5.0), expected=1)
    assert "12,345.6" in shown(found)
