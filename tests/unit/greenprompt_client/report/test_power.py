"""The power of machines over time, from windows whose times overlap."""

from __future__ import annotations

import math
from dataclasses import replace

from greenprompt_client.report.power import powers
from registry.accounting.window_report import WindowReport, window_report
from registry.contract.windows import EnergyWindow
from registry.wire.words import WindowKind
from tests.support.energy_windows import iso, kept, window


def rows(*windows: EnergyWindow) -> list[WindowReport]:
    return [window_report(each, None, iso) for each in kept(*windows)]


def curve(*windows: WindowReport) -> list[tuple[float, float | None]]:
    """(second, W or None) of the only machine."""
    ((times, watts),) = powers(windows).values()
    return [
        (time.timestamp(), None if math.isnan(each) else round(each, 3))
        for time, each in zip(times, watts, strict=True)
    ]


def idle(number: int, begun_s: float, seconds: float, own_s: float, joules: float | None) -> EnergyWindow:
    return window(number, WindowKind.IDLE, begun_s=begun_s, seconds=seconds, reserved_s=own_s, joules=joules)


def test_idle_time_is_between_the_prompts() -> None:
    """100 W idle and 400 W busy for 0 to 10 s, with a prompt at 4 to 8 s and another that overlaps it from 6 to 8 s.

    Prompts have 1,000 and 600 J of the 1,600 J; the idle window of 0 to 10 s had 6 s and 600 J for itself. Spread over
    its whole length it would be 60 W, and the prompts 250 and 300 W above it: 60, 310, 610 W.
    """
    windows = rows(
        idle(1, 0.0, 10.0, 6.0, 600.0),
        window(2, begun_s=4.0, seconds=4, reserved_s=3.0, joules=1000.0),
        window(3, begun_s=6.0, seconds=2, reserved_s=1.0, joules=600.0),
        window(4, WindowKind.LEASE, begun_s=0.0, seconds=10, joules=2200.0),
    )
    assert curve(*windows) == [(0.0, 100.0), (4.0, 400.0), (8.0, 100.0), (10.0, None)]


def test_an_idle_window_that_ends_or_begins_with_a_prompt() -> None:
    """The prompts at its ends are no part of it; a prompt of another time neither."""
    windows = rows(
        window(1, begun_s=0.0, seconds=2, joules=800.0),
        idle(2, 2.0, 2.0, 2.0, 200.0),
        window(3, begun_s=4.0, seconds=2, joules=600.0),
        window(4, begun_s=9.0, seconds=1, joules=100.0),
    )
    assert curve(*windows) == [(0.0, 400.0), (2.0, 100.0), (4.0, 300.0), (6.0, None), (9.0, 100.0), (10.0, None)]


def test_a_start_under_a_lease_is_no_idle_time() -> None:
    """An engine that is started again takes its time out of the idle window around it."""
    windows = rows(idle(1, 0.0, 10.0, 6.0, 600.0), window(2, WindowKind.LOAD, begun_s=2.0, seconds=4, joules=2000.0))
    assert curve(*windows) == [(0.0, 100.0), (2.0, 500.0), (6.0, 100.0), (10.0, None)]


def test_what_is_not_known_is_no_power() -> None:
    """A prompt without joules, a time without windows, an idle time of which a prompt is missing: unknown, not 0 W."""
    holed = rows(window(1, begun_s=0.0, seconds=2, joules=None), window(2, begun_s=1.0, seconds=2, joules=50.0))
    assert curve(*holed) == [(0.0, None), (3.0, None)]
    dropped = rows(idle(1, 0.0, 10.0, 6.0, 600.0))  # a prompt of 4 s is missing
    assert curve(*dropped) == [(0.0, None), (10.0, None)]
    unknown = rows(idle(1, 0.0, 10.0, 10.0, None))
    assert curve(*unknown) == [(0.0, None), (10.0, None)]
    untold = rows(window(1, WindowKind.IDLE, begun_s=0.0, seconds=2, reserved_s=None, joules=20.0))
    assert curve(*untold) == [(0.0, 10.0), (2.0, None)]
    assert powers(rows(window(1, seconds=0))) == {}


def test_wrappers_of_a_machine_add_up_and_machines_do_not() -> None:
    """Two wrappers at once are the machine's power; another machine has a curve of its own."""
    one, two, three = rows(*(window(n, begun_s=0.0, seconds=2, joules=100.0 * n) for n in (1, 2, 3)))
    other, elsewhere = replace(two, wrapper="a-1"), replace(three, machine="gpu-2")
    assert curve(one, other) == [(0.0, 150.0), (2.0, None)]
    assert {machine: watts[0] for machine, (_, watts) in powers([one, other, elsewhere]).items()} == {
        "gpu-1": 150.0,
        "gpu-2": 150.0,
    }
