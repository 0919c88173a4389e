"""The contribution of an energy window to a figure: joules, grams or seconds with their errors, and units. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from registry.accounting.totals import sum_of
from registry.accounting.window_report import WindowReport
from registry.wire.words import WindowKind

ANSWERED: Final = (None, "answered")
"""Values of ``status`` that mean that the prompt was answered; records of earlier versions have no status (None)."""


# D91: errors of either side
class Amount(NamedTuple):
    """Joules, grams or seconds of a window, with their bounds; None: not known.

    ``less`` and ``more``, ≥ 0: by how much the true value may be lower or higher because of systematic errors, which
    have the same sign in all windows.
    """

    value: float
    low: float | None
    high: float | None
    less: float | None
    more: float | None


AmountOf = Callable[[WindowReport], Amount | None]
UnitsOf = Callable[[WindowReport], float | None]

_Errors = tuple[float | None, float | None]
"""By how much the true value may be lower, and higher; None: not known."""


def joules_of(window: WindowReport) -> Amount | None:
    """Return the energy, J; None if not known."""
    if window.joules is None:
        return None
    return Amount(window.joules, window.low_j, window.high_j, *_systematic_j(window))


def _systematic_j(window: WindowReport) -> _Errors:
    """Return the systematic error (lower, higher), J, which averaging does not reduce.

    It never goes beyond the bounds. If a record does not state it, the whole distance to the bounds counts as
    systematic; if the bounds are not known either, the resolution counts instead.
    """
    distances = _distances(window.joules, window.low_j, window.high_j)
    if window.systematic_j is None:
        return (window.resolution_j, window.resolution_j) if None in distances else distances
    less, more = (window.systematic_j if each is None else min(window.systematic_j, each) for each in distances)
    return less, more


def operational_of(window: WindowReport) -> Amount | None:
    """Return the operational emissions, gCO2eq; None if not known. The grid intensity's error is systematic.

    Energy E and grid intensity I may both be wrong: E * I is at least (E - dE) * (I - dI), and at most
    (E + dE) * (I + dI). Without joules, or with 0 J (e.g. a refused prompt while others were in flight),
    the whole error counts as systematic.
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
    """Return the embodied emissions, gCO2eq; None if not known. Their whole error is systematic."""
    if window.m_g is None:
        return None
    errors = _distances(window.m_g, window.m_low_g, window.m_high_g)
    return Amount(window.m_g, window.m_low_g, window.m_high_g, *errors)


def grams_of(window: WindowReport) -> Amount | None:
    """Return operational plus embodied emissions, gCO2eq; None if one is not known."""
    o_g, m_g = operational_of(window), embodied_of(window)
    if o_g is None or m_g is None:
        return None
    rest = [sum_of(each).value for each in zip(o_g[1:], m_g[1:], strict=True)]
    return Amount(o_g.value + m_g.value, *rest)


def seconds_of(window: WindowReport) -> Amount:
    """Return the duration, s, without error."""
    return Amount(window.seconds, window.seconds, window.seconds, 0.0, 0.0)


def _distances(value: float | None, low: float | None, high: float | None) -> _Errors:
    """Return the distances, ≥ 0, of a value from its bounds; (None, None) if one is not known."""
    if value is None or low is None or high is None:
        return None, None
    return max(0.0, value - low), max(0.0, high - value)


def tokens_of(window: WindowReport) -> float | None:
    """Return the number of output tokens, None if not known."""
    return window.output_tokens


def answers_of(window: WindowReport) -> float:
    """Return the number of answers: 1 or 0."""
    return 1.0 if window.status in ANSWERED else 0.0


def units_in(unit: str | None) -> UnitsOf:
    """Return a function that returns a window's number of functional units.

    The number is None if it is not known in this unit, and 0 for idle windows.
    """

    def units(window: WindowReport) -> float | None:
        if window.kind == WindowKind.IDLE:
            return 0.0
        return window.units if window.unit == unit else None

    return units


def unit_of(windows: Sequence[WindowReport]) -> str | None:
    """Return the functional unit of these windows, None if there is none or more than one."""
    units = {window.unit for window in windows if window.unit is not None}
    return units.pop() if len(units) == 1 else None
