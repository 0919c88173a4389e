"""Pure choices: where a request may go, who is next, whom a warm match may overtake, whose LLM is evicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from registry.fit import Size
from registry.state import Limits, Measurement, Priority, Request, Wrapper

LOOK_AHEAD: Final = 16
"""How many places down a line a choice looks. Bounds what one decision costs and how many rows it changes: a warm
match overtakes at most so many requests at once, and a victim is one of so many least recently used wrappers."""

Rank = tuple[int, int, int]
"""Order of measurements inside a tenant, smallest first: priority, arrival, measurementId."""

_PRIORITY_ORDER: Final[Mapping[Priority, int]] = {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the next request of a measurement may go.

    ``sizes``: of those wrappers that are large enough and have the right GPUs. So there are few places, however many
    needs there are. ``machine_id``: only there (None: anywhere). ``not_on``: wrappers on which its LLM has failed.
    """

    sizes: frozenset[Size]
    machine_id: str | None = None
    not_on: frozenset[str] = frozenset()

    def takes(self, size: Size) -> bool:
        """True when a wrapper of this size is large and alike enough."""
        return size in self.sizes

    def allows(self, wrapper: Wrapper, size: Size) -> bool:
        """True when this very wrapper, which has this size, may serve the request."""
        return (
            self.takes(size) and self.machine_id in (None, wrapper.machine_id) and wrapper.wrapper_id not in self.not_on
        )


def rank(measurement: Measurement) -> Rank:
    """The measurement's place in its tenant's line: priority first, then first come, first served."""
    return _PRIORITY_ORDER[measurement.priority], measurement.seq, measurement.measurement_id


def may_be_overtaken(request: Request, limits: Limits, now_s: float) -> bool:
    """True when a waiting request can let one more warm match go before it: neither too often nor for too long."""
    return request.overtaken < limits.max_overtakes and now_s - request.created_s < limits.max_overtake_s


def victim(candidates: Iterable[Wrapper], wanted: Callable[[Wrapper], Rank | None]) -> Wrapper | None:
    """Whose LLM is given up: the first (least recently used) that nobody in the queue wants.

    Where all are wanted, that of which the best rank that wants it (``wanted``) is the lowest: who is served earlier
    finds his LLM still there.
    """
    last: tuple[Rank, Wrapper] | None = None
    for wrapper in candidates:
        rank = wanted(wrapper)
        if rank is None:
            return wrapper
        if last is None or rank > last[0]:
            last = rank, wrapper
    return None if last is None else last[1]


class Turns:
    """Tenants in turn by weight: start-time fair queueing over grants, without a clock.

    Each grant moves its tenant forward by 1/weight; who is furthest behind is next, the name deciding ties. A tenant
    that had nothing to ask for, or could not be served, does not save up turns: it starts where the others are.
    """

    def __init__(self, weights: Iterable[tuple[str, float]]) -> None:
        self._weights = dict(weights)
        self._next: dict[str, float] = {}
        self._served_at = 0.0

    def key(self, tenant: str) -> tuple[float, str]:
        """Sort key of a tenant: the smallest is next. Changes only when the tenant is charged."""
        return self._next.get(tenant, 0.0), tenant

    def charge(self, tenant: str) -> None:
        """The tenant got something."""
        self._served_at = max(self._next.get(tenant, 0.0), self._served_at)
        self._next[tenant] = self._served_at + self.step(tenant)

    def start(self, tenant: str) -> float:
        """Where the tenant's next turn begins, in grants of a tenant of weight 1."""
        return max(self._next.get(tenant, 0.0), self._served_at)

    def step(self, tenant: str) -> float:
        """How far one grant moves the tenant."""
        return 1.0 / self._weights.get(tenant, 1.0)

    def served_before(self, tenant: str, other: str, index: int) -> int:
        """How many turns ``other`` has before the ``index``-th (0 = next) turn of ``tenant``, if both always ask."""
        begins = self.start(tenant) + index * self.step(tenant)
        turns = round((begins - self.start(other)) / self.step(other), 6)  # sums of 1/weight are a hair off
        if turns < 0:
            return 0
        if turns != math.floor(turns):
            return math.floor(turns) + 1
        # Both have a turn that begins at the same time: who is further behind is first, then the name decides.
        own = begins if index else self._next.get(tenant, 0.0)
        theirs = begins if turns else self._next.get(other, 0.0)
        return int(turns) + ((theirs, other) < (own, tenant))
