"""Pure choices: where a request may go, which is next, which may be overtaken, which LLM is evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from registry.core.decision import Limits
from registry.core.fit import Size
from registry.core.records import Measurement, Request, Wrapper
from registry.wire.words import Priority

LOOK_AHEAD: Final = 16
"""Maximum number of candidates that a choice looks at. It limits the cost of a decision and the number of rows that it
changes: one decision overtakes at most so many requests, and considers at most so many wrappers for eviction."""

PRIORITY_TURNS: Final = 8
"""After so many consecutive turns by priority, the next turn of a tenant goes to its oldest request that can be served.
So a ``low`` request waits at most PRIORITY_TURNS + 1 turns of its tenant for each older request, and as many more for
its own turn."""

Rank = tuple[int, int, int]
"""Order of measurements inside a tenant, smallest first: priority, arrival of the next request, measurementId."""

PRIORITIES: Final = range(3)
"""Possible values of the first part of a Rank."""

_PRIORITY_ORDER: Final[Mapping[Priority, int]] = {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2}


@dataclass(frozen=True, slots=True)
class Place:
    """The wrappers that may serve the next request of a measurement.

    * ``sizes``: sizes that are large enough and have the right GPUs. A place contains sizes instead of the LLM's needs,
      because there are fewer different sizes.
    * ``machine_id``: only this machine may serve it (None: any).
    * ``not_on``: wrappers on which its LLM has failed.
    """

    sizes: frozenset[Size]
    machine_id: str | None = None
    not_on: frozenset[str] = frozenset()

    def takes(self, size: Size) -> bool:
        """True when wrappers of this size are allowed."""
        return size in self.sizes

    def allows(self, wrapper: Wrapper, size: Size) -> bool:
        """True when this wrapper, which has this size, may serve the request."""
        return (
            self.takes(size) and self.machine_id in (None, wrapper.machine_id) and wrapper.wrapper_id not in self.not_on
        )


def rank(measurement: Measurement, request: Request) -> Rank:
    """Return the rank of a request among those of its tenant: by priority, then by arrival of the request itself.

    The arrival of its measurement does not count: adding LLMs to an old measurement gives no advantage.
    """
    return _PRIORITY_ORDER[measurement.priority], request.seq, measurement.measurement_id


def may_be_overtaken(request: Request, limits: Limits, now_s: float) -> bool:
    """True when a waiting request may be overtaken: it was not overtaken too often, nor has it waited too long."""
    return request.overtaken < limits.max_overtakes and now_s - request.created_s < limits.max_overtake_s


# D21: the least recently used that no waiting request wants
def victim(candidates: Iterable[Wrapper], wanted: Callable[[Wrapper], Rank | None]) -> Wrapper | None:
    """Return the wrapper whose LLM is evicted: the first (least recently used) that no queued request wants.

    If all are wanted, return the one that is wanted last, so that requests served earlier still find
    their LLM. ``wanted`` returns the best rank among the requests that want a wrapper's LLM, None if
    there are none. Return None without candidates.
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
    """Weighted turns of tenants: start-time fair queueing over grants, without a clock.

    A turn is a point on a virtual time scale; its unit is one grant of a tenant of weight 1. When a
    tenant begins to wait, its turn is 1/weight after the latest turn granted; each grant adds 1/weight.
    A request that loses its wrapper and gets another one is granted twice: these are two turns.
    The smallest turn is next; among equals, the tenant that has waited longer. Tenants that don't wait
    are forgotten, so turns can't be saved up and a new name gives no advantage.

    Bound: while a tenant waits for its next turn, another tenant with w times its weight gets at most floor(w) + 1
    turns. It gets none if it began to wait later and w is at most 1. The wait begins with the tenant's last turn, or
    when the tenant begins to wait. It ends with the tenant's next turn in which it can be served.
    """

    def __init__(self, weights: Iterable[tuple[str, float]]) -> None:
        self._weights = dict(weights)
        self._waiting: dict[str, tuple[float, int]] = {}
        self._served_at = 0.0
        self._moves = 0

    def begin(self, tenant: str) -> None:
        """Add a tenant that begins to wait."""
        self._move(tenant, self._served_at)

    def end(self, tenant: str) -> None:
        """Remove a tenant that no longer waits."""
        del self._waiting[tenant]

    def key(self, tenant: str) -> tuple[float, int, str]:
        """Return the sort key of a waiting tenant: the smallest is next. Changes only in ``charge``."""
        return (*self._waiting[tenant], tenant)

    def find(self, tenant: str) -> tuple[float, int, str] | None:
        """Return the sort key of a tenant, None if it does not wait."""
        return self.key(tenant) if tenant in self._waiting else None

    @property
    def served_at(self) -> float:
        """Start of the latest turn granted, in virtual time (see the class)."""
        return self._served_at

    def charge(self, tenant: str) -> None:
        """Count a grant to a waiting tenant."""
        self._served_at = self.start(tenant)
        self._move(tenant, self._served_at)

    def _move(self, tenant: str, from_: float) -> None:
        self._moves += 1
        self._waiting[tenant] = from_ + self.step(tenant), self._moves

    def start(self, tenant: str) -> float:
        """Return the start of a waiting tenant's next turn, in virtual time (see the class)."""
        return max(self._waiting[tenant][0], self._served_at)

    def step(self, tenant: str) -> float:
        """Return how far one grant moves the tenant's turn in virtual time: 1/weight."""
        return 1.0 / self._weights.get(tenant, 1.0)
