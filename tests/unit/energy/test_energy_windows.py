"""What a wrapper writes down of its time: every moment once. All joules here are a test double's."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.energy import window_log as energy_log
from deployments.energy.counters.probe import Unreadable
from registry.contract.messages import LeaseGrant, StartedFor
from registry.wire.labels import Label
from registry.wire.words import WindowKind
from tests.support.fake_counters import FakeCounter, PowerCurve, Ticks
from tests.support.meter_bench import EMBODIED, LEASE, OTHER, UTC_S, WATTS, Make, detail, of_kind


async def test_lease_becomes_windows(make: Make) -> None:
    """A lease of two prompts gives their windows, that of its idle time, and its own, which is their sum."""
    made = make()
    made.passes(1.0)
    made.bind(LEASE)
    made.passes(3.0)
    made.prompt(2.0)
    made.passes(1.0)
    made.prompt(1.0)
    made.bind(None)
    windows = await made.windows()
    assert [window.kind.value for window in windows] == ["prompt", "prompt", "idle", "idle", "lease"]
    machine, idle = of_kind(windows, WindowKind.IDLE)
    first, second = of_kind(windows, WindowKind.PROMPT)
    [lease] = of_kind(windows, WindowKind.LEASE)
    assert [window.window_id for window in windows] == ["p-p1", "p-p2", "p-3", "p-4", "p-5"]
    assert [window.number for window in windows] == [1, 2, 3, 4, 5]
    assert machine.request_id is None
    assert machine.total_j == pytest.approx(100.0)
    assert {window.request_id for window in (idle, first, second, lease)} == {"request-1"}
    assert [window.total_j for window in (first, second, idle)] == pytest.approx([200.0, 100.0, 400.0])
    assert lease.total_j == pytest.approx(700.0)
    assert (lease.begun_s, lease.ended_s) == pytest.approx((UTC_S + 1.0, UTC_S + 8.0))
    assert lease.m_g == pytest.approx(3.6 * 7.0 / 3600)
    assert (detail(lease)["units"], detail(lease)["prompts"]) == (8, 2)
    assert detail(lease)["tokens"] == {"prompt": 12, "cached": 0, "output": 8}
    assert detail(lease)["score"]["value"] == pytest.approx(((lease.o_g or 0) + (lease.m_g or 0)) / 8)


async def test_record_of_a_prompt(make: Make) -> None:
    """A record says what is needed to check its figures: ids, times, tokens, joules by part, factors, flags."""
    made = make()
    made.bind(LEASE)
    made.prompt(2.0)
    [window] = of_kind(await made.windows(), WindowKind.PROMPT)
    found = detail(window)
    assert found["ids"] == {
        "window_id": "p-p1", "wrapper_id": "a-0", "request_id": "request-1", "measurement_id": 7,
        "process": "p", "number": 1,
    }  # fmt: skip
    assert (found["begun"], found["ended"]) == ("2027-01-15T08:00:00.000000+00:00", "2027-01-15T08:00:02.000000+00:00")
    assert (found["tokens"], found["words"]) == ({"prompt": 6, "cached": 0, "output": 4}, 4)
    [part] = found["energy"]["components"]
    assert (part["name"], part["label"], part["source"]) == ("gpu:GPU-x", "simulated", "a test")
    assert found["grid"] == {
        "value": 360.0, "unit": "gCO2eq/kWh", "zone": None, "dataset": "a test", "version": "2026-01-01",
        "year": None, "source": "a test", "low": None, "high": None,
    }  # fmt: skip
    assert (found["embodied"], found["pue"], found["gpus"]) == (EMBODIED, 1.0, ["GPU-x"])
    assert (found["unit"], found["units"], found["boundary"]) == ("output_token", 4, ["gpu:GPU-x"])
    assert found["score"]["low"] < found["score"]["value"] < found["score"]["high"]
    assert found["methods"] == {"E": "simulated", "I": "sourced", "M": "sourced", "R": "measured"}
    assert (window.total_j, window.o_g, window.m_g) == (found["energy"]["total_j"], found["o_g"], found["m_g"])
    assert window.label == "simulated"


async def test_a_stranger_on_the_cpus_flags_the_windows_in_it(make: Make) -> None:
    """The prompt during which a stranger used the CPUs is contended, and so is its lease; a later prompt is not."""
    made = make()
    made.bind(LEASE)
    made.stranger_works = True
    made.prompt(2.0)
    made.stranger_works = False
    made.passes(3.0)
    made.prompt(2.0)
    made.bind(None)
    windows = await made.windows()
    first, second = of_kind(windows, WindowKind.PROMPT)
    (lease,) = of_kind(windows, WindowKind.LEASE)
    assert ["contended" in detail(window)["flags"] for window in (first, second, lease)] == [True, False, True]


async def test_start_names_the_request_that_it_is_for(make: Make) -> None:
    """A load for request-9 and a wake for request-8 name these; a preload of 2 s and 200 J names no request."""
    made = make()
    with made.meter.load("org/tiny", StartedFor("request-9", 4)):
        made.passes(5.0)
    with made.meter.load("org/other", StartedFor("request-8", 3)) as start:
        made.passes(1.0)
        start.woken = True
    with made.meter.load("org/tiny"):
        made.passes(2.0)
    windows = await made.windows()
    first, preload = of_kind(windows, WindowKind.LOAD)
    (wake,) = of_kind(windows, WindowKind.WAKE)
    assert (first.request_id, first.measurement_id) == ("request-9", 4)
    assert (wake.request_id, wake.measurement_id) == ("request-8", 3)
    assert (preload.request_id, preload.measurement_id) == (None, None)
    assert preload.total_j == pytest.approx(200, rel=0.05)
    assert detail(first)["ids"]["request_id"] == "request-9"


async def test_start_is_charged_to_the_deployment(make: Make) -> None:
    """The start of an LLM is no time of a lease, not even of the one whose LLM comes back; a wake is no load."""
    made = make()
    made.bind(LEASE)
    made.passes(1.0)
    with made.meter.load("org/tiny"):
        made.passes(5.0)
    made.passes(2.0)
    with made.meter.load("org/tiny") as start:
        made.passes(1.0)
        start.woken = True
    made.bind(None)
    windows = await made.windows()
    [load], [wake] = of_kind(windows, WindowKind.LOAD), of_kind(windows, WindowKind.WAKE)
    assert load.request_id is None
    assert [load.total_j, wake.total_j] == pytest.approx([500.0, 100.0])
    assert detail(load)["model"] == "org/tiny"
    [lease] = of_kind(windows, WindowKind.LEASE)
    assert lease.total_j == pytest.approx(300.0)
    assert detail(lease)["reserved_s"] == pytest.approx(3.0)


async def test_nobodys_time_is_cut(make: Make) -> None:
    """An idle machine is written down every five minutes, without a request."""
    made = make()
    for _ in range(3):
        made.passes(150.0)
        await made.windows()
    made.passes(150.0)
    windows = await made.windows()
    assert [window.request_id for window in windows] == [None, None]
    assert [window.total_j for window in windows] == pytest.approx([30_000, 30_000], rel=0.01)
    assert windows[0].ended_s == pytest.approx(windows[1].begun_s)


async def test_windows_are_kept_until_they_are_written_down(make: Make) -> None:
    """A window is given again and again until the registry confirms its number; a word on another process is none."""
    made = make()
    made.bind(LEASE)
    for _ in range(3):
        made.prompt(0.5)
    assert [window.window_id for window in await made.windows()] == ["p-p1", "p-p2", "p-p3"]
    assert len(await made.windows(kept=2, process="another")) == 3
    assert [window.window_id for window in await made.windows(kept=2)] == ["p-p3"]
    assert [window.window_id for window in await made.windows(kept=1)] == ["p-p3"]
    assert await made.windows(kept=99) == ()
    made.prompt(0.5)
    assert [window.window_id for window in await made.windows(kept=3)] == ["p-p4"]


async def test_what_nobody_fetches_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a limit to what is kept and to what is given at once; what goes over it is told."""
    monkeypatch.setattr(energy_log, "KEPT_WINDOWS", 3)
    monkeypatch.setattr(energy_log, "WINDOWS_A_REPORT", 2)
    made = make()
    for _ in range(5):
        made.prompt(0.5)
    assert [window.window_id for window in await made.windows()] == ["p-p3", "p-p4"]
    assert made.meter.describe()["windows"] == {"kept": 3, "dropped": 2}


