"""What a measurement's report says: scores, sums, spreads and where they are from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from registry.report import MeasurementReport, report_of, spread, t_975
from registry.state import EnergyWindow, KeptWindow, Measurement, Request, WindowKind
from tests.energy_windows import BEGUN_S, GPU, an_experiment, iso, kept, request, window

MEASUREMENT = Measurement(7, 1, created_s=BEGUN_S, flags=("engine_restarted",), versions='{"vllm":"0.32.0"}')


TINY = (request("r-1", "org/tiny"),)


def reported(*windows: EnergyWindow, requests: tuple[Request, ...] = TINY) -> MeasurementReport:
    return report_of(MEASUREMENT, requests, kept(*windows), iso)


def test_score_is_what_all_units_caused() -> None:
    """An LLM's score is (O + M) per R of all its prompts together: the long ones count by their tokens."""
    (llm,) = reported(window(1, joules=100.0, units=50), window(2, joules=300.0, units=100)).llms
    o_g, m_g = 400.0 / 3.6e6 * 329.7, 2 * 37.5 * 2 / 3600
    assert llm.score.value == pytest.approx((o_g + m_g) / 150)
    assert (llm.score.unit, llm.score.label, llm.score.reason) == ("gCO2eq/output_token", "measured", None)
    assert (llm.score.low, llm.score.high) == (None, None)
    assert (llm.prompts, llm.units) == (2, 150)


def test_an_estimate_has_its_range_and_its_label() -> None:
    """One modelled prompt makes the score an estimate, with a range; the measured ones are in it as they are."""
    (llm,) = reported(window(1, label="modeled"), window(2)).llms
    assert llm.score.label == "modeled"
    assert llm.score.value is not None
    assert llm.score.low == pytest.approx(llm.score.value * 0.75)
    assert llm.score.high == pytest.approx(llm.score.value * 1.5)


def test_a_hole_makes_no_score_and_says_why() -> None:
    """One prompt without a figure leaves the score and the sum unknown, with the reason; the spread is of the rest."""
    report = reported(window(1), window(2, joules=None, flags=("too_short",)), window(3))
    (llm,) = report.llms
    assert (llm.score.value, llm.score.label) == (None, "unavailable")
    assert llm.score.reason == "1 of 3 windows have no score in gCO2eq/output_token (too_short)"
    assert (llm.score_per_prompt.n, llm.score_per_prompt.unknown) == (2, 1)
    assert llm.score_per_prompt.reason == llm.score.reason
    assert (report.costs["active"].joules, report.costs["active"].o_g) == (None, None)
    assert report.costs["active"].label == "unavailable"
    assert report.costs["active"].reason == "1 of 3 windows lack joules or gCO2eq (too_short)"
    assert report.costs["active"].m_g is not None


def test_joules_without_a_grid() -> None:
    """Without a carbon intensity there are joules and no score."""
    report = reported(window(1, grams=False, flags=("no_grid",)))
    (llm,) = report.llms
    assert llm.score.value is None
    assert llm.joules_per_token.mean == 2.0
    assert llm.score_per_prompt.mean is None
    assert (report.costs["active"].joules, report.costs["active"].o_g) == (100.0, None)
    assert report.coefficients == report.coefficients[:1]


def test_a_prompt_without_tokens_has_no_score() -> None:
    """What gave no token is in the sums, and in no figure per token."""
    (llm,) = reported(window(1, units=0)).llms
    assert llm.score.value is None
    assert llm.joules_per_token.n == 0
    assert llm.costs["active"].joules == 100.0


def test_nothing_yet() -> None:
    """A measurement without any window has a report in which nothing is known."""
    report = reported()
    (llm,) = report.llms
    assert (llm.score.value, llm.score.reason) == (None, "there are no such windows")
    assert llm.units is None
    assert llm.joules_per_token.reason == "there are no such windows"
    assert report.costs["lease"].joules is None
    assert report.methods == dict.fromkeys("EIMR", "unavailable")
    assert report.machines == ("gpu-1",)
    assert report.coefficients == ()


def test_idle_time_is_in_the_lease() -> None:
    """The score of the lease has its idle time in it; starts of the LLM are told apart from both."""
    report = an_experiment()
    small, large = report.llms
    assert small.lease_score.value is not None
    assert small.score.value is not None
    assert small.lease_score.value > small.score.value
    costs = small.costs
    assert costs["lease"].joules == pytest.approx((costs["active"].joules or 0) + (costs["idle"].joules or 0))
    assert costs["load"].joules == 2500.0
    assert costs["wake"].windows == 0
    assert large.lease_score.label == "modeled"


