"""Labels of figures, which say where a figure comes from. Used in records, answers and reports. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final


class Label(StrEnum):
    """Where a figure comes from, best first.

    measured: an energy counter of the hardware. measured_sampled: power samples of the hardware, at least 10 per
    second. sourced: a factor from a published source; for scores and grams, never for joules. modeled: an estimate
    with low and high. simulated: from a test double. unavailable: there is no figure.
    """

    MEASURED = "measured"
    MEASURED_SAMPLED = "measured_sampled"
    SOURCED = "sourced"
    MODELED = "modeled"
    SIMULATED = "simulated"
    UNAVAILABLE = "unavailable"


MEASURED: Final = frozenset({Label.MEASURED, Label.MEASURED_SAMPLED})
"""Labels of figures that hardware measured."""

_RANK: Final[dict[str, int]] = {label: rank for rank, label in enumerate(Label)}
_rank = _RANK.__getitem__
_NOTHING: Final = Label.UNAVAILABLE


def worst(labels: Iterable[Label]) -> Label:
    """Return the label of a sum: the worst of its parts; unavailable for a sum of nothing."""
    return max(labels, key=_rank, default=_NOTHING)


def worst_word(words: Iterable[str]) -> str:
    """Return the worst of these labels from records; an unknown word is worse than all labels.

    Returns ``unavailable`` if there are none.
    """
    return max(words, key=lambda word: _RANK.get(word, len(_RANK)), default=Label.UNAVAILABLE)


def label_of(word: str | None) -> Label:
    """Return the label that a record names; unavailable if it names none, or one that is not known here."""
    return Label(word) if word in _RANK else Label.UNAVAILABLE
