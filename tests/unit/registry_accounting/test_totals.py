"""Sums that know what they don't know."""

from __future__ import annotations

from registry.accounting.totals import Sum, Total, lease_total, spent_total, sum_of, total_of
from registry.wire.words import WindowKind


def test_a_hole_is_no_zero() -> None:
    """A sum with a part that is not known is not known, nor is the sum of nothing; what is known can be told."""
    assert sum_of([1.0, 2.0]).value == 3.0
    assert sum_of([1.0, None]) == Sum(count=2, known=1, of_known=1.0)
    assert sum_of([1.0, None]).value is None
    assert sum_of([]).value is None
    assert (sum_of([1.0]) + sum_of([None])).value is None


def test_sums_have_the_same_digits_in_any_order() -> None:
    """A client and a registry that add up the same windows in different orders say the same to the last digit."""
    assert sum_of([1e16, 1.0, 1.0]) == sum_of([1.0, 1.0, 1e16]) == Sum(3, 3, 1e16 + 2)


def test_totals_add_up() -> None:
    """Parts are added one by one, and one that is empty does not make the label worse."""
    one = Total(sum_of([1.0]), sum_of([2.0]), sum_of([3.0]), "measured")
    whole = total_of([one, Total(), one])
    assert (whole.joules.value, whole.o_g.value, whole.m_g.value, whole.label) == (2.0, 4.0, 6.0, "measured")
    assert total_of([]) == Total()


def cost(*joules: float | None, label: str = "measured") -> Total:
    return Total(sum_of(joules), sum_of([0.0] * len(joules)), sum_of([0.0] * len(joules)), label)


def test_a_lease_is_the_sum_of_its_windows_over_all_processes() -> None:
    """A wrapper dies after 80.9 J and its next process writes a lease window of 5.36 J: the lease cost 86.26 J.

    80.9 J = 60.9 J of prompts and 20 J idle before; 5.36 J = 4 J and 1.36 J after.
    """
    costs = {
        WindowKind.PROMPT: cost(60.9, 4.0),
        WindowKind.IDLE: cost(20.0, 1.36),
        WindowKind.LEASE: cost(5.36),
        WindowKind.LOAD: cost(100.0),
    }
    assert lease_total(costs).joules.value == 86.26
    assert spent_total(costs).joules.value == 186.26


def test_shares_of_a_measured_lease_add_up_to_a_measured_one() -> None:
    """A share is modeled; the lease window that holds the same joules says that their sum is measured."""
    shares = {WindowKind.PROMPT: cost(40.0, 60.0, label="modeled"), WindowKind.IDLE: cost(20.0)}
    assert lease_total(shares).label == "modeled"
    whole = lease_total(shares | {WindowKind.LEASE: cost(120.0)})
    assert (whole.joules.value, whole.label) == (120.0, "measured")
    assert lease_total(shares | {WindowKind.LEASE: cost(50.0)}).label == "modeled"  # of the last process only
    assert lease_total(shares | {WindowKind.LEASE: cost(119.9)}).label == "modeled"  # the first lived for 0.1 J
    assert lease_total(shares | {WindowKind.LEASE: cost(None)}).label == "modeled"
    assert lease_total({}) == Total()
