"""An allocator for tests. After every event, its invariants and the records that it wrote are checked."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import count

import pytest

from registry.core.allocator import Allocator
from registry.core.commands import Effect
from registry.core.decision import Changes, Decision, Limits, Snapshot
from registry.core.events import (
    Event,
    LeaseBound,
    LeaseReleased,
    LeaseRequested,
    LLMDeployed,
    LLMDeployFailed,
    MachineJoined,
    NewRequest,
    TimePassed,
    WrapperAdded,
    WrapperStarted,
)
from registry.core.fit import GIB
from registry.core.records import (
    LLMMemory,
    LLMSpec,
    Machine,
    Measurement,
    MeasurementKey,
    Request,
    StoredToken,
    Wrapper,
    WrapperStatus,
)
from registry.wire.words import Grade, Priority, RequestStatus


def llm(model: str, gpus: int = 0) -> LLMSpec:
    """Return an LLM with this name."""
    return LLMSpec(model, "text-generation", gpus=gpus)


class Memory:
    """A store in memory. It contains only what the committed decisions have written."""

    def __init__(self) -> None:
        self.machines: dict[str, Machine] = {}
        self.wrappers: dict[str, Wrapper] = {}
        self.measurements: dict[MeasurementKey, Measurement] = {}
        self.requests: dict[str, Request] = {}
        self.leases: dict[str, object] = {}

    def commit(self, changes: Changes) -> None:
        """Write a decision's changes. Fails if they remove an unknown record, or write and remove the same one."""
        self.machines |= {record.machine_id: record for record in changes.machines}
        self.wrappers |= {record.wrapper_id: record for record in changes.wrappers}
        self.measurements |= {record.key: record for record in changes.measurements}
        self.requests |= {record.request_id: record for record in changes.requests}
        self.leases |= {record.request_id: record for record in changes.leases}
        assert not {record.request_id for record in changes.leases} & set(changes.ended_leases)
        assert not {record.wrapper_id for record in changes.wrappers} & set(changes.removed_wrappers)
        for request_id in changes.ended_leases:
            self.leases.pop(request_id, None)  # a lease that begins and ends within one event is never written
        for wrapper_id in changes.removed_wrappers:
            del self.wrappers[wrapper_id]

    def knows(self, snapshot: Snapshot) -> bool:
        """Whether this store has exactly the records of the snapshot."""
        return (
            {record.machine_id: record for record in snapshot.machines} == self.machines
            and {record.wrapper_id: record for record in snapshot.wrappers} == self.wrappers
            and {record.key: record for record in snapshot.measurements} == self.measurements
            and {record.request_id: record for record in snapshot.requests} == self.requests
            and {record.request_id: record for record in snapshot.leases} == self.leases
        )


def stored_token(token_id: str) -> StoredToken:
    """What is stored of a token, which is made here from nothing but its id."""
    return StoredToken(token_id, hashlib.sha256(token_id.encode()).hexdigest())


