from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.energy.figures import Component, Embodied, Energy, GridIntensity, SCISettings, total
from deployments.energy.sci import grid_intensity, score
from registry import grid_mixes
from registry.errors import BadSettings
from registry.wire.labels import Label

H100 = Embodied(37.5, 16.7, 49.0, "GPU share of a server with eight H100 over three years")
SETTINGS = SCISettings(pue=1.2, functional_unit="output_token", allow_estimates=False, embodied=H100)
DEU, FRA = (GridIntensity(value, zone, "ecologits", "0.11") for value, zone in ((329.65, "DEU"), (41.44, "FRA")))


def gpu(joules: float, label: Label = Label.MEASURED, **bounds: float) -> Energy:
    return total([part("gpu:x", joules, label, **bounds)])


def part(name: str, joules: float, label: Label = Label.MEASURED, **bounds: float) -> Component:
    """A component whose bounds are those given, else exact."""
    known: dict[str, float] = {"low_j": joules, "high_j": joules, "systematic_j": 0.0} | bounds
    return Component(name, "a test", label, joules=joules, counter_label=label, **known)  # type: ignore[arg-type]


# --- the formula, worked through -------------------------------------------------------------------------------


def test_worked_example_germany() -> None:
    """A prompt of 2 s at 380 W in Germany: O = 0.0835 g, M = 0.0208 g, a quarter of it; 0.417 mg per token."""
    found = score(gpu(760.0), duration_s=2.0, units=250, settings=SETTINGS, grid=DEU)
    assert found.o_g == pytest.approx(0.0835, rel=1e-3)
    assert found.m_g == pytest.approx(0.0208, rel=2e-3)
    assert found.o_g is not None
    assert found.m_g is not None
    assert found.m_g / found.o_g == pytest.approx(0.249, abs=5e-4)
    assert found.sci_score == pytest.approx(4.17e-4, rel=1e-3)


def test_worked_example_france() -> None:
    """The same prompt in France: O = 0.0105 g, and M is twice that."""
    found = score(gpu(760.0), duration_s=2.0, units=250, settings=SETTINGS, grid=FRA)
    assert found.o_g == pytest.approx(0.0105, rel=2e-3)
    assert found.o_g is not None
    assert found.m_g is not None
    assert found.m_g / found.o_g == pytest.approx(1.98, abs=5e-3)


def test_worked_example_of_a_score_that_is_mostly_sourced() -> None:
    """A prompt of 2 s and 100 J in France: 95 % of its score are sourced embodied carbon, so it is no measurement.

    O = 100 J / 3.6e6 · 41.44 g = 1.151e-3 g; M = 37.5 g · 2 / 3600 = 20.83e-3 g, of 21.98e-3 g in all. Its energy is
    measured to 2 J; the range of M, 16.7 to 49 g an hour, makes 9.3e-3 to 27.2e-3 g of it: 10.4e-3 to 28.4e-3 g.
    """
    plain = SCISettings(1.0, "request", allow_estimates=False, embodied=H100)
    found = score(gpu(100.0, low_j=98.0, high_j=102.0), duration_s=2.0, units=1, settings=plain, grid=FRA)
    assert found.o_g == pytest.approx(1.151e-3, rel=1e-3)
    assert found.sci_score == pytest.approx(21.98e-3, rel=1e-3)
    assert (found.m_g or 0) / (found.sci_score or 1) == pytest.approx(0.948, abs=1e-3)
    assert found.low == pytest.approx(10.406e-3, rel=1e-3)
    assert found.high == pytest.approx(28.396e-3, rel=1e-3)
    assert (found.method, found.methods["E"]) == ("sourced", "measured")


def test_worked_example_idle_seconds() -> None:
    """58 idle seconds at 205 W emit 18 times what a prompt of 2 s at 380 W does: the lease counts, not the prompt."""
    prompt = score(gpu(2 * 380.0), duration_s=2.0, units=1, settings=SETTINGS, grid=DEU)
    idle = score(gpu(58 * 205.0), duration_s=58.0, units=1, settings=SETTINGS, grid=DEU)
    assert prompt.sci_score is not None
    assert idle.sci_score is not None
    assert idle.sci_score / prompt.sci_score == pytest.approx(18.3, abs=0.05)


