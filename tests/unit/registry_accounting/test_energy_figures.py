"""From final windows to the figures of an LLM: what counts, what is left out, and how sure a figure is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from greenprompt_client.figures_table import problems
from registry.accounting.estimate import Sample, estimate
from registry.accounting.figures import BatchFigures, Figure, MachineFigures, figures_of
from registry.accounting.window_report import WindowReport, window_report
from registry.contract.windows import EnergyWindow
from registry.wire.words import WindowKind
from tests.support.energy_windows import BEGUN_S, EMBODIED, FULL_GRID, iso, kept, record, request, window

SOURCED = {"E": "measured", "I": "sourced", "M": "sourced", "R": "measured"}


def rows(*windows: EnergyWindow, machine: str = "gpu-1") -> list[WindowReport]:
    return [
        replace(window_report(row, request("r-1", "org/tiny"), iso), machine=machine, detail=None)
        for row in kept(*windows)
    ]


def figures(*windows: EnergyWindow) -> MachineFigures:
    (found,) = figures_of(rows(*windows))
    return found


def named(number: int, prompt: str, **more: Any) -> EnergyWindow:
    """A prompt's window with the client's name of the prompt."""
    return record(number, **more, prompt_id=prompt)


# --- what counts --------------------------------------------------------------------------------------------


def test_the_headline_is_the_ratio_of_sums() -> None:
    """100 J for 50 tokens and 300 J for 100: 400 / 150 = 2.67 J per token; the mean of 2 and 3 stands beside it."""
    found = figures(record(1), record(2, joules=300.0, units=100)).joules_per_token
    assert found.value == pytest.approx(400 / 150)
    assert found.mean_of_ratios == 2.5
    assert (found.unit, found.label, found.reason, found.left_out) == ("J/output_token", "measured", None, 0)


def test_warm_ups_are_in_no_figure() -> None:
    """A warm-up that cost ten times as much changes nothing but the score with idle time; it is counted."""
    found = figures(record(1, joules=1000.0, warmup=True), record(2))
    assert found.joules_per_token.value == 2.0
    assert (found.prompts, found.warmups, found.unmarked, found.units, found.output_tokens) == (1, 1, 0, 50, 50)
    assert found.with_idle.n == 2
    assert figures(window(1)).unmarked == 1


def test_a_refused_prompt_adds_joules_and_no_unit() -> None:
    """100 J for 50 tokens and 10 J for a refused prompt: 110 / 50 = 2.2 J per token, and 110 J per prompt."""
    tokens = {"prompt": 0, "cached": 0, "output": 0}
    found = figures(record(1), record(2, joules=10.0, units=0, tokens=tokens, status="refused"))
    assert found.joules_per_token.value == pytest.approx(2.2)
    assert found.joules_per_prompt.value == 110.0
    assert found.seconds_per_prompt.value == 2.0
    grams = found.gco2eq_per_unit
    assert grams.value == pytest.approx((110 / 3.6e6 * 329.7 + 2 * 37.5 * 2 / 3600) / 50)
    assert grams.left_out == 0


def test_a_prompt_with_unknown_units_is_left_out_and_counted() -> None:
    """A plain stream tells no tokens: neither its joules nor its tokens are in the score, which the others have."""
    found = figures(record(1), record(2, joules=70.0, units=None, tokens=None, flags=("tokens_unknown",)))
    assert found.joules_per_token.value == 2.0
    assert (found.joules_per_token.left_out, found.gco2eq_per_unit.left_out) == (1, 1)
    assert found.gco2eq_per_unit.value is not None
    assert found.gco2eq_per_unit.reason == "1 of 2 windows have unknown units (tokens_unknown)"
    assert found.joules_per_prompt.value == 85.0


def test_a_prompt_without_joules_is_left_out_and_counted() -> None:
    """One `too_short` window takes no figure from the others, and a label that is theirs."""
    found = figures(record(1), record(2, joules=None, flags=("too_short",)))
    assert (found.joules_per_token.value, found.joules_per_token.label) == (2.0, "measured")
    assert found.joules_per_token.reason == "1 of 2 windows have no known amount (too_short)"
    assert found.flags == {"too_short": 1}


def test_nothing_is_known_of_nothing() -> None:
    """No window, no unit, or no record worth the name: no figure, and a reason."""
    assert figures_of([]) == ()
    refused = figures(record(1, units=0, tokens={"output": 0}, status="refused"))
    assert (refused.joules_per_token.value, refused.joules_per_token.reason) == (None, "no unit was produced")
    assert refused.seconds_per_prompt.reason == "there are no such windows"
    assert (refused.joules_per_token.label, refused.joules_per_token.bound_low) == ("unavailable", None)
    empty = figures(replace(window(1), detail="{}"))
    assert (empty.gco2eq_per_unit.value, empty.gco2eq_per_unit.unit) == (None, "gCO2eq/unit")
    assert (empty.units, empty.output_tokens) == (None, None)


def test_scores_of_different_units_make_no_figure() -> None:
    """gCO2eq per token and per request are no one figure; joules stay comparable."""
    found = figures(record(1), record(2, unit="request", units=1, tokens={"output": 50}))
    assert (found.gco2eq_per_unit.value, found.gco2eq_per_unit.left_out) == (None, 2)
    assert found.joules_per_token.value == 2.0


def test_machines_are_not_averaged_over() -> None:
    """The same LLM on two machines has two figures."""
    found = figures_of(rows(record(1)) + rows(record(2, joules=300.0), machine="gpu-2"))
    assert [(each.machine, each.joules_per_token.value) for each in found] == [("gpu-1", 2.0), ("gpu-2", 6.0)]


# --- estimates ----------------------------------------------------------------------------------------------


def test_a_score_is_never_measured() -> None:
    """Joules may be measured; grams rest on published factors."""
    found = figures(record(1))
    assert (found.joules_per_token.label, found.gco2eq_per_unit.label) == ("measured", "sourced")
    assert figures(record(1, label="modeled")).gco2eq_per_unit.label == "modeled"


def test_estimates_that_are_not_allowed_make_no_score() -> None:
    """In production two of three prompts are shares: no score is made of the third alone, which chance has picked."""
    shares = [record(n, label="modeled", flags=("estimates_not_allowed",)) for n in (1, 2)]
    found = figures(*shares, record(3)).gco2eq_per_unit
    assert (found.value, found.low, found.bound_high, found.label) == (None, None, None, "unavailable")
    assert found.reason is not None
    assert found.reason.startswith(
        "2 of 3 windows are estimates, which are not allowed (estimates_not_allowed); known for"
    )
    assert figures(*shares).joules_per_token.label == "modeled"


def test_energy_and_embodied_carbon_stand_apart() -> None:
    """O = 100 J · 329.7 g/kWh, between 98 J · 280 and 102 J · 380; M = 2 s of 37.5 g/h, between 16.7 and 49."""
    found = figures(record(1))
    o_g, m_g = found.operational_per_unit, found.embodied_per_unit
    assert o_g.value == pytest.approx(100 / 3.6e6 * 329.7 / 50)
    assert (o_g.bound_low, o_g.bound_high) == pytest.approx((98 / 3.6e6 * 280 / 50, 102 / 3.6e6 * 380 / 50))
    assert m_g.value == pytest.approx(37.5 * 2 / 3600 / 50)
    assert (m_g.bound_low, m_g.bound_high) == pytest.approx((16.7 * 2 / 3600 / 50, 49 * 2 / 3600 / 50))
    assert found.gco2eq_per_unit.value == pytest.approx((o_g.value or 0) + (m_g.value or 0))
    assert {o_g.label, m_g.label} == {"sourced"}
    without = figures(record(1, embodied=None))
    assert (without.embodied_per_unit.value, without.gco2eq_per_unit.value) == (None, None)
    assert without.operational_per_unit.value == o_g.value


# --- how sure -----------------------------------------------------------------------------------------------


def test_bounds_hold_for_these_very_prompts() -> None:
    """Two prompts of 100 ± 2 J and 50 tokens: 2 J per token, between 1.96 and 2.04.

    In grams the bounds are those of the grid (280 to 380) and of the embodied carbon (16.7 to 49 g/h), too.
    """
    found = figures(record(1), record(2))
    assert (found.joules_per_token.bound_low, found.joules_per_token.bound_high) == pytest.approx((1.96, 2.04))
    low = (98 / 3.6e6 * FULL_GRID["low"] + EMBODIED["low_g_per_hour"] * 2 / 3600) / 50  # type: ignore[operator] # a number
    assert found.gco2eq_per_unit.bound_low == pytest.approx(low)


def test_the_interval_is_the_estimators() -> None:
    """Twelve prompts in three leases: the same digits as the estimator's on the same samples, with the 0.5 J each."""
    windows, samples = [], []
    for n in range(36):
        lease, prompt = f"r-{n % 3}", f"p{n // 3}"
        joules = 90.0 + n // 3 + 2 * (n % 3)
        windows.append(named(n, prompt, request_id=lease, joules=joules))
        samples.append(Sample(lease, prompt, joules, 50, 0.5, 0.5))
    found, wanted = figures(*windows).joules_per_token, estimate(samples)
    assert wanted.low is not None
    names = ("value", "low", "high", "systematic_low", "systematic_high")
    assert [getattr(found, name) for name in names] == [getattr(wanted, name) for name in names]
    assert (found.prompts, found.leases, found.too_few) == (12, 3, None)