def test_time_is_counted_once() -> None:
    """Of two prompts at the same time each has its share of it; a wrapper that tells no share had all of it."""
    together = window(1, seconds=4, reserved_s=2.0), window(2, seconds=4, reserved_s=2.0)
    assert reported(*together, window(3, seconds=1, reserved_s=None)).costs["active"].seconds == 5.0


def test_units_are_not_mixed() -> None:
    """A prompt that was scored in another functional unit takes the score, and is left out of the spread."""
    (llm,) = reported(window(1), window(2, unit="word")).llms
    assert (llm.score.value, llm.score.unit) == (None, "gCO2eq/output_token")
    assert (llm.score_per_prompt.n, llm.score_per_prompt.unknown) == (1, 1)


def test_llms_that_differ_in_arguments_are_told_apart() -> None:
    """Requests with one llmconfig are one LLM; another llmconfig is another, in the order asked."""
    again, other = request("r-2", "org/tiny", 2), replace(request("r-3", "org/tiny", 3), llmconfig='{"a":1}')
    first = request("r-1", "org/tiny", model_revision="abc")
    report = reported(window(1), window(2, request_id="r-2"), requests=(first, again, other))
    assert [(llm.requestIds, llm.prompts) for llm in report.llms] == [(("r-1", "r-2"), 2), (("r-3",), 0)]
    assert report.llms[0].modelRevisions == ("abc",)


def test_methods_are_the_worst_of_all() -> None:
    """E, I, M and R are as good as in the worst window; what a wrapper does not say is unavailable."""
    methods = {"E": "measured", "I": "sourced", "M": "sourced"}
    report = reported(window(1), window(2, label="modeled"), window(3, methods=methods))
    assert report.methods == {"E": "modeled", "I": "sourced", "M": "sourced", "R": "unavailable"}


def test_what_it_was_reckoned_with() -> None:
    """Coefficients come with unit, range and source; the boundary with what nothing covers."""
    report = reported(window(1, flags=("dram_not_covered",)), window(2), window(3, grid=None, pue=None))
    grid, pue, embodied = report.coefficients
    assert (grid.value, grid.unit, grid.source) == (329.7, "gCO2eq/kWh", "ecologits 0.11.1 DEU")
    assert (pue.value, pue.unit) == (1.2, "1")
    assert (embodied.value, embodied.low, embodied.high) == (37.5, 16.7, 49.0)
    assert report.boundary == (GPU, "package-0")
    assert report.not_covered == ("dram",)
    assert report.window_flags == {"dram_not_covered": 1}
    assert report.flags == ("engine_restarted",)
    assert report.versions == {"vllm": "0.32.0"}
    assert report.gpu_uuids == ("GPU-1",)


def test_a_window_that_belongs_to_no_request_is_told() -> None:
    """A start of an LLM that nobody waited for, on a machine that is gone, is a row as well."""
    row = KeptWindow(window(1, WindowKind.LOAD, request_id=None), None, None)
    (told,) = report_of(MEASUREMENT, (), [row], iso).windows
    assert (told.llm, told.requestId, told.machine, told.kind) == (None, None, None, "load")


def test_a_record_may_be_empty() -> None:
    """A wrapper that told nothing but the sum is reported with nothing but the sum."""
    report = reported(replace(window(1), detail="{}"))
    assert report.windows[0].joules == 100.0
    assert report.windows[0].units is None
    assert report.llms[0].score.unit == "gCO2eq/unit"
    assert report.llms[0].units is None


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.7062), (9, 2.2622), (10, 2.2281), (15, 2.1314), (30, 2.0423), (100, 1.9840), (10**6, 1.95997)],
)
def test_students_t(degrees: int, t: float) -> None:
    """The 97.5 % points are those of the tables."""
    assert t_975(degrees) == pytest.approx(t, abs=2e-4)


def test_spread() -> None:
    """Mean, median, standard deviation and interval, by hand: of 2, 4, 4, 10 the mean is 5 ± 3.182 · 3.464 / 2."""
    lies = spread([4.0, 2.0, None, 10.0, 4.0], "J", "measured", "why")
    assert (lies.n, lies.unknown, lies.mean, lies.median, lies.min, lies.max) == (4, 1, 5.0, 4.0, 2.0, 10.0)
    assert lies.stdev == pytest.approx(math.sqrt(12))
    assert lies.ci95_high == pytest.approx(5 + 3.1824 * math.sqrt(12) / 2)
    assert lies.ci95_low == pytest.approx(5 - 3.1824 * math.sqrt(12) / 2)
    alone = spread([4.0], "J", "measured", None)
    assert (alone.mean, alone.stdev, alone.ci95_low, alone.ci95_high) == (4.0, None, None, None)


def test_it_crosses_the_wire() -> None:
    """The report comes back from its JSON as it was."""
    wire = TypeAdapter(MeasurementReport)
    report = an_experiment()
    assert wire.validate_json(wire.dump_json(report)) == report
