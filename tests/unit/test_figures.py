"""Figures of an experiment: what is summed up, what is not known, and how a terminal shows it."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from rich.console import Console

from deployments.energy import Label
from deployments.figures import LLMFigures, as_csv, llm_figures, spread
from deployments.measure_table import notes, results_table
from registry.api import MeasurementState
from tests.fake_registry_http import CREATED, answer

MEASUREMENT = MeasurementState(
    measurementId=1, machine="gpu-1", flags=["machine_changed"], createdAt=CREATED, requests=[]
)


def line(prompt: str = "1", llm: str = "org/a", **more: Any) -> dict[str, Any]:
    return {
        "llm": llm,
        "prompt": prompt,
        "warmup": False,
        "error": None,
        "machine": "gpu-1",
        "duration_s": 1.5,
        **answer(),
        **more,
    }


def figures(*lines: dict[str, Any], expected: int = 2, llm: str = "org/a") -> LLMFigures:
    return llm_figures(llm, lines, expected=expected, seed=1)


def modeled(score: float) -> dict[str, Any]:
    return answer(score, 2.0, "modeled") | {"sci_low": score / 2, "sci_high": score * 2}


def shown(*rows: LLMFigures, width: int = 80) -> list[str]:
    """Table and notes on a terminal of this width."""
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(results_table(rows))
    for note in notes(rows, MEASUREMENT):
        console.print(note)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert all(len(line) <= width for line in lines)
    return lines


# --- sums --------------------------------------------------------------------------------------------------


def test_spread() -> None:
    """Mean, median and deviation are the usual ones; the interval lies around the mean, and is the seed's."""
    values = [(str(n), float(n)) for n in range(1, 21)]
    made = spread(values, seed=1)
    assert (made.n, made.unknown, made.mean, made.median) == (20, 0, 10.5, 10.5)
    assert made.stdev == pytest.approx(5.916, abs=1e-3)
    assert made.low is not None
    assert made.high is not None
    # By the normal distribution 10.5 ± 1.96 · 5.916 / √20 = 7.9 to 13.1.
    assert made.low == pytest.approx(7.9, abs=0.3)
    assert made.high == pytest.approx(13.1, abs=0.3)
    assert spread(values, seed=1) == made


def test_repetitions_are_not_taken_for_independent() -> None:
    """The same prompts asked ten times make no interval ten times as sure; of one prompt, its answers are drawn."""
    once = spread([(str(n), float(n)) for n in range(10)], seed=1)
    often = spread([(str(n), float(n)) for n in range(10)] * 10, seed=1)
    assert often.low == pytest.approx(once.low)
    assert often.high == pytest.approx(once.high)
    one = spread([("1", 1.0), ("1", 2.0), ("1", 3.0)], seed=1)
    assert one.low is not None
    assert one.low >= 1.0


def test_unknown_is_counted_and_never_zero() -> None:
    """What is not known is in no mean; where nothing is, nor two values are, nothing is made up."""
    some = spread([("1", 2.0), ("2", None)], seed=1)
    assert (some.n, some.unknown, some.mean, some.stdev, some.low, some.high) == (1, 1, 2.0, None, None, None)
    none = spread([("1", None)], seed=1)
    assert (none.n, none.unknown, none.mean, none.median, none.low) == (0, 1, None, None, None)
    assert spread([], seed=1).mean is None


def test_label_is_the_worst() -> None:
    """One estimate makes an LLM's figures estimates, with the mean of their ranges; of no answers nothing is known."""
    made = figures(line(), line("2", **modeled(0.4)))
    assert made.label is Label.MODELED
    assert made.estimate_low is None
    assert figures(line(**modeled(0.4)), line("2", **modeled(0.8))).estimate_high == pytest.approx(1.2)
    assert figures().label is Label.UNAVAILABLE
    holed = figures(line(**modeled(0.4)), line("2", **answer(None, None, "unavailable")))
    assert (holed.label, holed.known_label) == (Label.UNAVAILABLE, Label.MODELED)


