"""Simulated wrappers whose commands and answers a test delivers late, in any order, or never.

The wrappers run the real ``deployments.wrapper.commands``. Commands and answers wait in lists until a test delivers
one, and are handled as in ``registry.service``. The rules of Hypothesis are not coroutines, so each step runs an event
loop until no task can run. Nothing here reads the allocator's indices.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from deployments.wrapper.commands import WrapperCommands
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.ports import LLM, OnPhase
from registry.contract.messages import LeaseGrant, StartedFor
from registry.core.allocator import Allocator
from registry.core.commands import BindLease, DeployLLM, Effect, RestartWrapper, StopLLM, UnbindLease
from registry.core.events import (
    Event,
    LeaseBound,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMStopped,
    WrapperFailed,
    WrapperStarted,
)
from registry.core.records import Lease, LLMSpec, WrapperStatus
from registry.errors import EngineStartFailed, StaleEpoch
from tests.support.virtual_time import Stuck, VirtualLoop
from tests.support.wrapper_ports import KeptTasks, NoPrompts, PlainHandOvers, StartedLLM

Answer = Callable[[Allocator], Event | None]
"""The result of a command. It makes its event when the registry receives it, from the state at that moment."""


class HeldLLMs:
    """The engine of a wrapper. A start lasts until the test ends it."""

    def __init__(self) -> None:
        self.running: StartedLLM | None = None
        self.revision: str | None = None
        self.starting: LLMSpec | None = None
        self.outcome: asyncio.Future[None] | None = None
        """Result of the current start, which the test sets; None if nothing is being started."""

    async def replace(
        self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None, on_phase: OnPhase
    ) -> StartedLLM:
        """As LLMSwap.replace."""
        self.running, self.starting = None, spec
        self.outcome = asyncio.get_running_loop().create_future()
        try:
            await self.outcome
        finally:
            self.starting = None
        self.running = StartedLLM(spec)
        return self.running

    async def stop(self) -> None:
        """As LLMSwap.stop."""
        self.running = None

    async def clear_away(self) -> None:
        """As LLMSwap.clear_away."""
        self.running = None

    def give_up(self, llm: StartedLLM, reason: str) -> None:
        """As LLMSwap.give_up."""
        llm.die(reason)


class HandOversByCPU(PlainHandOvers):
    """Hand-overs whose provenance depends on the machine: a and b have another CPU than c and d."""

    def __init__(self, wrapper_id: str) -> None:
        self._kind = "xeon" if wrapper_id < "c" else "epyc"

    async def provenance(
        self, llm: LLM, spec: LLMSpec, revision: str | None, grant: LeaseGrant
    ) -> Mapping[str, object] | None:
        return {"cpu": self._kind}


class QueuedWrapper:
    """One wrapper with its current process."""

    def __init__(self, wrapper_id: str) -> None:
        self.wrapper_id = wrapper_id
        self.calls: dict[asyncio.Task[Event | None], int] = {}
        """The registry's calls that wait for an answer, with their epochs."""
        self._begin()

    def _begin(self) -> None:
        self._tasks = KeptTasks()
        self._gate = LeaseGate(lambda: 0.0, fence_s=1.0, process=self.wrapper_id)
        self._llms = HeldLLMs()
        self._commands: WrapperCommands[StartedLLM] = WrapperCommands(
            self.wrapper_id,
            gate=self._gate,
            prompts=NoPrompts(),
            llms=self._llms,
            hand_overs=HandOversByCPU(self.wrapper_id),
            finish_prompts=False,
            tasks=self._tasks,
        )

    @property
    def epoch(self) -> int:
        """The epoch of the newest command."""
        return self._commands.report().epoch

    @property
    def running(self) -> LLMSpec | None:
        """The LLM that answers prompts."""
        llm, _ = self._commands.engine_state()
        return None if llm is None else llm.spec

    @property
    def starting(self) -> LLMSpec | None:
        """The LLM that is being started."""
        return self._llms.starting

    @property
    def empty(self) -> bool:
        """Whether no LLM runs or is being started."""
        return self._commands.spec is None

    @property
    def token(self) -> str | None:
        """The lease token that the wrapper accepts."""
        return None if self._gate.grant is None else self._gate.grant.token

    @property
    def died(self) -> bool:
        """Whether the wrapper's LLM has died."""
        return self._commands.report().died is not None

    def report(self, _: Allocator) -> Event:
        """Return the wrapper's report about its current state, as an event."""
        report = self._commands.report()
        return WrapperStarted(self.wrapper_id, report.epoch, report.running)

    async def take(self, effect: Effect, lease: Lease | None) -> Event | None:
        """Execute a command. ``lease``: the lease that the registry knows when it sends the command."""
        wrapper_id, epoch = effect.wrapper_id, effect.epoch
        grant = None if lease is None else LeaseGrant(lease.request_id, 1, lease.token_id, "{}", 100.0, 100.0)
        match effect:
            case BindLease():
                assert grant is not None
                over = await self._commands.bind(epoch, grant)
                told = None if over.provenance is None else json.dumps(over.provenance)
                return LeaseBound(wrapper_id, epoch, provenance=told)
            case UnbindLease():
                await self._commands.unbind(epoch, effect.request_id, effect.how)
                return None
            case DeployLLM():
                try:
                    await self._commands.deploy(epoch, effect.spec, grant)
                except EngineStartFailed as error:
                    return LLMDeployFailed(wrapper_id, epoch, str(error), error.permanent)
                return LLMDeployed(wrapper_id, epoch)
            case StopLLM():
                await self._commands.stop(epoch)
                return LLMStopped(wrapper_id, epoch)
            case RestartWrapper():
                raise AssertionError("Serve does that, not the process")

    def finish(self, *, works: bool, permanent: bool) -> None:
        """End the current start: the LLM runs (``works``), or could not be started."""
        assert self._llms.outcome is not None
        if works:
            self._llms.outcome.set_result(None)
        else:
            self._llms.outcome.set_exception(EngineStartFailed("org/any", "out of memory", permanent=permanent))

    def crash(self) -> list[int]:
        """Replace the process by a new one. Return the epochs of the calls that fail because of this."""
        epochs = list(self.calls.values())
        for call in self.calls:
            call.cancel()
        self.calls.clear()
        self._tasks.cancel()
        self._begin()
        return epochs

    def lose_engine(self) -> None:
        """Let the engine's process die; the next report of the wrapper says so."""
        if self._llms.running is not None:
            self._llms.running.die("killed")