class Scene:
    """An allocator with a manual clock, and a short method for each event."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.tokens = count(1)
        self.allocator = Allocator(self.limits, lambda: stored_token(f"token-{next(self.tokens)}"))
        self.memory = Memory()
        self.now_s = 1000.0
        self.effects: tuple[Effect, ...] = ()
        self.changes = Changes()

    def tell(self, event: Event) -> Decision:
        """Pass an event to the allocator now, check the result, and return the decision."""
        decision = self.allocator.handle(event, self.now_s)
        self.effects, self.changes = decision.effects, decision.changes
        self.memory.commit(decision.changes)
        self.allocator.check()
        assert self.memory.knows(self.allocator.snapshot())
        return decision

    def restart(self) -> None:
        """Replace the allocator by a new one with the stored records, as after a crash of the registry."""
        snapshot = self.allocator.snapshot()
        self.allocator = Allocator(self.limits, lambda: stored_token(f"token-{next(self.tokens)}"))
        self.allocator.load(snapshot)
        self.allocator.check()

    # --- what happens -----------------------------------------------------------------------------------

    def machine(
        self,
        machine_id: str = "m",
        *,
        wrappers: int = 1,
        gpus: int = 0,
        gpu_type: str | None = None,
        gib: int | None = None,
        home: LLMSpec | None = None,
    ) -> None:
        """Add a machine; its wrappers m-0, m-1 … start without an LLM.

        ``gib``: the memory of each GPU, or of the machine if it has none.
        """
        machine = Machine(machine_id, f"node-{machine_id}", "10.0.0.1", gpus=gpus, gpu_type=gpu_type)
        if gib is not None:
            kind = "gpu_memory_bytes" if gpus else "memory_bytes"
            machine = replace(machine, **{kind: gib * GIB})  # type: ignore[arg-type]  # both are int | None
        self.tell(MachineJoined(machine))
        for n in range(wrappers):
            wrapper_id = f"{machine_id}-{n}"
            self.tell(WrapperAdded(wrapper_id, machine_id, f"http://{wrapper_id}", gpus, home if n == 0 else None))
            self.tell(WrapperStarted(wrapper_id))

    def ask(
        self,
        measurement_id: int,
        *specs: LLMSpec | str,
        tenant: str = "default",
        priority: Priority | None = None,
        gpu_type: str | None = None,
        memory: LLMMemory | None = None,
        grade: Grade = Grade.STANDARD,
        like: str | None = None,
    ) -> None:
        """Request LLMs; the requests of measurement 1 are called 1a, 1b … ``memory``: what each LLM needs."""
        known = sum(r.measurement_id == measurement_id for r in self.allocator.snapshot().requests)
        new = tuple(
            NewRequest(
                f"{measurement_id}{chr(ord('a') + known + n)}",
                llm(spec) if isinstance(spec, str) else spec,
                "{}",
                memory=memory,
            )
            for n, spec in enumerate(specs)
        )
        self.tell(LeaseRequested(measurement_id, new, tenant, priority, gpu_type, grade, like))

    def runs(self, wrapper_id: str = "m-0") -> None:
        """Report that the LLM which the wrapper was starting runs now."""
        self.tell(LLMDeployed(wrapper_id, self.wrapper(wrapper_id).epoch))

    def breaks(self, wrapper_id: str = "m-0", *, permanent: bool = False) -> None:
        """Report that the LLM which the wrapper was starting could not be started."""
        self.tell(LLMDeployFailed(wrapper_id, self.wrapper(wrapper_id).epoch, "out of memory", permanent))

    def bound(self, wrapper_id: str = "m-0") -> None:
        """Report that the wrapper has bound the lease."""
        self.tell(LeaseBound(wrapper_id, self.wrapper(wrapper_id).epoch))

    def hand_over(self, wrapper_id: str = "m-0") -> None:
        """Report that the wrapper's LLM runs and the lease is bound, so that its request is deployed."""
        if self.wrapper(wrapper_id).status is WrapperStatus.DEPLOYING:
            self.runs(wrapper_id)
        self.bound(wrapper_id)

    def release(self, request_id: str) -> None:
        """Release a request, as its client does."""
        self.tell(LeaseReleased(request_id))

    def leave_ready(self, model: LLMSpec | str, wrapper_id: str, measurement_id: int) -> None:
        """Start an LLM on this wrapper and release it, so that it runs without a lease.

        The wrapper must be the one that the allocator would choose next.
        """
        self.ask(measurement_id, model)
        request = self.request(f"{measurement_id}a")
        assert request.wrapper_id == wrapper_id
        self.hand_over(wrapper_id)
        self.now_s += 1
        self.release(request.request_id)

    # --- how it is --------------------------------------------------------------------------------------

    def request(self, request_id: str) -> Request:
        return self.allocator.request(request_id)

    def status(self, request_id: str) -> RequestStatus:
        return self.allocator.request(request_id).status

    def wrapper(self, wrapper_id: str = "m-0") -> Wrapper:
        wrapper = self.allocator.wrapper(wrapper_id)
        assert wrapper is not None
        return wrapper

    def request_on(self, wrapper_id: str) -> str | None:
        return self.wrapper(wrapper_id).request_id

    def measurement(self, measurement_id: int, tenant: str = "default") -> Measurement:
        return self.allocator.measurement((tenant, measurement_id))


def next_deadline_s(allocator: Allocator) -> float | None:
    """Return when the next lease or pin ends, UTC seconds; None if there is none."""
    ledger = allocator._ledger
    return min((timed.first[0] for timed in (ledger.deadlines, ledger.pins) if timed), default=None)


def refused(scene: Scene, error: type[Exception], event: LeaseRequested) -> Exception:
    """Return the error with which an event is refused, which has changed nothing."""
    before = scene.allocator.snapshot()
    with pytest.raises(error) as caught:
        scene.allocator.handle(event, scene.now_s)
    assert scene.allocator.snapshot() == before
    assert scene.tell(TimePassed()).changes.empty
    return caught.value


def asked(measurement_id: int, *names: str, model: str = "A", gpus: int = 0, tenant: str = "default") -> LeaseRequested:
    """Return a POST of these requests, all for the same LLM."""
    return LeaseRequested(
        measurement_id, tuple(NewRequest(name, llm(model, gpus), "{}") for name in names), tenant=tenant
    )


def handed_over(limits: Limits | None = None) -> Scene:
    """Request 1a has its LLM A on m-0."""
    scene = Scene(limits)
    scene.machine()
    scene.ask(1, "A")
    scene.hand_over()
    return scene


def ready(limits: Limits | None = None) -> Scene:
    """m-0 runs A for nobody."""
    scene = handed_over(limits)
    scene.release("1a")
    return scene


def deploying(limits: Limits | None = None) -> Scene:
    """m-0 starts A for request 1a."""
    scene = Scene(limits)
    scene.machine()
    scene.ask(1, "A")
    return scene
