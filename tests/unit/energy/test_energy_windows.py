"""What a wrapper writes down of its time: every moment once. All joules here are a test double's."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.energy import flights, window_writer
from deployments.energy import window_log as energy_log
from deployments.energy.counters.probe import Unreadable
from registry.contract.messages import LeaseGrant, StartedFor
from registry.contract.windows import EnergyWindow
from registry.errors import BudgetUsed
from registry.wire.labels import Label
from registry.wire.words import WindowKind
from tests.support.fake_counters import FakeCounter, PowerCurve, Ticks
from tests.support.meter_bench import EMBODIED, LEASE, OTHER, UTC_S, WATTS, Bench, detail, of_kind

Make = Callable[..., Bench]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a bench: ``make(*sources, **energy settings)``."""
    return partial(Bench, monkeypatch)


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


async def test_prompt_waits_for_those_beside_it(make: Make) -> None:
    """A prompt is written down when those that it shares with have ended; then both shares are the whole."""
    made = make()
    made.bind(LEASE)
    long, short = made.meter.prompt(), made.meter.prompt()
    made.passes(1.0)
    made.end(short, (10, 10))
    assert await made.windows() == ()
    made.passes(0.8)
    made.end(long, (10, 30))
    one, other = of_kind(await made.windows(), WindowKind.PROMPT)
    assert (one.total_j or 0) + (other.total_j or 0) == pytest.approx(200.0)
    assert (one.m_g or 0) + (other.m_g or 0) == pytest.approx(3.6 * 2.0 / 3600)
    assert "share_estimated" not in detail(one)["flags"]


async def test_prompt_waits_no_longer_than_some_time(make: Make) -> None:
    """Beside a prompt that goes on and on the share is written down as an estimate, and stays so: the sum holds."""
    made = make()
    made.bind(LEASE)
    long, short = made.meter.prompt(), made.meter.prompt()
    made.passes(1.0)
    made.end(short, (10, 10))
    made.passes(window_writer.SHARES_S)
    [one] = await made.windows()
    assert "share_estimated" in detail(one)["flags"]
    made.end(long, (10, 5000))
    _, other = of_kind(await made.windows(), WindowKind.PROMPT)
    assert (one.total_j or 0) + (other.total_j or 0) == pytest.approx(WATTS * (31.0 + 0.2), rel=1e-6)


async def test_unknown_tokens_are_no_zero(make: Make) -> None:
    """A prompt of unknown tokens has its energy and no score; its lease has the sum of the others', and says so.

    Two prompts of 1 s: one of unknown tokens, one of 6 and 4. The lease has 10 tokens, 4 units and no score: 200 J for
    4 tokens would be too much.
    """
    made = make()
    made.bind(LEASE)
    made.prompt(1.0, tokens=None)
    made.prompt(1.0)
    made.bind(None)
    windows = await made.windows()
    prompt, lease = of_kind(windows, WindowKind.PROMPT)[0], of_kind(windows, WindowKind.LEASE)[0]
    for window in (prompt, lease):
        found = detail(window)
        assert found["score"]["value"] is None
        assert {"tokens_unknown", "units_unknown"} <= set(found["flags"])
        assert found["methods"]["R"] == "unavailable"
        assert found["energy"]["total_j"] > 0
    assert (detail(prompt)["tokens"], detail(prompt)["units"]) == (None, None)
    found = detail(lease)
    assert (found["tokens"], found["tokens_unknown_prompts"]) == ({"prompt": 6, "cached": 0, "output": 4}, 1)
    assert (found["units"], found["units_unknown_prompts"]) == (4, 1)


async def test_a_refused_prompt_has_nothing_and_that_is_known(make: Make) -> None:
    """A refused prompt brought 0 tokens and adds its energy: the lease's score is all of its grams for 4 tokens."""
    made = make()
    made.bind(LEASE)
    metered = made.meter.prompt()
    made.passes(1.0)
    metered.refused()
    metered.end()
    made.prompt(1.0)
    made.bind(None)
    windows = await made.windows()
    refused, [lease] = detail(of_kind(windows, WindowKind.PROMPT)[0]), of_kind(windows, WindowKind.LEASE)
    assert (refused["status"], refused["units"], refused["tokens"]["output"]) == ("refused", 0, 0)
    found = detail(lease)
    assert (found["units"], found["units_unknown_prompts"]) == (4, 0)
    assert lease.total_j == pytest.approx(200.0)
    assert found["score"]["value"] == pytest.approx(((lease.o_g or 0) + (lease.m_g or 0)) / 4)


