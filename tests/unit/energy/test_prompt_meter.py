"""What a prompt cost. All joules here are a test double's, and labelled ``simulated``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.energy import build, prompt_meter
from deployments.energy import meter as meter_module
from deployments.energy.build import grid_of, sci_settings
from deployments.energy.counters.probe import Source, Unreadable
from deployments.energy.figures import GridIntensity
from deployments.energy.meter import Meter
from deployments.energy.prompt_meter import MeteredPrompt, PromptMeter
from deployments.machine.gpus import ReadFailed
from registry.errors import BadSettings
from registry.settings import EnergySettings, load_settings
from registry.wire.labels import Label, worst
from registry.wire.words import WindowKind
from tests.support.fake_counters import FakeCounter, ManualClock
from tests.support.meter_bench import LEASE, detail, of_kind
from tests.support.meter_bench import Bench as WindowBench

GRID = {"gco2eq_per_kwh": 360.0, "source": "a test", "date": "2026-01-01"}
EMBODIED = {"g_per_hour": 3.6, "low_g_per_hour": 1.8, "high_g_per_hour": 7.2, "source": "a test"}
CPU_MODEL = {
    "idle_w_per_cpu": 1.0, "busy_w_per_cpu": 5.0,
    "idle_low_w_per_cpu": 0.5, "idle_high_w_per_cpu": 2.0,
    "busy_low_w_per_cpu": 2.5, "busy_high_w_per_cpu": 10.0, "source": "a test"
}  # fmt: skip
USAGE = {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10}
WATTS = 100.0


class Bench:
    """A PromptMeter on a manual clock and simulated counters of 100 W."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *sources: Source | Unreadable, **energy: Any) -> None:
        self.clock = ManualClock()
        found = sources or (FakeCounter(lambda now_s: WATTS * now_s, name="gpu:x", label=Label.SIMULATED),)
        monkeypatch.setattr(prompt_meter, "sources_of", lambda *_: list(found))
        monkeypatch.setattr(prompt_meter, "Meter", partial(Meter, clock=self.clock, allow_simulated=True))
        chosen = {"allow_estimates": True, "grid": GRID, "embodied": EMBODIED, **energy}
        monkeypatch.setattr(meter_module, "PERIOD_S", 0.0)  # others are looked for with each poll
        self.meter = PromptMeter(EnergySettings.model_validate(chosen), gpus=1)
        self.meter._meter.poll_once()

    def passes(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            self.clock.now_s += 0.05
            self.meter._meter.poll_once()

    def prompt(self, seconds: float) -> MeteredPrompt:
        metered = self.meter.prompt()
        self.passes(seconds)
        metered.end()
        return metered

    def account(
        self, metered: MeteredPrompt, tokens: tuple[int, int] = (6, 4), answer: str = "four words and no"
    ) -> Any:
        self.passes(0.2)
        usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        account = metered.account(usage=usage, answer=answer)
        assert_honest(account)
        energy, carbon = account["energy"], account["carbon"]
        same = ("window", "final", "sci_score", "sci_method", "sci_low", "sci_high", "unit", "flags")
        assert metered.brief(usage=usage, answer=answer) == {
            **{name: account[name] for name in same},
            "joules": energy["total_j"],
            "joules_low": energy["low_j"],
            "joules_high": energy["high_j"],
            "label": energy["label"],
            "o_g": carbon["o_g"],
            "m_g": carbon["m_g"],
        }
        return account


def assert_honest(account: Any) -> None:
    """No bare zero, no figure without a label, all of it plain JSON."""
    assert json.loads(json.dumps(account)) == account
    energy = account["energy"]
    assert (energy["total_j"] is None) == (energy["label"] == "unavailable")
    for figure in (energy["total_j"], account["sci_score"], account["carbon"]["o_g"], account["carbon"]["m_g"]):
        assert figure is None or figure > 0
    for part in energy["components"]:
        assert (part["joules"] is None) == (part["label"] == "unavailable")
    assert account["methods"]["E"] == energy["label"]
    assert account["sci_method"] == worst(Label(label) for label in account["methods"].values())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """Makes a bench: ``bench(*sources, **energy settings)``."""
    return partial(Bench, monkeypatch)


# --- one prompt --------------------------------------------------------------------------------------------


def test_account_of_a_prompt(bench: Callable[..., Bench]) -> None:
    """A prompt of 2 s at 100 W is 200 J; its score follows the SCI formula, with the worst label of its parts."""
    made = bench()
    account = made.account(made.prompt(2.0))
    assert account["energy"]["total_j"] == pytest.approx(200.0, rel=0.06)
    assert account["energy"]["components"][0]["name"] == "gpu:x"
    o_g, m_g = account["energy"]["total_j"] / 3.6e6 * 360.0, 3.6 * 2.0 / 3600
    assert account["carbon"]["o_g"] == pytest.approx(o_g)
    assert account["carbon"]["m_g"] == pytest.approx(m_g)
    assert account["sci_score"] == pytest.approx((o_g + m_g) / 4)
    assert account["sci_low"] < account["sci_score"] < account["sci_high"]
    assert (account["unit"], account["units"], account["sci_method"]) == ("output_token", 4, "simulated")
    assert account["carbon"]["grid"] == {
        "gco2eq_per_kwh": 360.0,
        "zone": None,
        "dataset": "a test",
        "version": "2026-01-01",
        "year": None,
        "source": "a test",
        "low": None,
        "high": None,
    }
    assert account["methods"] == {"E": "simulated", "I": "sourced", "M": "sourced", "R": "measured"}


@pytest.mark.parametrize(("unit", "units"), [("output_token", 4), ("token", 10), ("request", 1), ("word", 4)])
def test_functional_unit_is_the_operators(bench: Callable[..., Bench], unit: str, units: int) -> None:
    """The score is per the unit that the operator chose, and says which."""
    made = bench(functional_unit=unit)
    account = made.account(made.prompt(1.0))
    assert (account["unit"], account["units"]) == (unit, units)
    whole = account["carbon"]["o_g"] + account["carbon"]["m_g"]
    assert account["sci_score"] * units == pytest.approx(whole)


@pytest.mark.parametrize(
    ("chosen", "unit", "units"),
    [("output_token", "token", 6), ("word", "token", 6), ("token", "token", 6), ("request", "request", 1)],
)
async def test_llm_that_writes_no_text_is_scored_by_its_input(
    monkeypatch: pytest.MonkeyPatch, chosen: str, unit: str, units: int
) -> None:
    """An embedding of 6 tokens has no output: it counts 6 tokens, in its answer, its record and its lease's alike."""
    bench = WindowBench(monkeypatch, functional_unit=chosen)
    bench.meter._writes_text = lambda llmconfig: llmconfig != "{}"
    bench.bind(LEASE)
    bench.passes(1.0)
    metered = bench.meter.prompt("/v1/embeddings")
    bench.passes(1.0)
    metered.end()
    told = metered.brief(usage={"prompt_tokens": 6, "total_tokens": 6}, answer=None)
    assert told["unit"] == unit
    assert told["sci_score"] == pytest.approx((told["o_g"] + told["m_g"]) / units)
    bench.bind(None)
    bench.passes(5.0)
    windows = await bench.windows()
    for kind in (WindowKind.PROMPT, WindowKind.LEASE):
        (window,) = of_kind(windows, kind)
        assert (detail(window)["unit"], detail(window)["units"]) == (unit, units)
    idle = [detail(window) for window in of_kind(windows, WindowKind.IDLE) if window.request_id == "request-1"]
    assert {each["unit"] for each in idle} == {unit}


def test_score_of_nothing_is_none(bench: Callable[..., Bench]) -> None:
    """A prompt that brought no units has its energy, and no score: not zero and not infinite."""
    made = bench()
    account = made.account(made.prompt(1.0), tokens=(6, 0), answer="")
    assert account["sci_score"] is None
    assert account["energy"]["total_j"] > 0
    assert "no_units" in account["flags"]


@pytest.mark.parametrize(("missing", "flag"), [("grid", "no_grid"), ("embodied", "no_embodied")])
def test_without_a_factor_there_is_no_score(bench: Callable[..., Bench], missing: str, flag: str) -> None:
    """Without a grid or an embodied figure there is no score, and the account says what is missing."""
    made = bench(**{missing: None})
    account = made.account(made.prompt(1.0))
    assert account["sci_score"] is None
    assert flag in account["flags"]
    assert account["energy"]["total_j"] > 0


def test_simulated_is_an_estimate_where_none_are_allowed(bench: Callable[..., Bench]) -> None:
    """Where only measured scores are allowed, other energy gives none."""
    made = bench(allow_estimates=False)
    account = made.account(made.prompt(1.0))
    assert account["sci_score"] is None
    assert "estimates_not_allowed" in account["flags"]


def test_prompt_too_short_for_the_counter(bench: Callable[..., Bench]) -> None:
    """A prompt that no counter can resolve is unavailable and flagged, never 0 J."""
    made = bench(FakeCounter(lambda now_s: 5.0, name="gpu:x", label=Label.SIMULATED))
    account = made.account(made.prompt(0.05))
    assert account["energy"]["total_j"] is None
    assert account["sci_score"] is None
    assert "too_short" in account["flags"]


def test_nothing_to_read(bench: Callable[..., Bench]) -> None:
    """Where no counter is readable the account says so, and why."""
    made = bench(Unreadable("gpu:x", "no driver", in_boundary=True))
    account = made.account(made.prompt(1.0))
    assert account["energy"]["total_j"] is None
    assert account["sci_method"] == "unavailable"
    assert account["energy"]["components"][0]["source"] == "no driver"


def test_counter_that_fails_later(bench: Callable[..., Bench]) -> None:
    """A counter that stops answering in the middle of a prompt leaves its figure unknown."""

    def value(now_s: float) -> float | Exception:
        return WATTS * now_s if now_s < 1001.0 else ReadFailed("gone")

    made = bench(FakeCounter(value, name="gpu:x", label=Label.SIMULATED))
    account = made.account(made.prompt(3.0))
    assert account["energy"]["total_j"] is None
    assert "stale" in account["flags"]


# --- prompts that overlap ----------------------------------------------------------------------------------


def test_prompts_after_one_another_have_their_own(bench: Callable[..., Bench]) -> None:
    """A prompt that was alone has what the counters say, though others came before and after."""
    made = bench()
    first = made.prompt(1.0)
    second = made.prompt(2.0)
    assert made.account(first)["energy"]["total_j"] == pytest.approx(100.0, rel=0.11)
    account = made.account(second)
    assert account["energy"]["total_j"] == pytest.approx(200.0, rel=0.06)
    assert "shared" not in account["flags"]


def test_overlapping_prompts_share(bench: Callable[..., Bench]) -> None:
    """Two prompts at the same time share what flows by their tokens: together the whole, each flagged as shared."""
    made = bench()
    first, second = made.meter.prompt(), made.meter.prompt()
    made.passes(2.0)
    first.end()
    second.end()
    one = made.account(first, tokens=(10, 10))
    other = made.account(second, tokens=(10, 50))
    # The first to be accounted for takes the other for as fast as itself: all that is known then.
    assert one["energy"]["total_j"] == pytest.approx(100.0, rel=0.06)
    assert other["energy"]["total_j"] == pytest.approx(150.0, rel=0.06)
    assert {"shared"} <= set(one["flags"]) & set(other["flags"])
    assert one["energy"]["low_j"] <= one["energy"]["total_j"] <= one["energy"]["high_j"]


def test_prompt_that_still_runs_has_its_share(bench: Callable[..., Bench]) -> None:
    """A prompt still in flight takes part: who ends first is not charged for both."""
    made = bench()
    running = made.meter.prompt()
    first = made.prompt(1.0)
    assert made.account(first)["energy"]["total_j"] == pytest.approx(50.0, rel=0.2)
    running.end()


def test_prompt_that_failed_has_its_share(bench: Callable[..., Bench]) -> None:
    """A prompt that was cut used energy too, which is not charged to the one beside it."""
    made = bench()
    cut, good = made.meter.prompt(), made.meter.prompt()
    made.passes(1.0)
    cut.end()
    made.passes(1.0)
    good.end()
    account = made.account(good)
    assert account["energy"]["total_j"] == pytest.approx(150.0, rel=0.1)
    assert "shared" in account["flags"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 50)), min_size=1, max_size=5))
