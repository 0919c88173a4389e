"""What the records say of a prompt's place and of a lease as a whole: ids, warm-ups, the counted stretch, dates."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.energy.prompt_meter import MeteredPrompt
from registry.contract.windows import EnergyWindow
from registry.wire.words import WindowKind
from tests.support.energy_windows import record
from tests.support.meter_bench import LEASE, UTC_S, WATTS, Make, detail, of_kind


def shape(value: Any) -> Any:
    """The keys of a JSON value, all the way down."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def lease_of(windows: tuple[EnergyWindow, ...]) -> Any:
    [lease] = of_kind(windows, WindowKind.LEASE)
    return detail(lease)


async def test_records_are_those_that_tests_make(make: Make) -> None:
    """A wrapper's record of each kind has exactly the keys of the one that other tests are made of."""
    made = make()
    made.bind(LEASE)
    made.prompt(2.0)
    made.passes(1.0)
    for woken in (False, True):
        with made.meter.load("org/tiny") as start:
            made.passes(5.0)
            start.woken = woken
    made.passes(1.0)
    made.bind(None)
    windows = {window.kind: window for window in await made.windows()}
    assert windows.keys() == set(WindowKind)
    for kind, window in windows.items():
        assert shape(detail(window)) == shape(json.loads(record(1, kind).detail))


async def test_an_answer_names_its_window(make: Make) -> None:
    """The id in an answer is that of the window that is written down later; the answer says that it is not final.

    Two prompts: the second ends, and is written, first; ids follow the begins, numbers the log.
    """
    made = make()
    made.bind(LEASE)
    first, second = made.meter.prompt(), made.meter.prompt()
    made.passes(1.0)
    usage = {"prompt_tokens": 6, "completion_tokens": 4}
    told = {}
    for metered, text in ((second, "b"), (first, "a")):
        metered.end()
        metered.flight.answer_id = text
        account = metered.account(usage=usage, answer=text)
        brief = metered.brief(usage=usage, answer=text)
        told[text] = account["window"]
        assert (account["final"], brief["final"], brief["window"]) == (False, False, account["window"])
        assert brief["joules_low"] <= brief["joules"] <= brief["joules_high"]
        assert brief["sci_low"] <= brief["sci_score"] <= brief["sci_high"]
        made.passes(1.0)
    windows = of_kind(await made.windows(), WindowKind.PROMPT)
    assert [window.window_id for window in windows] == ["p-p2", "p-p1"]
    assert [window.number for window in windows] == [1, 2]
    assert {detail(window)["answer_id"]: window.window_id for window in windows} == told


async def test_how_many_were_in_flight(make: Make) -> None:
    """Of two prompts of 2 s that overlap for 1 s, each was alone for half of its time: at most 2, 1.5 in the mean."""
    made = make()
    made.bind(LEASE)
    first = made.meter.prompt()
    made.passes(1.0)
    second = made.meter.prompt()
    made.passes(1.0)
    made.end(first)
    made.passes(1.0)
    made.end(second)
    for window in of_kind(await made.windows(), WindowKind.PROMPT):
        assert detail(window)["in_flight"] == {"max": 2, "mean": pytest.approx(1.5)}


# --- the counted stretch -----------------------------------------------------------------------------------


async def test_a_record_has_the_clients_name_of_its_prompt(make: Make) -> None:
    """Answers to the same prompt in several leases belong together: the record says which prompt it was."""
    made = make()
    made.bind(LEASE)
    metered = made.meter.prompt(prompt_id="p 1")
    made.passes(1.0)
    made.end(metered)
    made.bind(None)
    [prompt] = of_kind(await made.windows(), WindowKind.PROMPT)
    assert detail(prompt)["prompt_id"] == "p 1"


async def test_counted_stretch_is_one_window_without_warm_ups(make: Make) -> None:
    """By hand: idle 1 s, a warm-up of 2 s, idle 1 s, a prompt of 3 s, idle 1 s, one of 2 s, idle 4 s, at 100 W.

    Counted are 3 + 1 + 2 = 6 s and 600 J, with 2 prompts and 8 tokens: 75 J a token. The lease has 1,400 J. Prompts are
    in flight for 5 of the 6 s. At 360 g/kWh 600 J are 0.06 g, at 3.6 g/h 6 s are 0.006 g.
    """
    made = make()
    made.bind(LEASE)
    made.passes(1.0)
    made.prompt(2.0, warmup=True)
    made.passes(1.0)
    made.prompt(3.0)
    made.passes(1.0)
    made.prompt(2.0)
    made.passes(4.0)
    made.bind(None)
    windows = await made.windows()
    assert [detail(window)["warmup"] for window in of_kind(windows, WindowKind.PROMPT)] == [True, False, False]
    lease = lease_of(windows)
    assert (lease["prompts"], lease["warmups"]) == (3, 1)
    counted = lease["counted"]
    assert lease["energy"]["total_j"] == pytest.approx(1400.0)
    assert (counted["total_j"], counted["seconds"]) == (pytest.approx(600.0), pytest.approx(6.0))
    assert counted["low_j"] <= counted["total_j"] <= counted["high_j"]
    assert (counted["o_g"], counted["m_g"]) == (pytest.approx(0.06), pytest.approx(0.006))
    assert (counted["prompts"], counted["output_tokens"], counted["units"]) == (2, 8, 8)
    assert counted["in_flight"] == {"max": 1, "mean": pytest.approx(5 / 6)}
    assert counted["label"] == "simulated"
    assert counted["flags"] == sorted(set(counted["flags"]) - {"warmup_inside", "llm_started_inside", "shared"})
    assert (counted["begun"], counted["ended"]) == ("2027-01-15T08:00:04.000000+00:00",
                                                    "2027-01-15T08:00:10.000000+00:00")  # fmt: skip