def test_prompts_without_a_name_have_their_place_in_the_lease() -> None:
    """The n-th prompts of two leases are taken for the same; warm-ups have no place."""
    windows = [
        record(1, request_id="r-1", begun_s=1.0, warmup=True),
        record(2, request_id="r-1", begun_s=2.0),
        record(3, request_id="r-1", begun_s=3.0),
        record(4, request_id="r-2", begun_s=4.0),
        record(5, request_id="r-2", begun_s=5.0),
    ]
    assert figures(*windows).joules_per_token.prompts == 2


def errors(figure: Figure) -> tuple[float | None, float | None]:
    return figure.systematic_low, figure.systematic_high


def test_the_error_that_does_not_average_out_is_in_the_interval() -> None:
    """100 J with a systematic 10 J, O of 9.16e-3 g -15 + 15 % by the grid, M of 20.8e-3 g -11.6e-3 + 6.4e-3 g, by hand.

    o = 100 / 3.6e6 · 329.7 = 9.158e-3 g; 10 % by the counter and (380 - 329.7) / 329.7 = 15.26 % by the grid multiply:
    1.1 · 1.1526 - 1 = 26.78 %, 2.453e-3 g more; less: 1 - 0.9 · 280 / 329.7 = 23.57 %, 2.158e-3 g.
    m = 37.5 · 2 / 3600 = 20.83e-3 g, at most 20.8 · 2 / 3600 = 11.56e-3 g less, 11.5 · 2 / 3600 = 6.389e-3 g more.
    Of 50 tokens: 2.743e-4 g less, 1.768e-4 g more.
    """
    found = figures(record(1, systematic_j=10.0, resolution_j=20.0))
    assert errors(found.joules_per_token) == pytest.approx((0.2, 0.2))
    assert errors(found.gco2eq_per_unit) == pytest.approx((2.743e-4, 1.768e-4), rel=1e-3)
    unranged = FULL_GRID | {"low": None, "high": None}
    without = figures(record(1, systematic_j=10.0, resolution_j=20.0, grid=unranged)).gco2eq_per_unit
    assert errors(without) == pytest.approx(((0.9158e-3 + 11.556e-3) / 50, (0.9158e-3 + 6.389e-3) / 50), rel=1e-3)