def test_accounts_are_never_more_than_what_flowed(
    bench: Callable[..., Bench], times: list[tuple[int, int, int]]
) -> None:
    """However prompts overlap, none is charged more than what flowed while it was in flight, and none is charged 0."""
    made = bench()
    flights: dict[int, MeteredPrompt] = {}
    for step in range(42):
        for index, (start, length, _) in enumerate(times):
            if step == start:
                flights[index] = made.meter.prompt()
            if step == start + length:
                flights[index].end()
        made.passes(0.05)
    for index, (_, length, tokens) in enumerate(times):
        account = made.account(flights[index], tokens=(tokens, 1))
        joules, poll_j = account["energy"]["total_j"], 0.05 * WATTS
        assert joules is None or 0 < joules <= length * poll_j + 2 * poll_j


async def test_only_what_is_needed_is_remembered(bench: Callable[..., Bench]) -> None:
    """Of what came and went that is remembered in which a prompt lies that is in flight, or not written down."""
    made = bench()
    made.prompt(0.5)
    long = made.meter.prompt()
    made.prompt(0.5)
    made.passes(0.5)
    await made.meter.write()
    assert len(made.meter._flights) == 3
    long.end()
    made.passes(0.5)
    await made.meter.write()
    assert len(made.meter._flights) == 0


