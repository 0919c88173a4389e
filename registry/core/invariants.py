"""Checks that must hold after every event. For tests: they read all records."""

from __future__ import annotations

from registry.core.decision import Limits
from registry.core.indices import is_free
from registry.core.ledger import Ledger
from registry.core.records import MeasurementKey, Request, Wrapper, WrapperStatus
from registry.core.transitions import InvariantBroken
from registry.wire.words import RequestStatus

_HOLDS = (WrapperStatus.LEASED, WrapperStatus.DEPLOYING, WrapperStatus.STARTING, WrapperStatus.RESTARTING)
"""Only in these statuses can a request hold a wrapper."""

_RUNS = (WrapperStatus.LEASED, WrapperStatus.READY, WrapperStatus.DEPLOYING)
"""In these statuses a wrapper always has an LLM."""


def check_ledger(ledger: Ledger, limits: Limits, *, serving: bool) -> None:
    """Check all records and indices. Raises InvariantBroken if they contradict each other.

    ``serving``: the dispatcher has run, so no request may wait for a free wrapper.
    """
    for wrapper in ledger.wrappers.values():
        _check_wrapper(ledger, wrapper)
    for request in ledger.requests.values():
        _check_request(ledger, request)
    for lease in ledger.leases.values():
        _hold(lease.request_id in ledger.requests, f"the lease of {lease.request_id} has a request")
    for key in ledger.measurements:
        _check_measurement(ledger, limits, key)
    _check_indices(ledger, limits)
    if serving:
        _check_nobody_waits_in_vain(ledger)


def _hold(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(f"not true: {what}")


def _check_wrapper(ledger: Ledger, wrapper: Wrapper) -> None:
    name = f"wrapper {wrapper.wrapper_id} ({wrapper.status})"
    if wrapper.status in _RUNS:
        _hold(wrapper.spec is not None, f"{name} has an LLM")
    else:
        held = wrapper.request_id is not None
        _hold((wrapper.spec is not None) == held, f"{name} has an LLM only while it is held")
    if wrapper.status is WrapperStatus.LEASED:
        _hold(wrapper.request_id in ledger.leases, f"{name} has its lease")
    if wrapper.request_id is not None:
        request = ledger.requests[wrapper.request_id]
        _hold(wrapper.status in _HOLDS, f"{name} may be held")
        _hold(request.wrapper_id == wrapper.wrapper_id, f"{name} and request {request.request_id} agree")
        _hold(request.spec == wrapper.spec, f"{name} has the LLM of its request")
        _hold(request.spec.gpus <= wrapper.gpus, f"{name} has enough GPUs")
        begun = wrapper.request_id in ledger.leases or not ledger.is_draining(wrapper.machine_id)
        _hold(begun, f"{name} is not on a draining machine, unless it has a lease")


def _check_request(ledger: Ledger, request: Request) -> None:
    name = f"request {request.request_id} ({request.status})"
    lease = ledger.leases.get(request.request_id)
    wrapper = None if request.wrapper_id is None else ledger.wrappers.get(request.wrapper_id)
    holds = wrapper is not None and wrapper.request_id == request.request_id
    match request.status:
        case RequestStatus.QUEUED:
            _hold(request.wrapper_id is None and lease is None, f"{name} holds nothing")
        case RequestStatus.DEPLOYING:
            _hold(holds, f"{name} holds its wrapper")
            _hold(request.deployed_s is None or lease is not None, f"{name} keeps its lease")
        case RequestStatus.DEPLOYED:
            _hold(holds and lease is not None, f"{name} holds its wrapper and a lease")
            _hold(wrapper is not None and wrapper.status is WrapperStatus.LEASED, f"{name} can be prompted")
        case _:
            _hold(not holds and lease is None, f"{name} holds nothing")
            _hold(request.ended_s is not None, f"{name} has an end")
    if lease is not None:
        _hold(lease.wrapper_id == request.wrapper_id, f"{name} and its lease agree")
    if holds and wrapper is not None:
        _hold(request.machine_id == wrapper.machine_id, f"{name} knows its machine")
        pin = ledger.measurements[request.measurement_key].machine_id
        _hold(pin == wrapper.machine_id, f"{name} is on the machine of its measurement")


def _check_measurement(ledger: Ledger, limits: Limits, key: MeasurementKey) -> None:
    measurement = ledger.measurements[key]
    requests = [ledger.requests[request_id] for _, request_id in ledger.by_request.of.get(key, ())]
    open_requests = [request for request in requests if not request.status.ended]
    live = [request for request in open_requests if request.status is not RequestStatus.QUEUED]
    _hold(live in ([], open_requests[:1]), f"measurement {key} is served one at a time, in order")
    if not open_requests:
        _hold(measurement.machine_id is None, f"measurement {key} is over and bound to no machine")
    if measurement.pinned_until_s is not None:
        _hold(measurement.machine_id is not None, f"measurement {key} is pinned to a machine")
        until_s = max((r.ended_s or 0.0 for r in requests if r.deployed_s is not None), default=0.0) + limits.sticky_s
        _hold(measurement.pinned_until_s <= until_s, f"measurement {key} is pinned for sticky_s at most")
    served_on = {request.machine_id for request in requests if request.deployed_s is not None}
    flagged = any(flag.startswith("machine_") for flag in measurement.flags)
    _hold(len(served_on) < 2 or flagged, f"measurement {key} was served on one machine, or has a flag machine_*")


def _check_indices(ledger: Ledger, limits: Limits) -> None:
    fresh = Ledger(limits)
    fresh.load(ledger.snapshot())
    _hold(vars(fresh.by_wrapper) == vars(ledger.by_wrapper), "the index of wrappers agrees with the records")
    _hold(vars(fresh.by_request) == vars(ledger.by_request), "the index of requests agrees with the records")
    _hold(fresh.deadlines == ledger.deadlines, "the index of deadlines agrees with the records")
    _hold(fresh.pins == ledger.pins, "the index of pins agrees with the records")
    _hold(fresh.queue.contents() == ledger.queue.contents(), "the queue has each waiting measurement at its place")


def _check_nobody_waits_in_vain(ledger: Ledger) -> None:
    free = [wrapper for wrapper in ledger.wrappers.values() if is_free(wrapper)]
    for key, (place, _) in ledger.queue.contents().items():
        for wrapper in free:
            _hold(
                not ledger.allows(place, wrapper),
                f"measurement {key} does not wait while {wrapper.wrapper_id} is free",
            )