async def test_counted_stretch_has_no_shares(make: Make) -> None:
    """Four prompts in flight at all times: single windows are shares and modeled, the counted stretch is the counter's.

    Four at once for 5 s at 100 W are 500 J for 4 x 4 tokens, whatever their shares are.
    """
    made = make()
    made.bind(LEASE)
    flights = [made.meter.prompt() for _ in range(4)]
    made.passes(5.0)
    for metered in flights:
        made.end(metered)
    made.bind(None)
    windows = await made.windows()
    counted = lease_of(windows)["counted"]
    assert all("shared" in detail(window)["flags"] for window in of_kind(windows, WindowKind.PROMPT))
    assert "shared" not in counted["flags"]
    assert (counted["total_j"], counted["output_tokens"]) == (pytest.approx(500.0), 16)
    assert counted["in_flight"] == {"max": 4, "mean": pytest.approx(4.0)}


async def test_a_start_is_not_inside_the_counted_stretch(make: Make) -> None:
    """An LLM that is started between two prompts costs its deployment: 2 + 3 s are counted, not the 10 s between."""
    made = make()
    made.bind(LEASE)
    made.prompt(2.0)
    with made.meter.load("org/tiny"):
        made.passes(10.0)
    made.prompt(3.0)
    made.bind(None)
    counted = lease_of(await made.windows())["counted"]
    assert (counted["total_j"], counted["seconds"]) == (pytest.approx(500.0), pytest.approx(5.0))
    assert "llm_started_inside" in counted["flags"]
    assert counted["in_flight"]["mean"] == pytest.approx(1.0)


async def test_counted_stretch_that_is_not_clean_says_so(make: Make) -> None:
    """A warm-up inside is flagged, also at the lease; a prompt of unknown tokens has known joules."""
    made = make()
    made.bind(LEASE)
    made.prompt(1.0)
    made.prompt(1.0, warmup=True)
    made.prompt(1.0, tokens=None)
    made.bind(None)
    lease = lease_of(await made.windows())
    counted = lease["counted"]
    assert {"warmup_inside", "tokens_unknown"} <= set(lease["flags"])
    assert (counted["output_tokens"], counted["units"], counted["prompts"]) == (None, None, 2)
    assert counted["total_j"] == pytest.approx(300.0)
    assert {"warmup_inside", "tokens_unknown"} <= set(counted["flags"])


async def test_a_lease_of_warm_ups_has_no_counted_stretch(make: Make) -> None:
    """Without a prompt that counts there is nothing that could be cited."""
    made = make()
    made.bind(LEASE)
    made.prompt(1.0, warmup=True)
    made.bind(None)
    assert lease_of(await made.windows())["counted"] is None


async def test_counted_stretch_of_a_long_lease(make: Make) -> None:
    """Over many reports, an idle quarter of an hour, and more prompts: still from the first begin to the last end.

    20 prompts of 40 s, reported every 80 s; 900 s idle; one prompt of 5 s: 1,705 s are 170,500 J; the last idle 700 s
    are not inside.
    """
    made = make()
    made.bind(LEASE)
    for _ in range(10):
        made.prompt(40.0)
        made.prompt(40.0)
        await made.windows(kept=10**6)
    before_s = made.clock.now_s
    for _ in range(9):
        made.passes(100.0)
        await made.windows(kept=10**6)
    idle_s = made.clock.now_s - before_s
    made.prompt(5.0)
    for _ in range(7):
        made.passes(100.0)
        await made.windows(kept=10**6)
    made.bind(None)
    counted = lease_of(await made.windows(kept=10**6))["counted"]
    assert counted["seconds"] == pytest.approx(800.0 + 10 * 0.2 + idle_s + 5.0)
    assert counted["total_j"] == pytest.approx(counted["seconds"] * WATTS)
    assert counted["prompts"] == 21
    assert "llm_started_inside" not in counted["flags"]


