"""The allocator: turns an event into changed records and effects. Pure; the registry's service owns the only instance.

All decisions are made by ``handle``. It validates an event before the first change, so an event that raises has changed
nothing. Outdated reports (older epoch, unexpected status, removed wrapper) are ignored without an error.

Every command to a wrapper carries an epoch and supersedes all older ones. At the wrapper, StopLLM ends the bound lease,
and so does a DeployLLM for anything but that lease. A new wrapper process has no lease.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

from registry.core.decision import Decision, Limits, Snapshot
from registry.core.dispatch import Dispatcher
from registry.core.endings import Endings
from registry.core.events import (
    Event,
    LeaseBound,
    LeaseFlagged,
    LeaseLapsed,
    LeaseReleased,
    LeaseRequested,
    LeaseUsed,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMStopped,
    MachineDrained,
    MachineJoined,
    MachineLost,
    MachineUndrained,
    NewRequest,
    ShutdownBegun,
    TimePassed,
    WrapperAdded,
    WrapperFailed,
    WrapperRemoved,
    WrapperStarted,
    WrapperSwitchedOff,
)
from registry.core.fit import ANY_GPU_TYPE, Size, is_gpu_type, needs_of, why_too_large
from registry.core.indices import is_usable
from registry.core.invariants import check_ledger
from registry.core.ledger import Ledger, stop
from registry.core.pins import Pins
from registry.core.policy import rank
from registry.core.provenance import unlike
from registry.core.records import Lease, Machine, Measurement, MeasurementKey, Request, Wrapper, WrapperStatus
from registry.core.transitions import InvariantBroken
from registry.core.wrapper_events import Reports
from registry.errors import InvalidField, LLMNeverFits, QueueFull, ShuttingDown
from registry.wire.words import Priority, RequestStatus

__all__ = ["Allocator", "InvariantBroken"]


_DEPARTURES = 32
"""Number of latest departures from the queue that the waiting time is estimated from."""


class Allocator:
    """Holds and changes the registry's state. ``new_token`` makes unguessable lease tokens."""

    def __init__(self, limits: Limits, new_token: Callable[[], str]) -> None:
        self._limits = limits
        self._new_token = new_token
        self.load(Snapshot())

    def load(self, snapshot: Snapshot, next_seq: int = 1) -> None:
        """Replace all state by that of the store. Causes no effects; the next event may.

        ``next_seq``: number of the next request, above those of all requests that only the store has. The tenants'
        turns are not stored and start from zero.
        """
        self._ledger = Ledger(self._limits)
        self._ledger.load(snapshot, next_seq)
        self._endings = Endings(self._ledger, self._limits)
        self._pins = Pins(self._ledger, self._limits)
        self._dispatcher = Dispatcher(self._ledger, self._limits, self._new_token)
        self._reports = Reports(self._ledger, self._limits, self._endings, self._dispatcher)
        self._settled = False
        self._departures_s: deque[float] = deque(maxlen=_DEPARTURES)

    def snapshot(self) -> Snapshot:
        """Return all records, in the form that ``load`` takes."""
        return self._ledger.snapshot()

    def recall(self, measurement: Measurement, requests: Sequence[Request]) -> None:
        """Load an ended measurement and ended requests of it back into memory. Those in memory stay unchanged."""
        self._ledger.recall(measurement, requests)

    def drop_request(self, request_id: str) -> Request | None:
        """Drop an ended request from memory, not from the store. Return it, or None if not in memory. Idempotent."""
        return self._ledger.drop_request(request_id)

    def drop_measurement(self, key: MeasurementKey) -> None:
        """Drop a finished measurement and its requests from memory, not from the store."""
        self._ledger.drop_measurement(key)

    def knows(self, key: MeasurementKey) -> bool:
        """True when a measurement is in memory."""
        return key in self._ledger.measurements

    def is_over(self, key: MeasurementKey) -> bool:
        """True when a measurement is in memory and all its requests have ended. O(1)."""
        return key in self._ledger.measurements and self._ledger.head(key) is None

    def handle(self, event: Event, now_s: float) -> Decision:
        """Return the changes and effects of an event at ``now_s`` (UTC seconds).

        Raises:
            QueueFull, LLMNeverFits, InvalidField, ShuttingDown: a LeaseRequested is refused; nothing has changed.
            UnknownRequest: a LeaseReleased, LeaseLapsed, LeaseUsed or LeaseFlagged has an unknown id; nothing changed.
            UnknownMachine: a MachineDrained or MachineUndrained has an unknown id; nothing has changed.
            InvariantBroken: a bug; the allocator must not be used any more.
        """
        reports, queued = self._reports, self.queued_count()
        match event:
            case LeaseRequested():
                self._on_requested(event, now_s)
            case LeaseReleased(request_id):
                self._on_released(self._ledger.request(request_id), now_s)
            case LeaseLapsed(request_id):
                self._on_lapsed(self._ledger.request(request_id), now_s)
            case LeaseUsed(request_id, at_s):
                self._on_used(self._ledger.request(request_id), min(at_s, now_s))
            case LeaseBound():
                reports.on_lease_bound(event, now_s)
            case LeaseFlagged(request_id, flags):
                reports.on_lease_flagged(self._ledger.request(request_id), flags)
            case LLMDeployed(wrapper_id, epoch):
                reports.on_llm_deployed(wrapper_id, epoch, now_s)
            case LLMDeployFailed():
                reports.on_llm_deploy_failed(event, now_s)
            case LLMStopped(wrapper_id, epoch):
                reports.on_llm_stopped(wrapper_id, epoch)
            case LLMDied():
                reports.on_llm_died(event, now_s)
            case WrapperAdded():
                reports.on_wrapper_added(event, now_s)
            case WrapperStarted():
                reports.on_wrapper_started(event, now_s)
            case WrapperFailed():
                reports.on_wrapper_failed(event, now_s)
            case WrapperRemoved():
                reports.on_wrapper_removed(event, now_s)
            case WrapperSwitchedOff():
                reports.on_wrapper_switched_off(event)
            case MachineJoined(machine):
                reports.on_machine_joined(machine)
            case MachineLost():
                reports.on_machine_lost(event, now_s)
            case MachineDrained(machine_id):
                reports.on_machine_drained(self._ledger.machine(machine_id), now_s)
            case MachineUndrained(machine_id):
                reports.on_machine_undrained(self._ledger.machine(machine_id))
            case TimePassed(asked):
                self._on_time_passed(asked, now_s)
            case ShutdownBegun():  # pragma: no branch - there are no other events
                self._on_shutdown_begun(now_s)
        if not reports.shutting_down:
            self._dispatcher.run(now_s)
            reports.preload_homes()
        self._settled = True
        self._departures_s.extend([now_s] * (queued - self.queued_count()))
        return self._ledger.take_decision()

    def check(self) -> None:
        """Check all invariants, in O(n log n): for tests. Raises InvariantBroken if one does not hold."""
        check_ledger(self._ledger, self._limits, serving=self._settled and not self._reports.shutting_down)

    def next_deadline_s(self) -> float | None:
        """Return when the next lease or pin ends and TimePassed is due, UTC seconds; None if there is none."""
        return min((timed.first[0] for timed in (self._ledger.deadlines, self._ledger.pins) if timed), default=None)

    def leases_due(self, now_s: float) -> tuple[Lease, ...]:
        """Return the leases that are over at ``now_s``, earliest end first. O(their number)."""
        due = takewhile(lambda entry: entry[0] <= now_s, self._ledger.deadlines)
        return tuple(self._ledger.leases[request_id] for _, request_id in due)

    def pins_due(self, now_s: float) -> tuple[MeasurementKey, ...]:
        """Return the measurements whose pin to their previous machine is over at ``now_s``. O(their number)."""
        return self._pins.due(now_s)

    # --- reading ----------------------------------------------------------------------------------------

    def request(self, request_id: str) -> Request:
        """Return the request with this id. Raises UnknownRequest."""
        return self._ledger.request(request_id)

    def measurement(self, key: MeasurementKey) -> Measurement:
        """Return the measurement with this key. Raises UnknownMeasurement."""
        return self._ledger.measurement(key)

    def head(self, key: MeasurementKey) -> Request | None:
        """Return the first request of a measurement that has not ended, None if all have. O(1)."""
        return self._ledger.head(key)

    def lease_of(self, request_id: str) -> Lease | None:
        """Return the lease of a request, None if it has none."""
        return self._ledger.leases.get(request_id)

    def lease_by_wrapper(self, wrapper_id: str) -> Lease | None:
        """Return the lease on a wrapper, None if there is none."""
        wrapper = self._ledger.wrappers.get(wrapper_id)
        return None if wrapper is None or wrapper.request_id is None else self._ledger.leases.get(wrapper.request_id)

    def wrapper(self, wrapper_id: str) -> Wrapper | None:
        """Return the wrapper with this id, None if unknown. O(1)."""
        return self._ledger.wrappers.get(wrapper_id)

    def wrappers(self) -> tuple[Wrapper, ...]:
        """Return all wrappers."""
        return tuple(self._ledger.wrappers.values())

    def machine(self, machine_id: str) -> Machine | None:
        """Return the machine with this id, None if unknown. O(1)."""
        return self._ledger.machines.get(machine_id)

    def known_machine(self, machine_id: str) -> Machine:
        """Return the machine with this id. Raises UnknownMachine, which lists the known ones."""
        return self._ledger.machine(machine_id)

    def machines(self) -> tuple[Machine, ...]:
        """Return all machines, including lost ones."""
        return tuple(self._ledger.machines.values())

    def wrappers_on(self, machine_id: str) -> tuple[Wrapper, ...]:
        """Return the wrappers of a machine, sorted by id."""
        return tuple(self._ledger.on_machine(machine_id))

    def count_wrappers(self, statuses: Iterable[WrapperStatus]) -> int:
        """Return how many wrappers are in one of these statuses. O(statuses)."""
        return sum(self._ledger.by_wrapper.statuses[status] for status in statuses)

    def deploying_count(self) -> int:
        """Return how many requests have a wrapper but no lease yet. O(1)."""
        return self._ledger.by_wrapper.held - len(self._ledger.leases)

    def queued_count(self) -> int:
        """Return how many requests are queued."""
        return self._ledger.by_request.queued_count

    def queue_position(self, request_id: str) -> int | None:
        """Return the place of a request in the queue, from 1; None if it is not queued. O(log n).

        Assumes that every tenant keeps requests queued and every wrapper fits every request. Requests whose LLM is
        already running, pins and sizes can change the order.
        """
        request = self._ledger.requests.get(request_id)
        if request is None or request.status is not RequestStatus.QUEUED:
            return None
        measurement = self._ledger.measurements[request.measurement_key]
        queued = self._ledger.by_request.queued[request.tenant]
        index = queued.index((rank(measurement, request), request.seq, request_id))
        return self._ledger.positions.before(request.tenant, index) + 1

    def misfit(self, request_id: str) -> str | None:
        """Return why no known wrapper can serve a queued request; None if one can, or if none is known.

        This happens if it was accepted before any wrapper was known, or its machine left. Raises UnknownRequest.
        """
        request = self._ledger.request(request_id)
        measurement = self._ledger.measurements[request.measurement_key]
        sizes, needs = self._sizes_for(measurement), self._ledger.needs(request)
        if not sizes:
            return self._no_such_type(measurement) if self._ledger.by_wrapper.present else None
        if not any(needs.met_by(size) for size in sizes):
            return why_too_large(request.spec, request.memory, sizes, self._limits)
        together = self._ledger.needs_together(measurement.key)
        if measurement.machine_id is None and not any(together.met_by(size) for size in sizes):
            return _not_together(measurement.measurement_id)
        return None

    def fits_only_drained(self, request_id: str) -> tuple[str, ...]:
        """Return the drained machines that a queued request fits on; () if it fits on others. Raises UnknownRequest."""
        ledger, request = self._ledger, self._ledger.request(request_id)
        asked = ledger.measurements[request.measurement_key].gpu_type or ANY_GPU_TYPE
        needs = ledger.needs_together(request.measurement_key)
        present = ledger.by_wrapper.present
        suitable = {size for size in present if needs.met_by(size) and is_gpu_type(asked, size.gpu_type)}
        if not all(size.draining for size in suitable):
            return ()
        there = (w for w in ledger.wrappers.values() if w.status is not WrapperStatus.LOST)
        return tuple(sorted({w.machine_id for w in there if ledger.size(w) in suitable}))

    # --- what clients and the clock do ------------------------------------------------------------------

    def _on_requested(self, event: LeaseRequested, now_s: float) -> None:
        ledger = self._ledger
        if self._reports.shutting_down:
            raise ShuttingDown
        old = ledger.measurements.get(event.measurement_key)
        live = old is not None and ledger.head(event.measurement_key) is not None
        if event.like_request_id is not None:
            event = self._made_like(event, event.like_request_id, live=live)
        measurement = Measurement(
            event.measurement_id,
            seq=ledger.next_seq,
            tenant=event.tenant,
            priority=event.priority or Priority.NORMAL,
            created_s=now_s,
            gpu_type=event.gpu_type,
        )
        if old is not None and live:
            _check_same_type(old, event.gpu_type)
            _check_same_priority(old, event.priority)
            measurement = self._pins.kept(old, event.requests)
        elif old is not None:
            measurement = replace(measurement, flags=old.flags, created_s=old.created_s)
            measurement = self._pins.begin(measurement, event.requests, now_s)

        self._check_room(measurement.tenant, len(event.requests), now_s)
        for new in event.requests:
            if new.request_id in ledger.requests:
                raise InvariantBroken(f"request {new.request_id} was made before")
        self._check_fits(event.requests, measurement)

        ledger.put_measurement(measurement)
        for new in event.requests:
            ledger.put_request(
                Request(
                    new.request_id,
                    event.measurement_id,
                    ledger.next_seq,
                    new.spec,
                    new.llmconfig,
                    notes=new.notes,
                    created_s=now_s,
                    memory=new.memory,
                    max_j=new.max_j,
                    max_g=new.max_g,
                    grade=event.grade,
                    like_request_id=event.like_request_id,
                    tenant=event.tenant,
                )
            )

    def _made_like(self, event: LeaseRequested, request_id: str, *, live: bool) -> LeaseRequested:
        """Return the event with the revision and GPU type of an earlier request filled in.

        ``live``: the measurement is running, so its GPU type is fixed already.

        Raises:
            InvalidField: the earlier request is unknown or was never handed over, or the event differs from it.
        """
        model = self._ledger.requests.get(request_id)
        if model is None:
            raise InvalidField("like", f"no request has the id {request_id!r}, or nothing is kept of it any more")
        if model.provenance is None:
            raise InvalidField("like", f"nothing is known of what request {request_id} was handed over with")
        gpu_type = None if model.machine_id is None else self._ledger.gpu_type(model.machine_id)
        differences = unlike(model, gpu_type, event)
        if differences:
            raise InvalidField("like", f"not as request {request_id}: {'; '.join(differences)}")
        specs = (replace(new.spec, revision=model.model_revision or new.spec.revision) for new in event.requests)
        requests = tuple(replace(new, spec=spec) for new, spec in zip(event.requests, specs, strict=True))
        return replace(event, requests=requests, gpu_type=event.gpu_type or (None if live else gpu_type))

    def _check_room(self, tenant: str, count: int, now_s: float) -> None:
        limits, queued = self._limits, self._ledger.by_request.queued
        most = min(limits.max_queued, limits.max_queued_per_tenant)
        if count > most:
            raise InvalidField("llms", f"{count} LLMs are more than may ever wait here ({most}); send several requests")
        if self.queued_count() + count > limits.max_queued:
            raise QueueFull("this registry", limits.max_queued, self._next_departure_s(now_s))
        if len(queued.get(tenant, ())) + count > limits.max_queued_per_tenant:
            # Tenants take turns, so the next departure is seldom this tenant's.
            own_s = self._next_departure_s(now_s)
            raise QueueFull(
                f"tenant {tenant!r}", limits.max_queued_per_tenant, None if own_s is None else own_s * len(queued)
            )

    def _next_departure_s(self, now_s: float) -> float | None:
        """Estimate the seconds until the next request leaves the queue; None before two have left."""
        left_s = self._departures_s
        if len(left_s) < 2:
            return None
        return (max(now_s, left_s[-1]) - left_s[0]) / (len(left_s) - 1)

    def _check_fits(self, requests: Sequence[NewRequest], measurement: Measurement) -> None:
        """Refuse an LLM that no known wrapper can run. While no wrapper is known, every LLM is accepted."""
        ledger, limits, named = self._ledger, self._limits, measurement.measurement_id
        sizes = self._sizes_for(measurement)
        if ledger.by_wrapper.present and not sizes:
            raise InvalidField("gpuType", self._no_such_type(measurement))
        pin = measurement.machine_id
        on_pin = []
        if pin is not None and not ledger.is_draining(pin):
            on_pin = [ledger.size(w) for w in ledger.on_machine(pin) if is_usable(w)]
        together = ledger.needs_together(measurement.key)
        for n, new in enumerate(requests):
            field, model = f"llms[{n}].model", new.spec.model
            needs = needs_of(new.spec, new.memory, limits)
            together = together.joined_with(needs)
            if sizes and not any(needs.met_by(size) for size in sizes):
                raise LLMNeverFits(field, model, why_too_large(new.spec, new.memory, sizes, limits))
            if on_pin and not any(needs.met_by(size) for size in on_pin):
                why = why_too_large(new.spec, new.memory, on_pin, limits)
                bound = f"measurement {named} is bound to machine {pin}; use another measurementId"
                raise LLMNeverFits(field, model, f"{why}; {bound}")
            if sizes and not on_pin and not any(together.met_by(size) for size in sizes):
                raise LLMNeverFits(field, model, f"{_not_together(named)}; use another measurementId")

    def _sizes_for(self, measurement: Measurement) -> list[Size]:
        """Return the sizes of the wrappers with a measurement's GPU type, except LOST ones."""
        asked = measurement.gpu_type or ANY_GPU_TYPE
        return [size for size in self._ledger.by_wrapper.present if is_gpu_type(asked, size.gpu_type)]

    def _no_such_type(self, measurement: Measurement) -> str:
        types = sorted({size.gpu_type for size in self._ledger.by_wrapper.present if size.gpu_type is not None})
        there = f"there are {', '.join(types)}" if types else "none has a GPU whose type is known"
        return f"no machine here has {measurement.gpu_type!r}; {there}"

    def _on_released(self, request: Request, now_s: float) -> None:
        if request.status.ended:
            return
        was_served = request.deployed_s is not None
        status = RequestStatus.RELEASED if was_served else RequestStatus.CANCELLED
        self._endings.end(request, status, "released", None, now_s)

    def _on_used(self, request: Request, at_s: float) -> None:
        lease = self._ledger.leases.get(request.request_id)
        if lease is not None:
            self._ledger.put_lease(replace(lease, last_active_s=max(lease.last_active_s, at_s)))

    def _on_lapsed(self, request: Request, now_s: float) -> None:
        if request.status is RequestStatus.DEPLOYED:
            reason = "its wrapper ended it: its time was over, or it was not used"
            self._endings.end(request, RequestStatus.EXPIRED, "expired", reason, now_s)

    def _on_time_passed(self, asked: tuple[str, ...] | None, now_s: float) -> None:
        self._pins.end(now_s)
        for lease in self.leases_due(now_s):
            if lease.deadline_s <= now_s:
                reason = "its lease reached its deadline"
            elif asked is None or lease.request_id in asked:
                reason = f"it was not used for {lease.idle_limit_s:g} s"
            else:
                continue
            request = self._ledger.requests[lease.request_id]
            self._endings.end(request, RequestStatus.EXPIRED, "expired", reason, now_s)

    def _on_shutdown_begun(self, now_s: float) -> None:
        ledger, reason = self._ledger, "the registry was shut down"
        self._reports.shutting_down = True
        for wrapper_id in list(ledger.wrappers):
            wrapper = ledger.wrappers[wrapper_id]
            request = None if wrapper.request_id is None else ledger.requests[wrapper.request_id]
            if wrapper.status is WrapperStatus.DEPLOYING:
                stop(ledger, replace(wrapper, request_id=None))  # also ends a lease that waits for its LLM
            if request is not None and request.deployed_s is not None:
                self._endings.end(request, RequestStatus.EXPIRED, "shutdown", reason, now_s)
            elif request is not None:
                self._endings.requeue(request, reason, "shutdown", now_s)
            wrapper = ledger.wrappers[wrapper_id]
            if wrapper.status is WrapperStatus.READY:
                stop(ledger, wrapper)


def _not_together(measurement_id: int) -> str:
    return f"no machine can run it and the others of measurement {measurement_id} as well"


def _check_same_type(measurement: Measurement, gpu_type: str | None) -> None:
    """Refuse a GPU type that differs from the measurement's: all its LLMs run on one machine."""
    same = is_gpu_type(gpu_type, measurement.gpu_type) or is_gpu_type(measurement.gpu_type, gpu_type)
    if gpu_type is not None and not same:
        begun = f"with {measurement.gpu_type!r}" if measurement.gpu_type is not None else "without one"
        raise InvalidField(
            "gpuType",
            f"measurement {measurement.measurement_id} was begun {begun}, and its LLMs run on one machine;"
            " leave it out, or use another measurementId",
        )


def _check_same_priority(measurement: Measurement, priority: Priority | None) -> None:
    """Refuse a priority that differs from the measurement's: all its LLMs share one place in the queue."""
    if priority not in (None, measurement.priority):
        raise InvalidField(
            "priority",
            f"measurement {measurement.measurement_id} was begun with {measurement.priority.value!r}; leave it out, or"
            " use another measurementId",
        )
