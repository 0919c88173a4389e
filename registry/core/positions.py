"""Computes places in the queue without visiting every tenant.

Tenants take turns (``policy.Turns``). Tenants with equal weight and equally many queued requests form a group, sorted
by the start of their next turn. n queued requests make at most sqrt(2n) groups per weight; in each group, the turns
before a given one are counted by bisection.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from registry.core.indices import SortedSet
from registry.core.policy import Turns

_EPS = 1e-6
"""Turns whose starts differ by less count as simultaneous: sums of 1/weight have rounding errors."""

_LAST = chr(0x10FFFF)
"""Sorts after all tenant names."""

Key = tuple[float, float, str]
"""(start of a tenant's next turn, a number that is smaller the longer the tenant has waited, the tenant's name)."""


class _Group(NamedTuple):
    """Tenants with ``queued`` requests each, whose turns are ``step`` apart."""

    step: float
    queued: int


# D83: places from an index
class Positions:
    """Counts the requests that are served before a given one.

    Assumes that every tenant keeps requests queued and every wrapper fits every request. Exact for equal weights.
    Otherwise the error is at most one turn per other tenant, since the order of simultaneous turns depends on the turns
    before them.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._entries: dict[str, tuple[_Group, Key | None]] = {}
        self._waiting: dict[_Group, SortedSet[Key]] = {}
        self._blocked: Counter[_Group] = Counter()
        """Number of tenants without a turn: their queued requests all wait for earlier ones of their measurements."""

    def put(self, tenant: str, queued: int) -> None:
        """Update a tenant after a change of its turn or of its number of queued requests. O(log n)."""
        entry = (_Group(self._turns.step(tenant), queued), self._turns.find(tenant)) if queued else None
        old = self._entries.get(tenant)
        if entry == old:
            return
        if old is not None:
            self._remove(*old)
            del self._entries[tenant]
        if entry is not None:
            self._entries[tenant] = entry
            group, key = entry
            if key is None:
                self._blocked[group] += 1
            else:
                self._waiting.setdefault(group, SortedSet()).add(key)

    def _remove(self, group: _Group, key: Key | None) -> None:
        if key is None:
            self._blocked[group] -= 1
            if not self._blocked[group]:
                del self._blocked[group]
            return
        keys = self._waiting[group]
        keys.remove(key)
        if not keys:
            del self._waiting[group]

    def before(self, tenant: str, index: int) -> int:
        """Return how many requests are served before a tenant's queued request at ``index`` (0: its next one).

        O(log n) per group.
        """
        group, key = self._entries[tenant]
        if key is None:  # its turn will start after those of all that wait now
            key = self._turns.served_at + group.step, math.inf, tenant
        turn = _Turn(max(key[0], self._turns.served_at) + index * group.step, index, key, group.step)
        served = sum(self._served_before(each, keys, turn) for each, keys in self._waiting.items())
        for each, count in self._blocked.items():
            after_all: SortedSet[Key] = SortedSet([(self._turns.served_at + each.step, math.inf, _LAST)])
            served += count * self._served_before(each, after_all, turn)
        return served

    def _served_before(self, group: _Group, keys: SortedSet[Key], turn: _Turn) -> int:
        """Return how many turns the tenants of a group have before ``turn``; each tenant has ``queued`` turns."""
        last_s = max(keys.last[0], self._turns.served_at)
        whole = min(max(math.ceil((turn.begins - _EPS - last_s) / group.step), 0), group.queued)
        count = whole * len(keys)
        for round_ in range(whole, group.queued):  # few rounds: no next turn starts later than ``served_at`` + one step
            begins = turn.begins - round_ * group.step
            if begins < self._turns.served_at - _EPS:
                break
            earlier = keys.index((begins - _EPS,)) if begins > self._turns.served_at + _EPS else 0  # type: ignore[arg-type]
            same = keys.index((begins + _EPS,)) - earlier  # type: ignore[arg-type]
            count += earlier + turn.ties_before(keys, earlier, same, group.step, round_)
        return count


class _Turn(NamedTuple):
    """The ``number``-th turn of a tenant with this ``key``; its turns are ``step`` apart."""

    begins: float
    number: int
    key: Key
    step: float

    def ties_before(self, keys: SortedSet[Key], first: int, count: int, step: float, round_: int) -> int:
        """Return how many of ``count`` simultaneous turns of this round, from index ``first`` on, come before this one.

        The tenant that has waited longer since its previous turn is first. Next turns (round 0): in order of ``keys``.
        """
        if round_ and self.number and step != self.step:
            return count if step > self.step else 0
        if round_ != self.number:
            return count if self.number > round_ else 0
        return min(max(keys.index(self.key) - first, 0), count)
