"""Sorted indices of free wrappers and waiting requests, so that a decision costs O(log n).

They are sorted lists with bisect. An insertion moves pointers, which takes some 20 µs at 100,000
entries. Unlike heaps with lazy deletion, they never contain outdated entries.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any, Generic, TypeVar

from registry.core.fit import Needs, Size
from registry.core.policy import LOOK_AHEAD, PRIORITIES, PRIORITY_TURNS, Place, Rank, Turns
from registry.core.records import MeasurementKey, Request, Wrapper, WrapperStatus
from registry.wire.words import RequestStatus

T = TypeVar("T", bound="tuple[Any, ...] | str")


class SortedSet(Generic[T]):
    """A set that iterates in sorted order. Must not change during iteration."""

    __slots__ = ("_items",)

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items: list[T] = sorted(set(items))

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SortedSet) and self._items == other._items

    __hash__ = None  # type: ignore[assignment]

    def add(self, item: T) -> None:
        """Add an item that is not in the set."""
        insort(self._items, item)

    def remove(self, item: T) -> None:
        """Remove an item that is in the set."""
        at = bisect_left(self._items, item)
        assert self._items[at] == item
        del self._items[at]

    def index(self, item: T) -> int:
        """Return how many items are smaller than this one."""
        return bisect_left(self._items, item)

    @property
    def first(self) -> T:
        """The smallest item. Raises IndexError if empty."""
        return self._items[0]

    @property
    def last(self) -> T:
        """The largest item. Raises IndexError if empty."""
        return self._items[-1]

    def first_from(self, item: Any) -> T | None:
        """Return the smallest item ≥ ``item``, which may be a tuple prefix; None if there is none."""
        at = bisect_left(self._items, item)
        return self._items[at] if at < len(self._items) else None


class Pool:
    """Free wrappers of one kind (e.g. idle), by size and last use."""

    def __init__(self) -> None:
        self._by_size: dict[Size, SortedSet[tuple[float, str]]] = {}
        self._ids: set[str] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pool) and self._by_size == other._by_size

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, wrapper: Wrapper) -> bool:
        return wrapper.wrapper_id in self._ids

    def add(self, wrapper: Wrapper, size: Size) -> None:
        """Add a wrapper."""
        self._by_size.setdefault(size, SortedSet()).add((wrapper.last_used_s, wrapper.wrapper_id))
        self._ids.add(wrapper.wrapper_id)

    def remove(self, wrapper: Wrapper, size: Size) -> None:
        """Remove a wrapper; the arguments must equal those of ``add``."""
        entries = self._by_size[size]
        entries.remove((wrapper.last_used_s, wrapper.wrapper_id))
        self._ids.remove(wrapper.wrapper_id)
        if not entries:
            del self._by_size[size]

    @property
    def sizes(self) -> Iterable[Size]:
        """The sizes of its wrappers."""
        return self._by_size

    def smallest(self, place: Place) -> str | None:
        """Return the wrapper of this place with the fewest GPUs, then least memory, then least recently used.

        None if there is none. Ignores ``place.machine_id``.
        """
        sizes: dict[tuple[int, int], list[Size]] = {}
        for size in self._by_size:
            if place.takes(size):
                sizes.setdefault((size.gpus, size.memory_bytes or 0), []).append(size)
        found = (wrapper_id for alike in sorted(sizes) for wrapper_id in self._oldest(place, sizes[alike]))
        return next(found, None)

    def oldest(self, place: Place) -> Iterator[str]:
        """Yield the wrappers of this place, least recently used first. Ignores ``place.machine_id``."""
        return self._oldest(place, [size for size in self._by_size if place.takes(size)])

    def _oldest(self, place: Place, sizes: Iterable[Size]) -> Iterator[str]:
        merged = heapq.merge(*(self._by_size[size] for size in sizes))
        return (wrapper_id for _, wrapper_id in merged if wrapper_id not in place.not_on)


class WrapperIndex:
    """Wrappers by machine and by size; free ones also by kind and LLM.

    Free wrappers: ``idle``, ``ready`` (runs an LLM), ``ownerless`` (starts an LLM that no request waits
    for). ``ready_with``, ``ownerless_with``: the same by fingerprint of the LLM.
    """

    def __init__(self) -> None:
        self.on_machine: dict[str, SortedSet[str]] = {}
        self.idle = Pool()
        self.ready = Pool()
        self.ready_with: dict[str, Pool] = {}
        self.ownerless = Pool()
        self.ownerless_with: dict[str, Pool] = {}
        self.sizes: Counter[Size] = Counter()
        """Sizes of all wrappers, including LOST ones."""
        self.present: Counter[Size] = Counter()
        """Sizes of wrappers that are not LOST."""
        self.usable: Counter[Size] = Counter()
        """Sizes of wrappers that are not LOST, FAILED or OFF."""
        self.statuses: Counter[WrapperStatus] = Counter()
        self.held = 0
        """Number of wrappers that a request holds or waits for."""

    def free_sizes(self) -> set[Size]:
        """Return the sizes of the free wrappers."""
        return {*self.idle.sizes, *self.ready.sizes, *self.ownerless.sizes}

    def add(self, wrapper: Wrapper, size: Size) -> None:
        """Add a wrapper of this size."""
        self.on_machine.setdefault(wrapper.machine_id, SortedSet()).add(wrapper.wrapper_id)
        self.statuses[wrapper.status] += 1
        self.held += wrapper.request_id is not None
        for counter in self._counters(wrapper):
            counter[size] += 1
        for pool in self._pools(wrapper):
            pool.add(wrapper, size)

    def remove(self, wrapper: Wrapper, size: Size) -> None:
        """Remove a wrapper; the arguments must equal those of ``add``."""
        on_machine = self.on_machine[wrapper.machine_id]
        on_machine.remove(wrapper.wrapper_id)
        if not on_machine:
            del self.on_machine[wrapper.machine_id]
        self.statuses[wrapper.status] -= 1
        self.held -= wrapper.request_id is not None
        for counter in self._counters(wrapper):
            counter[size] -= 1
            if not counter[size]:
                del counter[size]
        for pool in self._pools(wrapper):
            pool.remove(wrapper, size)
        if wrapper.spec is not None:
            for pools in (self.ready_with, self.ownerless_with):
                fingerprint = wrapper.spec.fingerprint
                if fingerprint in pools and not pools[fingerprint]:
                    del pools[fingerprint]

    def _counters(self, wrapper: Wrapper) -> Iterator[Counter[Size]]:
        yield self.sizes
        if wrapper.status is not WrapperStatus.LOST:
            yield self.present
        if is_usable(wrapper):
            yield self.usable

    def _pools(self, wrapper: Wrapper) -> Iterator[Pool]:
        if wrapper.status is WrapperStatus.IDLE:
            yield self.idle
        elif wrapper.spec is not None and wrapper.status is WrapperStatus.READY:
            yield self.ready
            yield self.ready_with.setdefault(wrapper.spec.fingerprint, Pool())
        elif wrapper.spec is not None and is_free(wrapper):
            yield self.ownerless
            yield self.ownerless_with.setdefault(wrapper.spec.fingerprint, Pool())


def is_usable(wrapper: Wrapper) -> bool:
    """True unless the wrapper is LOST, FAILED or OFF."""
    return wrapper.status not in (WrapperStatus.LOST, WrapperStatus.FAILED, WrapperStatus.OFF)


def is_free(wrapper: Wrapper) -> bool:
    """True when a request may get this wrapper: no request holds it, and it accepts a deploy or a lease."""
    free = wrapper.status in (WrapperStatus.IDLE, WrapperStatus.READY, WrapperStatus.DEPLOYING)
    return free and wrapper.request_id is None


class RequestIndex:
    """Requests by measurement and, while they are queued, by tenant and LLM."""

    def __init__(self) -> None:
        self.of: dict[MeasurementKey, SortedSet[tuple[int, str]]] = {}
        """All requests of a measurement, in order of arrival."""
        self.unfinished: dict[MeasurementKey, SortedSet[tuple[int, str]]] = {}
        """The requests of a measurement that have not ended; the first one is served now or next."""
        self.needs: dict[MeasurementKey, Counter[Needs]] = {}
        """Needs of a measurement's unfinished requests, with their number."""
        self.queued: dict[str, SortedSet[tuple[Rank, int, str]]] = {}
        """The queued requests of a tenant, in order of service."""
        self.queued_for: dict[str, SortedSet[tuple[Rank, int, str]]] = {}
        """The queued requests for the LLM with this fingerprint, by rank."""
        self.retried: set[str] = set()
        """Queued requests whose LLM has failed on a wrapper."""
        self.queued_count = 0

    def add(self, request: Request, needs: Needs, rank: Rank) -> None:
        """Add a request with these needs and this rank."""
        entry = request.seq, request.request_id
        self.of.setdefault(request.measurement_key, SortedSet()).add(entry)
        if not request.status.ended:
            self.unfinished.setdefault(request.measurement_key, SortedSet()).add(entry)
            self.needs.setdefault(request.measurement_key, Counter())[needs] += 1
        if request.status is RequestStatus.QUEUED:
            self.queued.setdefault(request.tenant, SortedSet()).add((rank, *entry))
            self.queued_for.setdefault(request.spec.fingerprint, SortedSet()).add((rank, *entry))
            self.queued_count += 1
            if request.failed_on:
                self.retried.add(request.request_id)

    def remove(self, request: Request, needs: Needs, rank: Rank) -> None:
        """Remove a request; the arguments must equal those of ``add``."""
        entry = request.seq, request.request_id
        of = self.of[request.measurement_key]
        of.remove(entry)
        if not of:
            del self.of[request.measurement_key]
        if not request.status.ended:
            unfinished, needed = self.unfinished[request.measurement_key], self.needs[request.measurement_key]
            unfinished.remove(entry)
            needed[needs] -= 1
            if not needed[needs]:
                del needed[needs]
            if not unfinished:
                del self.unfinished[request.measurement_key], self.needs[request.measurement_key]
        if request.status is RequestStatus.QUEUED:
            for queued, key in ((self.queued, request.tenant), (self.queued_for, request.spec.fingerprint)):
                queued[key].remove((rank, *entry))
                if not queued[key]:
                    del queued[key]
            self.queued_count -= 1
            self.retried.discard(request.request_id)


