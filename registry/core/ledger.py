"""The records and their indices. Every change of a record goes through a method of ``Ledger``.

These methods check the transition table, update the indices and collect what the store has to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import takewhile
from typing import Final

from registry.core.commands import Effect
from registry.core.decision import Changes, Decision, Limits, Snapshot
from registry.core.fit import ANY_GPU_TYPE, SIZE_STEP_BYTES, Needs, Size, fitting, needs_of
from registry.core.indices import Queue, RequestIndex, SortedSet, WrapperIndex, is_free, is_usable
from registry.core.policy import Place, Turns, rank
from registry.core.positions import Positions
from registry.core.records import Lease, Machine, Measurement, MeasurementKey, Request, Wrapper, WrapperStatus
from registry.core.transitions import check_request_transition, check_wrapper_transition
from registry.errors import UnknownMachine, UnknownMeasurement, UnknownRequest
from registry.wire.words import RequestStatus

NAMES_SHOWN: Final = 20
"""Maximum number of machines listed in an error text."""


class Ledger:
    """Holds all records, and what has changed since ``take_decision`` was last called."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.machines: dict[str, Machine] = {}
        self.wrappers: dict[str, Wrapper] = {}
        self.measurements: dict[MeasurementKey, Measurement] = {}
        self.requests: dict[str, Request] = {}
        self.leases: dict[str, Lease] = {}

        self.by_wrapper = WrapperIndex()
        self.by_request = RequestIndex()
        self.queue = Queue(Turns(limits.tenant_weights))
        self.positions = Positions(self.queue.turns)
        self.deadlines: SortedSet[tuple[float, str]] = SortedSet()
        self.pins: SortedSet[tuple[float, MeasurementKey]] = SortedSet()
        """(UTC s, key): when the pin of a resumed measurement expires."""
        self.next_seq = 1
        self.shutting_down = False
        """True after ShutdownBegun: no request is accepted and no LLM is started any more."""
        self.touched: set[str] = set()
        """Machines on which, since the last dispatch, a wrapper became free or a pinned measurement began to wait."""

        self._served_on: dict[MeasurementKey, tuple[int, str, str]] = {}
        self._pinned_to: dict[str, set[MeasurementKey]] = {}
        self._displaced: set[MeasurementKey] = set()
        self._sizes: frozenset[Size] = frozenset()
        self._usable: frozenset[Size] = frozenset()
        self._forget_changes()

    # --- reading ----------------------------------------------------------------------------------------

    def request(self, request_id: str) -> Request:
        """Return the request with this id. Raises UnknownRequest."""
        try:
            return self.requests[request_id]
        except KeyError:
            raise UnknownRequest(request_id) from None

    def machine(self, machine_id: str) -> Machine:
        """Return the machine with this id. Raises UnknownMachine."""
        try:
            return self.machines[machine_id]
        except KeyError:
            raise UnknownMachine(machine_id, _which_there_are(sorted(self.machines))) from None

    def measurement(self, key: MeasurementKey) -> Measurement:
        """Return the measurement with this key. Raises UnknownMeasurement."""
        try:
            return self.measurements[key]
        except KeyError:
            raise UnknownMeasurement(key[1]) from None

    def head(self, key: MeasurementKey) -> Request | None:
        """Return the first request of a measurement that has not ended, None if all have."""
        unfinished = self.by_request.unfinished.get(key)
        return None if unfinished is None else self.requests[unfinished.first[1]]

    def gpu_type(self, machine_id: str) -> str | None:
        """Return the GPU type of a machine, None if it has no GPU or the type is not known."""
        machine = self.machines.get(machine_id)
        return None if machine is None else machine.gpu_type

    def is_draining(self, machine_id: str) -> bool:
        """True when a machine gets no new leases."""
        machine = self.machines.get(machine_id)
        return machine is not None and machine.draining

    def size(self, wrapper: Wrapper) -> Size:
        """Return a wrapper's GPUs and memory, as far as known."""
        machine = self.machines.get(wrapper.machine_id)
        if machine is None:
            return Size(wrapper.gpus)
        has_bytes = machine.gpu_memory_bytes if wrapper.gpus else machine.memory_bytes
        if has_bytes is None:
            return Size(wrapper.gpus, machine.gpu_type, draining=machine.draining)
        if not wrapper.gpus:
            has_bytes //= self._limits.wrappers_per_machine
        has_bytes = -(-has_bytes // SIZE_STEP_BYTES) * SIZE_STEP_BYTES
        return Size(wrapper.gpus, machine.gpu_type, has_bytes, machine.draining)

    def needs(self, request: Request) -> Needs:
        """Return what the LLM of a request needs, as far as known."""
        return needs_of(request.spec, request.memory, self._limits)

    def needs_together(self, key: MeasurementKey) -> Needs:
        """Return what a wrapper needs to run all unfinished requests of a measurement, one after another."""
        return reduce(Needs.joined_with, self.by_request.needs.get(key, ()), Needs())

    def on_machine(self, machine_id: str) -> list[Wrapper]:
        """Return the wrappers of a machine, sorted by id."""
        return [self.wrappers[wrapper_id] for wrapper_id in self.by_wrapper.on_machine.get(machine_id, ())]

    def served_on(self, key: MeasurementKey) -> str | None:
        """Return the machine of the measurement's latest request that was handed over, None if there is none."""
        served = self._served_on.get(key)
        return None if served is None else served[1]

    def last_served(self, key: MeasurementKey) -> Request | None:
        """Return the measurement's latest request that was handed over; None if there is none in memory."""
        served = self._served_on.get(key)
        return None if served is None else self.requests[served[2]]

    def pin_without(self, key: MeasurementKey) -> str | None:
        """Return the machine that a measurement stays pinned to after its latest grant failed, None if no machine.

        This is the machine that has served it since it began or was resumed.
        """
        served = self._served_on.get(key)
        this_time = served is not None and served[0] >= self.measurements[key].seq
        return served[1] if served is not None and this_time else None

    def place_of(self, measurement: Measurement, request: Request) -> Place:
        """Return the wrappers that may serve this request, the next of its measurement.

        * Without a pin: wrappers large enough for all unfinished requests of the measurement.
        * Pinned: its machine, as long as that is not draining and has a usable wrapper that is large enough.
        * Otherwise: wrappers of the GPU type asked for, or else of the machine's GPU type; if none of these is usable,
          the same as without a pin.
        """
        not_on = frozenset(request.failed_on)
        needs = self.needs_together(measurement.key)
        pin = measurement.machine_id
        anywhere = Place(fitting(self._sizes, needs, measurement.gpu_type or ANY_GPU_TYPE), not_on=not_on)
        if pin is None:
            return anywhere
        own = self.needs(request)
        usable = () if self.is_draining(pin) else filter(is_usable, self.on_machine(pin))
        if any(own.met_by(self.size(wrapper)) for wrapper in usable):
            return Place(fitting(self._sizes, own, ANY_GPU_TYPE), machine_id=pin, not_on=not_on)
        alike = Place(fitting(self._sizes, needs, measurement.gpu_type or self.gpu_type(pin)), not_on=not_on)
        return anywhere if alike.sizes.isdisjoint(self.by_wrapper.usable) else alike

    def allows(self, place: Place, wrapper: Wrapper) -> bool:
        """True when this wrapper belongs to that place."""
        return place.allows(wrapper, self.size(wrapper))

    def is_exhausted(self, request: Request) -> bool:
        """True when there are wrappers for a queued request and its LLM has failed on all of them."""
        place = self.place_of(self.measurements[request.measurement_key], request)
        anew = replace(place, not_on=frozenset())
        if place.machine_id is not None:
            fitting = sum(self.allows(anew, wrapper) for wrapper in self.on_machine(place.machine_id))
        else:
            fitting = sum(count for size, count in self.by_wrapper.present.items() if place.takes(size))
        failed = sum(
            self.allows(anew, wrapper)
            for wrapper_id in place.not_on
            if (wrapper := self.wrappers.get(wrapper_id)) is not None and wrapper.status is not WrapperStatus.LOST
        )
        return fitting > 0 and failed >= fitting

    # --- writing ----------------------------------------------------------------------------------------

    def load(self, snapshot: Snapshot, next_seq: int = 1) -> None:
        """Load the store's records into an empty ledger. ``next_seq``: lower bound of the next request's ``seq``."""
        self.next_seq = next_seq
        self.machines = {machine.machine_id: machine for machine in snapshot.machines}
        for measurement in snapshot.measurements:
            self._store_measurement(measurement)
        for request in snapshot.requests:
            self._store_request(request)
        for lease in snapshot.leases:
            self._store_lease(lease)
        for wrapper in snapshot.wrappers:
            self._store_wrapper(wrapper)
        self._sizes, self._usable = frozenset(self.by_wrapper.sizes), frozenset(self.by_wrapper.usable)
        for key in self.measurements:
            self._requeue(key)

    def recall(self, measurement: Measurement, requests: Iterable[Request]) -> None:
        """Load an ended measurement and ended requests of it back into memory. Those in memory stay unchanged."""
        if measurement.key not in self.measurements:
            self._store_measurement(measurement)
        for request in requests:
            if request.request_id not in self.requests:
                self._store_request(request)

    def drop_request(self, request_id: str) -> Request | None:
        """Drop an ended request from memory, not from the store. Return it, None if not in memory."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        key = request.measurement_key
        self.by_request.remove(request, self.needs(request), rank(self.measurements[key], request))
        if self._served_on.get(key, (0, "", ""))[2] == request_id:
            del self._served_on[key]
        return request

    def drop_measurement(self, key: MeasurementKey) -> None:
        """Drop a finished measurement and its requests from memory, not from the store."""
        for _, request_id in list(self.by_request.of.get(key, ())):
            self.drop_request(request_id)
        del self.measurements[key]

    def snapshot(self) -> Snapshot:
        """Return all records."""
        return Snapshot(
            machines=tuple(self.machines.values()),
            wrappers=tuple(self.wrappers.values()),
            measurements=tuple(self.measurements.values()),
            requests=tuple(self.requests.values()),
            leases=tuple(self.leases.values()),
        )

    def put_machine(self, machine: Machine) -> None:
        """Add or change a machine."""
        if self.machines.get(machine.machine_id) == machine:
            return
        wrappers = self.on_machine(machine.machine_id)
        for wrapper in wrappers:
            self._unindex_wrapper(wrapper)
        self.machines[machine.machine_id] = machine
        for wrapper in wrappers:
            self._store_wrapper(wrapper)
        self._requeue_if_sizes_changed()
        self._requeue_pinned(machine.machine_id)
        self._machines[machine.machine_id] = machine

    def put_wrapper(self, wrapper: Wrapper) -> None:
        """Add or change a wrapper. Raises InvariantBroken if the transition table forbids the change of status."""
        old = self.wrappers.get(wrapper.wrapper_id)
        if old == wrapper:
            return
        check_wrapper_transition(wrapper.wrapper_id, None if old is None else old.status, wrapper.status)
        if old is not None:
            self._unindex_wrapper(old)
        self._store_wrapper(wrapper)
        self._requeue_if_sizes_changed()
        if old is None or _standing(old) != _standing(wrapper):
            self._requeue_pinned(wrapper.machine_id)
        self._removed_wrappers.pop(wrapper.wrapper_id, None)
        self._wrappers[wrapper.wrapper_id] = wrapper

    def remove_wrapper(self, wrapper: Wrapper) -> None:
        """Remove a wrapper."""
        self._unindex_wrapper(wrapper)
        del self.wrappers[wrapper.wrapper_id]
        self._requeue_if_sizes_changed()
        self._requeue_pinned(wrapper.machine_id)
        self._wrappers.pop(wrapper.wrapper_id, None)
        self._removed_wrappers[wrapper.wrapper_id] = None

    def put_measurement(self, measurement: Measurement) -> None:
        """Add or change a measurement. Its priority and seq may change only while all its requests have ended."""
        old = self.measurements.get(measurement.key)
        if old == measurement:
            return
        if old is not None and old.machine_id is not None:
            pinned = self._pinned_to[old.machine_id]
            pinned.remove(measurement.key)
            if not pinned:
                del self._pinned_to[old.machine_id]
        if old is not None and old.pinned_until_s is not None:
            self.pins.remove((old.pinned_until_s, old.key))
        self._store_measurement(measurement)
        self._requeue(measurement.key)
        self._measurements[measurement.key] = measurement

    def put_request(self, request: Request) -> None:
        """Add or change a request. Raises InvariantBroken if the transition table forbids the change of status."""
        old = self.requests.get(request.request_id)
        if old == request:
            return
        check_request_transition(request.request_id, None if old is None else old.status, request.status)
        if old is not None:
            measurement = self.measurements[old.measurement_key]
            self.by_request.remove(old, self.needs(old), rank(measurement, old))
        self._store_request(request)
        self._requeue(request.measurement_key)
        self._requests[request.request_id] = request

    def count_overtaken(self, request: Request) -> None:
        """Count that a queued request was overtaken once more. Its index entries stay the same."""
        request = replace(request, overtaken=request.overtaken + 1)
        self.requests[request.request_id] = self._requests[request.request_id] = request

    def put_lease(self, lease: Lease) -> None:
        """Add or change a lease."""
        old = self.leases.get(lease.request_id)
        if old == lease:
            return
        if old is not None:
            self.deadlines.remove((old.ends_s, old.request_id))
        self._store_lease(lease)
        self._ended_leases.pop(lease.request_id, None)
        self._leases[lease.request_id] = lease

    def end_lease(self, lease: Lease) -> None:
        """Remove a lease."""
        self.deadlines.remove((lease.ends_s, lease.request_id))
        del self.leases[lease.request_id]
        self._leases.pop(lease.request_id, None)
        self._ended_leases[lease.request_id] = None

    def leases_due(self, now_s: float) -> tuple[Lease, ...]:
        """Return the leases that are over at ``now_s``, earliest end first. O(their number)."""
        due = takewhile(lambda entry: entry[0] <= now_s, self.deadlines)
        return tuple(self.leases[request_id] for _, request_id in due)

    def emit(self, effect: Effect) -> None:
        """Add an effect, which is run after the changes are stored."""
        self._effects.append(effect)

    def take_decision(self) -> Decision:
        """Return the changes and effects since the last call, and forget them."""
        changes = Changes(
            machines=tuple(self._machines.values()),
            wrappers=tuple(self._wrappers.values()),
            measurements=tuple(self._measurements.values()),
            requests=tuple(self._requests.values()),
            leases=tuple(self._leases.values()),
            ended_leases=tuple(self._ended_leases),
            removed_wrappers=tuple(self._removed_wrappers),
        )
        decision = Decision(changes, tuple(self._effects))
        self._forget_changes()
        return decision

    # --- inside -----------------------------------------------------------------------------------------

    def _forget_changes(self) -> None:
        self._machines: dict[str, Machine] = {}
        self._wrappers: dict[str, Wrapper] = {}
        self._measurements: dict[MeasurementKey, Measurement] = {}
        self._requests: dict[str, Request] = {}
        self._leases: dict[str, Lease] = {}
        self._ended_leases: dict[str, None] = {}
        self._removed_wrappers: dict[str, None] = {}
        self._effects: list[Effect] = []

    def _store_wrapper(self, wrapper: Wrapper) -> None:
        self.wrappers[wrapper.wrapper_id] = wrapper
        self.by_wrapper.add(wrapper, self.size(wrapper))
        if is_free(wrapper):
            self.touched.add(wrapper.machine_id)

    def _unindex_wrapper(self, wrapper: Wrapper) -> None:
        self.by_wrapper.remove(wrapper, self.size(wrapper))

    def _store_measurement(self, measurement: Measurement) -> None:
        self.measurements[measurement.key] = measurement
        if measurement.machine_id is not None:
            self._pinned_to.setdefault(measurement.machine_id, set()).add(measurement.key)
        if measurement.pinned_until_s is not None:
            self.pins.add((measurement.pinned_until_s, measurement.key))

    def _store_request(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.next_seq = max(self.next_seq, request.seq + 1)
        measurement = self.measurements[request.measurement_key]
        self.by_request.add(request, self.needs(request), rank(measurement, request))
        if request.deployed_s is not None and request.machine_id is not None:
            served = request.seq, request.machine_id, request.request_id
            self._served_on[request.measurement_key] = max(served, self._served_on.get(request.measurement_key, served))

    def _store_lease(self, lease: Lease) -> None:
        self.leases[lease.request_id] = lease
        self.deadlines.add((lease.ends_s, lease.request_id))

    def _requeue(self, key: MeasurementKey) -> None:
        """Queue the measurement at its place if its next request is queued, else remove the measurement."""
        measurement = self.measurements[key]
        head = self.head(key)
        self._displaced.discard(key)
        if head is None or head.status is not RequestStatus.QUEUED:
            self.queue.put(key, None)
            self._count_queued(key[0])
            return
        place = self.place_of(measurement, head)
        self.queue.put(key, (place, rank(measurement, head)))
        self._count_queued(key[0])
        if place.machine_id is not None:
            self.touched.add(place.machine_id)
        elif measurement.machine_id is not None:
            self._displaced.add(key)

    def _count_queued(self, tenant: str) -> None:
        self.positions.put(tenant, len(self.by_request.queued.get(tenant, ())))

    def _requeue_if_sizes_changed(self) -> None:
        """Compute all places again if the set of wrapper sizes has changed, since places consist of sizes.

        O(waiting measurements), but rare: there are few kinds of hardware, and the sizes of lost wrappers are kept.
        """
        if self.by_wrapper.sizes.keys() != self._sizes:
            self._sizes = frozenset(self.by_wrapper.sizes)
            for key in self.queue.contents():
                self._requeue(key)

    def _requeue_pinned(self, machine_id: str) -> None:
        """Compute the places of pinned measurements again after a change of this machine's wrappers.

        A measurement whose machine can't be used may use others. Its place is computed again only if the set of usable
        sizes has changed, so the loss of n machines costs O(n), not O(n²).
        """
        keys = self._pinned_to.get(machine_id, set())
        if self.by_wrapper.usable.keys() != self._usable:
            self._usable = frozenset(self.by_wrapper.usable)
            keys = keys | self._displaced
        for key in list(keys):
            self._requeue(key)


def _which_there_are(names: Sequence[str]) -> str:
    shown, more = ", ".join(names[:NAMES_SHOWN]), len(names) - NAMES_SHOWN
    if not shown:
        return "none has joined yet"
    return f"there are {shown} and {more} more" if more > 0 else f"there are {shown}"


def _standing(wrapper: Wrapper) -> tuple[bool, int]:
    return is_usable(wrapper), wrapper.gpus
