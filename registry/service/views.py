"""Converts records into the answers that clients get. Read-only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from registry.accounting.totals import Total, lease_total
from registry.contract.messages import SETTLING, Download
from registry.core.records import Machine, Measurement, MeasurementKey, Request, Wrapper, WrapperStatus
from registry.service.old_address import old_address, old_address_problems
from registry.service.service import Service
from registry.service.version_skew import differing_versions, joined
from registry.store.rows import APIKey, StoredEvent
from registry.wire.labels import Label
from registry.wire.schemas import (
    MAX_REQUESTS,
    AcceptedRequest,
    EnergyState,
    EventState,
    HealthState,
    KeyState,
    LLMState,
    MachineState,
    MeasurementState,
    PromptingAnswer,
    RequestState,
    WrapperState,
)
from registry.wire.words import RequestStatus, WindowKind

USABLE = frozenset({WrapperStatus.IDLE, WrapperStatus.DEPLOYING, WrapperStatus.READY, WrapperStatus.LEASED})
"""Statuses in which a wrapper serves, or can serve, a request."""

_WELL = frozenset({WrapperStatus.STARTING, WrapperStatus.DEPLOYING, WrapperStatus.READY, WrapperStatus.LEASED})
"""Statuses in which a wrapper works or is being started as intended."""

_UNWELL = frozenset({WrapperStatus.FAILED, WrapperStatus.RESTARTING, WrapperStatus.LOST})
"""Statuses of a wrapper that make its machine unhealthy."""


def link_of(service: Service, request_id: str) -> str:
    """Return the temporary link at which a client polls its request."""
    return f"{service.settings.base_url}/promptingservice/request/{request_id}"


def lease_url(service: Service, request_id: str) -> str | None:
    """Return the base URL for prompts of a request's lease; None without a lease, or if its token is lost."""
    return _with_token(service, request_id)[0]


def prompting_answer(service: Service, requests: Sequence[Request]) -> PromptingAnswer:
    """Return the answer to the POST of these requests."""
    return PromptingAnswer(requests=[_accepted_request(service, each) for each in requests])


def _accepted_request(service: Service, request: Request) -> AcceptedRequest:
    url, address = _addresses(service, request)
    return AcceptedRequest(
        requestId=request.request_id,
        llmconfig=json.loads(request.llmconfig),
        link=link_of(service, request.request_id),
        status=request.status.value,
        url=url,
        address=address,
        notes=_notes(service, request),
    )


def _addresses(service: Service, request: Request) -> tuple[str | None, str | None]:
    """Return the ``url`` and ``address`` of a request's lease; None while it is not deployed."""
    return _with_token(service, request.request_id) if request.status is RequestStatus.DEPLOYED else (None, None)


def _with_token(service: Service, request_id: str) -> tuple[str | None, str | None]:
    """Return ``url`` and ``address`` of a request's lease; None without a lease, or if its token is lost."""
    lease = service.allocator.lease_of(request_id)
    wrapper = None if lease is None else service.allocator.wrapper(lease.wrapper_id)
    if lease is None or wrapper is None or service.tokens.is_lost(lease):
        return None, None
    token = service.tokens.of(lease)
    return f"{wrapper.url}/{token}", old_address(service.settings.base_url, token)


def _notes(service: Service, request: Request) -> list[str]:
    return [*request.notes, *old_address_problems(service.settings.base_url)]


def request_state(service: Service, request: Request, *, addresses: bool = True) -> RequestState:
    """Return a request as its client sees it. O(log n) in the number of queued requests.

    ``addresses``: whether the answer contains the address of its lease.

    Raises:
        StoreUnavailable: the database does not answer.
    """
    costs = {} if request.deployed_s is None else service.accounts.costs(request.request_id)
    measurement = service.archive.measurement(request.measurement_key)
    return _request_state(service, request, measurement, costs, addresses=addresses)