def test_the_error_that_does_not_average_out_is_inside_the_bounds() -> None:
    """A share of 100 J, between 90 and 400 J, with a systematic 80 J may be 10 J less, and 80 J more.

    So no interval begins below what its bounds leave of it: not at 0.
    """
    shares = [
        record(10 * lease + n, request_id=f"r-{lease}", begun_s=BEGUN_S + n, energy=energy_of(100.0, 90.0, 400.0, 80.0))
        for lease in range(3)
        for n in range(12)
    ]
    found = figures(*shares).joules_per_token
    assert errors(found) == pytest.approx((0.2, 1.6))
    assert (found.low, found.high) == pytest.approx((1.8, 3.6))
    assert (found.bound_low, found.bound_high) == pytest.approx((1.8, 8.0))


def energy_of(joules: float, low_j: float, high_j: float, systematic_j: float | None) -> dict[str, Any]:
    return {"total_j": joules, "low_j": low_j, "high_j": high_j, "systematic_j": systematic_j}


def test_a_prompt_that_took_nothing_has_an_error_all_the_same() -> None:
    """A prompt that was refused while others were in flight took 0 J: it takes no other's interval away."""
    many = [record(n, request_id=f"r-{n % 3}", begun_s=BEGUN_S + n) for n in range(36)]
    refused = record(
        36, request_id="r-0", begun_s=BEGUN_S + 36, joules=0.0, resolution_j=0.0, units=0, status="refused"
    )
    found = figures(*many, refused).gco2eq_per_unit
    assert found.too_few is None
    assert found.low is not None