def test_a_kilowatt_hour_is_3_6_megajoules() -> None:
    """The old system took W·s / 3600, which is Wh, for kWh."""
    plain = SCISettings(1.0, "output_token", allow_estimates=False, embodied=H100)
    assert score(gpu(3.6e6), duration_s=10_000.0, units=10**6, settings=plain, grid=DEU).o_g == pytest.approx(329.65)


def test_pue_counts_once() -> None:
    """The site's overhead multiplies the operational emissions and leaves the embodied ones alone."""
    plain = SCISettings(1.0, "output_token", allow_estimates=False, embodied=H100)
    with_pue = score(gpu(760.0), duration_s=2.0, units=1, settings=SETTINGS, grid=DEU)
    without = score(gpu(760.0), duration_s=2.0, units=1, settings=plain, grid=DEU)
    assert with_pue.o_g == pytest.approx((without.o_g or 0) * 1.2)
    assert with_pue.m_g == without.m_g


# --- what a score says of itself -------------------------------------------------------------------------------


def test_score_tells_its_methods() -> None:
    """A score tells its unit and the labels of E, I, M and R; its own label is the worst of them.

    The energy is measured, the grid and the embodied carbon are published factors: the score is sourced.
    """
    found = score(gpu(760.0), duration_s=2.0, units=250, settings=SETTINGS, grid=DEU)
    assert (found.unit, found.units, found.method) == ("output_token", 250, "sourced")
    assert found.methods == {"E": "measured", "I": "sourced", "M": "sourced", "R": "measured"}
    assert found.flags == ()


def test_range_of_everything() -> None:
    """Low and high hold the counter's resolution, the grid's range and the embodied carbon's.

    3600 J (3240 to 3960) with PUE 2 are 2 Wh (1.8 to 2.2); at 400 g/kWh (300 to 500) 0.8 g (0.54 to 1.1). An hour of
    1 g (0.5 to 2) is 1 g. For 2 requests: 0.9 g each (0.52 to 1.55).
    """
    settings = SCISettings(2.0, "request", allow_estimates=False, embodied=Embodied(1.0, 0.5, 2.0, "x"))
    grid = GridIntensity(400.0, None, "our meter", "2026-01-01", low=300.0, high=500.0)
    energy = gpu(3600.0, low_j=3240.0, high_j=3960.0)
    found = score(energy, duration_s=3600.0, units=2, settings=settings, grid=grid)
    assert (found.o_low_g, found.o_g, found.o_high_g) == pytest.approx((0.54, 0.8, 1.1))
    assert (found.m_low_g, found.m_g, found.m_high_g) == pytest.approx((0.5, 1.0, 2.0))
    assert (found.low, found.sci_score, found.high) == pytest.approx((0.52, 0.9, 1.55))


def test_embodied_part_of_a_share_has_the_range_of_the_share() -> None:
    """A share of 2 s that may be 1 to 3 s, at 3,600 (1,800 to 7,200) g an hour: 2 g, 0.5 to 6 g."""
    settings = replace(SETTINGS, embodied=Embodied(3600.0, 1800.0, 7200.0, "a test"))
    found = score(gpu(9.0), duration_s=2.0, duration_range_s=(1.0, 3.0), units=1, settings=settings, grid=DEU)
    assert (found.m_low_g, found.m_g, found.m_high_g) == pytest.approx((0.5, 2.0, 6.0))


def test_grams_have_a_range_without_a_score() -> None:
    """Nothing was produced: no score, but the grams of the window and their ranges are known."""
    found = score(gpu(760.0), duration_s=2.0, units=0, settings=SETTINGS, grid=DEU)
    assert (found.sci_score, found.low, found.high) == (None, None, None)
    assert None not in (found.o_low_g, found.o_g, found.o_high_g, found.m_low_g, found.m_g, found.m_high_g)


@pytest.mark.parametrize(
    ("energy", "units", "grid", "method"),
    [
        (gpu(9.0, Label.MODELED), 9, DEU, "modeled"),
        (gpu(9.0, Label.SIMULATED), 9, DEU, "simulated"),
        (gpu(9.0), None, DEU, "unavailable"),
        (gpu(9.0), 9, None, "unavailable"),
        (total([]), 9, DEU, "unavailable"),
    ],
)
def test_label_is_the_worst(energy: Energy, units: int | None, grid: GridIntensity | None, method: str) -> None:
    """A score's label is the worst of those of E, I, M and R: an unknown part makes it unavailable."""
    assert score(energy, duration_s=2.0, units=units, settings=SETTINGS, grid=grid).method == method