def _request_state(
    service: Service,
    request: Request,
    measurement: Measurement,
    costs: Mapping[WindowKind, Total],
    *,
    addresses: bool,
) -> RequestState:
    allocator = service.allocator
    lease = allocator.lease_of(request.request_id)
    deployed = request.status is RequestStatus.DEPLOYED
    url, address = _addresses(service, request) if addresses else (None, None)
    queued = request.status is RequestStatus.QUEUED
    phase, download = _phase(service, request)
    return RequestState(
        requestId=request.request_id,
        llmconfig=json.loads(request.llmconfig),
        status=request.status.value,
        measurementId=request.measurement_id,
        tenant=request.tenant,
        url=url,
        address=address,
        link=link_of(service, request.request_id),
        position=allocator.queue_position(request.request_id) if queued else None,
        phase=phase,
        **_progress(download),
        reason=request.reason or (_waits_for(service, request) if queued else None),
        notes=_notes(service, request),
        modelRevision=request.model_revision,
        grade=request.grade.value,
        like=request.like_request_id,
        provenance=None if request.provenance is None else json.loads(request.provenance),
        machine=request.machine_id,
        wrapper=request.wrapper_id,
        flags=list(measurement.flags),
        createdAt=iso(request.created_s),
        deployingAt=_iso_or_none(request.deploying_s),
        deployedAt=_iso_or_none(request.deployed_s),
        endedAt=_iso_or_none(request.ended_s),
        expiresAt=iso(lease.deadline_s) if deployed and lease is not None else None,
        idleAfter=iso(lease.ends_s) if deployed and lease is not None else None,
        maxJoules=request.max_j,
        maxGco2eq=request.max_g,
        energy=_energy_state(costs),
    )


def _energy_state(costs: Mapping[WindowKind, Total]) -> EnergyState | None:
    """Return the cost of a lease so far: prompts and idle time. None if no window of it is stored yet."""
    idle, lease = costs.get(WindowKind.IDLE, Total()), lease_total(costs)
    if not lease.joules.count:
        return None
    joules, idle_j = lease.joules.value, idle.joules.value
    return EnergyState(
        joules=joules,
        idle_j=idle_j,
        idle_share=None if joules is None or idle_j is None else idle_j / joules,
        o_g=lease.o_g.value,
        m_g=lease.m_g.value,
        label=lease.label if joules is not None else Label.UNAVAILABLE,
        known_j=lease.joules.of_known if lease.joules.known else None,
        unknown_windows=lease.joules.count - lease.joules.known,
    )


def event_states(events: Sequence[StoredEvent]) -> list[EventState]:
    """Return a request's events as its client sees them."""
    return [
        EventState(
            event=stored.event_id,
            what=stored.event.kind,
            at=iso(stored.event.at_s),
            cause=None if stored.event.cause_id is None else int(stored.event.cause_id),
            status=detail.get("status"),
            reason=detail.get("reason"),
            wrapper=stored.event.wrapper_id,
        )
        for stored in events
        for detail in [json.loads(stored.event.detail)]
    ]


def measurement_state(
    service: Service, key: MeasurementKey, *, after_seq: int = 0, limit: int = MAX_REQUESTS, addresses: bool = True
) -> MeasurementState:
    """Return a measurement with a page of its requests: at most ``limit`` with ``seq`` > ``after_seq``. O(limit).

    ``addresses``: whether the answer contains the addresses of its leases.

    Raises:
        UnknownMeasurement: there is none with this key.
        StoreUnavailable: the database does not answer.
    """
    measurement = service.archive.measurement(key)
    requests = service.archive.requests_of(key, after_seq=after_seq, limit=limit)
    costs = service.accounts.costs_of([each.request_id for each in requests if each.deployed_s is not None])
    return MeasurementState(
        measurementId=measurement.measurement_id,
        machine=measurement.machine_id,
        gpuType=measurement.gpu_type,
        flags=list(measurement.flags),
        createdAt=iso(measurement.created_s),
        versions=None if measurement.versions is None else json.loads(measurement.versions),
        requests=[
            _request_state(service, each, measurement, costs.get(each.request_id, {}), addresses=addresses)
            for each in requests
        ],
        next=requests[-1].seq if len(requests) == limit else None,
    )


