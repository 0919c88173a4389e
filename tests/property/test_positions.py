"""A place in the queue is how many are really served before, by an oracle that serves them one after another."""

from __future__ import annotations

import copy

from hypothesis import given
from hypothesis import strategies as st

from registry.core.policy import Turns
from registry.core.positions import Positions

WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 0.5, "e": 3.0, "f": 1.0, "g": 1.0, "h": 0.3}
TENANTS = sorted(WEIGHTS)


class Line:
    """Tenants that wait, as the queue keeps them: how many requests of each, and whose turn it is."""

    def __init__(self) -> None:
        self.turns = Turns(WEIGHTS.items())
        self.positions = Positions(self.turns)
        self.queued: dict[str, int] = {}
        self.blocked: set[str] = set()

    def add(self, tenant: str, count: int, *, blocked: bool) -> None:
        """Requests come; ``blocked``: of a tenant all of whose requests wait for others of their measurements."""
        if tenant not in self.queued and blocked:
            self.blocked.add(tenant)
        elif tenant not in self.queued or (tenant in self.blocked and not blocked):
            self.blocked.discard(tenant)
            self.turns.begin(tenant)
        self.queued[tenant] = self.queued.get(tenant, 0) + count
        self.positions.put(tenant, self.queued[tenant])

    def serve(self, tenant: str) -> None:
        """A tenant that waits is served, whoever's turn it is: the others may not fit."""
        if tenant not in self.queued or tenant in self.blocked:
            return
        self.turns.charge(tenant)
        self.queued[tenant] -= 1
        if not self.queued[tenant]:
            del self.queued[tenant]
            self.turns.end(tenant)
        self.positions.put(tenant, self.queued.get(tenant, 0))

    def served_before(self, tenant: str, index: int) -> int:
        """Serve one after another until it is that request's turn; O(n)."""
        turns, left = copy.deepcopy(self.turns), dict(self.queued)
        for each in sorted(self.blocked, key=lambda each: each != tenant):  # of those without a turn, itself first
            turns.begin(each)
        served = 0
        while True:
            # Sums of 1/weight are a hair off.
            first = min(left, key=lambda each: (round(turns.key(each)[0], 6), turns.key(each)[1]))
            if first == tenant and self.queued[tenant] - left[tenant] == index:
                return served
            turns.charge(first)
            served += 1
            left[first] -= 1
            if not left[first]:
                del left[first]


moves = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(TENANTS), st.integers(1, 6), st.booleans()),
        st.tuples(st.just("serve"), st.sampled_from(TENANTS)),
    ),
    min_size=1,
    max_size=30,
)


@given(moves, st.booleans())
def test_the_place_is_how_many_are_served_before(story: list[tuple[object, ...]], equal: bool) -> None:
    """Exactly, where all weights are equal; within one turn of each other tenant where they are not."""
    line = Line()
    if equal:
        line.turns._weights.clear()
    for name, *arguments in story:
        if name == "add":
            tenant, count, blocked = arguments
            line.add(str(tenant), int(str(count)), blocked=bool(blocked))
        else:
            line.serve(str(arguments[0]))
    for tenant, count in line.queued.items():
        for index in range(count):
            told, true = line.positions.before(tenant, index), line.served_before(tenant, index)
            assert abs(told - true) <= (0 if equal else len(line.queued)), (tenant, index, told, true)
