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
"""Maximum number of candidates that a choice looks at. Limits the cost of a decision and the rows it changes: at most
so many requests are overtaken at once, and so many least recently used wrappers considered for eviction."""

PRIORITY_TURNS: Final = 8
"""After so many consecutive turns of a tenant by priority, one goes to its oldest request that can be served. So a
``low`` request waits at most PRIORITY_TURNS + 1 turns for each older request of its tenant, and as many for itself."""

Rank = tuple[int, int, int]
"""Order of measurements inside a tenant, smallest first: priority, arrival of the next request, measurementId."""

PRIORITIES: Final = range(3)
"""Possible values of the first part of a Rank."""

_PRIORITY_ORDER: Final[Mapping[Priority, int]] = {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2}


@dataclass(frozen=True, slots=True)
class Place:
    """The wrappers that may serve the next request of a measurement.

    ``sizes``: sizes that are large enough and have the right GPUs; sizes rather than needs, so that there are few
    places. ``machine_id``: only on this machine (None: any). ``not_on``: wrappers on which its LLM has failed.
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
    """True when a waiting request may be overtaken once more: neither too often nor too long after its arrival."""
    return request.overtaken < limits.max_overtakes and now_s - request.created_s < limits.max_overtake_s


# D21: the least recently used that no waiting request wants
def victim(candidates: Iterable[Wrapper], wanted: Callable[[Wrapper], Rank | None]) -> Wrapper | None:
    """Return the wrapper whose LLM is evicted: the first (least recently used) that no queued request wants.

    If all are wanted, the one that is wanted latest, so that requests served earlier still find their LLM. ``wanted``
    returns the best rank among the requests that want a wrapper's LLM. None without candidates.
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

    When a tenant begins to wait, its turn is 1/weight after the latest turn granted; each grant adds 1/weight. The
    smallest turn is next; among equals, the tenant that has waited longer. Tenants that don't wait are forgotten, so
    turns can't be saved up and a new name gives no advantage.

    Bound: from the time when a tenant begins to wait, or has a turn, until its next turn that it can use, another
    tenant with w times its weight has at most floor(w) + 1 turns; none if it came later and is not heavier.
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
        """Start of the latest turn granted, in grants of a tenant of weight 1."""
        return self._served_at

    def charge(self, tenant: str) -> None:
        """Count a grant to a waiting tenant."""
        self._served_at = self.start(tenant)
        self._move(tenant, self._served_at)

    def _move(self, tenant: str, from_: float) -> None:
        self._moves += 1
        self._waiting[tenant] = from_ + self.step(tenant), self._moves

    def start(self, tenant: str) -> float:
        """Return the start of a waiting tenant's next turn, in grants of a tenant of weight 1."""
        return max(self._waiting[tenant][0], self._served_at)

    def step(self, tenant: str) -> float:
        """Return how far one grant moves the tenant: 1/weight."""
        return 1.0 / self._weights.get(tenant, 1.0)
