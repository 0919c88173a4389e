"""Places in the queue, found without a look at every tenant.

Tenants take turns (``policy.Turns``). Those with equally many queued requests, and equal weights, stand in one
group, sorted by when their next turn begins. Of n queued requests there are at most sqrt(2n) such groups for each
weight, and in each the turns before a moment are counted by bisection.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from registry.core.indices import SortedSet
from registry.core.policy import Turns

_EPS = 1e-6
"""Sums of 1/weight are a hair off; turns that begin so close together begin at the same time."""

_LAST = chr(0x10FFFF)
"""A name after all names of tenants."""

Key = tuple[float, float, str]
"""When the next turn of a tenant begins, how long it has waited for it (less is longer), and its name."""


class _Group(NamedTuple):
    """Tenants with so many queued requests, whose turns are so far apart."""

    step: float
    queued: int


class Positions:
    """How many requests are served before one, if all tenants go on asking and every wrapper suits everyone.

    Exact where weights are equal. Else within one turn of each other tenant: whose turn is first of those that
    begin at the same time depends on the turns before.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._entries: dict[str, tuple[_Group, Key | None]] = {}
        self._waiting: dict[_Group, SortedSet[Key]] = {}
        self._blocked: Counter[_Group] = Counter()
        """Tenants whose queued requests all wait for others of their own measurements: they have no turn yet."""

    def put(self, tenant: str, queued: int) -> None:
        """A tenant has so many requests in the queue, or its turn has changed. O(log n)."""
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
        """How many requests are served before the ``index``-th (0: next) of those that a tenant has queued.

        O(log n) for each of the groups, which are few.
        """
        group, key = self._entries[tenant]
        if key is None:  # it begins to wait after all that wait now
            key = self._turns.served_at + group.step, math.inf, tenant
        turn = _Turn(max(key[0], self._turns.served_at) + index * group.step, index, key, group.step)
        served = sum(self._served_before(each, keys, turn) for each, keys in self._waiting.items())
        for each, count in self._blocked.items():
            after_all: SortedSet[Key] = SortedSet([(self._turns.served_at + each.step, math.inf, _LAST)])
            served += count * self._served_before(each, after_all, turn)
        return served

    def _served_before(self, group: _Group, keys: SortedSet[Key], turn: _Turn) -> int:
        """How many turns the tenants of a group, each as often as it has queued requests, have before a turn."""
        last_s = max(keys.last[0], self._turns.served_at)
        whole = min(max(math.ceil((turn.begins - _EPS - last_s) / group.step), 0), group.queued)
        count = whole * len(keys)
        for round_ in range(whole, group.queued):  # no turn is further than one step away: a few rounds
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
        """Of ``count`` others from ``first`` on, whose turn of this round begins at the same time: how many are before.

        Those who have waited longer for it: since the turn before, or since now if there is none.
        """
        if round_ and self.number and step != self.step:
            return count if step > self.step else 0
        if round_ != self.number:
            return count if self.number > round_ else 0
        return min(max(keys.index(self.key) - first, 0), count)