events = st.lists(
    st.tuples(
        st.sampled_from(["begin", "begin", "warm up", "end", "end", "load", "report", "pass"]), st.integers(1, 60)
    ),
    min_size=10,
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events)
async def test_counted_stretch_is_the_truth(make: Make, events: list[tuple[str, int]]) -> None:
    """However prompts, warm-ups, starts and reports follow each other, the stretch is what a stopwatch says of it.

    Its joules, its seconds without starts, its prompts, and its concurrency are those that are noted beside the meter.
    """
    made = make()
    made.bind(LEASE)
    flying: list[MeteredPrompt] = []
    begun_s = ended_s = None
    noted: list[tuple[float, float, int, bool]] = []
    """Begin and end of each piece of time, how many were in flight in it, and whether an LLM was being started."""

    def passes(seconds: float, *, load: bool = False) -> None:
        from_s = made.clock.now_s
        made.passes(seconds)
        noted.append((from_s, made.clock.now_s, len(flying), load))

    for what, ticks in events:
        if what in {"begin", "warm up"}:
            flying.append(made.meter.prompt(warmup=what == "warm up"))
            begun_s = begun_s if begun_s is not None or what == "warm up" else made.clock.now_s
        elif what == "end" and flying:
            metered = flying.pop(ticks % len(flying))
            made.end(metered)
            ended_s = ended_s if metered.flight.warmup else made.clock.now_s
        elif what == "load" and not flying:
            with made.meter.load("x"):
                passes(ticks * 0.05, load=True)
        elif what == "report":
            from_s = made.clock.now_s
            await made.windows()
            noted.append((from_s, made.clock.now_s, len(flying), False))
        passes(ticks * 0.05 if what != "pass" else ticks * 1.0)
    for metered in flying:
        made.end(metered)
        ended_s = ended_s if metered.flight.warmup else made.clock.now_s
    made.bind(None)
    counted: Any = lease_of(await made.windows(kept=10**6))["counted"]
    if begun_s is None or ended_s is None:
        assert counted is None
        return
    inside = [(b - a, n) for a, b, n, load in noted if a >= begun_s and b <= ended_s and not load]
    seconds = sum(each for each, _ in inside)
    assert counted["seconds"] == pytest.approx(seconds)
    assert counted["total_j"] == pytest.approx(WATTS * seconds)
    assert counted["in_flight"]["mean"] == pytest.approx(sum(each * n for each, n in inside) / seconds)
    assert counted["in_flight"]["max"] >= max(n for _, n in inside)


# --- processes and clocks ----------------------------------------------------------------------------------


async def test_a_lease_that_another_process_held_says_so(make: Make) -> None:
    """A lease that comes to a process with what it used before began before: its record says when, and which process.

    Bound for the first time it begins with its window; to a process that took it up 90 s later it is 90 s older.
    """
    made = make()
    made.bind(LEASE)
    made.passes(1.0)
    made.bind(replace(LEASE, request_id="taken up", handed_over_s=UTC_S - 89.0, used_j=10.0))
    made.passes(1.0)
    made.bind(None)
    first, second = (detail(window) for window in of_kind(await made.windows(), WindowKind.LEASE))
    assert (first["process"], first["lease_begun"]) == ("p", first["begun"])
    assert second["lease_begun"] == "2027-01-15T07:58:31.000000+00:00"
    assert second["begun"] == "2027-01-15T08:00:01.000000+00:00"


@pytest.mark.parametrize("step_s", [7200.0, -7200.0])
async def test_a_step_of_the_wall_clock_does_not_reach_records(make: Make, step_s: float) -> None:
    """The clock is set by two hours within the second of three prompts: dates go on, and the flag says what happened.

    Windows follow each other in time as in truth, none overlaps, and durations are what they were.
    """
    made = make()
    made.bind(LEASE)
    made.prompt(2.0)
    made.passes(1.0)
    await made.windows()
    metered = made.meter.prompt()
    made.passes(1.0)
    made.stepped_s = step_s
    await made.windows()
    made.passes(1.0)
    made.end(metered)
    made.passes(1.0)
    made.prompt(2.0)
    made.bind(None)
    windows = await made.windows()
    prompts = of_kind(windows, WindowKind.PROMPT)
    assert all(before.ended_s < after.begun_s for before, after in pairwise(prompts))
    for window in windows:
        assert detail(window)["duration_s"] == pytest.approx(window.ended_s - window.begun_s, rel=1e-3)
        assert abs(window.begun_s - UTC_S) < 20.0
    assert ["clock_stepped" in detail(window)["flags"] for window in prompts] == [False, True, True]
    assert "clock_stepped" in lease_of(windows)["flags"]
