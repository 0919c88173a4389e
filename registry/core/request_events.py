"""Handles the events of clients and of the clock: requests, releases, use, and time that has passed."""

from __future__ import annotations

from dataclasses import replace

from registry.core.admission import Admission
from registry.core.endings import Endings
from registry.core.events import LeaseRequested
from registry.core.fit import is_gpu_type
from registry.core.ledger import Ledger
from registry.core.pins import Pins
from registry.core.provenance import unlike
from registry.core.records import Measurement, Request, WrapperStatus
from registry.core.transitions import InvariantBroken
from registry.core.wrapper_commands import stop
from registry.errors import InvalidField, ShuttingDown
from registry.wire.words import Priority, RequestStatus


class RequestEvents:
    """Handles the events about requests and leases, one method each."""

    def __init__(self, ledger: Ledger, endings: Endings, pins: Pins, admission: Admission) -> None:
        self._ledger = ledger
        self._endings = endings
        self._pins = pins
        self._admission = admission

    def on_requested(self, event: LeaseRequested, now_s: float) -> None:
        """Queue the requests. Raises as ``Allocator.handle`` says; nothing has changed then."""
        ledger = self._ledger
        if self._ledger.shutting_down:
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

        self._admission.check_room(measurement.tenant, len(event.requests), now_s)
        for new in event.requests:
            if new.request_id in ledger.requests:
                raise InvariantBroken(f"request {new.request_id} was made before")
        self._admission.check_fits(event.requests, measurement)

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
            raise unknown_like(request_id)
        if model.provenance is None:
            raise InvalidField("like", f"the hardware and software of request {request_id} are not known")
        gpu_type = None if model.machine_id is None else self._ledger.gpu_type(model.machine_id)
        differences = unlike(model, gpu_type, event)
        if differences:
            raise InvalidField("like", f"differs from request {request_id}: {'; '.join(differences)}")
        specs = (replace(new.spec, revision=model.model_revision or new.spec.revision) for new in event.requests)
        requests = tuple(replace(new, spec=spec) for new, spec in zip(event.requests, specs, strict=True))
        return replace(event, requests=requests, gpu_type=event.gpu_type or (None if live else gpu_type))

    def on_released(self, request: Request, now_s: float) -> None:
        """End a request that its client releases (it was handed over) or cancels (it was not). Idempotent."""
        if request.status.ended:
            return
        was_served = request.deployed_s is not None
        status = RequestStatus.RELEASED if was_served else RequestStatus.CANCELLED
        self._endings.end(request, status, "released", None, now_s)

    def on_used(self, request: Request, at_s: float) -> None:
        """Restart the lease's idle time: it had a prompt or keep-alive at ``at_s`` (UTC s)."""
        lease = self._ledger.leases.get(request.request_id)
        if lease is not None:
            self._ledger.put_lease(replace(lease, last_active_s=max(lease.last_active_s, at_s)))

    def on_lapsed(self, request: Request, now_s: float) -> None:
        """Expire a request whose lease its wrapper has ended. Ignored unless the request is DEPLOYED."""
        if request.status is RequestStatus.DEPLOYED:
            reason = "its wrapper ended it: its time was over, or it was not used"
            self._endings.end(request, RequestStatus.EXPIRED, "expired", reason, now_s)

    def on_token_lost(self, request: Request, reason: str, now_s: float) -> None:
        """End a lease without a token: fail its request if it was handed over, else requeue it. Idempotent."""
        if request.request_id in self._ledger.leases:
            self._endings.lose(request, reason, now_s)

    def on_time_passed(self, asked: tuple[str, ...] | None, now_s: float) -> None:
        """End the pins and leases that are over. Leases end for idleness only if ``asked`` has them (None: all)."""
        self._pins.end(now_s)
        for lease in self._ledger.leases_due(now_s):
            if lease.deadline_s <= now_s:
                reason = "its lease reached its deadline"
            elif asked is None or lease.request_id in asked:
                reason = f"it was not used for {lease.idle_limit_s:g} s"
            else:
                continue
            request = self._ledger.requests[lease.request_id]
            self._endings.end(request, RequestStatus.EXPIRED, "expired", reason, now_s)

    # D13: leases end, the queue stays
    def on_shutdown_begun(self, now_s: float) -> None:
        """Accept no more requests, end all leases, and stop all LLMs. Queued requests stay queued."""
        ledger, reason = self._ledger, "the registry was shut down"
        self._ledger.shutting_down = True
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


def _check_same_type(measurement: Measurement, gpu_type: str | None) -> None:
    """Refuse a GPU type that differs from the measurement's: all its LLMs run on one machine."""
    same = is_gpu_type(gpu_type, measurement.gpu_type) or is_gpu_type(measurement.gpu_type, gpu_type)
    if gpu_type is not None and not same:
        begun = f"with {measurement.gpu_type!r}" if measurement.gpu_type is not None else "without one"
        raise InvalidField(
            "gpuType",
            f"measurement {measurement.measurement_id} began {begun}, and all its LLMs run on one machine;"
            " leave it out, or use another measurementId",
        )


def _check_same_priority(measurement: Measurement, priority: Priority | None) -> None:
    """Refuse a priority that differs from the measurement's: all its LLMs share one place in the queue."""
    if priority not in (None, measurement.priority):
        raise InvalidField(
            "priority",
            f"measurement {measurement.measurement_id} began with {measurement.priority.value!r}; leave it out, or"
            " use another measurementId",
        )


def unknown_like(request_id: str) -> InvalidField:
    """Return the error for a ``like`` that names no request, or one that the caller may not see."""
    return InvalidField("like", f"no request has the id {request_id!r}, or its record was deleted")