def test_warmups_and_others_are_not_in_it() -> None:
    """Warm-ups and other LLMs' answers are passed over, errors and what is missing counted."""
    refused = {"llm": "org/a", "prompt": "2", "warmup": False, "error": {"code": "x"}, "machine": "gpu-1"}
    made = figures(line(), line(warmup=True), line(llm="org/b"), refused, expected=5)
    assert (made.answers, made.errors, made.missing) == (1, 1, 3)
    assert made.spreads["energy_j"].n == 1


def test_scores_of_different_units_make_no_mean() -> None:
    """gCO2eq per token and per request are no one figure; joules stay comparable."""
    made = figures(line(), line("2", unit="request"))
    assert made.unit is None
    assert (made.spreads["gco2eq_per_unit"].mean, made.spreads["gco2eq_per_unit"].unknown) == (None, 2)
    assert made.spreads["energy_j"].mean == 2.0


def test_csv_has_a_row_per_llm() -> None:
    """Every figure has a column; what is not known is empty."""
    rows = list(csv.DictReader(io.StringIO(as_csv([figures(line()), figures(llm="org/b")]))))
    assert [row["llm"] for row in rows] == ["org/a", "org/b"]
    assert (rows[0]["energy_j_mean"], rows[0]["energy_j_stdev"], rows[0]["missing"]) == ("2.0", "", "1")
    assert (rows[1]["gco2eq_per_unit_mean"], rows[1]["gco2eq_per_unit_n"], rows[1]["label"]) == ("", "0", "unavailable")


def test_json_has_the_figures_beside_the_rest() -> None:
    """The summary's JSON names each figure at the top."""
    told = figures(line(flags=["contended"])).as_json()
    assert told["gco2eq_per_unit"]["mean"] == 0.5
    assert (told["flags"], told["label"], told["machines"]) == ({"contended": 1}, "measured", ("gpu-1",))


# --- shown -------------------------------------------------------------------------------------------------


def test_measured_figures_are_shown_plain() -> None:
    """Means with their intervals below, in a unit that needs no exponent, and no mark."""
    text = "\n".join(shown(figures(line(sci_score=1.5e-5), line("2", sci_score=2.5e-5))))
    assert "µgCO2eq" in text
    assert "15 to 25" in text
    assert "measured" in text
    assert "~" not in text
    assert "estimate" not in text


def test_estimates_are_marked() -> None:
    """A figure that rests on an estimate has its mark, the word, and its range in gCO2eq."""
    text = " ".join(shown(figures(line(**modeled(0.4)), line("2", **modeled(0.4)))))
    assert "~400" in text
    assert "~2" in text
    assert "~10" not in text  # tokens are counted
    assert "estimate (modeled), not a measurement; the score may lie between 200 and 800 mg" in text


def test_what_is_not_known_is_said() -> None:
    """Empty, unknown, refused and missing are words, never a zero; wide names are folded, and none is cut."""
    wide = "an-organisation-with-a-long-name/a-model-with-a-very-long-name-Instruct"
    unknown = line("1", llm=wide, **answer(None, None, "unavailable"), machine="gpu-2")
    refused = {"llm": wide, "prompt": "2", "warmup": False, "error": {"code": "x"}, "machine": "gpu-2"}
    lines = shown(figures(unknown, refused, llm=wide), figures(llm="/srv/build/llms/a"), figures(line(), llm="org/a"))
    text = " ".join(lines)
    assert "unknown" in text
    assert "llms/a" in text
    assert "refused prompts: 1" in text
    assert "answers still missing: 2" in text
    assert "answers whose score is not known, and not in the mean: 1" in text
    assert "estimate" not in text
    assert "~" not in text
    assert "from 2 machines, whose figures don't compare: gpu-1, gpu-2" in text
    assert "flags: machine_changed" in text
    assert wide in "".join(each.split()[0] for each in lines if each.strip())


def test_large_figures_have_no_exponent() -> None:
    """Thousands of joules are read as such; whoever has no flags and no measurement is told nothing of them."""
    rows = [figures(line(energy={"total_j": 12345.6}), line("2", energy={"total_j": 12345.6}))]
    assert any("12,346" in line for line in shown(*rows))
    assert not [note for note in notes(rows, None) if "flags" in note]
    flagged = [figures(line(flags=["contended"]), line("2"))]
    assert "org/a: flags: contended (1)" in list(notes(flagged, None))