Line = dict[str, SortedSet[Rank]]
"""The measurements that wait for one place, by tenant."""


class Queue:
    """Measurements whose next request is queued, by place, tenant and rank."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self._entries: dict[MeasurementKey, tuple[Place, Rank]] = {}
        self._anywhere: dict[Place, Line] = {}
        self._on_machine: dict[str, dict[Place, Line]] = {}
        self._tenants: SortedSet[tuple[float, int, str]] = SortedSet()
        self._waiting: Counter[str] = Counter()
        self._by_priority: Counter[str] = Counter()
        """By waiting tenant: how many of its turns in a row passed over its oldest request that could be served."""
        self._oldest: tuple[str, Rank] | None = None
        """The tenant whose turn it is, and its oldest request that can be served."""

    def contents(self) -> dict[MeasurementKey, tuple[Place, Rank]]:
        """Return place and rank of every waiting measurement."""
        return dict(self._entries)

    def put(self, key: MeasurementKey, entry: tuple[Place, Rank] | None) -> None:
        """Queue a measurement with this place and rank; None removes it."""
        old = self._entries.get(key)
        if old == entry:
            return
        if entry is not None:
            self._add(key, entry)
        if old is not None:
            self._remove(key, old)
            if entry is not None:
                self._entries[key] = entry

    def _add(self, key: MeasurementKey, entry: tuple[Place, Rank]) -> None:
        (tenant, _), (place, rank) = key, entry
        self._entries[key] = entry
        self._lines(place).setdefault(place, {}).setdefault(tenant, SortedSet()).add(rank)
        if not self._waiting[tenant]:
            self.turns.begin(tenant)
            self._tenants.add(self.turns.key(tenant))
        self._waiting[tenant] += 1

    def _remove(self, key: MeasurementKey, entry: tuple[Place, Rank]) -> None:
        (tenant, _), (place, rank) = key, entry
        del self._entries[key]
        lines = self._lines(place)
        lines[place][tenant].remove(rank)
        if not lines[place][tenant]:
            del lines[place][tenant]
        if not lines[place]:
            del lines[place]
        if place.machine_id is not None and not lines:
            del self._on_machine[place.machine_id]
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._tenants.remove(self.turns.key(tenant))
            self.turns.end(tenant)
            self._by_priority.pop(tenant, None)

    def _lines(self, place: Place) -> dict[Place, Line]:
        if place.machine_id is None:
            return self._anywhere
        return self._on_machine.setdefault(place.machine_id, {})

    def charge(self, key: MeasurementKey) -> None:
        """Charge a turn to the tenant of this measurement, whose next request is being granted."""
        tenant, (_, rank) = key[0], self._entries[key]
        # If it is another tenant's turn, the request overtakes: ``max_overtakes`` and ``max_overtake_s`` limit that.
        if self._oldest is not None and self._oldest[0] == tenant:
            self._by_priority[tenant] = self._by_priority[tenant] + 1 if rank[1] > self._oldest[1][1] else 0
        self._tenants.remove(self.turns.key(tenant))
        self.turns.charge(tenant)
        self._tenants.add(self.turns.key(tenant))

    def places(self, machine_ids: Iterable[str]) -> list[Place]:
        """Return the places that measurements wait for: those without a machine, and those on these machines."""
        pinned = [place for machine_id in machine_ids for place in self._on_machine.get(machine_id, ())]
        return [*self._anywhere, *pinned]

    def next(self, places: Iterable[Place]) -> tuple[MeasurementKey, Place] | None:
        """Return the next measurement that waits for these places, with its place; None if none waits."""
        waiting = [(place, self._lines(place)[place]) for place in places]
        for _, _, tenant in self._tenants:
            lines = [(line[tenant], place) for place, line in waiting if tenant in line]
            if lines:
                oldest = min(((_oldest(line), place) for line, place in lines), key=lambda head: head[0][1])
                self._oldest = tenant, oldest[0]
                rank, place = min(((line.first, place) for line, place in lines), key=lambda head: head[0])
                if self._by_priority[tenant] >= PRIORITY_TURNS:
                    rank, place = oldest
                return (tenant, rank[-1]), place
        return None

    def line(self, places: Iterable[Place]) -> Iterator[MeasurementKey]:
        """Yield the first ``LOOK_AHEAD + 1`` measurements that wait for these places, in order of service."""
        lines = [self._lines(place)[place] for place in places]
        tenants: list[tuple[str, Iterator[Rank]]] = []
        for _, _, tenant in self._tenants:
            own = [line[tenant] for line in lines if tenant in line]
            if own:
                tenants.append((tenant, heapq.merge(*own)))
            if len(tenants) > LOOK_AHEAD:
                break
        return islice(self._in_turn(tenants), LOOK_AHEAD + 1)

    def _in_turn(self, tenants: list[tuple[str, Iterator[Rank]]]) -> Iterator[MeasurementKey]:
        turns = [(self.turns.start(tenant), *self.turns.key(tenant), ranks) for tenant, ranks in tenants]
        heapq.heapify(turns)
        later = count(max((turn[2] for turn in turns), default=0) + 1)
        while turns:
            start, _, _, tenant, ranks = heapq.heappop(turns)
            rank = next(ranks, None)
            if rank is not None:
                yield tenant, rank[-1]
                then = start + self.turns.step(tenant)
                heapq.heappush(turns, (then, then, next(later), tenant, ranks))


def _oldest(line: SortedSet[Rank]) -> Rank:
    """Return the rank with the earliest arrival in a line that is not empty, whatever its priority."""
    if line.first[0] == line.last[0]:
        return line.first
    heads = (line.first_from((priority,)) for priority in PRIORITIES)
    return min((head for head in heads if head is not None), key=lambda rank: rank[1])
