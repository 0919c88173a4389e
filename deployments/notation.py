"""Figures as people see them: a ``~`` before an estimate, a dash for what is not known."""

from __future__ import annotations

MEASURED = frozenset({"measured", "measured_sampled"})
"""Labels of figures that are no estimates."""

UNKNOWN = "-"
LEGEND = "~ is an estimate, not a measurement; - is not known"


def figure(value: float | None, label: str) -> str:
    """A figure to three digits: ``1,230``, ``~1.23e-05`` where its label says that it is an estimate."""
    if value is None:
        return UNKNOWN
    return f"{'' if label in MEASURED else '~'}{number(value)}"


def number(value: float) -> str:
    """A number to three digits."""
    return f"{float(f'{value:.3g}'):,.12g}"


def in_range(value: float | None, low: float | None, high: float | None, label: str) -> str:
    """A figure with its range, if it has one: ``~1.23 (1.1 to 1.4)``."""
    text = figure(value, label)
    return text if low is None or high is None else f"{text} ({number(low)} to {number(high)})"


def phase_words(phase: str, progress: float | None, total_bytes: int | None) -> str:
    """A phase, and how much of it is done: ``downloading 43% of 5.2 GB``."""
    words = [phase]
    if progress is not None:
        words.append(f"{progress:.0%}")
    if total_bytes is not None:
        words.append(f"of {number(total_bytes / 1e9)} GB")
    return " ".join(words)
