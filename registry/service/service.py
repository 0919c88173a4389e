"""The registry's shell: decide (allocator) → commit (store) → act (cluster). Plain asyncio, no Ray.

One object owns the state. Every event goes through ``_apply``: the decision and its commit happen without an
await in between, so no other event can come in; only then do effects run, each as a task of its own. What an
effect brings about comes back as an event. A command supersedes all older ones of its wrapper (its epoch says
so), therefore effects need no order among themselves. A commit or a decision that fails ends the process: its
restart loads the database, which is simpler than rolling memory back. Whatever else fails ends nothing: the
watching goes on.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from registry.contract.messages import (
    Belief,
    Cluster,
    HandOver,
    LeaseGrant,
    Moment,
    StartedFor,
    WrapperPlan,
    WrapperReport,
    plan,
    wanted_wrappers,
    with_known_ids,
)
from registry.core.allocator import Allocator
from registry.core.records import (
    BindLease,
    Changes,
    Decision,
    DeployLLM,
    Effect,
    Event,
    Grade,
    KeptWindow,
    Lease,
    LeaseBound,
    LeaseFlagged,
    LeaseLapsed,
    LeaseReleased,
    LeaseRequested,
    LeaseUsed,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMSpec,
    LLMStopped,
    MachineDrained,
    MachineJoined,
    MachineUndrained,
    NewRequest,
    Priority,
    Request,
    RequestStatus,
    RestartWrapper,
    ShutdownBegun,
    StopLLM,
    TimePassed,
    UnbindLease,
    Wrapper,
    WrapperAdded,
    WrapperFailed,
    WrapperStarted,
    WrapperStatus,
    WrapperSwitchedOff,
    canonical_json,
)
from registry.errors import (
    EngineNotReady,
    EngineStartFailed,
    IdempotencyConflict,
    InternalError,
    InvalidField,
    LeaseEnded,
    NoSuchLease,
    RegistryError,
    ShuttingDown,
    StaleEpoch,
    StoreUnavailable,
    WrapperUnheard,
    WrapperUnreachable,
)
from registry.service.accounts import Accounts
from registry.service.archive import KEPT, Archive
from registry.service.history import ids_of, log_fields, rows_of
from registry.service.news import News
from registry.settings import Settings
from registry.store.store import IdempotencyRow, Store, StoredEvent
from registry.wire.schemas import MAX_WAIT_S

log = structlog.get_logger("registry.service.service")

T = TypeVar("T")

FAILED_RETRY_S = 30.0
"""How often a wrapper that was given up is looked at again, seconds."""

ACTIVITY_GRAIN = 0.05
"""While a lease is used its activity is written down when it is newer by this share of the idle limit than what is
known: each time is a commit. Before a lease is ended its wrapper is asked, so it costs no lease a second."""

STOP_MARGIN_S = 10.0
"""How much longer than an LLM may take to stop a shutdown waits for it, seconds."""

DAY_S = 86_400.0

FORGET_AT_ONCE = 200
"""Rows of each kind that are forgotten in one transaction: some 20 ms in which the registry decides nothing."""

FORGET_PAUSE_S = 0.05
"""Pause between two such transactions, seconds: the rest of the time is for others."""

_WATCHED = frozenset(
    {WrapperStatus.IDLE, WrapperStatus.DEPLOYING, WrapperStatus.READY, WrapperStatus.LEASED, WrapperStatus.STOPPING}
)
"""States in which a wrapper that does not answer has failed."""

_UNWATCHED = frozenset({WrapperStatus.LOST, WrapperStatus.OFF, WrapperStatus.RESTARTING})
"""States in which a wrapper is not asked how it is."""

GRANT_WAIT_S = 0.25
"""How long the answer to a POST is held back for an LLM that is warm and free, seconds; it takes milliseconds."""

RESEND_DELAYS_S = (0.1, 0.5, 2.0)
"""Pauses before a lease command is sent again to a wrapper that did not take it, seconds."""


REMEMBERED_TOKENS = 10_000
"""Leases whose tokens the registry still knows, ended ones included."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's Idempotency-Key and the SHA-256 of the body it came with, as canonical JSON."""

    key: str
    body_sha256: str


