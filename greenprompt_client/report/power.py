"""Computes the power of machines over time from overlapping energy windows. Pure.

At any moment a wrapper is busy (prompts are in flight), idle, or starting an LLM. The shares of overlapping prompts say
nothing about single moments, but all shares of a busy time add up to its joules, so its mean power is known. An idle
window extends over the busy times of its lease, but its power is that of the gaps between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from registry.accounting.figures import of_kind
from registry.accounting.totals import Sum, sum_of
from registry.accounting.window_report import WindowReport
from registry.wire.words import WindowKind

Curve = tuple[list[datetime], list[float]]
"""Times, and the power [W] from each time on; NaN if unknown."""

SLACK_S = 0.005
SLACK_SHARE = 0.02
"""Tolerance between an idle window's gaps and its idle time: SLACK_S per edge plus SLACK_SHARE of that time.

Times are rounded to milliseconds.
"""


class _Piece(NamedTuple):
    """A time with constant power, None if unknown."""

    begun: datetime
    ended: datetime
    watts: float | None

    @property
    def seconds(self) -> float:
        return (self.ended - self.begun).total_seconds()


# D70: busy times and the gaps between them
def powers(windows: Sequence[WindowReport]) -> Mapping[str | None, Curve]:
    """Return the power of each machine: the sum over the windows of its wrappers.

    Unknown while the power of one of these windows is unknown. A wrapper without a window adds
    nothing.
    """
    by_wrapper: dict[tuple[str | None, str], list[WindowReport]] = {}
    for window in windows:
        if window.seconds > 0:
            by_wrapper.setdefault((window.machine, window.wrapper), []).append(window)
    pieces: dict[str | None, list[_Piece]] = {}
    for (machine, _), own in by_wrapper.items():
        pieces.setdefault(machine, []).extend(_pieces(own))
    return {machine: _curve(of_machine) for machine, of_machine in pieces.items()}


def _pieces(windows: Sequence[WindowReport]) -> list[_Piece]:
    """Return the pieces of one wrapper."""
    busy = _busy(of_kind(windows, WindowKind.PROMPT))
    starts = [_whole(window) for kind in (WindowKind.LOAD, WindowKind.WAKE) for window in of_kind(windows, kind)]
    taken = _united([*busy, *starts])
    idle = [piece for window in of_kind(windows, WindowKind.IDLE) for piece in _gaps(window, taken)]
    return [*busy, *starts, *idle]


def _busy(prompts: Sequence[WindowReport]) -> list[_Piece]:
    """Return the times with prompts in flight, each with the mean power of all its prompts."""
    periods: list[tuple[datetime, datetime, Sum]] = []
    for prompt in sorted(prompts, key=lambda each: each.begunAt):
        begun, ended = _times(prompt)
        joules = sum_of([prompt.joules])
        if periods and begun < periods[-1][1]:
            first, last, before = periods.pop()
            begun, ended, joules = first, max(ended, last), before + joules
        periods.append((begun, ended, joules))
    return [_of(begun, ended, joules.value) for begun, ended, joules in periods]


def _gaps(idle: WindowReport, taken: Sequence[_Piece]) -> list[_Piece]:
    """Return the pieces of an idle window. Their power is unknown if a window between its gaps is missing."""
    begun, ended = _times(idle)
    gaps = []
    for piece in taken:
        if piece.ended <= begun or piece.begun >= ended:
            continue
        if piece.begun > begun:
            gaps.append(_Piece(begun, piece.begun, None))
        begun = piece.ended
    if begun < ended:
        gaps.append(_Piece(begun, ended, None))
    own_s = idle.seconds if idle.reserved_s is None else idle.reserved_s
    off_s = abs(sum(gap.seconds for gap in gaps) - own_s)
    if idle.joules is None or own_s <= 0 or off_s > SLACK_SHARE * own_s + SLACK_S * (len(gaps) + 1):
        return gaps
    return [gap._replace(watts=idle.joules / own_s) for gap in gaps]


def _united(pieces: Iterable[_Piece]) -> list[_Piece]:
    """Return the union of these times, in order."""
    found: list[_Piece] = []
    for piece in sorted(pieces, key=lambda each: each.begun):
        if found and piece.begun <= found[-1].ended:
            found[-1] = found[-1]._replace(ended=max(found[-1].ended, piece.ended))
        else:
            found.append(piece)
    return found


def _curve(pieces: Sequence[_Piece]) -> Curve:
    """Return the sum of the pieces over time."""
    steps: list[tuple[datetime, float, int, int]] = []
    for begun, ended, watts in pieces:
        known = 0 if watts is None else 1
        steps += [(begun, watts or 0.0, known, 1 - known), (ended, -(watts or 0.0), -known, known - 1)]
    steps.sort(key=lambda step: step[0])
    times, levels = [], []
    watts, known, unknown = 0.0, 0, 0
    for n, (time, step_w, step_known, step_unknown) in enumerate(steps):
        watts, known, unknown = watts + step_w, known + step_known, unknown + step_unknown
        if n + 1 == len(steps) or steps[n + 1][0] != time:
            times.append(time)
            levels.append(max(watts, 0.0) if known and not unknown else math.nan)
    return times, levels


def _whole(window: WindowReport) -> _Piece:
    return _of(*_times(window), window.joules)


def _of(begun: datetime, ended: datetime, joules: float | None) -> _Piece:
    return _Piece(begun, ended, None if joules is None else joules / (ended - begun).total_seconds())


def _times(window: WindowReport) -> tuple[datetime, datetime]:
    begun = datetime.fromisoformat(window.begunAt)
    return begun, begun + timedelta(seconds=window.seconds)
