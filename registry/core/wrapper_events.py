"""Handles the reports of wrappers and machines.

An outdated report is ignored: its epoch is older than the wrapper's, it does not match the wrapper's status (e.g. a
duplicate), or its wrapper was removed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from registry.core.decision import Limits
from registry.core.dispatch import Dispatcher, with_flag
from registry.core.endings import Endings
from registry.core.events import (
    LeaseBound,
    LLMDeployFailed,
    LLMDied,
    MachineLost,
    WrapperAdded,
    WrapperFailed,
    WrapperRemoved,
    WrapperStarted,
    WrapperSwitchedOff,
)
from registry.core.indices import is_usable
from registry.core.ledger import Ledger
from registry.core.provenance import differences
from registry.core.records import Machine, Request, Wrapper, WrapperStatus
from registry.core.wrapper_commands import bind, deploy, restart, stop, unbind
from registry.wire.flags import Flag
from registry.wire.words import RequestStatus


class WrapperEvents:
    """Handles the events about wrappers and machines, one method each."""

    def __init__(self, ledger: Ledger, limits: Limits, endings: Endings, dispatcher: Dispatcher) -> None:
        self._ledger = ledger
        self._limits = limits
        self._endings = endings
        self._dispatcher = dispatcher
        self._came_up_empty: list[str] = []

    # --- LLMs -------------------------------------------------------------------------------------------

    def on_llm_deployed(self, wrapper_id: str, epoch: int, now_s: float) -> None:
        """Handle an LLM that runs now: hand it over to the request that waits for it, or mark the wrapper READY."""
        wrapper = self._current(wrapper_id, epoch, WrapperStatus.DEPLOYING)
        if wrapper is not None:
            self._llm_runs(wrapper, now_s)

    # D2: deployed once the wrapper has confirmed
    def on_lease_bound(self, event: LeaseBound, now_s: float) -> None:
        """Hand over the LLM: set the request DEPLOYED and start the lease's time, or fail the request.

        The request fails if the wrapper refuses it, or if its provenance differs from that of its
        ``like_request_id``. After a restart of the engine the deadline stays, and only the idle time
        starts again.
        """
        ledger = self._ledger
        wrapper = self._current(event.wrapper_id, event.epoch, WrapperStatus.LEASED)
        if wrapper is None or wrapper.request_id is None:
            return
        ledger.put_wrapper(replace(wrapper, failures=0, reason=None))
        request, lease = ledger.requests[wrapper.request_id], ledger.leases[wrapper.request_id]
        if request.status is not RequestStatus.DEPLOYING:
            return
        first = request.deployed_s is None
        if first:
            request = replace(request, provenance=event.provenance)
            why_not = event.refusal or self._unlike_what_it_asks(request)
            if why_not is not None:  # the client does not have the address yet
                self._endings.end(request, RequestStatus.FAILED, "failed", why_not, now_s)
                return
        ledger.put_request(
            replace(
                request,
                status=RequestStatus.DEPLOYED,
                reason=None,
                deployed_s=now_s if first else request.deployed_s,
                # D26: the commit is noted at the hand-over
                model_revision=event.model_revision or request.model_revision,
            )
        )
        deadline_s = now_s + self._limits.lease_max_s if first else lease.deadline_s
        ledger.put_lease(replace(lease, last_active_s=now_s, deadline_s=deadline_s))
        measurement = ledger.measurements[request.measurement_key]
        ledger.put_measurement(replace(measurement, pinned_until_s=None))  # served there: the pin does not expire
        if event.versions is not None:
            measurement = ledger.measurements[request.measurement_key]
            same = measurement.versions in (None, event.versions)
            flags = measurement.flags if same else with_flag(measurement.flags, Flag.VERSION_CHANGED)
            ledger.put_measurement(replace(measurement, versions=event.versions, flags=flags))
        self.on_lease_flagged(request, event.flags)

    def on_lease_flagged(self, request: Request, flags: tuple[str, ...]) -> None:
        """Add these flags to the measurement of a request."""
        measurement = self._ledger.measurements[request.measurement_key]
        self._ledger.put_measurement(replace(measurement, flags=reduce(with_flag, flags, measurement.flags)))

    def on_llm_deploy_failed(self, event: LLMDeployFailed, now_s: float) -> None:
        """Mark the wrapper IDLE. Queue the request again, or fail it; a request with a lease always fails."""
        ledger = self._ledger
        wrapper = self._current(event.wrapper_id, event.epoch, WrapperStatus.DEPLOYING)
        if wrapper is None:
            return
        request = self._owner(wrapper)
        empty = replace(wrapper, status=WrapperStatus.IDLE, spec=None, request_id=None, reason=event.reason)
        if request is None:
            ledger.put_wrapper(empty)
        elif request.request_id in ledger.leases:
            # The client has an address on this wrapper, so no other wrapper can take over.
            ledger.put_wrapper(unbind(ledger, empty, request, "failed"))
            self._endings.end(request, RequestStatus.FAILED, "failed", event.reason, now_s)
        else:
            ledger.put_wrapper(empty)
            self._endings.try_elsewhere(request, event.wrapper_id, event.reason, now_s, permanent=event.permanent)

    def on_llm_stopped(self, wrapper_id: str, epoch: int) -> None:
        """Mark the wrapper IDLE: its LLM has stopped."""
        wrapper = self._current(wrapper_id, epoch, WrapperStatus.STOPPING)
        if wrapper is not None:
            self._ledger.put_wrapper(replace(wrapper, status=WrapperStatus.IDLE))
            self._came_up_empty.append(wrapper_id)

    # D12: an engine is started again for its lease
    def on_llm_died(self, event: LLMDied, now_s: float) -> None:
        """Restart an LLM that died during a lease, unless it failed too often. In other cases mark the wrapper IDLE."""
        wrapper = self._current(event.wrapper_id, event.epoch, WrapperStatus.READY, WrapperStatus.LEASED)
        if wrapper is None:
            return
        request = self._owner(wrapper)
        if request is not None:
            self.on_lease_flagged(request, event.flags)
        if request is not None and self._outlives_engine(request, event.reason, now_s):
            assert wrapper.spec is not None
            deploy(self._ledger, wrapper, wrapper.spec, request.request_id)
            return
        wrapper = self._ledger.wrappers[wrapper.wrapper_id]
        self._ledger.put_wrapper(replace(wrapper, status=WrapperStatus.IDLE, spec=None, reason=event.reason))

    # --- wrappers ---------------------------------------------------------------------------------------

    def on_wrapper_added(self, event: WrapperAdded, now_s: float) -> None:
        """Mark a wrapper that is being created (again) as STARTING.

        A request that holds this wrapper keeps it if the machine is the same and the GPUs suffice.
        """
        ledger = self._ledger
        known = ledger.wrappers.get(event.wrapper_id)
        if known is None:
            ledger.put_wrapper(Wrapper(event.wrapper_id, event.machine_id, event.url, gpus=event.gpus, home=event.home))
            return
        request = self._owner(known)
        moved = known.machine_id != event.machine_id
        keeps = request is not None and not moved and request.spec.gpus <= event.gpus
        if moved:
            ledger.remove_wrapper(known)
        ledger.put_wrapper(
            replace(
                known,
                machine_id=event.machine_id,
                url=event.url,
                gpus=event.gpus,
                home=event.home,
                status=WrapperStatus.STARTING,
                spec=known.spec if keeps else None,
                request_id=known.request_id if keeps else None,
            )
        )
        reason = f"wrapper {event.wrapper_id} is created again"
        if request is not None and keeps:
            self._waits_for_wrapper(request, reason)
        elif request is not None:
            self._endings.lose(request, reason, now_s)

    def on_wrapper_started(self, event: WrapperStarted, now_s: float) -> None:
        """Compare what a wrapper runs with what it should run, and send it the commands that are needed."""
        ledger = self._ledger
        wrapper = ledger.wrappers.get(event.wrapper_id)
        if wrapper is None or wrapper.status is WrapperStatus.OFF:
            return
        if wrapper.status is WrapperStatus.LOST and not self._is_alive(wrapper.machine_id):
            return
        # New commands need newer epochs than any that the wrapper can have seen.
        missed = event.epoch != wrapper.epoch
        wrapper = replace(wrapper, epoch=max(wrapper.epoch, event.epoch))
        as_told = wrapper.spec is not None and event.running == wrapper.spec.fingerprint
        request = self._owner(wrapper)
        if request is not None and self._started_for(request, wrapper, as_told, now_s):
            return
        if request is not None:
            wrapper = ledger.wrappers[wrapper.wrapper_id]  # the request has failed, which has freed the wrapper
        self._started_free(wrapper, event, as_told, missed, now_s)
        # Not in on_wrapper_added: of many wrappers that are added after a loss, a later one may serve the request.
        self._endings.fail_exhausted(now_s)

    def _started_for(self, request: Request, wrapper: Wrapper, as_told: bool, now_s: float) -> bool:
        """Serve the request that holds a started wrapper. Return False if the request has failed instead.

        ``as_told``: the wrapper runs the LLM that it should run.
        """
        assert wrapper.spec is not None
        if wrapper.status is WrapperStatus.LEASED:
            if as_told:
                bind(self._ledger, wrapper, request.request_id)  # an earlier registry may not have sent the BindLease
                return True
            self._ledger.put_wrapper(wrapper)
            if not self._outlives_engine(request, "the LLM is gone from its wrapper", now_s):
                return False
        if as_told:
            self._llm_runs(wrapper, now_s)
        else:
            deploy(self._ledger, wrapper, wrapper.spec, request.request_id)
        return True

    def _started_free(self, wrapper: Wrapper, event: WrapperStarted, as_told: bool, missed: bool, now_s: float) -> None:
        """Mark a started wrapper READY or IDLE, or send it the next command. No request holds it.

        ``as_told``: it runs the LLM that it should run. ``missed``: the last command that it accepted is
        not the newest one.
        """
        empty = event.running is None
        # An empty process that has executed a command may be starting an LLM, or still hold the token of a lease that
        # has ended: it gets a StopLLM, which ends both. It has neither if its last command left the wrapper IDLE.
        is_idle = empty and (event.epoch == 0 or (wrapper.status is WrapperStatus.IDLE and not missed))
        match wrapper.status:
            case WrapperStatus.DEPLOYING if wrapper.spec is not None and (empty or as_told):
                if as_told and not missed:
                    self._llm_runs(wrapper, now_s)
                else:
                    deploy(self._ledger, wrapper, wrapper.spec, None)
            case WrapperStatus.READY if wrapper.spec is not None and as_told:
                if missed:
                    # An earlier registry may not have sent the UnbindLease. A DeployLLM for the running LLM takes no
                    # time and also ends the lease.
                    deploy(self._ledger, wrapper, wrapper.spec, None)
            case WrapperStatus.STOPPING:
                stop(self._ledger, wrapper)
            case _ if is_idle:
                self._ledger.put_wrapper(replace(wrapper, status=WrapperStatus.IDLE, spec=None))
                self._came_up_empty.append(wrapper.wrapper_id)
            case _:
                stop(self._ledger, wrapper)

    def on_wrapper_failed(self, event: WrapperFailed, now_s: float) -> None:
        """Restart a wrapper. In a shutdown, or after ``wrapper_attempts`` failures in a row, mark it FAILED instead."""
        wrapper = self._ledger.wrappers.get(event.wrapper_id)
        if wrapper is None or not is_usable(wrapper):
            return
        wrapper = replace(wrapper, failures=wrapper.failures + 1, reason=event.reason)
        if self._ledger.shutting_down or wrapper.failures >= self._limits.wrapper_attempts:
            self._give_up(wrapper, event.reason, now_s)
        else:
            self._restart(wrapper, event.reason, now_s)

    def _give_up(self, wrapper: Wrapper, why: str, now_s: float) -> None:
        request = self._owner(wrapper)
        self._ledger.put_wrapper(replace(wrapper, status=WrapperStatus.FAILED, spec=None, request_id=None))
        reason = f"wrapper {wrapper.wrapper_id} was given up: {why}"
        if request is not None and request.deployed_s is not None:
            self._endings.end(request, RequestStatus.FAILED, "failed", reason, now_s)
        elif request is not None:
            self._endings.try_elsewhere(request, wrapper.wrapper_id, reason, now_s)
        self._endings.fail_exhausted(now_s)

    def _restart(self, wrapper: Wrapper, why: str, now_s: float) -> None:
        ledger = self._ledger
        ran_its_llm = wrapper.status is WrapperStatus.LEASED
        request = self._owner(wrapper)
        restart(ledger, replace(wrapper, spec=None if request is None else wrapper.spec))
        if request is not None:
            reason = f"wrapper {wrapper.wrapper_id} is restarted: {why}"
            if ran_its_llm:
                self._outlives_engine(request, reason, now_s)
            else:
                self._waits_for_wrapper(request, reason)

    def on_wrapper_removed(self, event: WrapperRemoved, now_s: float) -> None:
        """Remove a wrapper. Its request fails if it was handed over, else it is queued again."""
        wrapper = self._ledger.wrappers.get(event.wrapper_id)
        if wrapper is None:
            return
        request = self._owner(wrapper)
        self._ledger.remove_wrapper(wrapper)
        if request is not None:
            self._endings.lose(request, f"wrapper {wrapper.wrapper_id} was removed", now_s)
        self._endings.fail_exhausted(now_s)

    def on_wrapper_switched_off(self, event: WrapperSwitchedOff) -> None:
        """Mark a wrapper OFF if no request holds it and its machine is draining. Its record and size are kept."""
        wrapper = self._ledger.wrappers.get(event.wrapper_id)
        if wrapper is not None and wrapper.request_id is None and self._ledger.is_draining(wrapper.machine_id):
            self._ledger.put_wrapper(replace(wrapper, status=WrapperStatus.OFF, spec=None, failures=0, reason=None))

    # --- machines ---------------------------------------------------------------------------------------

    def on_machine_joined(self, machine: Machine) -> None:
        """Add or change a machine. A draining machine stays draining, even when it left and comes back."""
        self._ledger.put_machine(replace(machine, draining=self._ledger.is_draining(machine.machine_id)))

    # D31: a drained machine is used by its leases only
    def on_machine_drained(self, machine: Machine, now_s: float) -> None:
        """Allow no new leases on a machine. Requests that wait there without a lease are queued again."""
        ledger = self._ledger
        ledger.put_machine(replace(machine, draining=True))
        for wrapper in ledger.on_machine(machine.machine_id):
            request = self._owner(wrapper)
            if request is not None and request.request_id not in ledger.leases:
                self._endings.requeue(request, f"machine {machine.machine_id} is being drained", "drained", now_s)
        self._endings.fail_exhausted(now_s)

    def on_machine_undrained(self, machine: Machine) -> None:
        """Use a machine again; its empty wrappers are preloaded with their ``home`` LLM."""
        ledger = self._ledger
        ledger.put_machine(replace(machine, draining=False))
        self._came_up_empty += [wrapper.wrapper_id for wrapper in ledger.on_machine(machine.machine_id)]

    def on_machine_lost(self, event: MachineLost, now_s: float) -> None:
        """Mark a machine and its wrappers lost. Requests that were handed over fail, others are queued again."""
        ledger = self._ledger
        machine = ledger.machines.get(event.machine_id)
        if machine is not None:
            ledger.put_machine(replace(machine, alive=False))
        wrappers = ledger.on_machine(event.machine_id)
        requests = [request for wrapper in wrappers if (request := self._owner(wrapper)) is not None]
        for wrapper in wrappers:
            ledger.put_wrapper(replace(wrapper, status=WrapperStatus.LOST, spec=None, request_id=None))
        for request in requests:
            self._endings.lose(request, f"machine {event.machine_id} was lost: {event.reason}", now_s)
        self._endings.fail_exhausted(now_s)

    # --- the end of an event ----------------------------------------------------------------------------

    def preload_homes(self) -> None:
        """Deploy its ``home`` LLM on every wrapper that became empty and is still IDLE."""
        for wrapper_id in self._came_up_empty:
            wrapper = self._ledger.wrappers[wrapper_id]
            home = wrapper.home
            wanted = wrapper.status is WrapperStatus.IDLE and not self._ledger.is_draining(wrapper.machine_id)
            if wanted and home is not None and home.gpus <= wrapper.gpus:
                deploy(self._ledger, wrapper, home, None)
        self._came_up_empty.clear()

    # --- inside -----------------------------------------------------------------------------------------

    def _current(self, wrapper_id: str, epoch: int, *statuses: WrapperStatus) -> Wrapper | None:
        """Return the wrapper that a report is about, None if the report is outdated."""
        wrapper = self._ledger.wrappers.get(wrapper_id)
        if wrapper is None or epoch < wrapper.epoch or wrapper.status not in statuses:
            return None
        return wrapper

    def _unlike_what_it_asks(self, request: Request) -> str | None:
        """Return how a request differs from its ``like_request_id``; None if it does not differ, or has no such id.

        A text is also returned if that earlier request is not known any more.
        """
        if request.like_request_id is None:
            return None
        model = self._ledger.requests.get(request.like_request_id)
        if model is None:
            return f"request {request.like_request_id}, which it must repeat (like), is not known any more"
        found = differences(model.provenance, request.provenance)
        return f"it would differ from request {model.request_id} (like): {'; '.join(found)}" if found else None

    def _owner(self, wrapper: Wrapper) -> Request | None:
        return None if wrapper.request_id is None else self._ledger.requests[wrapper.request_id]

    def _is_alive(self, machine_id: str) -> bool:
        machine = self._ledger.machines.get(machine_id)
        return machine is None or machine.alive

    def _llm_runs(self, wrapper: Wrapper, now_s: float) -> None:
        wrapper = replace(wrapper, failures=0, reason=None)
        if wrapper.request_id is None:
            self._ledger.put_wrapper(replace(wrapper, status=WrapperStatus.READY))
        elif wrapper.request_id in self._ledger.leases:
            bind(self._ledger, wrapper, wrapper.request_id)
        else:
            self._dispatcher.lease(wrapper, wrapper.request_id, now_s)

    def _outlives_engine(self, request: Request, reason: str, now_s: float) -> bool:
        """Keep a lease whose LLM is gone. Return False if the request was failed instead.

        It fails when its LLM has been lost ``deploy_attempts`` times on this wrapper. The count is that of
        ``failed_on``, which is stored, so it survives a restart of the registry.
        """
        assert request.wrapper_id is not None
        request = replace(request, failed_on=(*request.failed_on, request.wrapper_id))
        if request.failed_on.count(request.wrapper_id) >= self._limits.deploy_attempts:
            self._endings.end(request, RequestStatus.FAILED, "failed", reason, now_s)
            return False
        self._waits_for_wrapper(request, reason)
        return True

    def _waits_for_wrapper(self, request: Request, reason: str) -> None:
        """Set a request to DEPLOYING until its wrapper runs its LLM again. The request keeps the wrapper."""
        ledger = self._ledger
        ledger.put_request(replace(request, status=RequestStatus.DEPLOYING, reason=reason))
        if request.request_id in ledger.leases:
            measurement = ledger.measurements[request.measurement_key]
            ledger.put_measurement(replace(measurement, flags=with_flag(measurement.flags, Flag.ENGINE_RESTARTED)))
