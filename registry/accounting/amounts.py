"""What one energy window counts as in a figure: its joules, grams or seconds with their errors, and its units. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from registry.accounting.totals import sum_of
from registry.accounting.window_report import WindowReport
from registry.core.records import WindowKind

ANSWERED: Final = (None, "answered")
"""``status`` of prompts that have an answer; None: a record of an earlier version, which does not say."""


class Amount(NamedTuple):
    """Joules, grams or seconds of a window, with their bounds; None: not known.

    By its error of the same sign in all windows the truth is less by up to ``less``, or more by up to ``more``.
    """

    value: float
    low: float | None
    high: float | None
    less: float | None
    more: float | None


AmountOf = Callable[[WindowReport], Amount | None]
UnitsOf = Callable[[WindowReport], float | None]

_Errors = tuple[float | None, float | None]
"""How much less, and how much more, the truth may be."""


def joules_of(window: WindowReport) -> Amount | None:
    """Return the energy."""
    if window.joules is None:
        return None
    return Amount(window.joules, window.low_j, window.high_j, *_systematic_j(window))


def _systematic_j(window: WindowReport) -> _Errors:
    """Return the part of the error that a mean keeps, which is not more than the bounds allow on each side.

    Where a record does not say it, all of the error may be kept.
    """
    distances = _distances(window.joules, window.low_j, window.high_j)
    if window.systematic_j is None:
        return (window.resolution_j, window.resolution_j) if None in distances else distances
    less, more = (window.systematic_j if each is None else min(window.systematic_j, each) for each in distances)
    return less, more


def operational_of(window: WindowReport) -> Amount | None:
    """Return the emissions of the energy. The error of the grid's factor has the same sign in all windows.

    Both factors may be wrong at once: E * I is at least (E - dE) * (I - dI), and at most (E + dE) * (I + dI).
    Without joules, as of a prompt that was refused while others were in flight, all of the error is kept.
    """
    if window.o_g is None:
        return None
    errors = _distances(window.o_g, window.o_low_g, window.o_high_g)
    if window.joules:
        energy = [None if each is None else each / window.joules for each in _systematic_j(window)]
        of_grid = _distances(window.grid, window.grid_low, window.grid_high)
        grid = [each / window.grid if each and window.grid else 0.0 for each in of_grid]
        less, more = energy
        errors = (
            None if less is None else window.o_g * (1 - (1 - less) * (1 - grid[0])),
            None if more is None else window.o_g * ((1 + more) * (1 + grid[1]) - 1),
        )
    return Amount(window.o_g, window.o_low_g, window.o_high_g, *errors)


def embodied_of(window: WindowReport) -> Amount | None:
    """Return the embodied emissions, of which all error has the same sign in all windows."""
    if window.m_g is None:
        return None
    errors = _distances(window.m_g, window.m_low_g, window.m_high_g)
    return Amount(window.m_g, window.m_low_g, window.m_high_g, *errors)


def grams_of(window: WindowReport) -> Amount | None:
    """Return operational and embodied emissions together."""
    o_g, m_g = operational_of(window), embodied_of(window)
    if o_g is None or m_g is None:
        return None
    rest = [sum_of(each).value for each in zip(o_g[1:], m_g[1:], strict=True)]
    return Amount(o_g.value + m_g.value, *rest)


def seconds_of(window: WindowReport) -> Amount:
    """Return the time from begin to end."""
    return Amount(window.seconds, window.seconds, window.seconds, 0.0, 0.0)


def _distances(value: float | None, low: float | None, high: float | None) -> _Errors:
    """Return how far a value is from its bounds; None if they are not known."""
    if value is None or low is None or high is None:
        return None, None
    return max(0.0, value - low), max(0.0, high - value)


def tokens_of(window: WindowReport) -> float | None:
    """Return the output tokens."""
    return window.output_tokens


def answers_of(window: WindowReport) -> float:
    """Return how many answers it is: 1 or 0."""
    return 1.0 if window.status in ANSWERED else 0.0


def units_in(unit: str | None) -> UnitsOf:
    """Return the units of a window; None where it has none in this unit. Idle time has no units, which is known."""

    def units(window: WindowReport) -> float | None:
        if window.kind == WindowKind.IDLE:
            return 0.0
        return window.units if window.unit == unit else None

    return units


def unit_of(windows: Sequence[WindowReport]) -> str | None:
    """Return the functional unit of these windows, None if it is not always the same."""
    units = {window.unit for window in windows if window.unit is not None}
    return units.pop() if len(units) == 1 else None