async def test_cached_tokens_that_one_prompt_does_not_tell(make: Make) -> None:
    """Of two prompts one tells that 0 of its tokens were cached, one says nothing: it and its lease don't know."""
    made = make()
    made.bind(LEASE)
    made.prompt(1.0)
    metered = made.meter.prompt()
    made.passes(1.0)
    metered.end()
    metered.account(usage={"prompt_tokens": 6, "completion_tokens": 4}, answer=None)
    made.bind(None)
    windows = await made.windows()
    cached = [detail(window)["tokens"]["cached"] for window in of_kind(windows, WindowKind.PROMPT)]
    [lease] = of_kind(windows, WindowKind.LEASE)
    assert (cached, detail(lease)["tokens"]) == ([0, None], {"prompt": 12, "cached": None, "output": 8})


async def test_long_prompt_beside_more_than_is_remembered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and idle time add up to their lease however many come and go beside a long prompt.

    100 W that rise to 400 W in the middle of 180 s. One prompt takes 150 s, beside a short one every second: 300
    changes, of which 100 are remembered. What the long one had of the others is summed up before it is forgotten.
    """
    monkeypatch.setattr(flights, "REMEMBERED_CHANGES", 100)
    made = make(
        FakeCounter(lambda now_s: 100 * now_s + 300 * max(now_s - 1090, 0), name="gpu:x", label=Label.SIMULATED)
    )
    made.bind(LEASE)
    made.passes(2.0)
    long = made.meter.prompt()
    remembered: list[int] = []
    windows: tuple[EnergyWindow, ...] = ()
    for second in range(150):
        made.passes(0.5)
        made.prompt(0.5, (second % 7, 1 + second % 5))
        if second % 5 == 0:
            await made.windows()
            remembered.append(len(made.meter._flights))
    made.end(long, (100, 3000))
    made.passes(2.0)
    made.bind(None)
    made.passes(31.0)
    windows = await made.windows()
    [lease] = of_kind(windows, WindowKind.LEASE)
    prompts = of_kind(windows, WindowKind.PROMPT)
    parts_j = [w.total_j for w in windows if w.request_id and w.kind in (WindowKind.PROMPT, WindowKind.IDLE)]
    assert None not in parts_j
    assert sum(part_j or 0 for part_j in parts_j) == pytest.approx(lease.total_j, rel=1e-9)
    assert max(remembered) <= 2 * 100
    [kept] = [detail(prompt) for prompt in prompts if detail(prompt)["tokens"]["output"] == 3000]
    assert kept["in_flight"]["max"] == 2
    assert kept["in_flight"]["mean"] == pytest.approx(1 + 150 * 0.5 / kept["duration_s"], rel=1e-3)


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


# --- budgets -----------------------------------------------------------------------------------------------


def flags_of(made: Bench) -> Any:
    metered = made.meter.prompt()
    made.passes(0.5)
    metered.end()
    made.passes(0.1)
    return metered.account(usage={"prompt_tokens": 1, "completion_tokens": 1}, answer=None)["flags"]


@pytest.mark.parametrize("limit", [{"max_j": 1000.0}, {"max_g": 1000.0 / 3.6e6 * 360.0 + 10.0 / 1000}])
def test_budget_warns_and_then_refuses(make: Make, limit: dict[str, float]) -> None:
    """Idling uses a budget, too: answers warn from 80 % of it on, and when it is used no prompt is taken."""
    made = make()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, **limit))  # type: ignore[arg-type]
    made.passes(3.0)
    made.meter.require_budget()
    assert "budget_nearly_used" not in flags_of(made)
    made.passes(4.5)
    assert "budget_nearly_used" in flags_of(made)
    made.meter.require_budget()
    made.passes(2.0)
    with pytest.raises(BudgetUsed):
        made.meter.require_budget()


def test_larger_budget_is_taken_at_once(make: Make) -> None:
    """The same lease bound again, as a restarted registry does, goes on with its account and its new limits."""
    made = make()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=100.0))
    made.passes(2.0)
    with pytest.raises(BudgetUsed):
        made.meter.require_budget()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1000.0))
    made.meter.require_budget()
    use = made.meter.use()
    assert use is not None
    assert use["total_j"] == pytest.approx(200.0)


def test_budget_goes_on_after_a_restart(make: Make) -> None:
    """What a lease used under an earlier process of its wrapper counts, once: the same word again adds nothing."""
    made = make()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1000.0, used_j=700.0, used_g=0.5))
    made.passes(2.0)
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1000.0, used_j=900.0, used_g=0.7))
    use = made.meter.use()
    assert use is not None
    assert (use["total_j"], use["before_j"], use["before_g"]) == (pytest.approx(200.0), 700.0, 0.5)
    assert "budget_nearly_used" in use["flags"]
    made.meter.require_budget()
    made.passes(1.05)
    with pytest.raises(BudgetUsed, match="may use 1000"):
        made.meter.require_budget()


def test_budget_that_nobody_can_tell(make: Make) -> None:
    """A budget on a machine without figures is not enforced, and says so."""
    made = make(Unreadable("gpu:x", "no driver", in_boundary=True))
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1.0))
    made.passes(3.0)
    made.meter.require_budget()
    assert "budget_not_enforced" in flags_of(made)
    use = made.meter.use()
    assert use is not None
    assert (use["total_j"], use["max_j"]) == (None, 1.0)
    assert "budget_not_enforced" in use["flags"]


def test_new_budget_is_no_unknown_one(make: Make) -> None:
    """A lease that has just begun has used nothing: it does not count as one of which nobody can tell."""
    made = make()
    made.bind(LeaseGrant("r", 1, "t", "{}", 600.0, 60.0, max_j=1000.0))
    for _ in range(3):
        use = made.meter.use()
        assert use is not None
        assert "budget_not_enforced" not in use["flags"]
        made.meter.require_budget()
        made.passes(0.05)


async def test_lease_that_comes_back_goes_on(make: Make) -> None:
    """A lease that is bound again while a prompt of it is finished is one lease."""
    made = make()
    made.bind(LEASE)
    metered = made.meter.prompt()
    made.passes(1.0)
    made.bind(None)
    made.bind(LEASE)
    made.end(metered)
    made.passes(1.0)
    made.bind(None)
    [lease] = of_kind(await made.windows(), WindowKind.LEASE)
    assert lease.total_j == pytest.approx(200.0)


async def test_what_a_lease_has_cost_so_far(make: Make) -> None:
    """The status tells what a lease has used, with its idle time, over all that was written down and what was not."""
    made = make()
    assert made.meter.use() is None
    made.bind(LEASE)
    first = made.meter.use()
    assert first is not None
    assert (first["total_j"], first["idle_j"], first["label"]) == (None, None, "unavailable")
    made.passes(310.0)
    await made.windows()
    made.prompt(2.0)
    made.passes(1.0)
    use = made.meter.use()
    assert use is not None
    assert use["total_j"] == pytest.approx(WATTS * 313.2)
    assert use["idle_j"] == pytest.approx(WATTS * 311.2)
    assert use["o_g"] == pytest.approx(WATTS * 313.2 / 3.6e6 * 360.0)
    assert use["m_g"] == pytest.approx(3.6 * 313.2 / 3600)
    json.dumps(use)


async def test_lease_and_start_shorter_than_the_counter(make: Make) -> None:
    """A lease and a start that the counter is too slow for are modelled and flagged, as the prompts in them are.

    A counter of 100 ms at 100 W: a start of 0.1 s and a lease that is one prompt of 0.1 s are 10 J each. As each can
    lie in two ticks of 10 J, they are 0 to 20 J.
    """
    ticks = Ticks(lambda now_s: WATTS * now_s, [0.1 * tick for tick in range(11_000)], 1e-3)
    made = make(FakeCounter(ticks, name="gpu:GPU-x", label=Label.SIMULATED, max_age_s=None, step=1e-3, limit_w=700.0))
    made.passes(2.0)
    with made.meter.load("x"):
        made.passes(0.1)
    made.passes(1.0)
    made.bind(LEASE)
    made.prompt(0.1)
    made.bind(None)
    made.passes(0.5)  # until the power after the prompt is known
    windows = await made.windows()
    [load], [lease], [prompt] = (
        of_kind(windows, kind) for kind in (WindowKind.LOAD, WindowKind.LEASE, WindowKind.PROMPT)
    )
    for window in (load, lease):
        energy = detail(window)["energy"]
        assert window.total_j == pytest.approx(10.0)
        assert energy["low_j"] <= 0.1
        assert energy["high_j"] == pytest.approx(20.0, abs=0.1)
        assert "too_short" in detail(window)["flags"]
    assert lease.total_j == pytest.approx(prompt.total_j)


async def test_counter_that_stands_still_for_a_while(make: Make) -> None:
    """No window is written while its counter stands still: afterwards prompts and idle time are exactly the lease.

    100 W; the counter stands still from 1005 to 1012 s, in which two prompts of 1 s are answered. The lease of three
    times 1 + 1 + 0.2 s, 0.2 s and 6 s is 12.8 s: 1,280 J, of which 700 J show at once.
    """
    still = FakeCounter(lambda now_s: WATTS * (now_s if not 1005 < now_s < 1012 else 1005.0), name="gpu:GPU-x",
                        label=Label.SIMULATED, max_age_s=None)  # fmt: skip
    made = make(still)
    made.passes(2.0)
    made.bind(LEASE)
    for _ in range(3):
        made.passes(1.0)
        made.prompt(1.0)
        await made.windows()
    assert made.clock.now_s < 1012
    assert len(await made.windows()) <= 3
    made.passes(6.0)
    made.bind(None)
    made.passes(1.0)
    windows = await made.windows()
    [lease] = of_kind(windows, WindowKind.LEASE)
    own = [window for window in windows if window.request_id == "request-1" and window is not lease]
    assert len(of_kind(windows, WindowKind.PROMPT)) == 3
    assert not any("provisional" in detail(window)["flags"] for window in windows)
    assert None not in [window.total_j for window in own]
    assert lease.total_j == pytest.approx(1280.0)
    assert sum(window.total_j or 0.0 for window in own) == pytest.approx(lease.total_j, rel=1e-9)


async def test_counter_that_does_not_come_back(make: Make) -> None:
    """What a dead counter has not told after `READINGS_S` is unavailable and says so, rather than extrapolated."""
    made = make(FakeCounter(lambda now_s: WATTS * min(now_s, 1003.0), name="gpu:GPU-x",
                            label=Label.SIMULATED, max_age_s=None))  # fmt: skip
    made.passes(2.0)
    made.bind(LEASE)
    made.prompt(1.2)
    assert of_kind(await made.windows(), WindowKind.PROMPT) == []
    made.passes(window_writer.READINGS_S)
    [prompt] = of_kind(await made.windows(), WindowKind.PROMPT)
    assert prompt.total_j is None
    assert "stale" in detail(prompt)["flags"]


# --- what a prompt token costs -----------------------------------------------------------------------------


def prefill_and_decode() -> tuple[FakeCounter, Callable[[float, float], None]]:
    """A GPU of 50 W, and a way to make it use so many joules more, evenly in the time that they take."""
    works: list[tuple[float, float, float]] = []

    def joules(now_s: float) -> float:
        extra = sum(j * min(max(now_s - begin_s, 0.0) / length_s, 1.0) for begin_s, length_s, j in works)
        return 50 * now_s + extra

    counter = FakeCounter(joules, name="gpu:GPU-x", label=Label.SIMULATED)
    return counter, lambda begin_s, joules: works.append((begin_s, 1.0, joules))


async def shares_of_two(made: Bench, use: Callable[[float, float], None]) -> list[EnergyWindow]:
    """The records of (810 + 150) and (3 + 150) tokens that are answered together in one second."""
    use(made.clock.now_s, 2.0 * 60.0)
    large, small = made.meter.prompt(), made.meter.prompt()
    made.passes(1.0)
    made.end(large, (810, 150))
    made.end(small, (3, 150))
    made.passes(0.5)
    return of_kind(await made.windows(), WindowKind.PROMPT)[-2:]


async def test_weight_is_learned_from_prompts_alone(make: Make) -> None:
    """Prompts that were alone teach the weight; shares then go by it, and a new LLM has to teach it anew.

    An output token takes 0.5 J, a prompt token 0.005 J, 50 W the machine: prompts of 1 s each. With all of that the
    weight is small, so (810 + 150) and (3 + 150) tokens have shares of 1.0 to 1.2 : 1, and not 3.7 : 1 as before.
    """
    counter, use = prefill_and_decode()
    made = make(counter)
    made.passes(1.0)
    before = await shares_of_two(made, use)
    assert (before[0].total_j or 0) / (before[1].total_j or 1) == pytest.approx(555 / 151.5)
    for number in range(12):
        prompt, output = (810, 3, 300)[number % 3], (150, 150, 40, 90)[number % 4]
        use(made.clock.now_s, 0.005 * prompt + 0.5 * output)
        made.prompt(1.0, (prompt, output))
        made.passes(0.5)
    await made.windows()
    after = await shares_of_two(made, use)
    assert 1.0 < (after[0].total_j or 0) / (after[1].total_j or 1) < 1.2
    weight = made.meter._flights.weight
    for _ in range(20):
        metered = made.meter.prompt()
        made.passes(0.5)
        metered.end()
        metered.refused()  # teaches nothing: it brought no tokens
    await made.windows()
    assert made.meter._flights.weight == weight
    widths = [detail(pair[0])["energy"]["high_j"] - detail(pair[0])["energy"]["low_j"] for pair in (before, after)]
    assert widths[1] < widths[0] / 2
    with made.meter.load("another"):
        made.passes(1.0)
    made.passes(1.0)
    again = await shares_of_two(made, use)
    assert (again[0].total_j or 0) / (again[1].total_j or 1) == pytest.approx(555 / 151.5)


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
