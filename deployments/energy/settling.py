"""Before a lease: the LLM's caches empty; for measurement grade also the LLM warm and the machine at rest. In time.

What can't be had in time is told by a flag, and the LLM is handed over all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from statistics import fmean, pstdev
from typing import Final

import structlog

from deployments.energy.figures import Label
from deployments.energy.meter import CONTENDED, Meter
from registry.settings import EnergySettings

NOT_STEADY: Final = "not_steady"
"""Flag: the power of the idle machine did not become steady in time, or the LLM did not answer."""

STEADINESS_UNKNOWN: Final = "steadiness_unknown"
"""Flag: nothing on the machine counts energy, so that nobody knows whether its power was steady."""

PREFIX_CACHE_KEPT: Final = "prefix_cache_kept"
"""Flag: the LLM may still have prompts of an earlier lease in its caches."""

SLICES, SLICE_S = 5, 1.0
"""How many slices of time are compared, and how long each is, seconds: NVML's counter steps every 100 ms or so."""

LAG_S = 0.5
"""How old the newest slice is, seconds: counters that step tell of a moment a little later."""

LOOK_S = 0.5
"""How often it is looked, seconds."""

_COUNTED = frozenset({Label.MEASURED, Label.MEASURED_SAMPLED, Label.SIMULATED})

log = structlog.get_logger("deployments.energy.settling")


async def warmed_up(warm_up: Callable[[], Awaitable[None]], *, max_s: float) -> bool:
    """Have an LLM answer once; False if it failed, or took longer than ``max_s``."""
    try:
        async with asyncio.timeout(max_s):
            await warm_up()
    except Exception as error:  # the engine's death is told in its own way
        log.warning("an LLM did not warm up for its lease", reason=f"{type(error).__name__}: {error}")
        return False
    return True


async def forgotten(forget_prompts: Callable[[], Awaitable[bool]]) -> tuple[str, ...]:
    """Have an LLM's caches emptied; the flag PREFIX_CACHE_KEPT if that failed, or was not done in time."""
    try:
        empty = await forget_prompts()
    except Exception as error:  # the engine's death is told in its own way
        log.warning("the caches of an LLM were not emptied", reason=f"{type(error).__name__}: {error}")
        empty = False
    return () if empty else (PREFIX_CACHE_KEPT,)


async def at_rest(
    meter: Meter,
    settings: EnergySettings,
    *,
    begun_s: float,
    given_up: Callable[[], bool],
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> tuple[str, ...]:
    """Wait until nothing else has worked on the machine, and its power has been steady, for SLICES * SLICE_S seconds.

    Args:
        meter: What counts the machine's energy, and knows of others on it.
        settings: Their ``settle_max_s`` and ``steady_cv``.
        begun_s: When the settling began, in the meter's clock; the limit counts from then.
        given_up: True when there is nothing to wait for any more.
        pause: How to wait.

    Returns:
        No flag, or those that say what was not so in time. Where nothing counts energy only the others are waited for.
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
    return (CONTENDED, STEADINESS_UNKNOWN) if flag == CONTENDED else (STEADINESS_UNKNOWN,)


def _unrest(meter: Meter, since_s: float, steady_cv: float | None) -> str | None:
    """The flag for a machine that is not at rest, or was not looked at for long enough since ``since_s``; else None."""
    now_s = meter.mark()
    if meter.contended(max(since_s, now_s - SLICES * SLICE_S - LAG_S), now_s):
        return CONTENDED
    first_s = now_s - LAG_S - SLICES * SLICE_S
    if first_s < since_s:
        return NOT_STEADY
    if steady_cv is None:
        return None
    watts = [_power_w(meter, first_s + n * SLICE_S) for n in range(SLICES)]
    known_w = [power_w for power_w in watts if power_w is not None]
    steady = len(known_w) == SLICES and pstdev(known_w) <= steady_cv * fmean(known_w)
    return None if steady else NOT_STEADY


def _power_w(meter: Meter, start_s: float) -> float | None:
    """Mean power of all that is counted by hardware in one slice, None if some of it is not known."""
    parts = meter.window(start_s, start_s + SLICE_S).components
    known = [part.joules for part in parts if part.counter_label in _COUNTED and part.joules is not None]
    unknown = any(part.label is Label.UNAVAILABLE for part in parts)
    return None if unknown or not known else sum(known) / SLICE_S
