"""Formats figures for people: ``~`` marks values that are not measured, a dash unknown ones.

The interval determines the digits: half of its width is shown with two digits, and the figure to the same decimal
place. A figure that is small beside its interval still has two digits of its own: it is never shown as 0. A figure
without an interval has three digits.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from math import ceil, floor, log10

from registry.accounting.figures import Figure
from registry.wire.labels import MEASURED
from registry.wire.schemas import RequestState

UNKNOWN = "-"
LEGEND = "~: not measured, but estimated or computed with a published factor; ≥: only the known part; -: not known"


def figure(value: float | None, label: str, *, missing: int = 0) -> str:
    """Return a figure with three digits: ``1,230``, or ``~1.23e-05`` if it is not measured.

    ``missing``: number of unknown parts of a sum. If > 0, the figure is a lower bound, rounded down: ``≥ 1,230``.
    """
    if value is None:
        return UNKNOWN
    return f"≥ {mark(label)}{number(value, floor)}" if missing else f"{mark(label)}{number(value)}"


def mark(label: str) -> str:
    """Return the mark before a figure with this label."""
    return "" if label in MEASURED else "~"


def number(value: float, way: Callable[[Decimal], int] = round) -> str:
    """Return a number with three digits. ``way`` is the rounding function, as in `rounded`."""
    place = floor(log10(abs(value))) - 2 if value else 0
    return _to_place(value, place, way)


def in_range(
    value: float | None, low: float | None, high: float | None, label: str, *, missing: int | bool = False
) -> str:
    """Return a figure with its range, if it has one: ``~1.23 (1.10 to 1.40)``. ``missing`` as in `figure`."""
    if value is None or low is None or high is None:
        return figure(value, label, missing=missing)
    half = (high - low) / 2
    # At most the half width that leaves the figure two digits: 12.2 (0.3 to 6,580) is ~12, not ~0.
    middle = rounded(value, min(half, abs(value)) if value else half, floor if missing else round)
    least, most = rounded(low, half, floor), rounded(high, half, ceil)
    text = f"{'≥ ' if missing else ''}{mark(label)}{middle}"
    return text if least == most else f"{text} ({least} to {most})"


def rounded(value: float, half: float, way: Callable[[Decimal], int] = round) -> str:
    """Return a number rounded to the place of the second digit of ``half``, half the width of its interval.

    ``way`` is the rounding function: ``floor`` for low bounds and ``ceil`` for high ones, so that the printed range
    contains the true one.
    """
    if not half > 0:
        return number(value, way)
    return _to_place(value, floor(log10(half)) - 1, way)


def _to_place(value: float, place: int, way: Callable[[Decimal], int]) -> str:
    # Uses the shortest decimal of the float, so that 0.3 counts as three tenths and not a little less.
    return f"{float(way(Decimal(repr(value)).scaleb(-place)) * Decimal(10) ** place):,.15g}"


def estimate_text(found: Figure, scale: float = 1.0) -> str:
    """Return a figure divided by ``scale``, with its 95 % interval; without one, rounded according to its bounds."""
    value = None if found.value is None else found.value / scale
    if value is None or found.low is None or found.high is None:
        text = bounded_text(found, scale).partition(" (")[0]
    else:
        text = in_range(value, found.low / scale, found.high / scale, found.label)
    return text


def bounded_text(found: Figure, scale: float = 1.0) -> str:
    """Return a figure divided by ``scale``, with the bounds from its counters and factors."""
    value, low, high = (
        None if each is None else each / scale for each in (found.value, found.bound_low, found.bound_high)
    )
    return in_range(value, low, high, found.label)


def phase_words(phase: str, progress: float | None, total_bytes: int | None) -> str:
    """Return a phase and its progress: ``downloading 43% of 5.2 GB``."""
    words = [phase]
    if progress is not None:
        words.append(f"{progress:.0%}")
    if total_bytes is not None:
        words.append(f"of {number(total_bytes / 1e9)} GB")
    return " ".join(words)


def state_words(state: RequestState) -> str:
    """Return a request's state: ``queued, place 2 in the queue``, or ``deploying, downloading 43% of 5.2 GB``."""
    words = [state.status]
    if state.position is not None:
        words.append(f"place {state.position} in the queue")
    if state.phase is not None:
        words.append(phase_words(state.phase, state.progress, state.bytesTotal))
    return ", ".join(words)