def test_a_record_that_does_not_say_its_systematic_error_may_keep_all_of_it() -> None:
    """Old records: the range of a model, else the steps of the counter, else it is not known, and no interval is."""
    ranged = window(1, energy={"low_j": 50.0, "high_j": 180.0})
    assert errors(figures(ranged).joules_per_token) == pytest.approx((50 / 50, 80 / 50))
    stepped = window(1, energy={"resolution_j": 5.0})
    assert errors(figures(stepped).joules_per_token) == pytest.approx((5 / 50, 5 / 50))
    unranged = window(1, energy={"systematic_j": 5.0})
    assert errors(figures(unranged).joules_per_token) == pytest.approx((5 / 50, 5 / 50))
    many = [window(n, request_id=f"r-{n % 3}", begun_s=float(n)) for n in range(36)]
    found = figures(*many).joules_per_token
    assert (found.value, found.low, found.high, *errors(found)) == (2.0, None, None, None, None)
    assert found.too_few == "36 of 36 windows don't say how wrong their counters may be"
    assert (
        figures(many[0]).joules_per_token.too_few == "too few prompts: 1 (at least 10); too few leases: 1 (at least 2)"
    )


def test_idle_time_is_in_the_score_of_the_leases() -> None:
    """100 J of a prompt and 60 J idle, 3 s reserved: (160 J · grid + 3 s embodied) / 50 tokens."""
    found = figures(record(1), record(2, WindowKind.IDLE, joules=60.0, seconds=1))
    assert found.with_idle.value == pytest.approx((160 / 3.6e6 * 329.7 + 37.5 * 3 / 3600) / 50)
    assert found.gco2eq_per_unit.value == pytest.approx((100 / 3.6e6 * 329.7 + 37.5 * 2 / 3600) / 50)


# --- batches ------------------------------------------------------------------------------------------------


def batch(*windows: EnergyWindow) -> BatchFigures:
    found = figures(*windows).batch
    assert found is not None
    return found


def stretch(number: int, joules: float, tokens: int, **more: Any) -> EnergyWindow:
    """A lease of this stretch after its warm-up; the lease itself took more."""
    made = {"total_j": joules, "low_j": joules - 2, "high_j": joules + 2, "systematic_j": 0.5, "label": "measured"}
    grams = {"o_g": 0.1, "o_low_g": 0.08, "o_high_g": 0.12, "m_g": 0.2, "m_low_g": 0.1, "m_high_g": 0.3}
    about = {"seconds": 10.0, "prompts": 60, "output_tokens": tokens, "units": tokens, "flags": []}
    counted = made | grams | about | {"in_flight": {"max": 16, "mean": 12.5}} | more.pop("counted", {})
    return record(number, WindowKind.LEASE, joules=2 * joules, request_id=f"r-{number}", counted=counted, **more)


