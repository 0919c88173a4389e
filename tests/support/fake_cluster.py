"""Fake machines and wrappers for the registry's service. They have the ``Cluster`` protocol, and fail on command.

A wrapper runs the real commands with a fake engine. A test can *hold* a method of a wrapper (its calls wait until the
gate is opened or fails), let it *fail*, kill a wrapper's engine or process, and add or remove machines. Nothing here
waits for a time to pass.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

from deployments.wrapper.commands import WrapperCommands
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.ports import LLM, OnPhase
from registry.contract.messages import Belief, HandOver, LeaseGrant, Observation, StartedFor, WrapperPlan, WrapperReport
from registry.contract.windows import EnergyWindow
from registry.core.records import LLMSpec, Machine
from registry.errors import EngineStartFailed, StaleEpoch, WrapperUnreachable
from tests.support.fake_counters import ManualClock
from tests.support.wrapper_ports import KeptTasks, NoPrompts, PlainHandOvers, StartedLLM

T = TypeVar("T")

FENCE_S = 30.0

UNTOLD = Belief(epoch=0, request_id=None, as_of=None)
"""The registry's belief about a wrapper from which it has no report yet."""


WINDOWS_TOLD = 3
"""Maximum number of energy windows in a report."""


class Gate:
    """Lets calls wait. ``arrived``: number of calls that have reached the gate."""

    def __init__(self) -> None:
        self.arrived = 0
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def open(self) -> None:
        """Let all calls continue, also later ones."""
        self._outcome.set_result(None)

    def fail(self, error: Exception) -> None:
        """Let all calls fail, also later ones."""
        self._outcome.set_exception(error)

    async def passes(self) -> None:
        """Wait for the gate."""
        await asyncio.shield(self._outcome)


class RecordingGate(LeaseGate):
    """A lease gate that records in ``endings`` the leases that a command has ended, and how."""

    def __init__(self, clock: Callable[[], float], *, fence_s: float, process: str) -> None:
        super().__init__(clock, fence_s=fence_s, process=process)
        self.endings: list[tuple[str, str]] = []

    def unbind(self, how: str) -> None:
        if self.grant is not None:
            self.endings.append((self.grant.request_id, how))
        super().unbind(how)


@dataclass
class FakeLLMs:
    """The engine of a wrapper. A test can hold its starts (``deploy``) and stops."""

    cluster: FakeCluster
    wrapper_id: str
    running: StartedLLM | None = None
    revision: str | None = None
    started_for: StartedFor | None = None

    async def replace(
        self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None, on_phase: OnPhase
    ) -> StartedLLM:
        """As LLMSwap.replace."""
        self.running, self.started_for = None, started_for
        on_phase("loading", None)
        await self.cluster.called(self.wrapper_id, "deploy")
        if spec.model in self.cluster.unusable:
            raise self.cluster.unusable[spec.model]
        self.revision = revision or self.cluster.commits.get(spec.model)
        self.running = StartedLLM(spec)
        return self.running

    async def stop(self) -> None:
        """As LLMSwap.stop."""
        await self.cluster.called(self.wrapper_id, "stop")
        await self.clear_away()

    async def clear_away(self) -> None:
        """As LLMSwap.clear_away."""
        self.running = self.revision = None

    def give_up(self, llm: StartedLLM, reason: str) -> None:
        """As LLMSwap.give_up."""
        llm.die(reason)


@dataclass
class FakeHandOvers(PlainHandOvers):
    """``bind_flags``: flags of the binding of a lease. ``flags``: flags of disturbances during the lease."""

    cluster: FakeCluster
    machine_id: str
    bind_flags: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    async def forget_prompts(self, llm: LLM) -> tuple[str, ...]:
        return self.bind_flags

    async def provenance(
        self, llm: LLM, spec: LLMSpec, revision: str | None, grant: LeaseGrant
    ) -> Mapping[str, object] | None:
        return self.cluster.provenances.get(self.machine_id)

    def lease_flags(self) -> tuple[str, ...]:
        return self.flags