def key_state(key: APIKey) -> KeyState:
    """Return an API key as operators see it."""
    return KeyState(
        id=key.key_id,
        role=key.role,
        tenant=key.tenant,
        name=key.name,
        createdAt=iso(key.created_s),
        expiresAt=_iso_or_none(key.expires_s),
        revokedAt=_iso_or_none(key.revoked_s),
        usedAt=_iso_or_none(key.used_s),
    )


def machine_states(service: Service) -> list[MachineState]:
    """Return all known machines with their wrappers."""
    differs = _differing_versions(service)
    return [_machine_state(service, machine, differs) for machine in service.allocator.machines()]


def machine_state(service: Service, machine_id: str) -> MachineState:
    """Return one machine with its wrappers. Raises UnknownMachine."""
    return _machine_state(service, service.allocator.known_machine(machine_id), _differing_versions(service))


def _machine_state(service: Service, machine: Machine, differs: Mapping[str, list[str]]) -> MachineState:
    machine_id, allocator = machine.machine_id, service.allocator
    wrappers = allocator.wrappers_on(machine_id)
    heard_s = [service.heard_s[w.wrapper_id] for w in wrappers if w.wrapper_id in service.heard_s]
    drain = None
    if machine.draining:
        drain = "drained" if service.is_off(machine_id) else "draining"
    return MachineState(
        machine=machine_id,
        address=machine.address,
        alive=machine.alive,
        gpus=machine.gpus,
        gpuType=machine.gpu_type,
        memoryBytes=machine.memory_bytes,
        gpuMemoryBytes=machine.gpu_memory_bytes,
        zone=machine.zone,
        region=machine.region,
        drain=drain,
        leases=sum(allocator.lease_by_wrapper(w.wrapper_id) is not None for w in wrappers),
        healthy=_is_healthy(service, machine, wrappers),
        lastHeardAt=_iso_or_none(max(heard_s, default=None)),
        differs=differs.get(machine_id, []),
        wrappers=[_wrapper_state(service, wrapper) for wrapper in wrappers],
    )


def _is_healthy(service: Service, machine: Machine, wrappers: Sequence[Wrapper]) -> bool | None:
    """Return True if all wrappers answer; False if the machine is lost, or a wrapper failed or does not answer.

    None: it has no wrapper, or not all have answered yet.
    """
    statuses = {wrapper.status for wrapper in wrappers}
    if not machine.alive or not statuses.isdisjoint(_UNWELL):
        return False
    if any(service.misses_reports(wrapper.wrapper_id) for wrapper in wrappers):
        return False
    there = [wrapper.wrapper_id for wrapper in wrappers if wrapper.status is not WrapperStatus.OFF]
    answered = WrapperStatus.STARTING not in statuses and all(each in service.heard_s for each in there)
    return True if there and answered else None


def _differing_versions(service: Service) -> dict[str, list[str]]:
    """Return for each machine the reported software versions that differ from those of most machines."""
    told: dict[str, list[Mapping[str, str]]] = {}
    for wrapper_id, report in service.wrapper_reports.items():
        wrapper = service.allocator.wrapper(wrapper_id)
        if wrapper is not None and report.versions is not None:
            told.setdefault(wrapper.machine_id, []).append(report.versions)
    return differing_versions({machine_id: joined(versions) for machine_id, versions in told.items()})


def llm_states(service: Service) -> list[LLMState]:
    """Return every LLM that runs or is being started, with its machine and its wrapper's status."""
    return [
        LLMState(
            model=wrapper.spec.model,
            modeltyp=wrapper.spec.modeltyp,
            fingerprint=wrapper.spec.fingerprint,
            revision=report.revision
            if (report := service.wrapper_reports.get(wrapper.wrapper_id)) is not None
            else None,
            deployment=json.loads(wrapper.spec.engine_args),
            machine=wrapper.machine_id,
            wrapper=wrapper.wrapper_id,
            status=wrapper.status.value,
        )
        for wrapper in service.allocator.wrappers()
        if wrapper.spec is not None and wrapper.status in USABLE
    ]