def test_a_batch_is_read_as_one_window() -> None:
    """1,200 J in a counted stretch of 6,000 tokens: 0.2 J per token, within 2 J, without a share; 16 in flight."""
    found = batch(stretch(1, 1200.0, 6000))
    joules = found.joules_per_token
    assert (joules.value, joules.label) == (0.2, "measured")
    assert (joules.bound_low, joules.bound_high) == pytest.approx((1198 / 6000, 1202 / 6000))
    assert (found.leases, found.prompts, found.output_tokens, found.seconds) == (1, 60, 6000, 10.0)
    assert (found.in_flight_max, found.in_flight_mean) == (16, 12.5)
    assert found.gco2eq_per_unit.value == pytest.approx(0.3 / 6000)
    assert found.gco2eq_per_unit.bound_high == pytest.approx(0.42 / 6000)
    assert found.gco2eq_per_unit.label == "sourced"
    assert joules.too_few == "too few leases: 1 (at least 10)"


def test_a_stretch_with_a_warm_up_in_flight_has_no_batch_figure() -> None:
    """8 warm-ups run while 2 prompts of 500 tokens do: 12,000 J / 1,000 tokens, 12 J per token, is 5 times too much.

    Nobody can say which of the joules are the warm-ups'. The stretch says so, and so do the figures and the notes.
    """
    clean, unclean = stretch(1, 1200.0, 6000), stretch(2, 12_000.0, 1000, counted={"flags": ["warmup_inside"]})
    found = batch(clean, unclean)
    for figure in (found.joules_per_token, found.gco2eq_per_unit):
        assert (figure.value, figure.low, figure.bound_high, figure.label) == (None, None, None, "unavailable")
        assert figure.reason == "a warm-up was in flight in 1 of 2 leases"
    assert found.flags == {"warmup_inside": 1}
    said = list(problems([("tiny", figures(record(1), clean, unclean))]))
    assert "tiny: all prompts as one: not known: a warm-up was in flight in 1 of 2 leases" in said
    assert "tiny: all prompts as one: flags: warmup_inside (1)" in said


def test_relative_errors_of_energy_and_grid_multiply() -> None:
    """30 kJ with a systematic 45 kJ, at 300 (100 to 600) g/kWh: 74 kJ at 590 g/kWh are inside the 95 % interval.

    At most (30 + 45) kJ · 600 g/kWh / 3.6e6 J/kWh = 12.5 g a prompt; 12.1 g is the truth here. Added up, relative
    errors of 150 % and 100 % gave 2.5 g · 3.5 = 8.75 g at most.
    """
    grid = FULL_GRID | {"value": 300.0, "low": 100.0, "high": 600.0}
    about: dict[str, Any] = {
        "joules": 30e3,
        "energy": energy_of(30e3, 0.0, 75e3, 45e3),
        "grid": grid,
        "label": "modeled",
    }
    windows = [
        record(10 * lease + n, request_id=f"r-{lease}", begun_s=BEGUN_S + n, units=1, **about)
        for lease in range(5)
        for n in range(10)
    ]
    found = figures(*windows).operational_per_unit
    assert found.value == pytest.approx(30e3 / 3.6e6 * 300, rel=0.1)
    assert found.high == pytest.approx(12.5, rel=0.1)
    assert found.high is not None
    assert found.high >= 74e3 / 3.6e6 * 590


def test_production_has_a_batch_figure_with_prompts_in_flight_together() -> None:
    """All prompts are shares, which production does not score; the stretch is measured, and has a score.

    A stretch that is an estimate itself has none.
    """
    flags = ("estimates_not_allowed",)
    share = record(2, label="modeled", flags=flags)
    found = figures(share, stretch(1, 1200.0, 6000, label="modeled", flags=flags))
    assert found.gco2eq_per_unit.value is None
    assert found.batch is not None
    assert found.batch.gco2eq_per_unit.value is not None
    estimated = batch(stretch(1, 1200.0, 6000, label="modeled", flags=flags, counted={"label": "modeled"}))
    assert estimated.gco2eq_per_unit.value is None
    assert estimated.joules_per_token.label == "modeled"


