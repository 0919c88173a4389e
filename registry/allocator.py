"""The allocator: an event in, changed records and effects out. Pure; the registry's service owns the only one.

``handle`` is the only way to change anything. Whatever can be wrong with an event is found before the first change,
so an event that raises has changed nothing. Reports of wrappers that are out of date (an older epoch, another status,
a wrapper that is gone) are no errors: they change nothing.

Every command to a wrapper carries an epoch and supersedes all older ones. At the wrapper a StopLLM, and a DeployLLM
that is not for the lease which is bound there, end that lease; a wrapper whose process is new knows of none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

from registry.dispatch import Dispatcher
from registry.endings import Endings
from registry.errors import LLMNeverFits, QueueFull, ShuttingDown
from registry.indices import is_usable
from registry.invariants import check_ledger
from registry.ledger import Ledger, stop
from registry.policy import rank
from registry.reports import Reports
from registry.state import (
    Decision,
    Event,
    Lease,
    LeaseBound,
    LeaseReleased,
    LeaseRequested,
    LeaseUsed,
    Limits,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMSpec,
    LLMStopped,
    Machine,
    MachineJoined,
    MachineLost,
    Measurement,
    Request,
    RequestStatus,
    ShutdownBegun,
    Snapshot,
    TimePassed,
    Wrapper,
    WrapperAdded,
    WrapperFailed,
    WrapperRemoved,
    WrapperStarted,
    WrapperStatus,
)
from registry.transitions import InvariantBroken

__all__ = ["Allocator", "InvariantBroken"]


class Allocator:
    """The state of the registry and the only one who changes it. ``new_token`` makes unguessable lease tokens."""

    def __init__(self, limits: Limits, new_token: Callable[[], str]) -> None:
        self._limits = limits
        self._new_token = new_token
        self.load(Snapshot())

    def load(self, snapshot: Snapshot) -> None:
        """Take over what the store knew, in place of everything. Has no effects by itself; the next event may.

        Turns of tenants are not stored: they start anew.
        """
        self._ledger = Ledger(self._limits)
        self._ledger.load(snapshot)
        self._endings = Endings(self._ledger, self._limits)
        self._dispatcher = Dispatcher(self._ledger, self._limits, self._new_token)
        self._reports = Reports(self._ledger, self._limits, self._endings, self._dispatcher)
        self._settled = False

    def snapshot(self) -> Snapshot:
        """Everything that is known, as ``load`` takes it."""
        return self._ledger.snapshot()

    def handle(self, event: Event, now_s: float) -> Decision:
        """Decide what an event at ``now_s`` (UTC seconds) changes and brings about.

        Raises:
            QueueFull, LLMNeverFits, ShuttingDown: a LeaseRequested that is refused; nothing has changed.
            UnknownRequest: LeaseReleased or LeaseUsed of an id that was never seen; nothing has changed.
            InvariantBroken: the program is at fault; the allocator must not be used any more.
        """
        reports = self._reports
        match event:
            case LeaseRequested():
                self._on_requested(event, now_s)
            case LeaseReleased(request_id):
                self._on_released(self._ledger.request(request_id), now_s)
            case LeaseUsed(request_id, at_s):
                self._on_used(self._ledger.request(request_id), min(at_s, now_s))
            case LeaseBound(wrapper_id, epoch):
                reports.on_lease_bound(wrapper_id, epoch, now_s)
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
            case MachineJoined(machine):
                self._ledger.put_machine(machine)
            case MachineLost():
                reports.on_machine_lost(event, now_s)
            case TimePassed(asked):
                self._on_time_passed(asked, now_s)
            case ShutdownBegun():  # pragma: no branch - there are no other events
                self._on_shutdown_begun(now_s)
        if not reports.shutting_down:
            self._dispatcher.run(now_s)
            reports.preload_homes()
        self._settled = True
        return self._ledger.take_decision()

    def check(self) -> None:
        """Raise InvariantBroken unless every rule that the registry promises holds. Costs O(n log n): for tests."""
        check_ledger(self._ledger, self._limits, serving=self._settled and not self._reports.shutting_down)

    def next_deadline_s(self) -> float | None:
        """When the next TimePassed is due, UTC seconds: the end of a lease. None when nothing is timed."""
        return self._ledger.deadlines.first[0] if self._ledger.deadlines else None

    def leases_due(self, now_s: float) -> tuple[Lease, ...]:
        """The leases that the next TimePassed ends if they are not used before, the oldest first. O(their number)."""
        due = takewhile(lambda entry: entry[0] <= now_s, self._ledger.deadlines)
        return tuple(self._ledger.leases[request_id] for _, request_id in due)

    # --- reading ----------------------------------------------------------------------------------------

    def request(self, request_id: str) -> Request:
        """The request with this id. Raises UnknownRequest."""
        return self._ledger.request(request_id)

    def measurement(self, measurement_id: int) -> Measurement:
        """The measurement with this id. Raises UnknownMeasurement."""
        return self._ledger.measurement(measurement_id)

    def requests_of(self, measurement_id: int) -> tuple[Request, ...]:
        """All requests of a measurement, ended ones too, in order of arrival. Raises UnknownMeasurement."""
        self._ledger.measurement(measurement_id)
        ids = self._ledger.by_request.of.get(measurement_id, ())
        return tuple(self._ledger.requests[request_id] for _, request_id in ids)

    def lease_of(self, request_id: str) -> Lease | None:
        """The lease of a request, None when it has none."""
        return self._ledger.leases.get(request_id)

    def lease_by_wrapper(self, wrapper_id: str) -> Lease | None:
        """The lease on a wrapper, None when there is none."""
        wrapper = self._ledger.wrappers.get(wrapper_id)
        return None if wrapper is None or wrapper.request_id is None else self._ledger.leases.get(wrapper.request_id)

    def wrapper(self, wrapper_id: str) -> Wrapper | None:
        """The wrapper with this id, None when there is none. O(1)."""
        return self._ledger.wrappers.get(wrapper_id)

    def wrappers(self) -> tuple[Wrapper, ...]:
        """All wrappers."""
        return tuple(self._ledger.wrappers.values())

    def machine(self, machine_id: str) -> Machine | None:
        """The machine with this id, None when there is none. O(1)."""
        return self._ledger.machines.get(machine_id)

    def machines(self) -> tuple[Machine, ...]:
        """All machines, lost ones too."""
        return tuple(self._ledger.machines.values())

    def queued_count(self) -> int:
        """How many requests are queued."""
        return self._ledger.by_request.queued_count

    def queue_position(self, request_id: str) -> int | None:
        """How many requests are served until this one is, itself included; None when it is not queued. O(tenants).

        Assumes that all tenants go on asking and that every wrapper suits everyone; warm matches, pins and sizes
        can change the order.
        """
        request = self._ledger.requests.get(request_id)
        if request is None or request.status is not RequestStatus.QUEUED:
            return None
        measurement = self._ledger.measurements[request.measurement_id]
        queued = self._ledger.by_request.queued
        before = queued[measurement.tenant].index((rank(measurement), request.seq, request_id))
        turns = self._ledger.queue.turns
        others = sum(
            min(len(theirs), turns.served_before(measurement.tenant, other, before))
            for other, theirs in queued.items()
            if other != measurement.tenant
        )
        return before + others + 1

    # --- what clients and the clock do ------------------------------------------------------------------

    def _on_requested(self, event: LeaseRequested, now_s: float) -> None:
        ledger = self._ledger
        if self._reports.shutting_down:
            raise ShuttingDown
        old = ledger.measurements.get(event.measurement_id)
        live = old is not None and ledger.head(event.measurement_id) is not None
        measurement = Measurement(
            event.measurement_id,
            seq=ledger.next_seq,
            tenant=event.tenant,
            priority=event.priority,
            created_s=now_s,
        )
        if old is not None:
            measurement = old if live else replace(measurement, flags=old.flags, created_s=old.created_s)

        self._check_room(measurement.tenant, len(event.requests))
        for new in event.requests:
            if new.request_id in ledger.requests:
                raise InvariantBroken(f"request {new.request_id} was made before")
            self._check_fits(new.spec, measurement)

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
                )
            )

    def _check_room(self, tenant: str, count: int) -> None:
        limits, queued = self._limits, self._ledger.by_request.queued
        if self.queued_count() + count > limits.max_queued:
            raise QueueFull("this registry", limits.max_queued)
        if len(queued.get(tenant, ())) + count > limits.max_queued_per_tenant:
            raise QueueFull(f"tenant {tenant!r}", limits.max_queued_per_tenant)

    def _check_fits(self, spec: LLMSpec, measurement: Measurement) -> None:
        """Refuse what no wrapper that is known can run; as long as none is, everything is accepted."""
        pin = measurement.machine_id
        there = [w.gpus for w in self._ledger.on_machine(pin) if is_usable(w)] if pin is not None else []
        if there and max(there) < spec.gpus:
            raise LLMNeverFits(
                spec.model,
                f"it needs {spec.gpus} GPUs, but measurement {measurement.measurement_id} is bound to machine {pin}"
                f" with at most {max(there)} in a wrapper; use another measurementId",
            )
        largest = max((gpus for gpus, _ in self._ledger.by_wrapper.present), default=None)
        if largest is not None and largest < spec.gpus:
            raise LLMNeverFits(spec.model, f"it needs {spec.gpus} GPUs, and the largest wrapper has {largest}")

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

    def _on_time_passed(self, asked: tuple[str, ...] | None, now_s: float) -> None:
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
                stop(ledger, replace(wrapper, request_id=None))  # which ends a lease that waits for its LLM as well
            if request is not None and request.deployed_s is not None:
                self._endings.end(request, RequestStatus.EXPIRED, "shutdown", reason, now_s)
            elif request is not None:
                self._endings.requeue(request, reason, "shutdown", now_s)
            wrapper = ledger.wrappers[wrapper_id]
            if wrapper.status is WrapperStatus.READY:
                stop(ledger, wrapper)