def test_units_not_known() -> None:
    """R is measured where the units are known, 0 among them, and unavailable where they are not."""
    methods = [
        score(gpu(9.0), duration_s=2.0, units=units, settings=SETTINGS, grid=DEU).methods["R"] for units in (9, 0, None)
    ]
    assert methods == ["measured", "measured", "unavailable"]


def test_estimate_where_none_is_wanted() -> None:
    """Where estimates are not allowed a modelled energy has no score; method and emissions say what it would be."""
    energy = gpu(760.0, Label.MODELED, low_j=380.0, high_j=1520.0)
    found = score(energy, duration_s=2.0, units=250, settings=SETTINGS, grid=DEU)
    assert (found.sci_score, found.low, found.high) == (None, None, None)
    assert found.method is Label.MODELED
    assert found.methods["E"] == "modeled"
    assert found.o_g is not None
    assert found.flags == ("estimates_not_allowed",)


def test_estimate_where_allowed() -> None:
    """Where estimates are allowed the score is the middle one, labelled, with low and high."""
    settings = SCISettings(1.0, "request", allow_estimates=True, embodied=Embodied(36.0, 36.0, 36.0, "x"))
    grid = GridIntensity(360.0, None, "our meter", "2026-01-01")
    energy = gpu(7200.0, Label.MODELED, low_j=3600.0, high_j=18000.0)
    found = score(energy, duration_s=10.0, units=1, settings=settings, grid=grid)
    assert found.sci_score == pytest.approx(0.72 + 0.1)
    assert found.low == pytest.approx(0.36 + 0.1)
    assert found.high == pytest.approx(1.8 + 0.1)
    assert found.method is Label.MODELED


def test_sampled_counts_as_measured() -> None:
    """Integrated power samples are a measurement: they have a score where estimates are not allowed."""
    found = score(gpu(760.0, Label.MEASURED_SAMPLED), duration_s=2.0, units=250, settings=SETTINGS, grid=DEU)
    assert found.sci_score is not None
    assert found.methods["E"] == "measured_sampled"


def test_simulated_is_no_measurement() -> None:
    """A test double's energy has no score where estimates are not allowed, and keeps its label where they are."""
    assert score(gpu(9.0, Label.SIMULATED), duration_s=2.0, units=9, settings=SETTINGS, grid=DEU).sci_score is None
    settings = SCISettings(1.0, "output_token", allow_estimates=True, embodied=H100)
    found = score(gpu(9.0, Label.SIMULATED), duration_s=2.0, units=9, settings=settings, grid=DEU)
    assert found.methods["E"] == "simulated"


def test_range_without_any() -> None:
    """Where nothing has a range, low and high are the score itself: they are there whenever it is."""
    settings = SCISettings(1.0, "request", allow_estimates=False, embodied=Embodied(36.0, 36.0, 36.0, "x"))
    found = score(gpu(760.0), duration_s=2.0, units=1, settings=settings, grid=DEU)
    assert found.sci_score is not None
    assert found.low == found.sci_score == found.high


@pytest.mark.parametrize(("low", "high"), [(401.0, None), (None, 399.0), (-1.0, None)])
def test_grid_value_outside_its_range(low: float | None, high: float | None) -> None:
    """A grid value below its low, or above its high, is a mistake in the settings."""
    with pytest.raises(BadSettings, match="low_gco2eq_per_kwh"):
        GridIntensity(400.0, None, "our meter", "2026-01-01", low=low, high=high)


@pytest.mark.parametrize(
    ("energy", "units", "settings", "grid", "flag"),
    [
        (total([]), 250, SETTINGS, DEU, "no_source"),
        (gpu(760.0), 250, SETTINGS, None, "no_grid"),
        (gpu(760.0), 250, SCISettings(1.0, "output_token", allow_estimates=True), DEU, "no_embodied"),
        (gpu(760.0), 0, SETTINGS, DEU, "no_units"),
    ],
)
def test_missing_part_is_no_zero(
    energy: Energy, units: int, settings: SCISettings, grid: GridIntensity | None, flag: str
) -> None:
    """Without energy, grid, embodied carbon or a unit there is no score, never one of 0, and a flag says why."""
    found = score(energy, duration_s=2.0, units=units, settings=settings, grid=grid)
    assert (found.sci_score, found.low, found.high) == (None, None, None)
    assert flag in found.flags
    assert found.o_g != 0
    assert found.m_g != 0