class FakeWrapper:
    """The process of a wrapper. It reports ``idle_for_s`` and ``in_flight`` as the test sets them."""

    def __init__(self, cluster: FakeCluster, plan: WrapperPlan, process: str) -> None:
        self.plan = plan
        self.gate = RecordingGate(cluster.clock, fence_s=cluster.fence_s, process=process)
        self.llms = FakeLLMs(cluster, plan.wrapper_id)
        self.hand_overs = FakeHandOvers(cluster, plan.machine_id)
        self.tasks = KeptTasks(cluster.changed)
        self.idle_for_s = 0.0
        self.in_flight = 0
        self.phase: str | None = None
        self.windows: list[EnergyWindow] = []
        """Windows that the registry has not confirmed as stored."""
        self._cluster = cluster
        self.commands: WrapperCommands[StartedLLM] = WrapperCommands(
            plan.wrapper_id,
            gate=self.gate,
            prompts=NoPrompts(),
            llms=self.llms,
            hand_overs=self.hand_overs,
            finish_prompts=False,
            tasks=self.tasks,
        )

    @property
    def grant(self) -> LeaseGrant | None:
        """The lease that is bound."""
        return self.gate.grant

    @property
    def spec(self) -> LLMSpec | None:
        """The LLM that runs or is being started."""
        return self.commands.spec

    @property
    def runs(self) -> bool:
        """Whether an LLM answers prompts."""
        return self.commands.engine_state()[0] is not None

    @property
    def starts(self) -> int:
        """How many LLMs were started."""
        return self.commands.report().starts

    @property
    def started_for(self) -> StartedFor | None:
        """The request that the last start of an LLM belongs to."""
        return self.llms.started_for

    @property
    def ended(self) -> list[tuple[str, str]]:
        """The leases that this wrapper has ended: request id, and how they ended."""
        return self.gate.endings

    async def hear(self, belief: Belief) -> None:
        """Receive the registry's belief."""
        if belief.as_of is not None and belief.as_of.process == self.gate.moment.process:
            self.windows = [each for each in self.windows if each.number > belief.windows_kept]
        await self.commands.hear(belief)

    def report(self) -> WrapperReport:
        """Return the wrapper's report."""
        report, machine_id = self.commands.report(), self.plan.machine_id
        memory_bytes = self._cluster.memory_bytes.get(machine_id)
        return replace(
            report,
            memory_bytes=None if self.plan.gpus else memory_bytes,
            gpu_memory_bytes=memory_bytes if self.plan.gpus else None,
            phase=report.phase or self.phase,
            idle_for_s=None if self.grant is None else self.idle_for_s,
            in_flight=self.in_flight,
            versions=self._cluster.versions.get(machine_id),
            windows=tuple(self.windows[:WINDOWS_TOLD]),
        )

    def end(self) -> None:
        """End the process with all its tasks."""
        self.llms.running = None
        self.tasks.cancel()
        self.gate.unbind("its process has ended")


