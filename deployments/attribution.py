"""From what a counter says to the figures of windows, and of the prompts that share one. Pure.

Levels are those of one source's counter at the times that matter; components are its part of each figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deployments.energy import Component, Label, worst
from deployments.energy_sources import POWER_HEADROOM, Source
from deployments.timeline import Interval
from deployments.windows import Level, Span, between, split


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's time in the meter's clock, and the tokens that were processed for it (≥ 0)."""

    start_s: float
    end_s: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Layout:
    """How prompts lie in a window: each one's time inside it, which of them overlap, and when there was none.

    ``inside`` is None for a prompt that has no time inside the window.
    """

    inside: tuple[Interval | None, ...]
    overlapping: frozenset[int]
    gaps: tuple[Interval, ...]

    def times_s(self) -> set[float]:
        """All the boundaries of prompts and gaps."""
        return {time_s for interval in (*self.inside, *self.gaps) if interval is not None for time_s in interval}


def lay_out(start_s: float, end_s: float, prompts: Sequence[Prompt]) -> Layout:
    """Clip prompts to a window and find overlaps and gaps."""
    inside = [
        (max(prompt.start_s, start_s), min(prompt.end_s, end_s))
        if max(prompt.start_s, start_s) < min(prompt.end_s, end_s)
        else None
        for prompt in prompts
    ]
    overlapping: set[int] = set()
    gaps: list[Interval] = []
    busy_until_s, by = start_s, -1
    for (a, b), index in sorted((interval, index) for index, interval in enumerate(inside) if interval is not None):
        if a < busy_until_s:
            overlapping |= {index, by}
        elif a > busy_until_s:
            gaps.append((busy_until_s, a))
        if b > busy_until_s:
            busy_until_s, by = b, index
    if busy_until_s < end_s:
        gaps.append((busy_until_s, end_s))
    return Layout(tuple(inside), frozenset(overlapping), tuple(gaps))


def unknown(source: Source, flag: str) -> Component:
    """A source's component where it can't tell."""
    return Component(source.name, source.origin, Label.UNAVAILABLE, flags=(flag,))


def counted(source: Source, duration_s: float, flow: Level, *, estimate_short: bool = False) -> Component:
    """What a counter's flow over a time means in joules.

    Unavailable and flagged ``too_short`` when the counter does not prove a single joule; with ``estimate_short`` it
    is then modelled, with the counter's bounds. ``implausible_power``: more than 1.2 times the hardware's limit.
    """
    low, mid, high = (source.joules(duration_s, units) for units in (flow.low, flow.mid, flow.high))
    flags = ("provisional",) if flow.provisional else ()
    if source.limit_w is not None and low.mid > POWER_HEADROOM * source.limit_w * duration_s:
        return unknown(source, "implausible_power")
    too_short = low.mid <= 0
    if mid.mid <= 0 or (too_short and not estimate_short):
        return unknown(source, "too_short")
    modeled = too_short or low.low < low.mid or high.mid < high.high
    return Component(
        name=source.name,
        source=source.origin,
        label=worst((source.label, Label.MODELED)) if modeled else source.label,
        joules=mid.mid,
        low_j=low.low if modeled else None,
        high_j=high.high if modeled else None,
        resolution_j=max(high.mid - mid.mid, mid.mid - low.mid),
        flags=(*flags, "too_short") if too_short else flags,
    )


def together(flows: Iterable[Level]) -> Level:
    """What flowed in several times."""
    parts = list(flows)
    if len(parts) == 1:
        return parts[0]
    return Level(
        low=math.fsum(part.low for part in parts),
        mid=math.fsum(part.mid for part in parts),
        high=math.fsum(part.high for part in parts),
        provisional=any(part.provisional for part in parts),
    )


@dataclass(frozen=True, slots=True)
class Flow:
    """What the counters went up by in a time, before it is told in joules.

    Flows of several times can be added up, and prove joules that each of them is too short for. ``units`` are those of
    the sources in their order, the flag in place of one that can't tell.
    """

    duration_s: float
    units: tuple[Level | str, ...]
    flags: frozenset[str]

    def __add__(self, other: Flow) -> Flow:
        units = [
            a if isinstance(a, str) else b if isinstance(b, str) else together((a, b))
            for a, b in zip(self.units, other.units, strict=True)
        ]
        return Flow(self.duration_s + other.duration_s, tuple(units), self.flags | other.flags)


def reserved_s(start_s: float, end_s: float, prompts: Sequence[Prompt]) -> float:
    """The first prompt's share of a window's seconds, by tokens as that of the energy; seconds of machine, not of wall.

    Together with the seconds without a prompt the shares of all are the window's.
    """
    if len(prompts) == 1:
        return min(prompts[0].end_s, end_s) - max(prompts[0].start_s, start_s)
    spans = [Span(prompt.start_s, prompt.end_s, max(prompt.tokens, 1)) for prompt in prompts]
    return split(lambda time_s: time_s - start_s, start_s, end_s, spans)[0][0]


def counted_in(source: Source, intervals: Sequence[Interval], levels: Mapping[float, Level]) -> Component:
    """What flowed in these intervals together; an estimate where they are too short for the counter."""
    flow = together(between(levels[a], levels[b]) for a, b in intervals)
    return counted(source, sum(b - a for a, b in intervals), flow, estimate_short=True)


def shared(
    source: Source,
    start_s: float,
    end_s: float,
    prompts: Sequence[Prompt],
    levels: Mapping[float, Level],
    first: int | None = None,
) -> list[Component]:
    """Each prompt's share of a window: by tokens, with the split by tokens and that by time as the range.

    Of the ``first`` so many prompts, None: of all of them.

    A prompt without tokens weighs as much as one with a single token: it was in flight.
    """
    joules = {
        time_s: source.joules(time_s - start_s, level.mid - levels[start_s].mid) for time_s, level in levels.items()
    }
    by_tokens = [Span(prompt.start_s, prompt.end_s, max(prompt.tokens, 1)) for prompt in prompts]
    by_time = [Span(prompt.start_s, prompt.end_s, prompt.end_s - prompt.start_s) for prompt in prompts]

    def divided(spans: Sequence[Span], level: int) -> list[float]:
        return split(lambda time_s: joules[time_s][level], start_s, end_s, spans)[0][:first]

    mid = divided(by_tokens, 1)
    low = [min(pair) for pair in zip(divided(by_tokens, 0), divided(by_time, 0), strict=True)]
    high = [max(pair) for pair in zip(divided(by_tokens, 2), divided(by_time, 2), strict=True)]
    return [
        Component(
            name=source.name,
            source=source.origin,
            label=worst((source.label, Label.MODELED)),
            joules=mid[index],
            low_j=low[index],
            high_j=high[index],
            flags=("shared",),
        )
        if mid[index] > 0
        else unknown(source, "too_short")
        for index in range(len(mid))
    ]