# --- the start of an LLM -----------------------------------------------------------------------------------


def test_start_of_an_llm_is_on_its_own_account(bench: Callable[..., Bench]) -> None:
    """What the start of an LLM took is told by the meter, also of a start that failed; no prompt pays for it."""
    made = bench()
    assert made.meter.describe()["last_load"] is None
    with made.meter.load():
        made.passes(3.0)
    load: Any = made.meter.describe()["last_load"]
    assert load["total_j"] == pytest.approx(300.0, rel=0.05)
    assert load["label"] == "simulated"

    def failing_start() -> None:
        with made.meter.load():
            made.passes(1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_start()
    load = made.meter.describe()["last_load"]
    assert load["total_j"] == pytest.approx(100.0, rel=0.11)
    json.dumps(made.meter.describe())


# --- putting it together -----------------------------------------------------------------------------------


def test_simulated_sources_are_refused_outside_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test double never gets into a real account."""
    source = FakeCounter(lambda now_s: now_s, label=Label.SIMULATED)
    monkeypatch.setattr(prompt_meter, "sources_of", lambda *_: [source])
    with pytest.raises(BadSettings, match="for tests only"):
        PromptMeter(EnergySettings(), gpus=0)


def test_production_takes_nothing_simulated(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """The production configuration refuses a simulated source, and where a test forces one in there is no score."""
    site = load_settings(Path(__file__).parents[3] / "configs" / "production.yaml").energy
    production = site.of_wrapper(machine="a", gpu_type=None, zone=None, gpus=1, on_machine=1)
    made = bench(**production.model_dump(exclude={"grid", "embodied"}))
    account = made.account(made.prompt(1.0))
    assert account["sci_score"] is None
    assert "estimates_not_allowed" in account["flags"]
    monkeypatch.setattr(prompt_meter, "Meter", Meter)
    with pytest.raises(BadSettings, match="for tests only"):
        PromptMeter(production, gpus=0)


def test_polls_while_it_runs(bench: Callable[..., Bench]) -> None:
    """The counters are polled between start and stop, and given back afterwards."""
    source = FakeCounter(lambda now_s: now_s, label=Label.SIMULATED)
    made = bench(source)
    made.meter.start()
    assert made.meter.describe()["polling"] is True
    made.meter.stop()
    assert made.meter.describe()["polling"] is False
    assert source.closed == 1


@pytest.mark.parametrize(
    ("visible", "answer", "missing"),
    [
        ("GPU-a,GPU-b", ("GPU-a", "GPU-b"), []),
        ("0", ReadFailed("no driver"), ["gpu:0"]),
        ("", (), ["gpu:"]),
        ("GPU-a", ("GPU-a",), ["gpu:GPU-a"]),
    ],
    ids=["all there", "no driver", "none visible", "one of two visible"],
)
def test_gpus_that_are_not_found_are_holes(
    monkeypatch: pytest.MonkeyPatch, visible: str, answer: tuple[str, ...] | Exception, missing: list[str]
) -> None:
    """Each GPU that a wrapper reserves is counted, or leaves a hole in the total: none is passed over."""

    def uuids(names: str) -> tuple[str, ...]:
        assert names == visible
        if isinstance(answer, Exception):
            raise answer
        return answer

    def probed(found: tuple[str, ...], **_: object) -> list[Source | Unreadable]:
        return [Unreadable(name, "found") for name in found]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(build, "gpu_uuids", uuids)
    monkeypatch.setattr(build, "probe_sources", probed)
    sources = build.sources_of(sci_settings(EnergySettings()), 2, None)
    holes = [source for source in sources if isinstance(source, Unreadable)]
    assert len(holes) == len(sources)
    assert [hole.name for hole in holes if hole.in_boundary] == missing
    assert [hole.name for hole in holes if not hole.in_boundary] == ([] if isinstance(answer, Exception) else [*answer])


def test_wrapper_without_gpus_looks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper without GPUs counts none, whatever this machine's environment says."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-of-somebody")
    monkeypatch.setattr(build, "probe_sources", lambda found, **_: [Unreadable(repr(found), "asked for")])
    assert build.sources_of(sci_settings(EnergySettings()), 0, None) == [Unreadable("()", "asked for")]


def test_settings_become_the_formulas() -> None:
    """All that the operator chose reaches the formula."""
    chosen = EnergySettings.model_validate(
        {"pue": 1.2, "functional_unit": "word", "embodied": EMBODIED, "cpu_model": CPU_MODEL, "grid": GRID}
    )
    formula = sci_settings(chosen)
    assert (formula.pue, formula.functional_unit, formula.allow_estimates) == (1.2, "word", False)
    assert formula.embodied is not None
    assert formula.embodied.g_per_hour == 3.6
    assert formula.cpu_model is not None
    assert formula.cpu_model.busy_w_per_cpu == 5.0
    grid = grid_of(chosen)
    assert grid is not None
    assert (grid.gco2eq_per_kwh, grid.zone, grid.dataset) == (360.0, None, "a test")


def test_grid_is_what_was_configured() -> None:
    """A zone is looked up, an unknown one is an error, and none at all is none: there is no default."""
    assert grid_of(EnergySettings()) is None
    zone = grid_of(EnergySettings.model_validate({"grid": {"zone": "FRA"}}))
    assert zone is not None
    assert zone.zone == "FRA"
    assert zone.gco2eq_per_kwh > 0
    assert (zone.year, zone.low, zone.high) == (None, None, None)
    assert zone.source is not None
    assert zone.source.startswith("ecologits ")


def test_the_grids_year_source_and_range_are_kept() -> None:
    """What the operator says of the value's year, source and range is told with it, for a zone as well."""
    more = {"year": 2024, "low_gco2eq_per_kwh": 1.0, "high_gco2eq_per_kwh": 2000.0}
    own = grid_of(EnergySettings.model_validate({"grid": {"gco2eq_per_kwh": 381.0, "source": "UBA", **more}}))
    assert own == GridIntensity(381.0, None, "UBA", "2024", 2024, "UBA", 1.0, 2000.0)
    zone = grid_of(EnergySettings.model_validate({"grid": {"zone": "DEU", **more}}))
    assert zone is not None
    assert (zone.year, zone.low, zone.high) == (2024, 1.0, 2000.0)


def test_cpu_model_out_of_range_is_refused() -> None:
    """A CPU that uses more when idle than when busy is an error of the settings."""
    with pytest.raises(ValidationError, match="idle_w_per_cpu"):
        EnergySettings.model_validate({"cpu_model": {**CPU_MODEL, "idle_w_per_cpu": 9.0}})


async def test_first_idle_stretch_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper's time begins when its counters have told a first time, so its first idle stretch has a figure.

    A counter that steps every 0.5 s tells nothing of the time before its first step.
    """
    steps = FakeCounter(lambda now_s: 50.0 * int(now_s * 2 + 1e-6), label=Label.SIMULATED, max_age_s=None)
    bench = WindowBench(monkeypatch, steps)
    monkeypatch.setattr(bench.meter._meter, "start", lambda: bench.passes(0.6))
    bench.meter.start()
    bench.passes(4.0)
    bench.prompt(2.0)
    bench.passes(3.0)
    bench.bind(LEASE)
    bench.passes(1.0)
    [idle] = of_kind(await bench.windows(), WindowKind.IDLE)
    assert detail(idle)["energy"]["total_j"] == pytest.approx(700, rel=0.15)
