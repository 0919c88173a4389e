"""Sums of energy windows; a sum with an unknown part is unknown. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import fsum, isclose
from typing import Final

from registry.wire.labels import Label, worst_word
from registry.wire.words import WindowKind

# D68: a lease is the sum of these
SPENT: Final = (WindowKind.PROMPT, WindowKind.IDLE, WindowKind.LOAD, WindowKind.WAKE)
"""Kinds of windows whose joules may be added: each joule is in exactly one of them. A lease window contains the joules
of the prompt and idle windows of its process once more. It exists only if that process lived until the lease ended."""

_SAME: Final = 1e-9
"""Two sums are equal up to this relative difference, which comes from rounding."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of ``count`` figures, of which ``known`` are known and add up to ``of_known``."""

    count: int = 0
    known: int = 0
    of_known: float = 0.0

    @property
    def value(self) -> float | None:
        """The sum; None if a figure is not known, or there are none."""
        return self.of_known if self.known == self.count and self.count else None

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.count + other.count, self.known + other.known, self.of_known + other.of_known)


def sum_of(figures: Iterable[float | None]) -> Sum:
    """Return the sum of these figures; the order does not change its digits."""
    every = list(figures)
    known = [figure for figure in every if figure is not None]
    return Sum(len(every), len(known), fsum(known))


@dataclass(frozen=True, slots=True)
class Total:
    """Sum over windows: energy [J], operational and embodied emissions [gCO2eq], and the worst label."""

    joules: Sum = Sum()
    o_g: Sum = Sum()
    m_g: Sum = Sum()
    label: str = Label.UNAVAILABLE


def total_of(parts: Iterable[Total]) -> Total:
    """Return the sum of these totals; those without windows are ignored."""
    every = [part for part in parts if part.joules.count]
    return Total(
        joules=sum((part.joules for part in every), Sum()),
        o_g=sum((part.o_g for part in every), Sum()),
        m_g=sum((part.m_g for part in every), Sum()),
        label=worst_word(part.label for part in every),
    )


def lease_total(costs: Mapping[WindowKind, Total]) -> Total:
    """Return the cost of leases: prompts plus idle time, of all processes of their wrappers.

    If the lease windows have the same sum of joules, their label is used: a single prompt may be a
    ``modeled`` share of a lease whose energy was measured.
    """
    parts = total_of(costs.get(kind, Total()) for kind in (WindowKind.PROMPT, WindowKind.IDLE))
    whole = costs.get(WindowKind.LEASE, Total())
    return replace(parts, label=whole.label) if same(parts.joules.value, whole.joules.value) else parts


def spent_total(costs: Mapping[WindowKind, Total]) -> Total:
    """Return the cost of leases and of the starts of their LLMs, each joule once."""
    starts = (costs.get(kind, Total()) for kind in (WindowKind.LOAD, WindowKind.WAKE))
    return total_of((lease_total(costs), *starts))


def same(one: float | None, other: float | None) -> bool:
    """True when two sums are known and equal up to rounding."""
    return one is not None and other is not None and isclose(one, other, rel_tol=_SAME)