class Service:
    """The registry's judgement, memory and hands.

    Must be made, started and used in one event loop. ``now_s`` gives UTC seconds, ``new_token`` unguessable
    lease tokens, ``homes`` the LLM for a machine id or ``*``; ``on_fatal`` is called
    when the database or a decision fails and must end the process, ``on_energy`` for each energy window that is kept.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        cluster: Cluster,
        *,
        now_s: Callable[[], float],
        new_token: Callable[[], str],
        homes: Mapping[str, LLMSpec],
        on_fatal: Callable[[RegistryError], None],
        on_energy: Callable[[KeptWindow], None] = lambda _: None,
        ended_kept: int = KEPT,
    ) -> None:
        self.settings = settings
        self.allocator = Allocator(settings.limits, new_token)
        self.archive = Archive(store, self.allocator, ended_kept)
        self.accounts = Accounts(
            store, self.allocator, self.archive, budgets=settings.budgets.tenants, now_s=now_s, on_kept=on_energy
        )
        self.news = News()
        self.reports: dict[str, WrapperReport] = {}
        self.heard_s: dict[str, float] = {}
        """When each wrapper has last reported to this process, UTC seconds."""
        self._store = store
        self._cluster = cluster
        self._now_s = now_s
        self._homes = homes
        self._on_fatal = on_fatal
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._under_way: dict[str, Effect] = {}
        """The newest command to each wrapper while it is under way; none that was given before it was created anew."""
        self._turns: dict[str, int] = {}
        """How often each wrapper was commanded or created anew."""
        self._misses: dict[str, int] = {}
        self._deployed: frozenset[str] | None = None
        self._switching_off: set[str] = set()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._tokens: OrderedDict[str, str] = OrderedDict()
        """Request ids by lease token, of the last REMEMBERED_TOKENS leases, ended ones included."""
        self._answered_again: set[str] = set()
        """First request ids of POSTs that were answered once more by their Idempotency-Key."""
        self._asked: set[str] = set()
        self._idle = asyncio.Event()
        self._stopping = False
        self._closed = False
        self._forget_next_s = 0.0
        self._begun_s = self._before_s = 0.0
        """When this process began, and when the one before it last wrote something, UTC seconds."""

    # --- life -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the database and begin to watch. Returns at once; machines and wrappers come in by themselves."""
        self._begun_s = self._now_s()
        newest_s = self._store.newest_event_s()
        self._before_s = self._begun_s if newest_s is None else min(newest_s, self._begun_s)
        stored = self._store.load(ended=False)
        self.allocator.load(stored, self._store.next_seq())
        self._remember_tokens(stored.leases)
        self._spawn(self._watch_cluster())
        self._spawn(self._watch_time())

    async def _forget(self) -> None:
        await self._guarded("what ended long ago could not be forgotten", self._forget_in_parts())

    async def _forget_in_parts(self) -> None:
        """Forget what ended more than ``keep_days`` ago, in small parts. Others are let in between them.

        The time in which no registry ran is not counted, as a clock that is wrong at the start would forget everything.
        """
        seen_s = self._before_s + self._now_s() - self._begun_s
        before_s, count = seen_s - self.settings.keep_days * DAY_S, 0
        while not self._closed:
            try:
                part = self._store.forget(ended_before_s=before_s, limit=FORGET_AT_ONCE)
                self.archive.forgotten(part.request_ids)
            except StoreUnavailable as error:
                self._on_fatal(error)
                raise
            self.accounts.forget(part.request_ids)
            self._answered_again.difference_update(part.request_ids)
            count += len(part.request_ids)
            if not part.more:
                log.info("requests were forgotten", count=count, keep_days=self.settings.keep_days)
                return
            await asyncio.sleep(FORGET_PAUSE_S)

    async def shutdown(self) -> None:
        """Stop every LLM and every wrapper, then close the database. Takes no new requests from the first moment.

        Waits for each step at most as long as the settings allow; queued requests stay queued for the next start.
        Again is not an error.
        """
        if self._closed:
            return
        self._stopping = True
        self._apply(ShutdownBegun())
        limit_s = self.settings.wrappers.stop_timeout_s + STOP_MARGIN_S
        try:
            async with asyncio.timeout(limit_s):
                while any(w.status is WrapperStatus.STOPPING for w in self.allocator.wrappers()):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            left = [w.wrapper_id for w in self.allocator.wrappers() if w.status is WrapperStatus.STOPPING]
            log.warning("LLMs did not stop in time; their wrappers are removed all the same", wrappers=left)
        await self._cancel_tasks()
        await asyncio.gather(*map(self._hear_out, self.allocator.wrappers()))
        await self._guarded(
            "wrappers could not be removed", self._cluster.remove([w.wrapper_id for w in self.allocator.wrappers()])
        )
        self._closed = True
        self._store.close()

    async def _hear_out(self, wrapper: Wrapper) -> None:
        """What a wrapper has measured of its last lease is written down before it is removed."""
        if wrapper.status in _WATCHED:
            with suppress(WrapperUnreachable):
                await self._report(wrapper.wrapper_id)

    async def _cancel_tasks(self) -> None:
        tasks = [*self._tasks, *self._watchers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watchers.clear()

    # --- what clients ask -------------------------------------------------------------------------------

    def request(
        self,
        measurement_id: int,
        llms: Sequence[NewRequest],
        *,
        tenant: str = "default",
        priority: Priority | None = None,
        gpu_type: str | None = None,
        idempotency: Idempotency | None = None,
        grade: Grade = Grade.STANDARD,
        like_request_id: str | None = None,
    ) -> tuple[Request, ...]:
        """Accept requests for LLMs, durable when this returns; in the order given.

        Ids come from the caller, so that it can safely ask again when it did not get the answer: the same ids
        are the same requests.

        Raises:
            QueueFull, LLMNeverFits, InvalidField, TenantBudgetUsed, ShuttingDown: nothing was accepted.
            IdempotencyConflict: the key was used with another body.
        """
        if self._closed:
            raise ShuttingDown
        if idempotency is not None:
            known = self._store.idempotent_request_ids(tenant, idempotency.key)
            if known is not None:
                if known[0] != idempotency.body_sha256:
                    raise IdempotencyConflict(idempotency.key)
                if known[1][0] != llms[0].request_id:
                    self._answered_again.add(known[1][0])
                return tuple(self.known(request_id) for request_id in known[1])
        ids = tuple(request.request_id for request in llms)
        if self._knows(ids[0]):
            return tuple(self.known(request_id) for request_id in ids)
        row = None
        if idempotency is not None:
            row = IdempotencyRow(tenant, idempotency.key, idempotency.body_sha256, ids, self._now_s())
        notes = self.accounts.notes(tenant)
        llms = [replace(llm, notes=(*llm.notes, *notes)) for llm in llms]
        self.archive.recall((tenant, measurement_id))
        self.archive.recall_request(like_request_id)
        asked = LeaseRequested(measurement_id, tuple(llms), tenant, priority, gpu_type, grade, like_request_id)
        self._apply(asked, idempotency=row)
        return tuple(self.allocator.request(request_id) for request_id in ids)

    def release(self, request_id: str) -> None:
        """The client is done with the LLM, or no longer wants it. Again is not an error.

        Raises:
            UnknownRequest, RequestForgotten: no request has this id, or none has it any more.
        """
        if not self.known(request_id).status.ended:
            self._apply(LeaseReleased(request_id))

    def withdraw(self, request_ids: Sequence[str], *, tenant: str, key: str | None) -> None:
        """Release the requests of a POST that was not answered: nobody has their ids. Idempotent.

        Its Idempotency-Key is forgotten, so that the client's next attempt makes new requests. Nothing happens if that
        attempt came first and was given these requests, or if they were never accepted.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        known = [request_id for request_id in request_ids if self._knows(request_id)]
        if not known or request_ids[0] in self._answered_again:
            return
        if key is not None:
            try:
                self._store.forget_idempotency_key(tenant, key)
            except StoreUnavailable as error:
                self._on_fatal(error)
                raise
        for request_id in known:
            self.release(request_id)

    def leased_with(self, token: str) -> str:
        """Return the id of the request whose lease has this token.

        Raises:
            LeaseEnded: the lease has ended, as far as that is remembered: not from before the last restart.
            NoSuchLease: no lease has, or had, this token.
        """
        request_id = self._tokens.get(token)
        if request_id is None:
            raise NoSuchLease
        lease, status = self.allocator.lease_of(request_id), self.known(request_id).status
        if lease is None or lease.token != token:
            raise LeaseEnded(status.value if status.ended else "replaced")
        return request_id

    def _remember_tokens(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self._tokens[lease.token] = lease.request_id
            self._tokens.move_to_end(lease.token)
        while len(self._tokens) > REMEMBERED_TOKENS:
            self._tokens.popitem(last=False)

    async def granted(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The requests of one POST, the first handed over if its LLM was warm and free.

        Only the wrapper's word is missing then, which is waited for, at most GRANT_WAIT_S.
        """
        first = requests[0]
        wrapper = None if first.wrapper_id is None else self.allocator.wrapper(first.wrapper_id)
        if wrapper is not None and wrapper.status is WrapperStatus.LEASED:
            await self.wait_for_change(first.request_id, GRANT_WAIT_S, RequestStatus.DEPLOYING)
        return tuple(self.known(request.request_id) for request in requests)

    async def keep_alive(self, request_id: str) -> Request:
        """The client still needs its LLM: its idle time starts anew, unless the wrapper has just ended its lease.

        While its LLM is being started again the wrapper may not know of the lease yet, which stands all the same.

        Raises:
            UnknownRequest, RequestForgotten: no request has this id, or none has it any more.
            WrapperUnreachable: the wrapper could not be told; the lease stands as it was.
        """
        request = self.known(request_id)
        lease = self.allocator.lease_of(request_id)
        if lease is not None:
            stands = await self._cluster.touch(lease.wrapper_id, request_id)
            held = self.allocator.lease_of(request_id) is not None  # still, after the call
            if held and (stands or self.allocator.request(request_id).status is RequestStatus.DEPLOYING):
                self._apply(LeaseUsed(request_id, self._now_s()))
            request = self.known(request_id)
        return request

    def drain(self, machine_id: str) -> None:
        """Hand out no more LLMs on a machine; when what is used there has ended, its wrappers go. Again is no error.

        Raises:
            UnknownMachine: no machine has this id.
            ShuttingDown: the registry's database is closed.
        """
        self._apply(MachineDrained(machine_id))

    def undrain(self, machine_id: str) -> None:
        """Use a machine again; its wrappers come back. Again is no error.

        Raises:
            UnknownMachine, ShuttingDown: as for ``drain``.
        """
        self._apply(MachineUndrained(machine_id))

    def is_off(self, machine_id: str) -> bool:
        """True when a drained machine has no wrapper any more: its GPUs are free, and it may be switched off."""
        machine, deployed = self.allocator.known_machine(machine_id), self._deployed
        wrappers = self.allocator.wrappers_on(machine_id)
        gone = {WrapperStatus.OFF} if machine.alive else {WrapperStatus.OFF, WrapperStatus.LOST}
        return (
            machine.draining
            and deployed is not None
            and all(wrapper.status in gone for wrapper in wrappers)
            and deployed.isdisjoint(wrapper.wrapper_id for wrapper in wrappers)
        )

    def misses_reports(self, wrapper_id: str) -> bool:
        """True when a wrapper did not answer when it was last asked."""
        return wrapper_id in self._misses

    async def wait_for_change(self, request_id: str, wait_s: float, seen: RequestStatus | None = None) -> Request:
        """The request, as soon as its status is another than ``seen`` or after ``wait_s`` (at most MAX_WAIT_S) seconds.

        Who does not say what it has seen waits for its LLM: ``deployed`` is news then, whatever else only when it
        differs from now. Nobody waits for a request that has ended.

        Raises:
            UnknownRequest, RequestForgotten: no request has this id, or none has it any more.
        """
        request = self.known(request_id)
        if seen is None and request.status is not RequestStatus.DEPLOYED:
            seen = request.status
        if wait_s <= 0 or request.status is not seen or request.status.ended:
            return request
        try:
            async with asyncio.timeout(min(wait_s, MAX_WAIT_S)):
                while self.known(request_id).status is seen:
                    await self._next_change(request_id)
        except TimeoutError:
            pass  # nothing changed: the answer is the state as it is
        return self.known(request_id)

    def history(self, request_id: str, *, after: int = 0, limit: int = 1000) -> tuple[StoredEvent, ...]:
        """What has happened to a request: the oldest ``limit`` (> 0) events with a number above ``after``, in order.

        Raises:
            UnknownRequest, RequestForgotten: no request has this id, or none has it any more.
            StoreUnavailable: the database does not answer.
        """
        self.known(request_id)
        return self._store.events(after=after, limit=limit, request_id=request_id)

    async def _next_change(self, request_id: str) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(request_id, set()).add(future)
        try:
            await future
        finally:
            waiting = self._waiters.get(request_id)
            if waiting is not None:
                waiting.discard(future)
                if not waiting:
                    del self._waiters[request_id]

    # --- decide, commit, act ----------------------------------------------------------------------------

    def _apply(self, event: Event, *, cause: int | None = None, idempotency: IdempotencyRow | None = None) -> None:
        """Let an event happen. ``cause``: the number of the event whose command it answers."""
        if self._closed:
            raise ShuttingDown
        now_s = self._now_s()
        decision = self._decide(event, now_s)
        number = self._commit(event, decision.changes, now_s, cause, idempotency)
        if not decision.changes.empty:
            self._wake(decision.changes)
        if isinstance(event, WrapperAdded):
            self._turn(event.wrapper_id, None)
        newest = {effect.wrapper_id: effect.epoch for effect in decision.effects}
        for effect in decision.effects:
            if (
                isinstance(effect, UnbindLease)
                and effect.how == "released"
                and effect.epoch < newest[effect.wrapper_id]
            ):
                continue  # whatever comes next for this wrapper ends the lease before it, too
            self._turn(effect.wrapper_id, effect)
            self._spawn(self._run(effect, number))

    def _turn(self, wrapper_id: str, effect: Effect | None) -> None:
        """A wrapper is commanded or (None) created anew: what was commanded before says nothing of it any more."""
        self._turns[wrapper_id] = self._turns.get(wrapper_id, 0) + 1
        if effect is None:
            self._under_way.pop(wrapper_id, None)
        else:
            self._under_way[wrapper_id] = effect

    def _decide(self, event: Event, now_s: float) -> Decision:
        try:
            return self.allocator.handle(event, now_s)
        except RegistryError:
            raise  # refused, and nothing has changed
        except Exception as error:  # half changed, perhaps: as bad as a commit that failed
            log.exception("a decision failed", kind=type(event).__name__, **ids_of(event))
            self._on_fatal(InternalError(f"{type(event).__name__}: {error}"))
            raise

    def _commit(
        self, event: Event, changes: Changes, now_s: float, cause: int | None, idempotency: IdempotencyRow | None
    ) -> int | None:
        if changes.empty and idempotency is None:
            return None
        rows = rows_of(event, changes, self.allocator.request, now_s, cause)
        try:
            number = self._store.commit(changes, events=rows, idempotency=idempotency)
        except StoreUnavailable as error:
            self._on_fatal(error)
            raise
        for row in rows:
            log.info("event", **log_fields(row))
        return number

    def _wake(self, changes: Changes) -> None:
        self._remember_tokens(changes.leases)
        self.archive.note(changes)
        self.news.add(request.request_id for request in changes.requests)
        for request in changes.requests:
            for future in self._waiters.pop(request.request_id, ()):
                if not future.done():
                    future.set_result(None)
        if changes.wrappers or changes.removed_wrappers:
            self._idle.set()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the registry ended with an error", exc_info=error)

    async def _guarded(self, what: str, work: Awaitable[None]) -> None:
        """Await background work. What goes wrong ends this piece of it and no more, so that the watching goes on."""
        try:
            await work
        except StoreUnavailable:
            raise  # on_fatal was told: the process ends
        except RegistryError as error:
            log.warning(what, reason=str(error))
        except Exception:
            log.exception(what)

    async def _run(self, effect: Effect, cause: int | None) -> None:
        """Carry an effect out and report what came of it, unless newer commands have made it meaningless."""
        log.info("effect", kind=type(effect).__name__, cause_id=cause, **ids_of(effect))
        try:
            event = await self._outcome(effect)
        except StaleEpoch as error:
            log.info("superseded", kind=type(effect).__name__, wrapper_id=effect.wrapper_id, reason=str(error))
            event = None
        except WrapperUnreachable as error:
            event = WrapperFailed(effect.wrapper_id, error.reason) if self._is_newest(effect) else None
        except Exception as error:
            log.exception("a command failed", kind=type(effect).__name__, wrapper_id=effect.wrapper_id)
            reason = f"internal error: {type(error).__name__}: {error}"
            event = WrapperFailed(effect.wrapper_id, reason) if self._is_newest(effect) else None
        finally:
            if self._is_newest(effect):
                del self._under_way[effect.wrapper_id]
        if event is not None:
            self._apply(event, cause=cause)

    def _is_newest(self, effect: Effect) -> bool:
        return self._under_way.get(effect.wrapper_id) is effect

    def _quiet_turn(self, wrapper_id: str, own: Effect | None) -> int | None:
        """A wrapper's turn while no command but ``own`` is under way to it, else None: two equal ones, and none was.

        One that was superseded does not count: its outcome changes nothing, and it may end long after.
        """
        return self._turns.get(wrapper_id, 0) if self._under_way.get(wrapper_id) in (None, own) else None

    async def _outcome(self, effect: Effect) -> Event | None:
        match effect:
            case DeployLLM(wrapper_id, epoch, spec, request_id):
                try:
                    lease = self.allocator.lease_by_wrapper(wrapper_id)
                    grant = None if lease is None else self._grant(lease.request_id)
                    await self._cluster.deploy(wrapper_id, epoch, spec, grant, self._started_for(request_id))
                except EngineStartFailed as error:
                    return LLMDeployFailed(wrapper_id, epoch, str(error), error.permanent)
                except InvalidField as error:  # allowed by the ingress, but not there: a link that leads elsewhere
                    return LLMDeployFailed(wrapper_id, epoch, str(error))
                return LLMDeployed(wrapper_id, epoch)
            case StopLLM(wrapper_id, epoch):
                await self._cluster.stop(wrapper_id, epoch)
                return LLMStopped(wrapper_id, epoch)
            case BindLease(wrapper_id, epoch, request_id):
                if wrapper_id not in self.reports:  # just loaded: the grant needs a moment of the wrapper's
                    await self._report(wrapper_id)
                grant = self._grant(request_id)
                if grant is None:
                    return None
                try:
                    over = await _insist(lambda: self._cluster.bind(wrapper_id, epoch, grant))
                except EngineNotReady as error:
                    return LLMDied(wrapper_id, epoch, error.reason)
                if (bound := self.archive.find_request(request_id)) is not None:
                    self.archive.recall_request(bound.like_request_id)  # which it is compared with
                return LeaseBound(
                    wrapper_id,
                    epoch,
                    over.model_revision,
                    self._versions_of(wrapper_id),
                    over.flags,
                    self._provenance(wrapper_id, over),
                    over.refusal,
                )
            case UnbindLease(wrapper_id, epoch, request_id, how):
                await _insist(lambda: self._cluster.unbind(wrapper_id, epoch, request_id, how))
                return None
            case RestartWrapper(wrapper_id, _):
                await self._cluster.restart(wrapper_id)
                return await self._await_wrapper(wrapper_id, effect)

    def _started_for(self, request_id: str | None) -> StartedFor | None:
        if request_id is None:
            return None
        return StartedFor(request_id, self.allocator.request(request_id).measurement_id)

    def _versions_of(self, wrapper_id: str) -> str | None:
        report = self.reports.get(wrapper_id)
        return None if report is None or report.versions is None else canonical_json(report.versions)

    def _provenance(self, wrapper_id: str, over: HandOver) -> str | None:
        """What a wrapper tells of a hand-over, and where it is."""
        wrapper = self.allocator.wrapper(wrapper_id)
        if over.provenance is None or wrapper is None:
            return None
        return canonical_json({**over.provenance, "machine": wrapper.machine_id, "wrapper": wrapper_id})

    def _grant(self, request_id: str) -> LeaseGrant | None:
        lease = self.allocator.lease_of(request_id)
        if lease is None:  # released between the decision and now
            return None
        request = self.allocator.request(request_id)
        handed_over = request.deployed_s is not None  # its time begins then, however long that takes
        used_j, used_g = self.accounts.used(request_id) if handed_over else (0.0, 0.0)
        return LeaseGrant(
            request_id=request_id,
            measurement_id=request.measurement_id,
            token=lease.token,
            llmconfig=request.llmconfig,
            ends_in_s=lease.deadline_s - self._now_s() if handed_over else self.settings.leases.max_s,
            idle_limit_s=lease.idle_limit_s,
            model_revision=request.model_revision,
            as_of=self._heard_at(lease.wrapper_id),
            max_j=request.max_j,
            max_g=request.max_g,
            used_j=used_j,
            used_g=used_g,
            grade=request.grade,
            handed_over_s=request.deployed_s,
        )

    def _belief(self, wrapper_id: str) -> Belief:
        wrapper, lease = self.allocator.wrapper(wrapper_id), self.allocator.lease_by_wrapper(wrapper_id)
        as_of = self._heard_at(wrapper_id)
        return Belief(
            epoch=0 if wrapper is None else wrapper.epoch,
            request_id=None if lease is None else lease.request_id,
            as_of=as_of,
            windows_kept=self.accounts.kept(wrapper_id, as_of),
        )

    def _heard_at(self, wrapper_id: str) -> Moment | None:
        """The moment of a wrapper's last report: whatever is known now was so then, or later."""
        report = self.reports.get(wrapper_id)
        return None if report is None else report.moment

    # --- watching ---------------------------------------------------------------------------------------

    async def _watch_cluster(self) -> None:
        """Keep machines and wrappers as they should be, for ever; no error ends it."""
        while not self._stopping:
            await self._guarded("the cluster could not be reconciled", self._reconcile())
            await asyncio.sleep(self.settings.watch.period_s)

    async def _reconcile(self) -> None:
        observed = await self._cluster.observe()
        known = self.allocator.machines()
        machines = with_known_ids(observed.machines, known)
        for named, machine in zip(observed.machines, machines, strict=True):
            if named.machine_id != machine.machine_id and all(machine.node_id != each.node_id for each in known):
                log.warning("a node joined under another's name", name=named.machine_id, machine_id=machine.machine_id)
        observed = replace(observed, machines=machines, leaving=observed.leaving | self._switching_off)
        self._deployed = observed.wrapper_ids | observed.leaving
        wanted: dict[str, tuple[WrapperPlan, ...]] = {
            machine.machine_id: wanted_wrappers(
                machine,
                per_machine=self.settings.wrappers.per_machine,
                gpus_per_wrapper=self.settings.wrappers.gpus_per_wrapper,
                base_url=self.settings.base_url,
                homes=self._homes,
            )
            for machine in observed.machines
        }
        steps = plan(known, self.allocator.wrappers(), observed, wanted)
        await self._apply_all(steps.events)
        if steps.switch_off:
            self._switching_off.update(steps.switch_off)
            self._spawn(self._switch_off(steps.switch_off))
        if steps.remove:
            await self._cluster.remove(steps.remove)
        if steps.create:
            await self._cluster.create(steps.create)
        await self._apply_all(steps.created)
        present = {wrapper.wrapper_id for wrapper in self.allocator.wrappers()}
        watched = {wrapper_id for wrapper_id, task in self._watchers.items() if not task.done()}
        for wrapper_id in sorted(present - watched):  # in an order that a simulation can repeat
            self._watchers[wrapper_id] = asyncio.create_task(self._watch_wrapper(wrapper_id))
            self._watchers[wrapper_id].add_done_callback(self._ended)
        for wrapper_id in self._watchers.keys() - present:
            self._watchers.pop(wrapper_id).cancel()
            self.reports.pop(wrapper_id, None)
            self.heard_s.pop(wrapper_id, None)

    async def _apply_all(self, events: Sequence[Event]) -> None:
        """Apply what the watching has found. Others are let in between: a thousand machines may join at once."""
        for event in events:
            self._apply(event)
            await asyncio.sleep(0)

    async def _switch_off(self, wrapper_ids: Sequence[str]) -> None:
        """Remove wrappers of drained machines, unless prompts of a lease that has expired are being finished there.

        Beside the watching, since it takes as long as Serve takes to end a replica. What comes in between (a crash, an
        error, an undrain) is found by the next look at the cluster.
        """
        await self._guarded("wrappers could not be switched off", self._remove_unless_used(wrapper_ids))
        self._switching_off.difference_update(wrapper_ids)

    async def _remove_unless_used(self, wrapper_ids: Sequence[str]) -> None:
        prompted = await asyncio.gather(*map(self._is_prompted, wrapper_ids))
        for wrapper_id in (each for each, busy in zip(wrapper_ids, prompted, strict=True) if not busy):
            self._apply(WrapperSwitchedOff(wrapper_id))
        known = {wrapper_id: self.allocator.wrapper(wrapper_id) for wrapper_id in wrapper_ids}
        off = [wrapper_id for wrapper_id, w in known.items() if w is None or w.status is WrapperStatus.OFF]
        if off:
            await self._cluster.remove(off)
        for wrapper_id in off:
            self.reports.pop(wrapper_id, None)

    async def _is_prompted(self, wrapper_id: str) -> bool:
        try:
            return bool((await self._cluster.report(wrapper_id, self._belief(wrapper_id))).in_flight)
        except WrapperUnreachable:
            return False

    async def _watch_wrapper(self, wrapper_id: str) -> None:
        """Follow one wrapper for as long as it exists. One that hangs holds up nobody but itself."""
        problem = f"wrapper {wrapper_id} could not be looked after"
        known = self.allocator.wrapper(wrapper_id)
        if known is not None and known.status is not WrapperStatus.OFF:
            await self._guarded(problem, self._follow_start(wrapper_id))
        while (wrapper := self.allocator.wrapper(wrapper_id)) is not None:
            given_up = wrapper.status is WrapperStatus.FAILED
            await asyncio.sleep(FAILED_RETRY_S if given_up else self.settings.watch.period_s)
            await self._guarded(problem, self._look_after(wrapper_id))

    async def _follow_start(self, wrapper_id: str) -> None:
        if (event := await self._await_wrapper(wrapper_id)) is not None:
            self._apply(event)

    async def _look_after(self, wrapper_id: str) -> None:
        wrapper = self.allocator.wrapper(wrapper_id)
        if wrapper is None or wrapper.status in _UNWATCHED:
            self._misses.pop(wrapper_id, None)
            return
        if wrapper.status is WrapperStatus.STARTING:
            await self._follow_start(wrapper_id)
            return
        try:
            report, is_news = await self._report(wrapper_id)
        except WrapperUnheard:
            return  # which says nothing about the wrapper
        except WrapperUnreachable as error:
            self._missed(wrapper_id, error.reason)
            return
        self._misses.pop(wrapper_id, None)
        self._take_report(wrapper_id, report, is_news)

    def _missed(self, wrapper_id: str, reason: str) -> None:
        """A report did not come; several in a row mean that the wrapper has failed."""
        misses = self._misses[wrapper_id] = self._misses.get(wrapper_id, 0) + 1
        wrapper = self.allocator.wrapper(wrapper_id)
        if misses >= self.settings.watch.failures and wrapper is not None and wrapper.status in _WATCHED:
            del self._misses[wrapper_id]
            self._apply(WrapperFailed(wrapper_id, reason))

    async def _report(self, wrapper_id: str, own: Effect | None = None) -> tuple[WrapperReport, bool]:
        """A wrapper's report, and whether it is news.

        It is none where a command was under way, besides the caller's ``own``: it may have been made before the wrapper
        took that command, and come after its outcome, which says more.
        """
        quiet = self._quiet_turn(wrapper_id, own)
        report = await self._cluster.report(wrapper_id, self._belief(wrapper_id))
        self.reports[wrapper_id] = report
        self.heard_s[wrapper_id] = self._now_s()
        self._note_memory(wrapper_id, report)
        self._keep_windows(wrapper_id, report)
        return report, quiet is not None and quiet == self._quiet_turn(wrapper_id, own)

    def _take_report(self, wrapper_id: str, report: WrapperReport, is_news: bool) -> None:
        self._note_activity(report, grain=ACTIVITY_GRAIN)
        self._note_flags(report)
        wrapper = self.allocator.wrapper(wrapper_id)
        if wrapper is None or not is_news:
            return
        has_llm = wrapper.status in (WrapperStatus.READY, WrapperStatus.LEASED)
        replaced = report.epoch < wrapper.epoch or (has_llm and not report.starts)
        if wrapper.status is WrapperStatus.FAILED or replaced:
            # It was given up and answers again, or its process is new and has forgotten everything. A command that was
            # meant for the old one may have given the new one an epoch, but not the LLM.
            self._apply(WrapperStarted(wrapper_id, report.epoch, report.running))
        elif report.died is not None and has_llm:
            self._apply(LLMDied(wrapper_id, report.epoch, report.died, report.death_flags))
        elif wrapper.status is WrapperStatus.LEASED and report.bound is None and wrapper.request_id is not None:
            self._apply(LeaseLapsed(wrapper.request_id))

    def _note_activity(self, report: WrapperReport, *, grain: float) -> None:
        if report.bound is None or report.idle_for_s is None:
            return
        at_s = self._now_s() - report.idle_for_s
        lease = self.allocator.lease_of(report.bound)
        if lease is not None and at_s > lease.last_active_s + grain * lease.idle_limit_s:
            self._apply(LeaseUsed(report.bound, at_s))

    def _note_flags(self, report: WrapperReport) -> None:
        if report.bound is None or self.allocator.lease_of(report.bound) is None:
            return
        measurement = self.allocator.measurement(self.allocator.request(report.bound).measurement_key)
        if not set(report.lease_flags) <= set(measurement.flags):
            self._apply(LeaseFlagged(report.bound, report.lease_flags))

    def _note_memory(self, wrapper_id: str, report: WrapperReport) -> None:
        """What a wrapper says of its machine's memory; what it can't tell stays as it was."""
        wrapper = self.allocator.wrapper(wrapper_id)
        machine = None if wrapper is None else self.allocator.machine(wrapper.machine_id)
        if machine is None:
            return
        told = replace(
            machine,
            memory_bytes=report.memory_bytes or machine.memory_bytes,
            gpu_memory_bytes=report.gpu_memory_bytes or machine.gpu_memory_bytes,
        )
        if told != machine:
            self._apply(MachineJoined(told))

    def _keep_windows(self, wrapper_id: str, report: WrapperReport) -> None:
        if self._closed:
            return  # the wrapper keeps them
        try:
            self.accounts.keep(wrapper_id, report)
        except StoreUnavailable as error:
            self._on_fatal(error)
            raise

    async def _await_wrapper(self, wrapper_id: str, own: Effect | None = None) -> Event | None:
        """Wait until a starting wrapper answers, for at most ``wrappers.start_timeout_s`` in which nobody commands it.

        Who commands it meanwhile is told how it is. None: ``own``, the command whose outcome this is, was superseded.
        """
        clock, limit_s = asyncio.get_running_loop().time, self.settings.wrappers.start_timeout_s
        deadline_s = clock() + limit_s
        while own is None or self._is_newest(own):
            quiet = self._quiet_turn(wrapper_id, own)
            try:
                report, is_news = await self._report(wrapper_id, own)
            except WrapperUnreachable as error:
                is_news = quiet is not None and quiet == self._quiet_turn(wrapper_id, own)
                if is_news and clock() >= deadline_s:
                    return WrapperFailed(wrapper_id, f"did not start: {error.reason}")
            else:
                if is_news:
                    return WrapperStarted(wrapper_id, report.epoch, report.running)
            if not is_news:
                deadline_s = clock() + limit_s
            await asyncio.sleep(self.settings.watch.period_s)
        return None

    async def _watch_time(self) -> None:
        """End leases that are over, and forget once a day what ended long ago, for ever."""
        while not self._stopping:
            await asyncio.sleep(min(self.settings.watch.period_s, 1.0))
            await self._guarded("leases could not be ended", self._pass_time())

    async def _pass_time(self) -> None:
        now_s = self._now_s()
        if now_s >= self._forget_next_s and not self._stopping:
            self._forget_next_s = now_s + DAY_S
            self._spawn(self._forget())
        due = self.allocator.leases_due(now_s)
        for lease in due:
            if lease.deadline_s > now_s and lease.request_id not in self._asked:
                self._asked.add(lease.request_id)
                self._spawn(self._end_idle(lease))
        if any(lease.deadline_s <= now_s for lease in due) or self.allocator.pins_due(now_s):
            self._apply(TimePassed(asked=()))

    async def _end_idle(self, lease: Lease) -> None:
        await self._guarded("a lease could not be ended", self._end_unless_used(lease))

    async def _end_unless_used(self, lease: Lease) -> None:
        """A prompt of the last moment, which no report has told of yet, still extends its lease.

        A wrapper that does not answer keeps no lease, and one that hangs holds up the end of no other.
        """
        try:
            report = await self._cluster.report(lease.wrapper_id, self._belief(lease.wrapper_id))
        except WrapperUnreachable as error:
            log.warning("a lease ends unasked", wrapper_id=lease.wrapper_id, reason=error.reason)
        else:
            self._note_activity(report, grain=0.0)
        finally:
            self._asked.discard(lease.request_id)
        self._apply(TimePassed(asked=(lease.request_id,)))

    def _knows(self, request_id: str) -> bool:
        return self.archive.find_request(request_id) is not None

    def known(self, request_id: str) -> Request:
        """The request with this id. Raises UnknownRequest, RequestForgotten."""
        return self.archive.request(request_id)


async def _insist(send: Callable[[], Awaitable[T]]) -> T:
    """Send a lease command, and again after short pauses while the wrapper does not answer. Returns its answer.

    Raises:
        WrapperUnreachable: it did not answer the last time either.
    """
    for delay_s in RESEND_DELAYS_S:
        try:
            return await send()
        except WrapperUnreachable as error:
            log.warning("a lease command is sent again", wrapper_id=error.wrapper_id, reason=error.reason)
            await asyncio.sleep(delay_s)
    return await send()
