"""Machines and wrappers for the registry's service: they keep the ``Cluster`` protocol, and misbehave when told to.

A wrapper follows ``deployments.wrapper.llm_wrapper``: it refuses older epochs, a new command ends what the older one
began, and a start goes on though its caller has gone. A test can *hold* a method of a wrapper (calls wait until the
gate is opened or fails), let it *fail*, kill a wrapper's engine or process, and add or take machines. Nothing here
waits for time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from deployments.wrapper.lease_gate import LeaseGate
from registry.contract.messages import Belief, HandOver, LeaseGrant, Observation, StartedFor, WrapperPlan, WrapperReport
from registry.contract.windows import EnergyWindow
from registry.core.records import LLMSpec, Machine
from registry.errors import EngineStartFailed, StaleEpoch, WrapperUnreachable
from tests.fake_counters import ManualClock

FENCE_S = 30.0

UNTOLD = Belief(epoch=0, request_id=None, as_of=None)
"""What a registry believes of a wrapper that it has not heard of yet."""


WINDOWS_TOLD = 3
"""Most energy windows in a report."""


class Gate:
    """Holds calls back. ``arrived`` counts those that have come."""

    def __init__(self) -> None:
        self.arrived = 0
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def open(self) -> None:
        """Let all calls go on, those to come too."""
        self._outcome.set_result(None)

    def fail(self, error: Exception) -> None:
        """Let all calls fail, those to come too."""
        self._outcome.set_exception(error)

    async def passes(self) -> None:
        """Wait for the gate."""
        await asyncio.shield(self._outcome)


@dataclass
class FakeWrapper:
    """The process of a wrapper. ``idle_for_s`` is what it reports of its lease, ``in_flight`` of its prompts."""

    plan: WrapperPlan
    epoch: int = 0
    spec: LLMSpec | None = None
    runs: bool = False
    start: asyncio.Task[None] | None = None
    revision: str | None = None
    died: str | None = None
    death_flags: tuple[str, ...] = ()
    idle_for_s: float = 0.0
    in_flight: int = 0
    starts: int = 0
    started_for: StartedFor | None = None
    """The request that the last start was begun for."""
    phase: str | None = None
    bind_flags: tuple[str, ...] = ()
    """What is not as it should be when a lease is bound here."""
    lease_flags: tuple[str, ...] = ()
    """What has disturbed the lease that is bound here."""
    ended: list[tuple[str, str]] = field(default_factory=list)
    """Leases that were ended here: request id, and how."""
    windows: list[EnergyWindow] = field(default_factory=list)
    """What was measured here, and the registry has not said to have written down."""
    gate: LeaseGate = field(kw_only=True)

    @property
    def grant(self) -> LeaseGrant | None:
        """The lease that is bound."""
        return self.gate.grant


class FakeCluster:
    """The machines, and what runs on them. ``changed`` is called after everything that happens."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.machines: dict[str, Machine] = {}
        self.wrappers: dict[str, FakeWrapper] = {}
        self.calls: Counter[tuple[str, str]] = Counter()
        self.removed: list[str] = []
        self.memory_bytes: dict[str, int] = {}
        """What wrappers report of their machine, by its id: memory of each GPU, or main memory without GPU."""
        self.versions: dict[str, dict[str, str]] = {}
        """What wrappers report of their machine's software, by its id."""
        self.provenances: dict[str, dict[str, object]] = {}
        """What LLMs are handed over with, by machine."""
        self.unusable: dict[str, EngineStartFailed] = {}
        """Models that can't be started, and why."""
        self.commits: dict[str, str] = {}
        """What the hub's default branch holds at the moment, by model; the others are local."""
        self.clock = ManualClock()
        """The wrappers' own. It stands still unless a test moves it: leases end by the registry's word alone."""
        self.fence_s = FENCE_S
        self.cut_off: set[str] = set()
        """Wrappers that nothing reaches, though they live."""
        self._processes = count(1)
        self._gates: dict[tuple[str, str], Gate] = {}
        self._failures: dict[tuple[str, str], list[Exception]] = {}
        self._changed = changed

    # --- what a test can do -----------------------------------------------------------------------------

    def join(self, machine_id: str, *, gpus: int = 0) -> None:
        """A machine comes."""
        self.machines[machine_id] = Machine(machine_id, f"node-{machine_id}", "10.0.0.1", gpus=gpus)

    def leave(self, machine_id: str) -> None:
        """A machine goes, and with it its wrappers; Serve still lists them."""
        del self.machines[machine_id]
        for wrapper in self.wrappers.values():
            if wrapper.plan.machine_id == machine_id:
                self._end_process(wrapper)

    def hold(self, wrapper_id: str, method: str) -> Gate:
        """Keep calls of this method waiting."""
        gate = self._gates[wrapper_id, method] = Gate()
        return gate

    def fail(self, wrapper_id: str, method: str, *errors: Exception) -> None:
        """Let the next calls of this method fail, one after the other."""
        self._failures.setdefault((wrapper_id, method), []).extend(errors)

    def kill_engine(self, wrapper_id: str, why: str = "its processes are gone", flags: tuple[str, ...] = ()) -> None:
        """The LLM dies; the wrapper notices."""
        wrapper = self.wrappers[wrapper_id]
        wrapper.death_flags = flags
        wrapper.runs, wrapper.spec, wrapper.died = False, None, why

    def kill_process(self, wrapper_id: str) -> None:
        """The wrapper's process is replaced: it knows nothing."""
        self._end_process(self.wrappers[wrapper_id])
        self.wrappers[wrapper_id] = self._process(self.wrappers[wrapper_id].plan)

    async def close(self) -> None:
        """End what is being started."""
        starts = [wrapper.start for wrapper in self.wrappers.values() if wrapper.start is not None]
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)

    # --- the protocol -----------------------------------------------------------------------------------

    async def observe(self) -> Observation:
        await self._called("cluster", "observe")
        return Observation(tuple(self.machines.values()), frozenset(self.wrappers))

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        await self._called("cluster", "create")
        for plan in wrappers:
            if plan.wrapper_id in self.wrappers:
                self._end_process(self.wrappers[plan.wrapper_id])
            self.wrappers[plan.wrapper_id] = self._process(plan)

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        await self._called("cluster", "remove")
        for wrapper_id in wrapper_ids:
            self.removed.append(wrapper_id)
            if wrapper_id in self.cut_off:
                del self.wrappers[wrapper_id]  # from Serve's list; its process is not told
            elif wrapper_id in self.wrappers:
                self._end_process(self.wrappers.pop(wrapper_id))

    async def report(self, wrapper_id: str, belief: Belief) -> WrapperReport:
        # What it says is made when it is asked; the answer can take its time.
        wrapper = self._reached(wrapper_id)
        self.hear(wrapper, belief)
        memory_bytes = self.memory_bytes.get(wrapper.plan.machine_id)
        report = WrapperReport(
            memory_bytes=None if wrapper.plan.gpus else memory_bytes,
            gpu_memory_bytes=memory_bytes if wrapper.plan.gpus else None,
            epoch=wrapper.epoch,
            running=wrapper.spec.fingerprint if wrapper.spec is not None and wrapper.runs else None,
            starting=wrapper.spec.fingerprint if wrapper.spec is not None and not wrapper.runs else None,
            revision=wrapper.revision,
            died=wrapper.died,
            death_flags=wrapper.death_flags,
            phase="loading" if wrapper.start is not None else wrapper.phase,
            bound=None if wrapper.grant is None else wrapper.grant.request_id,
            idle_for_s=None if wrapper.grant is None else wrapper.idle_for_s,
            in_flight=wrapper.in_flight,
            starts=wrapper.starts,
            versions=self.versions.get(wrapper.plan.machine_id),
            moment=wrapper.gate.moment,
            windows=tuple(wrapper.windows[:WINDOWS_TOLD]),
            lease_flags=wrapper.lease_flags,
        )
        await self._called(wrapper_id, "report")
        return report

    async def deploy(
        self,
        wrapper_id: str,
        epoch: int,
        spec: LLMSpec,
        grant: LeaseGrant | None,
        started_for: StartedFor | None = None,
    ) -> None:
        wrapper = self._take(wrapper_id, epoch)
        if grant is None:
            self._end_lease(wrapper, "released")
        else:
            wrapper.gate.bind(grant)
        if wrapper.spec != spec or (wrapper.start is None and not wrapper.runs):
            self._cancel_start(wrapper)
            wrapper.spec, wrapper.runs, wrapper.died = spec, False, None
            wrapper.started_for = started_for
            wrapper.start = asyncio.create_task(self._start(wrapper, spec))
        start = wrapper.start
        if start is None:
            await self._called(wrapper_id, "deploy")
            return
        await asyncio.wait({start})  # a caller that goes away does not end the start
        if self.wrappers.get(wrapper_id) is not wrapper:
            raise WrapperUnreachable(wrapper_id, "the replica died")
        if start.cancelled():
            raise StaleEpoch(wrapper_id, epoch, wrapper.epoch)
        start.result()

    async def _start(self, wrapper: FakeWrapper, spec: LLMSpec) -> None:
        try:
            await self._called(wrapper.plan.wrapper_id, "deploy")
            if spec.model in self.unusable:
                raise self.unusable[spec.model]
        except BaseException:
            if wrapper.start is asyncio.current_task():
                wrapper.spec = None
            raise
        else:
            begun_with = wrapper.grant.model_revision if wrapper.grant is not None else None
            wrapper.revision = begun_with or self.commits.get(spec.model)
            wrapper.runs = True
            wrapper.starts += 1
        finally:
            if wrapper.start is asyncio.current_task():
                wrapper.start = None
            self._changed()

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        wrapper = self._take(wrapper_id, epoch)
        self._end_lease(wrapper, "shutdown")
        self._cancel_start(wrapper)
        await self._called(wrapper_id, "stop")
        wrapper.spec, wrapper.runs, wrapper.died = None, False, None

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> HandOver:
        await self._called(wrapper_id, "bind")
        wrapper = self._take(wrapper_id, epoch)
        if wrapper.grant is not None and wrapper.grant.token != grant.token:
            self._end_lease(wrapper, "released")
        wrapper.gate.bind(grant)
        return HandOver(wrapper.revision, wrapper.bind_flags, self.provenances.get(wrapper.plan.machine_id))

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        await self._called(wrapper_id, "unbind")
        wrapper = self._take(wrapper_id, epoch)
        if wrapper.grant is not None:
            self._end_lease(wrapper, how if wrapper.grant.request_id == request_id else "released")

    async def touch(self, wrapper_id: str, request_id: str) -> bool:
        await self._called(wrapper_id, "touch")
        wrapper = self._reached(wrapper_id)
        bound = wrapper.grant is not None and wrapper.grant.request_id == request_id
        if bound:
            wrapper.idle_for_s = 0.0
        return bound

    async def restart(self, wrapper_id: str) -> None:
        await self._called(wrapper_id, "restart")
        if wrapper_id in self.cut_off:
            raise WrapperUnreachable(wrapper_id, "there is no way to its machine")
        if wrapper_id in self.wrappers:
            self.kill_process(wrapper_id)

    # --- inside -----------------------------------------------------------------------------------------

    async def _called(self, wrapper_id: str, method: str) -> None:
        self.calls[wrapper_id, method] += 1
        try:
            failures = self._failures.get((wrapper_id, method))
            if failures:
                raise failures.pop(0)
            if (gate := self._gates.get((wrapper_id, method))) is not None:
                gate.arrived += 1
                self._changed()
                await gate.passes()
        finally:
            self._changed()

    def _process(self, plan: WrapperPlan) -> FakeWrapper:
        gate = LeaseGate(self.clock, fence_s=self.fence_s, process=f"process {next(self._processes)}")
        return FakeWrapper(plan, gate=gate)

    def hear(self, wrapper: FakeWrapper, belief: Belief) -> None:
        """What the registry believes reaches a wrapper."""
        if belief.epoch < wrapper.epoch:
            return
        if belief.as_of is not None and belief.as_of.process == wrapper.gate.moment.process:
            wrapper.windows = [each for each in wrapper.windows if each.number > belief.windows_kept]
        wrapper.gate.believe(belief.request_id, belief.as_of)
        bound = wrapper.grant
        if belief.epoch == wrapper.epoch and bound is not None and bound.request_id != belief.request_id:
            self._end_lease(wrapper, "withdrawn")

    def _reached(self, wrapper_id: str) -> FakeWrapper:
        wrapper = self.wrappers.get(wrapper_id)
        if wrapper is None or wrapper.plan.machine_id not in self.machines or wrapper_id in self.cut_off:
            raise WrapperUnreachable(wrapper_id, "there is no such replica")
        return wrapper

    def _take(self, wrapper_id: str, epoch: int) -> FakeWrapper:
        wrapper = self._reached(wrapper_id)
        if epoch < wrapper.epoch:
            raise StaleEpoch(wrapper_id, epoch, wrapper.epoch)
        wrapper.epoch = epoch
        return wrapper

    def _end_lease(self, wrapper: FakeWrapper, how: str) -> None:
        if wrapper.grant is not None:
            wrapper.ended.append((wrapper.grant.request_id, how))
            wrapper.gate.unbind(how)

    def _cancel_start(self, wrapper: FakeWrapper) -> None:
        start, wrapper.start = wrapper.start, None
        if start is not None:
            start.cancel()

    def _end_process(self, wrapper: FakeWrapper) -> None:
        self._cancel_start(wrapper)
        wrapper.spec, wrapper.runs = None, False
        wrapper.gate.unbind("its process has ended")
