"""Sums of what windows cost, in which "don't know" stays "don't know". Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import fsum, isclose
from typing import Final

from registry.core.records import WindowKind

LABELS: Final = ("measured", "measured_sampled", "sourced", "modeled", "simulated", "unavailable")
"""Where a figure is from, best first: the words of ``deployments.energy.figures.Label``, which a wrapper says.

``sourced``, from a published factor, is a label of emissions and scores, never of energy."""

SPENT: Final = (WindowKind.PROMPT, WindowKind.IDLE, WindowKind.LOAD, WindowKind.WAKE)
"""Kinds of windows that add up: each joule is in one of them. A lease window holds its process' prompts and idle time
once more, and is there only if that process lived until the lease's end."""

_SAME: Final = 1e-9
"""Up to this relative difference, which is rounding of floats, two sums are the same joules."""

_RANK: Final = {label: rank for rank, label in enumerate(LABELS)}


def worst(labels: Iterable[str]) -> str:
    """The label of a sum: that of its worst part, ``unavailable`` for none. A word that is not known is the worst."""
    return max(labels, key=lambda label: _RANK.get(label, len(LABELS)), default=LABELS[-1])


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of figures that may have holes: of ``count`` figures ``known`` are known, and add up to ``of_known``."""

    count: int = 0
    known: int = 0
    of_known: float = 0.0

    @property
    def value(self) -> float | None:
        """The sum; None as soon as a part is not known, or without any: a sum with a hole is no total."""
        return self.of_known if self.known == self.count and self.count else None

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.count + other.count, self.known + other.known, self.of_known + other.of_known)


def sum_of(figures: Iterable[float | None]) -> Sum:
    """These figures, summed up: the same digits in any order."""
    every = list(figures)
    known = [figure for figure in every if figure is not None]
    return Sum(len(every), len(known), fsum(known))


@dataclass(frozen=True, slots=True)
class Total:
    """What windows cost together: energy [J], operational and embodied emissions [gCO2eq], the worst of the labels."""

    joules: Sum = Sum()
    o_g: Sum = Sum()
    m_g: Sum = Sum()
    label: str = LABELS[-1]


def total_of(parts: Iterable[Total]) -> Total:
    """These totals, summed up."""
    every = [part for part in parts if part.joules.count]
    return Total(
        joules=sum((part.joules for part in every), Sum()),
        o_g=sum((part.o_g for part in every), Sum()),
        m_g=sum((part.m_g for part in every), Sum()),
        label=worst(part.label for part in every),
    )


def lease_total(costs: Mapping[WindowKind, Total]) -> Total:
    """Return what leases cost: their prompts and idle time under all processes of their wrappers.

    The label is that of the lease windows where these hold the same joules: a share of a measured total is modeled, and
    the sum of all shares is measured.
    """
    parts = total_of(costs.get(kind, Total()) for kind in (WindowKind.PROMPT, WindowKind.IDLE))
    whole = costs.get(WindowKind.LEASE, Total())
    return replace(parts, label=whole.label) if same(parts.joules.value, whole.joules.value) else parts


def spent_total(costs: Mapping[WindowKind, Total]) -> Total:
    """Return what leases and the starts of their LLMs cost, each joule once."""
    starts = (costs.get(kind, Total()) for kind in (WindowKind.LOAD, WindowKind.WAKE))
    return total_of((lease_total(costs), *starts))


def same(one: float | None, other: float | None) -> bool:
    """Return whether two sums are known and hold the same joules."""
    return one is not None and other is not None and isclose(one, other, rel_tol=_SAME)
