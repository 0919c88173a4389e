"""How ``make bench PART=kills`` judges what its clients saw."""

from __future__ import annotations

import pytest

from tests.bench.kills import Lease, Seen


def lease(seen_s: float, until_s: float, wrapper: str = "/wrappers/m-0") -> Lease:
    """A lease that a client saw hold for this time; it was granted half a second earlier."""
    return Lease(f"from {seen_s:g}", wrapper, seen_s - 0.5, seen_s, until_s)


@pytest.mark.parametrize(
    ("leases", "double"),
    [
        ([], 0),
        ([lease(1, 2), lease(2, 3)], 0),
        ([lease(1, 3), lease(2, 4)], 1),
        ([lease(1, 3), lease(2, 4, "/wrappers/m-1")], 0),
        ([lease(1, 9), lease(2, 3), lease(4, 5)], 2),
    ],
)
def test_leases_of_one_wrapper_that_overlap_are_double_grants(leases: list[Lease], double: int) -> None:
    """Each lease that began while another of its wrapper certainly held counts, whatever order they were noted in."""
    assert len(Seen(leases=leases).double_grants) == double
    assert len(Seen(leases=leases[::-1]).double_grants) == double


def test_an_address_that_stays_open_is_a_double_grant() -> None:
    """Who still gets answers at the address of a released lease shares the wrapper with its next holder."""
    assert Seen(open_addresses=["lease 1"]).double_grants == ["lease 1"]


def test_time_to_the_next_grant_counts_from_the_last_kill_before_it() -> None:
    """A kill has no figure of its own when another comes before the next grant, or when nothing is granted any more."""
    seen = Seen(leases=[lease(1, 2), lease(7, 8), lease(8, 9)], kills_s=[3, 5, 10])
    assert seen.kill_to_next_grant_s == [2]


def test_a_grant_of_before_the_kill_says_nothing_about_it() -> None:
    """A lease that was granted before the registry was killed, and seen only after, is none that it came back for."""
    seen = Seen(leases=[lease(1, 2), lease(5, 6)], kills_s=[0.75])
    assert seen.kill_to_next_grant_s == [4.25]


def test_every_kind_of_fault_is_told() -> None:
    """What was lost, granted twice, left behind or refused all makes the benchmark fail."""
    seen = Seen(lost=["a"], open_addresses=["b"], orphans=["c"], refused_prompts=["d"])
    assert seen.faults == ["a", "b", "c", "d"]
    assert Seen().faults == []
