"""Pure choices: where a request may go, who is next, whom a warm match may overtake, whose LLM is evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from registry.core.fit import Size
from registry.core.records import Limits, Measurement, Priority, Request, Wrapper

LOOK_AHEAD: Final = 16
"""How many places down a line a choice looks. Bounds what one decision costs and how many rows it changes: a warm
match overtakes at most so many requests at once, and a victim is one of so many least recently used wrappers."""

PRIORITY_TURNS: Final = 8
"""Of so many turns of a tenant in a row, one more goes to its oldest request that can be served, whatever its priority:
so ``low`` is served, too, within PRIORITY_TURNS + 1 turns for each request of its tenant that is older."""

Rank = tuple[int, int, int]
"""Order of measurements inside a tenant, smallest first: priority, arrival of the next request, measurementId."""

PRIORITIES: Final = range(3)
"""What the first part of a Rank can be."""

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


def rank(measurement: Measurement, request: Request) -> Rank:
    """The place of a measurement's request in its tenant's line: priority first, then first come, first served.

    It is the request's own arrival: a measurement that keeps adding LLMs does not hold the line.
    """
    return _PRIORITY_ORDER[measurement.priority], request.seq, measurement.measurement_id


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

    A tenant that begins to wait has its turn 1/weight after the latest one that was given, and each grant moves it on
    by as much. Who is furthest behind is next; of equals, who has waited longer. Nothing is kept of a tenant that does
    not wait, so that nobody saves up turns, and new names gain nothing.

    Bound: from the moment at which a tenant begins to wait, or gets something, until it gets its next turn that it can
    use, another one with w times its weight has at most floor(w) + 1 turns; if it came later and is no heavier: none.
    """

    def __init__(self, weights: Iterable[tuple[str, float]]) -> None:
        self._weights = dict(weights)
        self._waiting: dict[str, tuple[float, int]] = {}
        self._served_at = 0.0
        self._moves = 0

    def begin(self, tenant: str) -> None:
        """The tenant waits from now on."""
        self._move(tenant, self._served_at)

    def end(self, tenant: str) -> None:
        """The tenant waits for nothing more."""
        del self._waiting[tenant]

    def key(self, tenant: str) -> tuple[float, int, str]:
        """Sort key of a tenant that waits: the smallest is next. Changes only when the tenant is charged."""
        return (*self._waiting[tenant], tenant)

    def find(self, tenant: str) -> tuple[float, int, str] | None:
        """Sort key of a tenant, None if it does not wait."""
        return self.key(tenant) if tenant in self._waiting else None

    @property
    def served_at(self) -> float:
        """Where the latest turn that was given began."""
        return self._served_at

    def charge(self, tenant: str) -> None:
        """A tenant that waits got something."""
        self._served_at = self.start(tenant)
        self._move(tenant, self._served_at)

    def _move(self, tenant: str, from_: float) -> None:
        self._moves += 1
        self._waiting[tenant] = from_ + self.step(tenant), self._moves

    def start(self, tenant: str) -> float:
        """Where the next turn of a tenant that waits begins, in grants of a tenant of weight 1."""
        return max(self._waiting[tenant][0], self._served_at)

    def step(self, tenant: str) -> float:
        """How far one grant moves the tenant."""
        return 1.0 / self._weights.get(tenant, 1.0)
