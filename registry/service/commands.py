"""Sends the commands of decisions to wrappers; their results come back as events.

Each command runs in a task of its own. By its epoch it supersedes all older commands to its wrapper, whatever the order
in which they arrive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import structlog

from registry.contract.messages import Cluster, HandOver, LeaseGrant, StartedFor
from registry.core.commands import BindLease, DeployLLM, Effect, RestartWrapper, StopLLM, UnbindLease
from registry.core.events import (
    Event,
    LeaseBound,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMStopped,
    WrapperAdded,
    WrapperFailed,
)
from registry.errors import EngineNotReady, EngineStartFailed, InvalidField, StaleEpoch, WrapperUnreachable
from registry.service.accounts import Accounts
from registry.service.archive import Archive
from registry.service.history import ids_of
from registry.service.lease_tokens import LeaseTokens
from registry.service.loop import Loop
from registry.service.tasks import Tasks
from registry.service.turns import Turns
from registry.service.wrapper_reports import WrapperReports
from registry.settings import Settings
from registry.wire.words import canonical_json

log = structlog.get_logger("registry.service.commands")

T = TypeVar("T")

RESEND_DELAYS_S = (0.1, 0.5, 2.0)
"""Pauses before a lease command is sent again to a wrapper that did not answer, seconds."""


class Commands:
    """Sends commands to wrappers, and applies the events that result from them."""

    def __init__(
        self,
        loop: Loop,
        cluster: Cluster,
        reports: WrapperReports,
        tokens: LeaseTokens,
        turns: Turns,
        *,
        tasks: Tasks,
        archive: Archive,
        accounts: Accounts,
        settings: Settings,
    ) -> None:
        self._loop = loop
        self._allocator = loop.allocator
        self._cluster = cluster
        self._reports = reports
        self._tokens = tokens
        self._turns = turns
        self._tasks = tasks
        self._archive = archive
        self._accounts = accounts
        self._settings = settings

    def start(self, event: Event, effects: Sequence[Effect], cause: int | None) -> None:
        """Start the effects of a decision on an event. ``cause``: number of that event, None if it has none."""
        if isinstance(event, WrapperAdded):
            self._turns.created(event.wrapper_id)
        newest = {effect.wrapper_id: effect.epoch for effect in effects}
        for effect in effects:
            is_release = isinstance(effect, UnbindLease) and effect.how == "released"
            if is_release and effect.epoch < newest[effect.wrapper_id]:
                continue  # the next command to this wrapper ends the released lease as well
            self._turns.commanded(effect)
            self._tasks.spawn(f"{type(effect).__name__} {effect.wrapper_id}", self._run(effect, cause))

    async def _run(self, effect: Effect, cause: int | None) -> None:
        """Run a command and apply the resulting event. A failure is ignored if a newer command has superseded it."""
        log.info("effect", kind=type(effect).__name__, cause_id=cause, **ids_of(effect))
        try:
            event = await self._send(effect)
        except StaleEpoch as error:
            log.info("superseded", kind=type(effect).__name__, wrapper_id=effect.wrapper_id, reason=str(error))
            event = None
        except WrapperUnreachable as error:
            event = WrapperFailed(effect.wrapper_id, error.reason) if self._turns.is_newest(effect) else None
        except Exception as error:
            log.exception("a command failed", kind=type(effect).__name__, wrapper_id=effect.wrapper_id)
            reason = f"internal error: {type(error).__name__}: {error}"
            event = WrapperFailed(effect.wrapper_id, reason) if self._turns.is_newest(effect) else None
        finally:
            self._turns.ended(effect)
        if event is not None:
            self._loop.apply(event, cause=cause)

    async def _send(self, effect: Effect) -> Event | None:
        """Send a command, and wait for its result. Return the resulting event, None if nothing follows from it."""
        match effect:
            case DeployLLM():
                return await self._deploy(effect)
            case StopLLM(wrapper_id, epoch):
                await self._cluster.stop(wrapper_id, epoch)
                return LLMStopped(wrapper_id, epoch)
            case BindLease():
                return await self._bind(effect)
            case UnbindLease(wrapper_id, epoch, request_id, how):
                await _with_retries(lambda: self._cluster.unbind(wrapper_id, epoch, request_id, how))
                return None
            case RestartWrapper(wrapper_id, _):
                await self._cluster.restart(wrapper_id)
                return await self._reports.await_start(wrapper_id, effect)

    async def _deploy(self, effect: DeployLLM) -> Event:
        wrapper_id, epoch = effect.wrapper_id, effect.epoch
        lease = self._allocator.lease_by_wrapper(wrapper_id)
        grant = None if lease is None else self._grant(lease.request_id)
        try:
            await self._cluster.deploy(wrapper_id, epoch, effect.spec, grant, self._started_for(effect.request_id))
        except EngineStartFailed as error:
            return LLMDeployFailed(wrapper_id, epoch, str(error), error.permanent)
        except InvalidField as error:  # accepted by the ingress but not on the machine, e.g. a symbolic link
            return LLMDeployFailed(wrapper_id, epoch, str(error))
        return LLMDeployed(wrapper_id, epoch)

    async def _bind(self, effect: BindLease) -> Event | None:
        wrapper_id, epoch, request_id = effect.wrapper_id, effect.epoch, effect.request_id
        if wrapper_id not in self._reports.latest:  # the grant needs the timestamp of a report
            await self._reports.fetch(wrapper_id)
        grant = self._grant(request_id)
        if grant is None:
            return None
        try:
            over = await _with_retries(lambda: self._cluster.bind(wrapper_id, epoch, grant))
        except EngineNotReady as error:
            return LLMDied(wrapper_id, epoch, error.reason)
        if (bound := self._archive.find_request(request_id)) is not None:
            self._archive.recall_request(bound.like_request_id)  # the allocator compares the provenance with it
        return LeaseBound(
            wrapper_id,
            epoch,
            over.model_revision,
            self._reports.versions(wrapper_id),
            over.flags,
            self._provenance(wrapper_id, over),
            over.refusal,
        )

    def _started_for(self, request_id: str | None) -> StartedFor | None:
        if request_id is None:
            return None
        return StartedFor(request_id, self._allocator.request(request_id).measurement_id)

    def _provenance(self, wrapper_id: str, over: HandOver) -> str | None:
        """Return the provenance of a hand-over with machine and wrapper as JSON; None if the wrapper reported none."""
        wrapper = self._allocator.wrapper(wrapper_id)
        if over.provenance is None or wrapper is None:
            return None
        return canonical_json({**over.provenance, "machine": wrapper.machine_id, "wrapper": wrapper_id})

    def _grant(self, request_id: str) -> LeaseGrant | None:
        """Return the lease of a request as it is sent to its wrapper; None if it was released meanwhile."""
        lease = self._allocator.lease_of(request_id)
        if lease is None:
            return None
        request = self._allocator.request(request_id)
        handed_over = request.deployed_s is not None  # the lease's time starts at the hand-over
        used_j, used_g = self._accounts.used(request_id) if handed_over else (0.0, 0.0)
        return LeaseGrant(
            request_id=request_id,
            measurement_id=request.measurement_id,
            token=self._tokens.of(lease),
            llmconfig=request.llmconfig,
            ends_in_s=lease.deadline_s - self._loop.now_s() if handed_over else self._settings.leases.max_s,
            idle_limit_s=lease.idle_limit_s,
            model_revision=request.model_revision,
            as_of=self._reports.moment(lease.wrapper_id),
            max_j=request.max_j,
            max_g=request.max_g,
            used_j=used_j,
            used_g=used_g,
            grade=request.grade,
            handed_over_s=request.deployed_s,
        )


async def _with_retries(send: Callable[[], Awaitable[T]]) -> T:
    """Send a lease command, with retries after RESEND_DELAYS_S if the wrapper does not answer. Return its answer.

    Raises:
        WrapperUnreachable: the last attempt was not answered either.
    """
    for delay_s in RESEND_DELAYS_S:
        try:
            return await send()
        except WrapperUnreachable as error:
            log.warning("a lease command is sent again", wrapper_id=error.wrapper_id, reason=error.reason)
            await asyncio.sleep(delay_s)
    return await send()