def unreachable(wrapper_id: str, epoch: int) -> Answer:
    """Return the result of a command without an answer: an event, unless a newer command was sent since then."""

    def outcome(allocator: Allocator) -> Event | None:
        wrapper = allocator.wrapper(wrapper_id)
        newest = wrapper is not None and wrapper.epoch == epoch
        return WrapperFailed(wrapper_id, "no answer") if newest else None

    return outcome


class QueuedCluster:
    """All wrappers, the commands that have not reached them, and the answers that have not reached the registry."""

    def __init__(self) -> None:
        self.wrappers: dict[str, QueuedWrapper] = {}
        self.commands: list[Effect] = []
        self.answers: list[tuple[str, Answer]] = []
        self.unseen: set[str] = set()
        """Wrappers from which the current process of the registry has no report yet."""
        self._loop = VirtualLoop(most_steps=10_000_000)

    def close(self) -> None:
        """End all tasks, and close the event loop."""
        for wrapper_id in list(self.wrappers):
            self.remove(wrapper_id)
        self._loop.close()

    def add(self, wrapper_id: str) -> None:
        """Create a wrapper. An older one of the same name is removed."""
        self.remove(wrapper_id)
        self.wrappers[wrapper_id] = QueuedWrapper(wrapper_id)

    def remove(self, wrapper_id: str) -> None:
        """Remove a wrapper's process without a replacement."""
        if (wrapper := self.wrappers.pop(wrapper_id, None)) is not None:
            wrapper.crash()
            self._go_on()

    def send(self, command: Effect, allocator: Allocator) -> None:
        """Deliver a command; it is lost if the wrapper does not exist."""
        self.commands.remove(command)
        wrapper_id = command.wrapper_id
        wrapper, lease = self.wrappers.get(wrapper_id), allocator.lease_by_wrapper(wrapper_id)
        if wrapper is None:
            self.answers.append((wrapper_id, unreachable(wrapper_id, command.epoch)))
        elif isinstance(command, BindLease) and (lease is None or lease.request_id != command.request_id):
            pass  # as in registry.service, nothing is sent for a lease that has ended
        elif isinstance(command, RestartWrapper):
            if command.epoch >= wrapper.epoch:
                wrapper.crash()
                self.answers.append((wrapper_id, wrapper.report))
        else:
            call = self._loop.create_task(wrapper.take(command, lease))
            wrapper.calls[call] = command.epoch
            call.add_done_callback(partial(self._answered, wrapper))
        self._go_on()

    def finish(self, wrapper_id: str, *, works: bool, permanent: bool = False) -> None:
        """End the start of a wrapper's LLM: let it run (``works``), or fail."""
        self.wrappers[wrapper_id].finish(works=works, permanent=permanent)
        self._go_on()

    def crash(self, wrapper_id: str) -> None:
        """Let a wrapper's process die; Serve starts a new one."""
        epochs = self.wrappers[wrapper_id].crash()
        self.answers += [(wrapper_id, unreachable(wrapper_id, epoch)) for epoch in epochs]
        self._go_on()

    def lose_engine(self, wrapper_id: str) -> None:
        """Let a wrapper's LLM die; the wrapper notices it."""
        self.wrappers[wrapper_id].lose_engine()
        self._go_on()

    def look_at(self, wrapper_id: str, allocator: Allocator) -> Event | None:
        """Return the event that the registry's watch gets from a wrapper, None if it gets none."""
        record, wrapper = allocator.wrapper(wrapper_id), self.wrappers.get(wrapper_id)
        if record is None or record.status in (WrapperStatus.LOST, WrapperStatus.OFF):
            return None
        if wrapper is None:
            return WrapperFailed(wrapper_id, "no answer")
        if wrapper_id in self.unseen or record.status is WrapperStatus.STARTING:
            return wrapper.report(allocator)
        if self.is_busy(wrapper_id) or record.status is WrapperStatus.RESTARTING:
            return None
        if record.status is WrapperStatus.FAILED or wrapper.epoch < record.epoch:
            return wrapper.report(allocator)
        if record.status in (WrapperStatus.READY, WrapperStatus.LEASED):
            if wrapper.died:
                return LLMDied(wrapper_id, wrapper.epoch, "killed")
            if wrapper.running != record.spec:
                return wrapper.report(allocator)  # its process was replaced before it took the last command
        return None

    def is_busy(self, wrapper_id: str) -> bool:
        """Whether a command to the wrapper is on its way or being executed, or its answer is on its way back."""
        wrapper = self.wrappers.get(wrapper_id)
        return (
            any(command.wrapper_id == wrapper_id for command in self.commands)
            or any(sender == wrapper_id for sender, _ in self.answers)
            or (wrapper is not None and bool(wrapper.calls))
        )

    def forget_registry(self) -> None:
        """Simulate the death of the registry: commands that were not delivered are lost, and so are all answers."""
        self.commands.clear()
        self.answers.clear()
        self.unseen = set(self.wrappers)
        for wrapper in self.wrappers.values():
            wrapper.calls.clear()

    def _answered(self, wrapper: QueuedWrapper, call: asyncio.Task[Event | None]) -> None:
        error = None if call.cancelled() else call.exception()
        if wrapper.calls.pop(call, None) is None or isinstance(error, StaleEpoch):
            return  # no call waits for it any more, or it is out of date
        if (event := call.result()) is not None:
            self.answers.append((wrapper.wrapper_id, lambda _: event))

    def _go_on(self) -> None:
        with suppress(Stuck):
            self._loop.run_forever()