def health_state(service: Service) -> HealthState:
    """Return the registry's health.

    ``ok``: a wrapper can serve. ``starting``: none can, but one is starting, or no wrapper exists yet.
    ``degraded``: none of these.
    """
    allocator = service.allocator
    wrappers, usable = allocator.count_wrappers(WrapperStatus), allocator.count_wrappers(USABLE)
    starting = not wrappers or allocator.count_wrappers([WrapperStatus.STARTING])
    return HealthState(
        status="ok" if usable else "starting" if starting else "degraded",
        wrappers=wrappers,
        usable=usable,
        queued=allocator.queued_count(),
        deploying=allocator.deploying_count(),
        version=version("greenprompt-llm-registry"),
    )


def _wrapper_state(service: Service, wrapper: Wrapper) -> WrapperState:
    report = service.wrapper_reports.get(wrapper.wrapper_id)
    return WrapperState(
        wrapper=wrapper.wrapper_id,
        status=wrapper.status.value,
        gpus=wrapper.gpus,
        llm=wrapper.spec.model if wrapper.spec is not None else None,
        leased=wrapper.status is WrapperStatus.LEASED,
        starts=report.starts if report is not None else None,
        in_flight=report.in_flight if report is not None else None,
        unfinished=report.unfinished if report is not None else None,
        phase=report.phase if report is not None else None,
        **_progress(report.download if report is not None else None),
        warm=report.warm if report is not None else None,
        coldReason=report.cold_reason if report is not None else None,
        # The reason of the last failure no longer matters once the wrapper works again. An IDLE wrapper keeps it: it
        # says why the last LLM could not be started or died.
        reason=None if wrapper.status in _WELL else wrapper.reason,
        meter=dict(report.meter) if report is not None and report.meter is not None else None,
        versions=dict(report.versions) if report is not None and report.versions is not None else None,
    )


def _progress(download: Download | None) -> dict[str, Any]:
    """Return a download's progress as fields of an answer; empty without a download."""
    if download is None:
        return {}
    return {"progress": download.share, "bytesDone": download.done_bytes, "bytesTotal": download.total_bytes}


def _phase(service: Service, request: Request) -> tuple[str | None, Download | None]:
    """Return the phase of a DEPLOYING request and its download; each is None if not reported.

    A request with a lease is ``handing over``, unless its machine is settling.
    """
    if request.status is not RequestStatus.DEPLOYING or request.wrapper_id is None:
        return None, None
    report = service.wrapper_reports.get(request.wrapper_id)
    phase, download = (report.phase, report.download) if report is not None else (None, None)
    if service.allocator.lease_of(request.request_id) is not None and phase != SETTLING:
        return "handing over", None
    return phase, download


def _waits_for(service: Service, request: Request) -> str:
    allocator = service.allocator
    head = allocator.head(request.measurement_key)
    if head is not None and head.request_id != request.request_id:
        return f"its measurement's request {head.request_id} comes first and is {head.status.value}"
    pin = allocator.measurement(request.measurement_key).machine_id
    bound = pin is not None and not allocator.known_machine(pin).draining
    drained = () if bound else allocator.fits_only_drained(request.request_id)
    if drained:
        return f"every LLM Machine that it fits on is drained: {', '.join(drained)}"
    if not allocator.count_wrappers(USABLE):
        return "no LLM Machine is ready yet"
    if bound:
        until_s = allocator.measurement(request.measurement_key).pinned_until_s
        if until_s is not None:
            return (
                f"its measurement ran on machine {pin}, which is in use; it waits for that machine until {iso(until_s)}"
            )
        return f"its measurement runs on machine {pin}, which is in use"
    misfit = allocator.misfit(request.request_id)
    return "every LLM Machine is in use" if misfit is None else f"it fits on no LLM Machine: {misfit}"


def iso(at_s: float) -> str:
    """Return a time, UTC seconds, as ISO 8601 with milliseconds."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _iso_or_none(at_s: float | None) -> str | None:
    return None if at_s is None else iso(at_s)