class FakeCluster:
    """The fake cluster: machines and wrappers. ``changed`` is called after each event."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.machines: dict[str, Machine] = {}
        self.wrappers: dict[str, FakeWrapper] = {}
        self.calls: Counter[tuple[str, str]] = Counter()
        self.removed: list[str] = []
        self.memory_bytes: dict[str, int] = {}
        """Memory that wrappers report, by machine id: of each GPU, or main memory if there is no GPU."""
        self.versions: dict[str, dict[str, str]] = {}
        """Software versions that wrappers report, by machine id."""
        self.provenances: dict[str, dict[str, object]] = {}
        """Provenance that wrappers report at a hand-over, by machine id."""
        self.unusable: dict[str, EngineStartFailed] = {}
        """Models that can't be started, and why."""
        self.commits: dict[str, str] = {}
        """Current commit of the hub's default branch, by model. Models without an entry are local."""
        self.clock = ManualClock()
        """The wrappers' clock. It moves only if a test moves it, so only commands of the registry end leases."""
        self.fence_s = FENCE_S
        self.cut_off: set[str] = set()
        """Wrappers that are alive, but can't be reached."""
        self._processes = count(1)
        self._gates: dict[tuple[str, str], Gate] = {}
        self._failures: dict[tuple[str, str], list[Exception]] = {}
        self.changed = changed
        self._created: list[FakeWrapper] = []

    # --- what a test can do -----------------------------------------------------------------------------

    def join(self, machine_id: str, *, gpus: int = 0) -> None:
        """Add a machine."""
        self.machines[machine_id] = Machine(machine_id, f"node-{machine_id}", "10.0.0.1", gpus=gpus)

    def leave(self, machine_id: str) -> None:
        """Remove a machine and end its wrappers; Serve still lists them."""
        del self.machines[machine_id]
        for wrapper in self.wrappers.values():
            if wrapper.plan.machine_id == machine_id:
                wrapper.end()

    def hold(self, wrapper_id: str, method: str) -> Gate:
        """Keep calls of this method waiting."""
        gate = self._gates[wrapper_id, method] = Gate()
        return gate

    def fail(self, wrapper_id: str, method: str, *errors: Exception) -> None:
        """Let the next calls of this method fail, one after the other."""
        self._failures.setdefault((wrapper_id, method), []).extend(errors)

    def kill_engine(self, wrapper_id: str, why: str = "its processes are gone", *, out_of_memory: bool = False) -> None:
        """Let the LLM die; the wrapper notices it."""
        llm = self.wrappers[wrapper_id].llms.running
        if llm is not None:
            llm.death_reason, llm.out_of_memory = why, out_of_memory
            llm.died.set()

    def kill_process(self, wrapper_id: str) -> None:
        """Replace the wrapper's process by a new one, without any state."""
        self.wrappers[wrapper_id].end()
        self.wrappers[wrapper_id] = self._process(self.wrappers[wrapper_id].plan)

    async def close(self) -> None:
        """End the tasks of all processes, including those that were replaced."""
        await asyncio.gather(*(wrapper.tasks.stop() for wrapper in self._created))

    # --- the protocol -----------------------------------------------------------------------------------

    async def observe(self) -> Observation:
        await self.called("cluster", "observe")
        return Observation(tuple(self.machines.values()), frozenset(self.wrappers))

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        await self.called("cluster", "create")
        for plan in wrappers:
            if plan.wrapper_id in self.wrappers:
                self.wrappers[plan.wrapper_id].end()
            self.wrappers[plan.wrapper_id] = self._process(plan)

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        await self.called("cluster", "remove")
        for wrapper_id in wrapper_ids:
            self.removed.append(wrapper_id)
            if wrapper_id in self.cut_off:
                del self.wrappers[wrapper_id]  # Serve no longer lists it, but its process continues
            elif wrapper_id in self.wrappers:
                self.wrappers.pop(wrapper_id).end()

    async def report(self, wrapper_id: str, belief: Belief) -> WrapperReport:
        # The report is made when the call arrives; its answer may be delayed.
        wrapper = self._reached(wrapper_id)
        await wrapper.hear(belief)
        report = wrapper.report()
        await self.called(wrapper_id, "report")
        return report

    async def deploy(
        self,
        wrapper_id: str,
        epoch: int,
        spec: LLMSpec,
        grant: LeaseGrant | None,
        started_for: StartedFor | None = None,
    ) -> None:
        wrapper = self._reached(wrapper_id)
        runs_already = wrapper.runs and wrapper.spec == spec
        try:
            await wrapper.commands.deploy(epoch, spec, grant, started_for)
        except StaleEpoch:
            if self.wrappers.get(wrapper_id) is not wrapper:
                raise WrapperUnreachable(wrapper_id, "the replica died") from None
            raise
        if runs_already:
            await self.called(wrapper_id, "deploy")

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        await self._reached(wrapper_id).commands.stop(epoch)

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> HandOver:
        await self.called(wrapper_id, "bind")
        return await self._reached(wrapper_id).commands.bind(epoch, grant)

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        await self.called(wrapper_id, "unbind")
        await self._reached(wrapper_id).commands.unbind(epoch, request_id, how)

    async def touch(self, wrapper_id: str, request_id: str) -> bool:
        await self.called(wrapper_id, "touch")
        wrapper = self._reached(wrapper_id)
        bound = wrapper.commands.touch(request_id)
        if bound:
            wrapper.idle_for_s = 0.0
        return bound

    async def restart(self, wrapper_id: str) -> None:
        await self.called(wrapper_id, "restart")
        if wrapper_id in self.cut_off:
            raise WrapperUnreachable(wrapper_id, "there is no way to its machine")
        if wrapper_id in self.wrappers:
            self.kill_process(wrapper_id)

    # --- inside -----------------------------------------------------------------------------------------

    async def called(self, wrapper_id: str, method: str) -> None:
        """Count a call of a method; let it wait or fail if the test wants that."""
        self.calls[wrapper_id, method] += 1
        try:
            failures = self._failures.get((wrapper_id, method))
            if failures:
                raise failures.pop(0)
            if (gate := self._gates.get((wrapper_id, method))) is not None:
                gate.arrived += 1
                self.changed()
                await gate.passes()
        finally:
            self.changed()

    def _process(self, plan: WrapperPlan) -> FakeWrapper:
        wrapper = FakeWrapper(self, plan, f"process {next(self._processes)}")
        self._created.append(wrapper)
        return wrapper

    def _reached(self, wrapper_id: str) -> FakeWrapper:
        wrapper = self.wrappers.get(wrapper_id)
        if wrapper is None or wrapper.plan.machine_id not in self.machines or wrapper_id in self.cut_off:
            raise WrapperUnreachable(wrapper_id, "there is no such replica")
        return wrapper
