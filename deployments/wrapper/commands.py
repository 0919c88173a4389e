"""Runs the registry's commands to one wrapper: start or stop an LLM, bind or end a lease.

Every command carries an epoch and supersedes all commands of older epochs. Prompts, LLMs and hand-overs are reached
through three ports, so that simulations run these commands as they are. This file knows no Ray, no vLLM and no clock
other than the lease gate's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Generic

import structlog

from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.ports import HandOvers, L, LLMs, Prompts, Tasks
from registry import background
from registry.contract.messages import SETTLING, Belief, Download, HandOver, LeaseGrant, StartedFor, WrapperReport
from registry.core.records import LLMSpec
from registry.errors import EngineStartFailed, StaleEpoch, WrapperUnreachable
from registry.wire.flags import Flag
from registry.wire.words import Grade

log = structlog.get_logger("deployments.wrapper.commands")


# D103: the rules exist once; ports only do
class WrapperCommands(Generic[L]):
    """The state of one wrapper, and the registry's commands that change it. For one event loop.

    ``finish_prompts``: prompts in flight are not cut when their lease expires. ``tasks`` starts
    background tasks; such a task continues if the call that started it is cancelled.
    """

    def __init__(
        self,
        wrapper_id: str,
        *,
        gate: LeaseGate,
        prompts: Prompts,
        llms: LLMs[L],
        hand_overs: HandOvers[L],
        finish_prompts: bool,
        tasks: Tasks = background,
    ) -> None:
        self._wrapper_id = wrapper_id
        self._gate = gate
        self._prompts = prompts
        self._llms = llms
        self._hand_overs = hand_overs
        self._finish_prompts = finish_prompts
        self._tasks = tasks
        self._epoch = 0
        self._in_force = 0
        self._spec: LLMSpec | None = None
        self._died: str | None = None
        self._death_flags: tuple[str, ...] = ()
        self._phase: str | None = None
        self._download: Download | None = None
        self._start: asyncio.Task[None] | None = None
        self._starts = 0
        self._death_watch: asyncio.Task[None] | None = None
        self._commands = asyncio.Lock()
        self._engine_lock = asyncio.Lock()
        self._settling: asyncio.Task[tuple[str, ...]] | None = None
        self._settling_for: str | None = None
        self._handed_over: tuple[str, HandOver] | None = None

    # --- its state --------------------------------------------------------------------------------------

    @property
    def spec(self) -> LLMSpec | None:
        """The LLM that runs or is being started; None if none should run."""
        return self._spec

    @property
    def is_starting(self) -> bool:
        """Whether an LLM is being started."""
        return self._start is not None

    def living(self) -> L | None:
        """Return the running LLM; None if it died, is being replaced or stopped, or none was started."""
        running = self._llms.running
        return None if self._spec is None or running is None or running.died.is_set() else running

    def engine_state(self) -> tuple[L | None, str]:
        """Return the LLM that answers prompts and "ready", else None and why there is none."""
        running = self.living()
        if running is not None and self._start is None:
            return running, "ready"
        if self._start is not None:
            return None, f"being started ({self._phase or 'waiting'})"
        dead = self._llms.running
        return None, (dead.death_reason if dead is not None else self._died) or "no LLM is deployed"

    def report(self) -> WrapperReport:
        """Return the part of the wrapper's report that this class knows: LLM, lease, progress of a start."""
        grant, living = self._gate.grant, self.living()
        meant = None if self._spec is None else self._spec.fingerprint
        settles = grant is None and self._settling_for is not None
        return WrapperReport(
            epoch=self._epoch,
            running=meant if living is not None and self._start is None else None,
            starting=meant if self._start is not None else None,
            revision=self._llms.revision,
            died=self._died,
            death_flags=self._death_flags if self._died is not None else (),
            phase=self._phase,
            download=self._download,
            bound=grant.request_id if grant is not None else self._settling_for,
            idle_for_s=0.0 if settles else self._gate.idle_for_s,
            in_flight=self._gate.in_flight,
            starts=self._starts,
            moment=self._gate.moment,
            lease_flags=self._hand_overs.lease_flags() if grant is not None else (),
        )

    # --- the registry's commands ------------------------------------------------------------------------

    async def hear(self, belief: Belief) -> None:
        """Process the registry's view of this wrapper's lease, sent with each request for a report.

        Older epoch: ignore the message; a newer command has come. Same epoch: if another lease is
        bound here, end it. The registry has ended that lease while it could not reach this wrapper.
        Newer epoch: only note the message. If another lease is bound here, new prompts are refused
        until the command that ends this lease arrives.
        """
        if belief.epoch < self._epoch:
            return
        self._gate.believe(belief.request_id, belief.as_of)
        bound = self._gate.grant
        if belief.epoch == self._in_force and bound is not None and bound.request_id != belief.request_id:
            log.warning(
                "a lease ends, because the registry does not know it",
                wrapper_id=self._wrapper_id,
                request_id=bound.request_id,
            )
            await self._end_lease("withdrawn")

    async def deploy(
        self, epoch: int, spec: LLMSpec, grant: LeaseGrant | None, started_for: StartedFor | None = None
    ) -> None:
        """Run this LLM instead of any other; returns when it answers.

        The LLM is not started again if it is running or starting already. ``grant`` is a lease whose
        LLM is being restarted; it stays bound, and its prompts are refused with "retry" meanwhile.
        Without ``grant`` the bound lease ends. If this command begins a start, the
        energy of the start is charged to the request ``started_for``; None: to no request.

        Raises:
            StaleEpoch: a newer command has come, before or during this one.
            EngineStartFailed: with the engine's own reason; the wrapper is empty and usable.
            WrapperUnreachable: the previous LLM could not be removed completely.
        """
        async with self._command(epoch):
            if grant is None:
                await self._end_lease("released")
            else:
                self._gate.bind(grant)
            if self._spec != spec or (self._start is None and self.living() is None):
                await self._cancel_start()
                self._spec = spec
                self._died = None
                revision = None if grant is None else grant.model_revision
                self._start = self._tasks.spawn_awaited("start an LLM", self._swap(spec, revision, started_for))
            start = self._start
        if start is not None:
            await asyncio.wait({start})  # cancelling this call does not end the start
            if start.cancelled():
                raise StaleEpoch(self._wrapper_id, epoch, self._epoch)
            start.result()

    async def stop(self, epoch: int) -> None:
        """Stop all LLMs that run, start or sleep; returns when the wrapper is verified to be empty.

        Raises:
            StaleEpoch: a newer command has come.
            WrapperUnreachable: something of an LLM could not be removed.
        """
        async with self._command(epoch):
            await self._end_lease("shutdown")
            await self._prompts.cut_all()
            await self._cancel_start()
            async with self._engine_lock:
                await self._llms.stop()
                self._spec = None
                self._died = None

    async def bind(self, epoch: int, grant: LeaseGrant) -> HandOver:
        """Accept this lease's token and no other, after the previous lease's last prompt has ended.

        Before the lease is bound, the LLM's caches are emptied. For measurement grade, this method
        also waits until the LLM is warm and the machine at rest. An LLM that refuses every prompt of
        the request is not handed over; ``refusal`` of the result then says why. Idempotent.

        Raises:
            StaleEpoch: a newer command has come, before or during this one.
            EngineNotReady: the LLM has died. Or it is being ended, because it did not become idle
                after the previous lease.
        """
        async with self._command(epoch):
            current = self._gate.grant
            if current is not None and current.request_id == grant.request_id:
                self._gate.bind(grant)
                if self._handed_over is not None and self._handed_over[0] == grant.request_id:
                    return self._handed_over[1]
                return HandOver(self._llms.revision, (), await self._provenance(grant))
            await self._end_lease("released")
        await self._prompts.over()  # without the lock, so that a newer command does not wait for these prompts
        refusal = await self._hand_overs.refusal(self.living(), grant)
        if refusal is not None:
            async with self._command(epoch):
                return HandOver(self._llms.revision, (), None, refusal)
        flags = await self._settled(epoch, grant) if grant.grade == Grade.MEASUREMENT else ()
        running = self.living()
        if running is not None:
            flags += await self._hand_overs.forget_prompts(running)
        over = HandOver(self._llms.revision, flags, await self._provenance(grant))
        async with self._command(epoch):
            self._gate.bind(grant)
            self._handed_over = grant.request_id, over
            self._hand_overs.begun(grant)
            return over

    async def unbind(self, epoch: int, request_id: str, how: str) -> None:
        """End the bound lease, whichever it is; cut this request's prompts in flight.

        They are not cut if the lease has expired and ``finish_prompts`` is set.

        Raises:
            StaleEpoch: a newer command has come.
        """
        async with self._command(epoch):
            bound = self._gate.grant
            if bound is not None and bound.request_id != request_id:
                await self._end_lease("released")  # this command superseded the one that should have ended it
            self._gate.unbind(how)
            if how != "expired" or not self._finish_prompts:
                await self._prompts.cut(request_id)

    def touch(self, request_id: str) -> bool:
        """Keep this request's lease alive. Returns False, without effect, if it is not bound here."""
        bound = self._gate.grant is not None and self._gate.grant.request_id == request_id
        if bound:
            self._gate.touch()
        return bound

    # --- inside -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _command(self, epoch: int) -> AsyncIterator[None]:
        """Run the block as one command: one at a time, and only if no newer command has come.

        Raises:
            StaleEpoch: a newer command has come, at the latest while this one waited for the lock.
        """
        if epoch > self._epoch and self._settling is not None:
            self._settling.cancel()
            self._settling = self._settling_for = self._phase = None
        if epoch >= self._epoch:
            self._epoch = epoch
            self._gate.commanded = True
        async with self._commands:
            if epoch < self._epoch:
                raise StaleEpoch(self._wrapper_id, epoch, self._epoch)
            self._in_force = epoch
            yield

    async def _end_lease(self, how: str) -> None:
        """End the bound lease and cut its prompts. If the lease has expired, its prompts are not cut here."""
        ended = self._gate.grant
        if ended is not None:
            self._gate.unbind(how)
            await self._prompts.cut(ended.request_id)

    async def _settled(self, epoch: int, grant: LeaseGrant) -> tuple[str, ...]:
        """Settle for a lease, or wait for the settling in progress; return its flags. Raises StaleEpoch."""
        if epoch < self._epoch:
            raise StaleEpoch(self._wrapper_id, epoch, self._epoch)
        if self._settling is None:
            self._settling_for = grant.request_id
            self._settling = self._tasks.spawn_awaited("settle for a lease", self._settle())
        settling = self._settling
        await asyncio.wait({settling})  # cancelling this call does not end the settling
        if settling.cancelled():
            raise StaleEpoch(self._wrapper_id, epoch, self._epoch)
        return settling.result()

    async def _settle(self) -> tuple[str, ...]:
        self._phase = SETTLING
        try:
            return await self._hand_overs.settle(self.living())
        finally:
            if self._settling is asyncio.current_task():
                self._settling = self._settling_for = self._phase = None

    async def _provenance(self, grant: LeaseGrant) -> Mapping[str, object] | None:
        running, spec = self.living(), self._spec
        if running is None or spec is None:
            return None
        return await self._hand_overs.provenance(running, spec, self._llms.revision, grant)

    async def _cancel_start(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            self._spec = None  # before the wait: after it, _spec may belong to a newer command
            start.cancel()
            await asyncio.wait({start})

    async def _swap(self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None) -> None:
        try:
            self._phase = "finishing_prompts"
            await self._prompts.over()
            async with self._engine_lock:
                self._phase = "stopping"
                running = await self._llms.replace(spec, revision, started_for, self._set_phase)
                self._starts += 1
                if self._death_watch is not None:
                    self._death_watch.cancel()  # it watches an LLM that sleeps now, or was stopped
                self._death_watch = self._tasks.spawn(
                    "end an LLM that died",
                    self._notice_death(running),
                    on_failure=lambda error: self._death_watch_failed(running, error),
                )
        except BaseException as problem:
            if isinstance(problem, EngineStartFailed):
                reason = problem.reason
                log.warning("the LLM did not start", wrapper_id=self._wrapper_id, model=spec.model, reason=reason)
            if self._start is asyncio.current_task():  # else _spec belongs to a newer command
                self._spec = None  # else the old LLM, if it still runs, would be reported as the new one
            raise
        finally:
            self._phase = self._download = None
            if self._start is asyncio.current_task():
                self._start = None

    def _set_phase(self, phase: str, download: Download | None) -> None:
        self._phase, self._download = phase, download

    async def _notice_death(self, running: L) -> None:
        await running.died.wait()
        async with self._engine_lock:
            if self._llms.running is not running:
                return
            if self._start is None and self._spec is not None:  # else a newer command decides what runs
                self._died, self._spec = running.death_reason, None
                self._death_flags = (Flag.ENGINE_OUT_OF_MEMORY,) if running.out_of_memory else ()
            await self._prompts.cut_all()
            try:
                await self._llms.clear_away()
            except WrapperUnreachable as error:
                if self._died is not None:
                    self._died = f"{self._died}; {error.reason}"

    def _death_watch_failed(self, running: L, error: BaseException) -> None:
        """Report an LLM as dead, because its death would go unnoticed. The next command ends its processes."""
        self._llms.give_up(running, f"its death watch failed: {background.reason_of(error)}")
        if self._llms.running is running and self._start is None and self._spec is not None:
            self._died, self._spec, self._death_flags = running.death_reason, None, ()
