"""Prepares an LLM and its machine for a lease, within a time limit.

The LLM's caches are emptied. For measurement grade the LLM also answers a warm-up, and the machine
comes to rest. If a step fails or takes too long, the result is a flag.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from statistics import fmean, pstdev

import structlog

from deployments.energy.meter import Meter
from registry.settings import EnergySettings
from registry.wire.flags import Flag
from registry.wire.labels import MEASURED, Label

SLICES, SLICE_S = 5, 1.0
"""Number of time slices that are compared, and their length, seconds: NVML's counter steps about every 100 ms."""

LAG_S = 0.5
"""Age of the newest slice, seconds: counters that step are a little late."""

LOOK_S = 0.5
"""Time between two checks, seconds."""

_COUNTED = MEASURED | {Label.SIMULATED}

log = structlog.get_logger("deployments.energy.settling")


async def warmed_up(warm_up: Callable[[], Awaitable[None]], *, max_s: float) -> bool:
    """Have an LLM answer once; return False if it failed or took longer than ``max_s`` seconds."""
    try:
        async with asyncio.timeout(max_s):
            await warm_up()
    except Exception as error:  # a dead engine is reported elsewhere
        log.warning("an LLM did not warm up for its lease", reason=f"{type(error).__name__}: {error}")
        return False
    return True


# D71: caches are emptied at every hand-over
async def forgotten(forget_prompts: Callable[[], Awaitable[bool]]) -> tuple[Flag, ...]:
    """Empty an LLM's caches; return the flag ``prefix_cache_kept`` if ``forget_prompts`` fails or returns False."""
    try:
        empty = await forget_prompts()
    except Exception as error:  # a dead engine is reported elsewhere
        log.warning("the caches of an LLM were not emptied", reason=f"{type(error).__name__}: {error}")
        empty = False
    return () if empty else (Flag.PREFIX_CACHE_KEPT,)


# D40: measurement grade settles the machine
async def at_rest(
    meter: Meter,
    settings: EnergySettings,
    *,
    begun_s: float,
    given_up: Callable[[], bool],
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> tuple[Flag, ...]:
    """Wait until the machine had no other work and steady power for SLICES * SLICE_S seconds; at most settle_max_s.

    Args:
        meter: Counts the machine's energy, and knows of other work on it.
        settings: Has ``settle_max_s`` and ``steady_cv``.
        begun_s: When settling began, in the meter's clock; the limit counts from then.
        given_up: Returns True if there is nothing to wait for any more.
        pause: How to wait.

    Returns:
        Flags for what was not reached in time. If nothing counts energy, this waits only for the
        end of other work, and the flags include ``steadiness_unknown``.
    """
    quiet_since_s = meter.mark()
    known = any(label in _COUNTED for label in meter.labels)
    while True:
        flag = _unrest(meter, quiet_since_s, settings.steady_cv if known else None)
        late = meter.mark() - begun_s >= settings.settle_max_s
        if flag is None or late or given_up():
            break
        await pause(LOOK_S)
    if known:
        return () if flag is None else (flag,)
    contended = (Flag.CONTENDED,) if flag is Flag.CONTENDED else ()
    return (*contended, Flag.STEADINESS_UNKNOWN)


def _unrest(meter: Meter, since_s: float, steady_cv: float | None) -> Flag | None:
    """Return the flag for a machine that is not at rest, or was watched too briefly since ``since_s``; else None."""
    now_s = meter.mark()
    if meter.contended(max(since_s, now_s - SLICES * SLICE_S - LAG_S), now_s):
        return Flag.CONTENDED
    first_s = now_s - LAG_S - SLICES * SLICE_S
    if first_s < since_s:
        return Flag.NOT_STEADY
    if steady_cv is None:
        return None
    watts = [_power_w(meter, first_s + n * SLICE_S) for n in range(SLICES)]
    known_w = [power_w for power_w in watts if power_w is not None]
    steady = len(known_w) == SLICES and pstdev(known_w) <= steady_cv * fmean(known_w)
    return None if steady else Flag.NOT_STEADY


def _power_w(meter: Meter, start_s: float) -> float | None:
    """Return the mean power in one slice, W, the sum over all hardware counters; None if any energy is unknown."""
    parts = meter.window(start_s, start_s + SLICE_S).components
    known = [part.joules for part in parts if part.counter_label in _COUNTED and part.joules is not None]
    unknown = any(part.label is Label.UNAVAILABLE for part in parts)
    return None if unknown or not known else sum(known) / SLICE_S