def test_a_batch_over_many_leases_has_an_interval() -> None:
    """Twelve leases: each is one sample of the estimator."""
    leases = [stretch(n, 1200.0 + n, 6000) for n in range(12)]
    found = batch(*leases)
    wanted = estimate([Sample(f"r-{n}", f"r-{n}", 1200.0 + n, 6000, 0.5, 0.5) for n in range(12)])
    assert wanted.low is not None
    assert (found.joules_per_token.low, found.joules_per_token.high) == (wanted.low, wanted.high)
    assert found.joules_per_token.too_few is None


def test_without_a_finished_lease_there_is_no_batch() -> None:
    """Before the lease's own window, or with one that does not tell, there is none; unknown counts stay unknown."""
    assert figures(record(1)).batch is None
    assert figures(window(1, WindowKind.LEASE)).batch is None
    found = batch(stretch(1, 1200.0, 6000, counted={"in_flight": None, "output_tokens": None, "flags": None}))
    assert (found.in_flight_max, found.in_flight_mean, found.output_tokens) == (None, None, None)
    assert found.joules_per_token.value is None


# --- what is known in production --------------------------------------------------------------------------------


def refused(number: int, kind: WindowKind = WindowKind.PROMPT, **more: Any) -> EnergyWindow:
    """A short window where the operator allows no estimates."""
    return record(number, kind, label="modeled", flags=("too_short", "estimates_not_allowed"), **more)


def test_short_idle_windows_are_in_the_lease() -> None:
    """Two prompts of 100 J and 50 units, two short idle windows of 1 J: the lease window of 202 J tells all of them.

    Without it, or with a second process in the lease, the short windows are estimates, which are not allowed.
    """
    short = [refused(n, WindowKind.IDLE, joules=1.0, seconds=0.01) for n in (3, 4)]
    parts = [record(1), record(2), *short]
    lease = record(5, WindowKind.LEASE, joules=202.0, seconds=4.02, units=100)
    found = figures(*parts, lease).with_idle
    assert found.value == pytest.approx((202 / 3.6e6 * 329.7 + 37.5 * 4.02 / 3600) / 100)
    assert found.too_few == "too few leases: 1 (at least 10)"
    assert figures(*parts).with_idle.value is None
    assert figures(*parts, lease, record(1, process="process 2")).with_idle.value is None


def test_known_part_is_shown_beside_an_estimate_that_is_not_allowed() -> None:
    """One of three prompts is too short: no score, by chance picked; but 200 J for 100 units are known of 2 of 3."""
    found = figures(record(1), record(2), refused(3)).gco2eq_per_unit
    assert (found.value, found.label) == (None, "unavailable")
    assert found.known is not None
    assert (found.known.windows, found.known.of, found.known.joules, found.known.units) == (2, 3, 200.0, 100)
    assert found.reason is not None
    assert "1 of 3 windows are estimates, which are not allowed (estimates_not_allowed, too_short)" in found.reason
    assert "known for 2 of 3: 200 J, 0.05998 gCO2eq, 100 units" in found.reason


@pytest.mark.parametrize(("leases", "too_few"), [(9, "too few leases: 9 (at least 10)"), (10, None)])
def test_ten_leases_have_an_interval_with_idle_time(leases: int, too_few: str | None) -> None:
    """Each lease is one sample of it: nine are too few."""
    windows = [
        record(number, kind, request_id=f"r-{n}", process=f"process {n}", joules=100.0 + n, units=50, seconds=seconds)
        for n in range(leases)
        for number, kind, seconds in ((1, WindowKind.PROMPT, 2.0), (2, WindowKind.LEASE, 4.0))
    ]
    found = figures(*windows).with_idle
    assert (found.leases, found.too_few) == (leases, too_few)
    assert (found.low is None) == (too_few is not None)
