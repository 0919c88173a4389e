"""Windows of prompts: when they are final, tokens that are not known, and what a prompt token costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deployments.energy import flights, window_writer
from registry.contract.windows import EnergyWindow
from registry.wire.labels import Label
from registry.wire.words import WindowKind
from tests.support.fake_counters import FakeCounter
from tests.support.meter_bench import LEASE, WATTS, Bench, Make, detail, of_kind


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
