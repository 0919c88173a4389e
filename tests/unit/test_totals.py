"""Sums that know what they don't know."""

from __future__ import annotations

from deployments.energy import Label
from registry.totals import LABELS, Sum, Total, sum_of, total_of, worst


def test_labels_are_those_of_the_wrappers() -> None:
    """The registry knows the words that wrappers label their energy with, in the same order."""
    assert tuple(Label) == LABELS


def test_worst_label() -> None:
    """A sum has the worst label of its parts; of nothing it has no figure, and an unknown word is trusted least."""
    assert worst(["measured", "modeled", "measured_sampled"]) == "modeled"
    assert worst([]) == "unavailable"
    assert worst(["unavailable", "guessed"]) == "guessed"


def test_a_hole_is_no_zero() -> None:
    """A sum with a part that is not known is not known, nor is the sum of nothing; what is known can be told."""
    assert sum_of([1.0, 2.0]).value == 3.0
    assert sum_of([1.0, None]) == Sum(count=2, known=1, of_known=1.0)
    assert sum_of([1.0, None]).value is None
    assert sum_of([]).value is None
    assert (sum_of([1.0]) + sum_of([None])).value is None


def test_totals_add_up() -> None:
    """Parts are added one by one, and one that is empty does not make the label worse."""
    one = Total(sum_of([1.0]), sum_of([2.0]), sum_of([3.0]), "measured")
    whole = total_of([one, Total(), one])
    assert (whole.joules.value, whole.o_g.value, whole.m_g.value, whole.label) == (2.0, 4.0, 6.0, "measured")
    assert total_of([]) == Total()
