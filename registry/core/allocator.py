"""The allocator: turns an event into changed records and effects. Pure; the registry's service owns the only instance.

All decisions are made by ``handle``. It validates an event before the first change, so an event that raises has changed
nothing. Outdated reports (older epoch, unexpected status, removed wrapper) are ignored without an error.

Every command to a wrapper carries an epoch and supersedes all older ones. StopLLM also ends the wrapper's lease.
DeployLLM ends it, too, unless the LLM is deployed again for this lease. A new wrapper process has no lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from registry.core.admission import Admission
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
    LeaseTokenLost,
    LeaseUsed,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMStopped,
    MachineDrained,
    MachineJoined,
    MachineLost,
    MachineUndrained,
    ShutdownBegun,
    TimePassed,
    WrapperAdded,
    WrapperFailed,
    WrapperRemoved,
    WrapperStarted,
    WrapperSwitchedOff,
)
from registry.core.invariants import check_ledger
from registry.core.ledger import Ledger
from registry.core.pins import Pins
from registry.core.policy import rank
from registry.core.records import (
    Lease,
    Machine,
    Measurement,
    MeasurementKey,
    Request,
    StoredToken,
    Wrapper,
    WrapperStatus,
)
from registry.core.request_events import RequestEvents
from registry.core.transitions import InvariantBroken
from registry.core.wrapper_events import WrapperEvents
from registry.wire.words import RequestStatus

__all__ = ["Allocator", "InvariantBroken"]


class Allocator:
    """Holds and changes the registry's state. ``new_token`` makes what is stored of a new lease's token."""

    def __init__(self, limits: Limits, new_token: Callable[[], StoredToken]) -> None:
        self._limits = limits
        self._new_token = new_token
        self.load(Snapshot())

    def load(self, snapshot: Snapshot, next_seq: int = 1) -> None:
        """Replace all state by that of the store. Emits no effects; the next event may emit some.

        ``next_seq``: number of the next request. It must be above the numbers of all requests that are
        in the store but not in ``snapshot``. The tenants' turns are not stored and start from zero.
        """
        self._ledger = Ledger(self._limits)
        self._ledger.load(snapshot, next_seq)
        self._endings = Endings(self._ledger, self._limits)
        self._pins = Pins(self._ledger, self._limits)
        self._dispatcher = Dispatcher(self._ledger, self._limits, self._new_token)
        self._wrappers = WrapperEvents(self._ledger, self._limits, self._endings, self._dispatcher)
        self._admission = Admission(self._ledger, self._limits)
        self._requests = RequestEvents(self._ledger, self._endings, self._pins, self._admission)
        self._settled = False

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
            UnknownRequest: an event about a lease has an unknown request_id; nothing has changed.
            UnknownMachine: a MachineDrained or MachineUndrained has an unknown id; nothing has changed.
            InvariantBroken: a bug; the allocator must not be used any more.
        """
        queued = self.queued_count()
        self._apply(event, now_s)
        if not self._ledger.shutting_down:
            self._dispatcher.run(now_s)
            self._wrappers.preload_homes()
        self._settled = True
        self._admission.note_departures(queued - self.queued_count(), now_s)
        return self._ledger.take_decision()

    def _apply(self, event: Event, now_s: float) -> None:
        """Change what the event itself changes. Raises as ``handle`` says."""
        requests, wrappers = self._requests, self._wrappers
        match event:
            case LeaseRequested():
                requests.on_requested(event, now_s)
            case LeaseReleased(request_id):
                requests.on_released(self._ledger.request(request_id), now_s)
            case LeaseLapsed(request_id):
                requests.on_lapsed(self._ledger.request(request_id), now_s)
            case LeaseTokenLost(request_id, reason):
                requests.on_token_lost(self._ledger.request(request_id), reason, now_s)
            case LeaseUsed(request_id, at_s):
                requests.on_used(self._ledger.request(request_id), min(at_s, now_s))
            case LeaseBound():
                wrappers.on_lease_bound(event, now_s)
            case LeaseFlagged(request_id, flags):
                wrappers.on_lease_flagged(self._ledger.request(request_id), flags)
            case LLMDeployed(wrapper_id, epoch):
                wrappers.on_llm_deployed(wrapper_id, epoch, now_s)
            case LLMDeployFailed():
                wrappers.on_llm_deploy_failed(event, now_s)
            case LLMStopped(wrapper_id, epoch):
                wrappers.on_llm_stopped(wrapper_id, epoch)
            case LLMDied():
                wrappers.on_llm_died(event, now_s)
            case WrapperAdded():
                wrappers.on_wrapper_added(event, now_s)
            case WrapperStarted():
                wrappers.on_wrapper_started(event, now_s)
            case WrapperFailed():
                wrappers.on_wrapper_failed(event, now_s)
            case WrapperRemoved():
                wrappers.on_wrapper_removed(event, now_s)
            case WrapperSwitchedOff():
                wrappers.on_wrapper_switched_off(event)
            case MachineJoined(machine):
                wrappers.on_machine_joined(machine)
            case MachineLost():
                wrappers.on_machine_lost(event, now_s)
            case MachineDrained(machine_id):
                wrappers.on_machine_drained(self._ledger.machine(machine_id), now_s)
            case MachineUndrained(machine_id):
                wrappers.on_machine_undrained(self._ledger.machine(machine_id))
            case TimePassed(asked):
                requests.on_time_passed(asked, now_s)
            case ShutdownBegun():  # pragma: no branch - there are no other events
                requests.on_shutdown_begun(now_s)

    def check(self) -> None:
        """Check all invariants, in O(n log n): for tests. Raises InvariantBroken if one does not hold."""
        check_ledger(self._ledger, self._limits, serving=self._settled and not self._ledger.shutting_down)

    def leases_due(self, now_s: float) -> tuple[Lease, ...]:
        """Return the leases that are over at ``now_s``, earliest end first. O(their number)."""
        return self._ledger.leases_due(now_s)

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

        Assumes that every tenant keeps requests queued and every wrapper fits every request. The order can differ
        because of pins, of sizes, and of requests that are served early because their LLM is already running.
        """
        request = self._ledger.requests.get(request_id)
        if request is None or request.status is not RequestStatus.QUEUED:
            return None
        measurement = self._ledger.measurements[request.measurement_key]
        queued = self._ledger.by_request.queued[request.tenant]
        index = queued.index((rank(measurement, request), request.seq, request_id))
        return self._ledger.positions.before(request.tenant, index) + 1

    def misfit(self, request_id: str) -> str | None:
        """Return why no known wrapper can serve a queued request; None if one can, or if no wrapper is known.

        A request can become unservable if it was accepted before any wrapper was known, or if a
        machine left. Raises UnknownRequest.
        """
        return self._admission.misfit(self._ledger.request(request_id))

    def fits_only_drained(self, request_id: str) -> tuple[str, ...]:
        """Return the drained machines that a queued request fits on; () if it also fits on others, or on none.

        Raises UnknownRequest.
        """
        return self._admission.fits_only_drained(self._ledger.request(request_id))