async def test_without_counters_nothing_is_measured(make: Make) -> None:
    """Where nothing can be read windows are written all the same, without a figure."""
    made = make(Unreadable("gpu:x", "no driver", in_boundary=True))
    made.bind(LEASE)
    made.prompt(1.0)
    made.bind(None)
    for window in await made.windows():
        assert (window.total_j, window.o_g, window.label) == (None, None, "unavailable")
        assert detail(window)["score"]["value"] is None
        assert window.m_g is not None


async def test_lease_that_ended_unnoticed(make: Make) -> None:
    """A lease that expired some time ago ends when it expired; what came after is the machine's."""
    made = make()
    made.bind(LEASE)
    made.passes(3.0)
    made.meter.hand_over(None, made.clock.now_s - 1.0)
    made.bind(OTHER)
    windows = await made.windows()
    [lease] = of_kind(windows, WindowKind.LEASE)
    assert lease.total_j == pytest.approx(200.0)
    assert [window.total_j for window in of_kind(windows, WindowKind.IDLE)] == pytest.approx([200.0, 100.0])


async def test_last_prompt_is_its_leases(make: Make) -> None:
    """A prompt that is finished after its lease belongs to it, and the next lease begins after it."""
    made = make()
    made.bind(LEASE)
    metered = made.meter.prompt()
    made.passes(1.0)
    made.bind(None)
    made.bind(OTHER)
    made.passes(1.0)
    made.end(metered)
    made.passes(1.0)
    made.bind(None)
    windows = await made.windows()
    first, second = of_kind(windows, WindowKind.LEASE)
    assert [window.request_id for window in (first, second)] == ["request-1", "request-2"]
    assert [window.total_j for window in (first, second)] == pytest.approx([200.0, 100.0])