@pytest.mark.parametrize(("joules", "implausible"), [(1.0, True), (20.0, False), (300.0, False), (5000.0, True)])
def test_implausible_joules_per_token(joules: float, implausible: bool) -> None:
    """100 output tokens of a GPU that cost less than 3 J or more than 1000 J are flagged, and still told."""
    found = score(gpu(joules), duration_s=2.0, units=100, settings=SETTINGS, grid=DEU)
    assert ("implausible_j_per_token" in found.flags) is implausible
    assert found.sci_score is not None


def test_plausibility_is_for_gpus_and_tokens() -> None:
    """A CPU's joules, and units that are no tokens, are not compared with what tokens cost on GPUs."""
    cpu = total([part("package-0", 1.0)])
    assert score(cpu, duration_s=2.0, units=100, settings=SETTINGS, grid=DEU).flags == ()
    words = SCISettings(1.2, "word", allow_estimates=False, embodied=H100)
    assert score(gpu(1.0), duration_s=2.0, units=100, settings=words, grid=DEU).flags == ()


@pytest.mark.parametrize(("duration_s", "units"), [(0.0, 1), (-1.0, 1), (1.0, -1)])
def test_impossible_window(duration_s: float, units: int) -> None:
    """A window without duration, or with less than no units, is a mistake of the caller's."""
    with pytest.raises(ValueError, match="can't score"):
        score(gpu(1.0), duration_s=duration_s, units=units, settings=SETTINGS, grid=DEU)


# --- the grid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "value"), [("DEU", 329.7), ("FRA", 41.4), ("USA", 384.4), ("CHN", 525.3), ("WOR", 458.3)]
)
def test_known_zones(zone: str, value: float) -> None:
    """A zone's intensity is the data set's, in g/kWh, with the data set's name and version."""
    found = grid_intensity(zone)
    assert found.gco2eq_per_kwh == pytest.approx(value, abs=0.051)
    assert (found.zone, found.dataset) == (zone, "ecologits")
    assert found.version[0].isdigit()


def test_agrees_with_the_package() -> None:
    """What is read from the package's file is what the package itself says, for every zone."""
    from ecologits.electricity_mix_repository import electricity_mixes

    mixes = electricity_mixes.list_electricity_mixes()
    assert len(mixes) > 200
    for mix in mixes:
        assert grid_intensity(mix.zone).gco2eq_per_kwh == pytest.approx(mix.gwp * 1000)


@pytest.mark.parametrize(
    ("zone", "hint"), [("deu", "DEU"), ("GER", "did you mean"), ("Germany", "alpha-3"), ("", "alpha-3")]
)
def test_unknown_zone(zone: str, hint: str) -> None:
    """An unknown zone is an error that names it and what is close to it; there is no default."""
    with pytest.raises(BadSettings, match=hint) as caught:
        grid_intensity(zone)
    assert repr(zone) in str(caught.value)


@pytest.fixture
def no_mixes() -> Iterator[None]:
    grid_mixes.grid_mixes.cache_clear()
    yield
    grid_mixes.grid_mixes.cache_clear()


def test_data_set_not_installed(monkeypatch: pytest.MonkeyPatch, no_mixes: None) -> None:
    """Without the data set a zone is an error that tells the way out."""
    monkeypatch.setattr(grid_mixes, "find_spec", lambda name: None)
    with pytest.raises(BadSettings, match="gco2eq_per_kwh"):
        grid_intensity("DEU")


def test_importing_the_meter_is_cheap() -> None:
    """Neither the package of the data set nor anything of an engine is imported for the meter and a look-up."""
    code = (
        "import sys; from deployments.energy import meter, sci; sci.grid_intensity('DEU');"
        "print(sorted({'ecologits', 'vllm', 'torch', 'ray', 'pydantic'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
