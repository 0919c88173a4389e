"""Computes the joules of windows, and of prompts that share a window, from counter readings. Pure.

A level is the reading of one source's counter at one time. A component is the part of a figure that
one source contributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from operator import add, mul, sub
from typing import NamedTuple

from deployments.energy.counters.base import POWER_HEADROOM, Source
from deployments.energy.counters.history import Level, between
from deployments.energy.figures import Component
from registry.wire.flags import Flag
from registry.wire.labels import Label, worst


@dataclass(frozen=True)
class Parts:
    """A prompt's part (0 < part <= 1) of the energy, from its start to its end, while others are in flight with it.

    ``times_s`` has the prompt's start, each time at which its part changes, and its end. So there is
    one time more than parts. ``mid`` is one division of the whole: at any time the parts of all
    prompts in flight add up to 1. ``low`` and ``high`` are the least and the most that the part can
    be at that time.
    """

    times_s: Sequence[float]
    mid: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    @cached_property
    def reserved_s(self) -> float:
        """The prompt's share of the time that passed, seconds; the time is divided like the energy.

        The shares of all prompts, and the seconds without a prompt, add up to the time that passed.
        """
        return _of(self.mid, self._seconds)

    @cached_property
    def reserved_low_s(self) -> float:
        """The least that ``reserved_s`` can be."""
        return _of(self.low, self._seconds)

    @cached_property
    def reserved_high_s(self) -> float:
        """The most that ``reserved_s`` can be."""
        return _of(self.high, self._seconds)

    @cached_property
    def _seconds(self) -> list[float]:
        return _between(self.times_s)

    @cached_property
    def changes(self) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        """The absolute changes of low, mid and high (in this order) at each of the times.

        If the level at one of the times is wrong, energy is counted after this time instead of before it, or the other
        way round. So the prompt's energy is wrong by the error of the level times the change of the part.
        """
        return _changes(self.low), _changes(self.mid), _changes(self.high)


def _between(levels: Sequence[float]) -> list[float]:
    return list(map(sub, levels[1:], levels))


def _of(parts: Sequence[float], flowed: Sequence[float]) -> float:
    share: float = sum(map(mul, parts, flowed))
    return share


def _changes(parts: Sequence[float]) -> list[float]:
    return list(map(abs, map(sub, (*parts, 0.0), (0.0, *parts))))


def unknown(source: Source, flag: Flag) -> Component:
    """Return an unavailable component for a source; ``flag`` says why."""
    return Component(source.name, source.origin, Label.UNAVAILABLE, flags=(flag,))


def counted(
    source: Source, duration_s: float, flow: Level, *, citable: bool = True, estimate_short: bool = False
) -> Component:
    """Return the joules of a counter's flow over a time.

    The component is flagged ``too_short`` if the time is too short (not ``citable``), or if the
    lower bound of the counter's rise is 0. It is then unavailable; with ``estimate_short`` it is
    modelled instead, with the counter's bounds, unless the estimate is 0. It is unavailable and
    flagged ``implausible_power`` if the power is above 1.2 times the hardware's limit.
    """
    low, mid, high = [source.joules(duration_s, units) for units in (flow.low, flow.mid, flow.high)]
    flags = (Flag.PROVISIONAL,) if flow.provisional else ()
    if _implausible(source, duration_s, low.mid):
        return unknown(source, Flag.IMPLAUSIBLE_POWER)
    too_short = low.mid <= 0 or not citable
    if mid.mid <= 0 or (too_short and not estimate_short):
        return unknown(source, Flag.TOO_SHORT)
    modeled = too_short or low.low < low.mid or high.mid < high.high
    less = more = mid
    if flow.systematic:
        less = source.joules(duration_s, max(flow.mid - flow.systematic, 0.0))
        more = source.joules(duration_s, flow.mid + flow.systematic)
    joules = mid.mid
    return Component(
        source.name,
        source.origin,
        worst((source.label, Label.MODELED)) if modeled else source.label,
        source.counter_label,
        joules,
        low_j=min(low.low, joules),  # a bound passes the estimate only by rounding
        high_j=max(high.high, joules),
        resolution_j=max(high.mid - joules, joules - low.mid),
        systematic_j=min(max(more.high - joules, joules - less.low), max(high.high - joules, joules - low.low)),
        flags=(*flags, Flag.TOO_SHORT) if too_short else flags,
    )


def doubted(part: Component, doubt: tuple[float, float]) -> Component:
    """Widen the bounds of a component whose joules may be wrong by a factor; ``doubt`` is its range."""
    if part.joules is None or part.low_j is None or part.high_j is None or part.systematic_j is None:
        return part
    least, most = doubt
    error_j = part.joules * max(1 - least, most - 1)
    return replace(
        part,
        label=worst((part.label, Label.MODELED)),
        low_j=part.low_j * least,
        high_j=part.high_j * most,
        systematic_j=part.systematic_j + error_j,
    )


def _implausible(source: Source, duration_s: float, least_j: float) -> bool:
    """Whether the counter proves more energy, ``least_j``, than the hardware can take in this time."""
    return source.limit_w is not None and least_j > POWER_HEADROOM * source.limit_w * duration_s


def together(parts: Sequence[Level]) -> Level:
    """Return the sum of the flows of several intervals."""
    return Level(
        low=math.fsum(part.low for part in parts),
        mid=math.fsum(part.mid for part in parts),
        high=math.fsum(part.high for part in parts),
        provisional=any(part.provisional for part in parts),
        systematic=math.fsum(part.systematic for part in parts),
    )


def widened(flow: Level, error: float) -> Level:
    """Return a flow with an additional error, in its units. Similar windows have this error with the same sign."""
    low, mid, high, provisional, systematic = flow
    return Level(max(low - error, 0.0), mid, high + error, provisional, systematic + error)


class Flow(NamedTuple):
    """How much the counters rose in one or several intervals, in their units. Flows can be added up.

    ``longest_s`` is the length of the longest interval. ``units`` has each source's rise, in order,
    or the flag that says why it is unknown.
    """

    duration_s: float
    longest_s: float
    units: tuple[Level | Flag, ...]
    flags: frozenset[Flag]

    def plus(self, other: Flow) -> Flow:
        """Return the sum of two flows of the same counters."""
        units = [
            a if isinstance(a, Flag) else b if isinstance(b, Flag) else together((a, b))
            for a, b in zip(self.units, other.units, strict=True)
        ]
        longest_s = max(self.longest_s, other.longest_s)
        return Flow(self.duration_s + other.duration_s, longest_s, tuple(units), self.flags | other.flags)


class Share(NamedTuple):
    """A prompt's share of what one counter counted in an interval, in its units. Shares can be added up.

    ``whole`` is all that was counted. ``units`` is the estimate of the share; ``least`` and
    ``most`` are its bounds, computed from those of the parts. The levels have errors;
    ``in_low``, ``in_mid`` and ``in_high`` are their effects on ``least``, ``units`` and ``most``.
    ``blur`` is the systematic error of ``units``.
    """

    whole: Level
    units: float
    least: float
    most: float
    in_low: float
    in_mid: float
    in_high: float
    blur: float

    def widened(self, error: float) -> Share:
        """Return the same share of a counter whose error is larger by ``error``, in its units."""
        if not error:
            return self
        return Share(widened(self.whole, error), self.units, self.least, self.most, *(one + error for one in self[4:]))

    def plus(self, other: Share) -> Share:
        """Return the sum of two shares of one counter."""
        return Share(together((self.whole, other.whole)), *map(add, self[1:], other[1:]))


@dataclass(frozen=True, slots=True)
class Shares:
    """A prompt's share of the time of an interval, seconds, and of each source's counter, in order.

    If a counter is unknown, the flag that says why is in its place. Shares of successive intervals
    can be added up.
    """

    duration_s: float
    reserved_low_s: float
    reserved_s: float
    reserved_high_s: float
    counters: tuple[Share | Flag, ...]

    @classmethod
    def of(
        cls, parts: Parts, levels: Iterable[Sequence[Level] | Flag], errors: Iterable[float] = repeat(0.0)
    ) -> Shares:
        """Return the shares for a prompt's parts.

        ``levels`` has each counter's levels at the times of the parts. ``errors`` has each counter's additional
        error, in its units.
        """
        both = zip(levels, errors, strict=False)
        counters = tuple(one if isinstance(one, Flag) else _share(parts, one).widened(error) for one, error in both)
        duration_s = parts.times_s[-1] - parts.times_s[0]
        return cls(duration_s, parts.reserved_low_s, parts.reserved_s, parts.reserved_high_s, counters)

    def __add__(self, other: Shares) -> Shares:
        counters = [
            a if isinstance(a, Flag) else b if isinstance(b, Flag) else a.plus(b)
            for a, b in zip(self.counters, other.counters, strict=True)
        ]
        return Shares(
            self.duration_s + other.duration_s,
            self.reserved_low_s + other.reserved_low_s,
            self.reserved_s + other.reserved_s,
            self.reserved_high_s + other.reserved_high_s,
            tuple(counters),
        )


def _share(parts: Parts, levels: Sequence[Level]) -> Share:
    flowed = _between([level.mid for level in levels])
    errors = [max(mid - low, high - mid) for low, mid, high, _, _ in levels]
    in_low, in_mid, in_high = (_of(changes, errors) for changes in parts.changes)
    return Share(
        whole=between(levels[0], levels[-1]),
        units=_of(parts.mid, flowed),
        least=_of(parts.low, flowed),
        most=_of(parts.high, flowed),
        in_low=in_low,
        in_mid=in_mid,
        in_high=in_high,
        blur=_of(parts.changes[1], [level.systematic for level in levels]),
    )


def shared(source: Source, shares: Shares, found: Share) -> Component:
    """Return the joules of a prompt's share of a counter, while it was in flight with others.

    The bounds are those of the parts, widened by the counter's resolution.
    """
    if _implausible(source, shares.duration_s, source.joules(shares.duration_s, found.whole.low).mid):
        return unknown(source, Flag.IMPLAUSIBLE_POWER)
    share = source.joules(shares.reserved_s, found.units)
    if share.mid <= 0:
        return unknown(source, Flag.TOO_SHORT)
    low_j = min(source.joules(shares.reserved_low_s, max(found.least - found.in_low, 0.0)).low, share.mid)
    high_j = max(source.joules(shares.reserved_high_s, found.most + found.in_high).high, share.mid)
    less_j = source.joules(shares.reserved_low_s, max(found.least - found.blur, 0.0)).low
    more_j = source.joules(shares.reserved_high_s, found.most + found.blur).high
    return Component(
        name=source.name,
        source=source.origin,
        label=worst((source.label, Label.MODELED)),
        joules=share.mid,
        low_j=low_j,
        high_j=high_j,
        resolution_j=source.joules(shares.reserved_s, found.units + found.in_mid).mid - share.mid,
        systematic_j=min(max(share.mid - less_j, more_j - share.mid, 0.0), max(share.mid - low_j, high_j - share.mid)),
        counter_label=source.counter_label,
        flags=(Flag.SHARED,),
    )