# --- every moment once -------------------------------------------------------------------------------------


def ticks_of_100_ms(stalls: int = 0) -> FakeCounter:
    """A counter as NVML's, under a power that goes up and down; of every 20 s it stands still for some."""
    curve = PowerCurve(0.0, [(0.37, 60.0 + 40 * (step % 7)) for step in range(6000)])
    ticks = Ticks(curve.joules, [0.1 * tick for tick in range(30_000) if tick % 200 >= 10 * stalls], 1e-3)
    return FakeCounter(ticks, name="gpu:GPU-x", label=Label.SIMULATED, max_age_s=None, step=1e-3, limit_w=700.0)


events = st.lists(
    st.tuples(
        st.sampled_from(["bind", "rebind", "unbind", *["begin", "end"] * 3, "end unknown", "load", "report", "pass"]),
        st.integers(1, 30),
        st.integers(0, 40),
    ),
    min_size=10,
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events, ticking=st.booleans(), stalls=st.sampled_from([0, 3, 8]))
async def test_every_moment_is_charged_once(
    make: Make, events: list[tuple[str, int, int]], ticking: bool, stalls: int
) -> None:
    """Whatever happens, prompts and idle time of a lease are the lease, and all windows together are all that flowed.

    No window is negative or 0 J, none has a better label than its counter, and the numbers have no holes.
    """
    made = make(*([ticks_of_100_ms(stalls)] if ticking else []))
    begun_s, flying, leases = made.clock.now_s, [], 0
    if ticking:
        made.passes(stalls + 1.0)  # what was before its first steps is not known
    made.bind(LEASE)
    for what, ticks, tokens in events:
        if what == "bind":
            leases += 1
            made.bind(LeaseGrant(f"r{leases}", 1, f"t{leases}", "{}", 600.0, 60.0))
        elif what == "rebind" and leases:
            made.bind(LeaseGrant(f"r{leases}", 1, f"t{leases}", "{}", 600.0, 60.0, max_j=1e9))
        elif what == "unbind":
            made.bind(None)
        elif what == "begin":
            flying.append(made.meter.prompt())
        elif what.startswith("end") and flying:
            made.end(flying.pop(tokens % len(flying)), None if what == "end unknown" else (tokens, tokens // 2))
        elif what == "load" and not flying:  # no LLM is started while another answers
            with made.meter.load("x"):
                made.passes(ticks * 0.05)
        elif what == "report":
            await made.windows()
        made.passes(ticks * 0.05)
    for metered in flying:
        made.end(metered)
    made.bind(None)
    ended_s = made.clock.now_s
    made.passes(stalls if ticking else 0)
    windows = await made.windows()
    assert [window.number for window in windows] == [*range(1, len(windows) + 1)]
    parts = [window for window in windows if window.kind is not WindowKind.LEASE]
    if not ticking:
        known_j = sum(window.total_j or 0.0 for window in parts)
        assert known_j == pytest.approx(WATTS * (ended_s - begun_s), abs=1e-6)
    order = list(Label)
    for lease in of_kind(windows, WindowKind.LEASE):
        own = [part for part in parts if part.request_id == lease.request_id]
        within = [part for part in own if part.begun_s >= lease.begun_s - 1e-9 and part.ended_s <= lease.ended_s + 1e-9]
        if lease.total_j is not None:
            assert sum(part.total_j or 0.0 for part in within) == pytest.approx(lease.total_j, abs=1e-6)
            assert sum(part.m_g or 0.0 for part in within) == pytest.approx(lease.m_g, abs=1e-9)
        assert all(order.index(Label(part.label)) >= order.index(Label.SIMULATED) for part in own)
    assert all(window.total_j is None or window.total_j > 0 for window in windows)
