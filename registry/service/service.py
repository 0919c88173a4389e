"""Runs the registry: decide (allocator) → commit (store) → act (cluster). Plain asyncio, no Ray.

One object owns the state. Every event goes through ``_apply``. There is no await between decision and commit, so no
other event can interleave. Then the effects run, each in a task of its own; their results come back as events. A
command supersedes all older ones of its wrapper, by its epoch, so effects need no order. If a decision or a commit
fails, the process ends: loading the database at the restart is simpler than rolling memory back. Any other failure is
logged, and the service continues.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Coroutine
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace
from registry.accounting.windows import KeptWindow
from registry.contract.messages import Belief
from registry.contract.messages import Cluster
from registry.contract.messages import HandOver
from registry.contract.messages import LeaseGrant
from registry.contract.messages import Moment
from registry.contract.messages import StartedFor
from registry.contract.messages import WrapperPlan
from registry.contract.messages import WrapperReport
from registry.contract.messages import plan
from registry.contract.messages import wanted_wrappers
from registry.contract.messages import with_known_ids
from registry.core.allocator import Allocator
from registry.core.commands import BindLease
from registry.core.commands import DeployLLM
from registry.core.commands import Effect
from registry.core.commands import RestartWrapper
from registry.core.commands import StopLLM
from registry.core.commands import UnbindLease
from registry.core.decision import Changes
from registry.core.decision import Decision
from registry.core.events import Event
from registry.core.events import LLMDeployFailed
from registry.core.events import LLMDeployed
from registry.core.events import LLMDied
from registry.core.events import LLMStopped
from registry.core.events import LeaseBound
from registry.core.events import LeaseFlagged
from registry.core.events import LeaseLapsed
from registry.core.events import LeaseReleased
from registry.core.events import LeaseRequested
from registry.core.events import LeaseUsed
from registry.core.events import MachineDrained
from registry.core.events import MachineJoined
from registry.core.events import MachineUndrained
from registry.core.events import NewRequest
from registry.core.events import ShutdownBegun
from registry.core.events import TimePassed
from registry.core.events import WrapperAdded
from registry.core.events import WrapperFailed
from registry.core.events import WrapperStarted
from registry.core.events import WrapperSwitchedOff
from registry.core.records import LLMSpec
from registry.core.records import Lease
from registry.core.records import Request
from registry.core.records import Wrapper
from registry.core.records import WrapperStatus
from registry.errors import EngineNotReady
from registry.errors import EngineStartFailed
from registry.errors import IdempotencyConflict
from registry.errors import InternalError
from registry.errors import InvalidField
from registry.errors import LeaseEnded
from registry.errors import NoSuchLease
from registry.errors import RegistryError
from registry.errors import ShuttingDown
from registry.errors import StaleEpoch
from registry.errors import StoreUnavailable
from registry.errors import WrapperUnheard
from registry.errors import WrapperUnreachable
from registry.service.accounts import Accounts
from registry.service.archive import Archive
from registry.service.archive import KEPT
from registry.service.history import ids_of
from registry.service.history import log_fields
from registry.service.history import rows_of
from registry.service.news import News
from registry.settings import Settings
from registry.store.rows import IdempotencyRow
from registry.store.rows import StoredEvent
from registry.store.store import Store
from registry.wire.schemas import MAX_WAIT_S
from registry.wire.words import Grade
from registry.wire.words import Priority
from registry.wire.words import RequestStatus
from registry.wire.words import canonical_json
from typing import TypeVar
import asyncio
import structlog


log = structlog.get_logger("registry.service.service")

T = TypeVar("T")

FAILED_RETRY_S = 30.0
"""Interval at which a FAILED wrapper is checked again, seconds."""

ACTIVITY_GRAIN = 0.05
"""A lease's activity is stored if it is newer than the stored one by this fraction of the idle limit: each time takes a
commit. No lease ends early because of that, since its wrapper is asked first."""

STOP_MARGIN_S = 10.0
"""A shutdown waits this much longer than an LLM may take to stop, seconds."""

DAY_S = 86_400.0

FORGET_AT_ONCE = 200
"""Maximum number of rows of each kind deleted in one transaction, which blocks the registry for some 20 ms."""

FORGET_PAUSE_S = 0.05
"""Pause between two such transactions, so that other work runs, seconds."""

_WATCHED = frozenset(
    {WrapperStatus.IDLE, WrapperStatus.DEPLOYING, WrapperStatus.READY, WrapperStatus.LEASED, WrapperStatus.STOPPING}
)
"""Statuses in which a wrapper that does not answer has failed."""

_UNWATCHED = frozenset({WrapperStatus.LOST, WrapperStatus.OFF, WrapperStatus.RESTARTING})
"""Statuses in which a wrapper is not asked for reports."""

GRANT_WAIT_S = 0.25
"""Maximum time that a POST's answer waits for the hand-over of a running free LLM, seconds; it takes milliseconds."""

RESEND_DELAYS_S = (0.1, 0.5, 2.0)
"""Pauses before a lease command is sent again to a wrapper that did not answer, seconds."""


REMEMBERED_TOKENS = 10_000
"""Number of latest leases whose tokens are remembered, including ended ones."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's Idempotency-Key and the SHA-256 of its request body (as canonical JSON)."""

    key: str
    body_sha256: str


class Service:
    """Owns the registry's state: decides on events, commits, runs the effects, and watches the wrappers.

    Must be created, started and used in one event loop. ``now_s`` returns UTC seconds, ``new_token`` unguessable lease
    tokens; ``homes`` maps a machine id or ``*`` to an LLM. ``on_fatal`` is called when the database or a decision
    fails, and must end the process; ``on_energy`` is called for each stored energy window.
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
        """By wrapper: when this process got its last report, UTC seconds."""
        self._store = store
        self._cluster = cluster
        self._now_s = now_s
        self._homes = homes
        self._on_fatal = on_fatal
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._under_way: dict[str, Effect] = {}
        """By wrapper: its newest command, while in progress; dropped when the wrapper is created again."""
        self._turns: dict[str, int] = {}
        """By wrapper: number of times it was commanded or created."""
        self._misses: dict[str, int] = {}
        self._deployed: frozenset[str] | None = None
        self._switching_off: set[str] = set()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._tokens: OrderedDict[str, str] = OrderedDict()
        """Request ids by lease token, of the last REMEMBERED_TOKENS leases, including ended ones."""
        self._answered_again: set[str] = set()
        """First request ids of POSTs that were repeated with the same Idempotency-Key and answered again."""
        self._asked: set[str] = set()
        self._idle = asyncio.Event()
        self._stopping = False
        self._closed = False
        self._forget_next_s = 0.0
        self._begun_s = self._before_s = 0.0
        """UTC seconds: when this process began, and the last event stored by the previous process."""

    # --- life -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the database and start watching. Does not wait for machines or wrappers."""
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
        """Delete what ended more than ``keep_days`` ago, in small parts, with other work in between.

        Time in which no registry ran is not counted: otherwise a clock that is wrong at the start could delete all.
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
        """Stop every LLM and every wrapper, then close the database. New requests are refused at once.

        The settings limit how long each step may take. Queued requests stay queued for the next start. Idempotent.
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
        """Store the energy windows of a wrapper's last lease before the wrapper is removed."""
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
        """Accept requests for LLMs, and return them in the order given. They are stored when this returns.

        The caller chooses the ids, so a retry is safe: known ids return the existing requests.

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
        """Release or cancel a request. Idempotent.

        Raises:
            UnknownRequest: no request has this id.
            RequestForgotten: the request was deleted after ``keep_days``.
        """
        if not self.known(request_id).status.ended:
            self._apply(LeaseReleased(request_id))

    def withdraw(self, request_ids: Sequence[str], *, tenant: str, key: str | None) -> None:
        """Release the requests of a POST whose answer did not reach the client, which has no ids of them. Idempotent.

        Its Idempotency-Key is deleted, so that a retry creates new requests. Nothing happens if a retry has got these
        requests already, or if they were never accepted.

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
            LeaseEnded: the lease has ended. Only the last REMEMBERED_TOKENS leases since the last restart are known.
            NoSuchLease: no known lease has, or had, this token.
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
        """Return the current requests of a POST. If the first one's LLM was running and free, wait for its hand-over.

        Waits at most GRANT_WAIT_S, for the wrapper's confirmation.
        """
        first = requests[0]
        wrapper = None if first.wrapper_id is None else self.allocator.wrapper(first.wrapper_id)
        if wrapper is not None and wrapper.status is WrapperStatus.LEASED:
            await self.wait_for_change(first.request_id, GRANT_WAIT_S, RequestStatus.DEPLOYING)
        return tuple(self.known(request.request_id) for request in requests)

    async def keep_alive(self, request_id: str) -> Request:
        """Restart the idle time of a request's lease, unless the wrapper has just ended the lease. Return the request.

        While the LLM is being restarted, the wrapper may not know the lease yet; the idle time restarts all the same.

        Raises:
            UnknownRequest, RequestForgotten: as for ``release``.
            WrapperUnreachable: the wrapper did not answer; the lease is unchanged.
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
        """Allow no new leases on a machine, and remove its wrappers once their leases have ended. Idempotent.

        Raises:
            UnknownMachine: no machine has this id.
            ShuttingDown: the registry's database is closed.
        """
        self._apply(MachineDrained(machine_id))

    def undrain(self, machine_id: str) -> None:
        """Use a machine again, and create its wrappers again. Idempotent.

        Raises:
            UnknownMachine, ShuttingDown: as for ``drain``.
        """
        self._apply(MachineUndrained(machine_id))

    def is_off(self, machine_id: str) -> bool:
        """True when a drained machine has no wrapper left: its GPUs are free, and it may be switched off."""
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
        """True when a wrapper did not answer the last request for a report."""
        return wrapper_id in self._misses

    async def wait_for_change(self, request_id: str, wait_s: float, seen: RequestStatus | None = None) -> Request:
        """Wait until a request's status differs from ``seen``, at most ``wait_s`` (≤ MAX_WAIT_S) seconds; return it.

        With ``seen=None``: return at once if it is ``deployed``, else wait for the next change of status. Requests that
        have ended return at once.

        Raises:
            UnknownRequest, RequestForgotten: as for ``release``.
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
            pass  # nothing changed: return the current state
        return self.known(request_id)

    def history(self, request_id: str, *, after: int = 0, limit: int = 1000) -> tuple[StoredEvent, ...]:
        """Return the oldest ``limit`` (> 0) events of a request with a number above ``after``, in order.

        Raises:
            UnknownRequest, RequestForgotten: as for ``release``.
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
        """Decide on an event, commit, start the effects. ``cause``: number of the event whose command it answers."""
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
                continue  # the next command to this wrapper ends the released lease as well
            self._turn(effect.wrapper_id, effect)
            self._spawn(self._run(effect, number))

    # D47: nothing is known of a wrapper from before it was created
    def _turn(self, wrapper_id: str, effect: Effect | None) -> None:
        """Record a new command to a wrapper, or (None) its creation: results of earlier commands are outdated now."""
        self._turns[wrapper_id] = self._turns.get(wrapper_id, 0) + 1
        if effect is None:
            self._under_way.pop(wrapper_id, None)
        else:
            self._under_way[wrapper_id] = effect

    def _decide(self, event: Event, now_s: float) -> Decision:
        try:
            return self.allocator.handle(event, now_s)
        except RegistryError:
            raise  # refused; nothing has changed
        except Exception as error:  # memory may be half changed: as bad as a failed commit
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
        """Await background work and log its errors, so that the caller can continue. Raises StoreUnavailable."""
        try:
            await work
        except StoreUnavailable:
            raise  # on_fatal was called: the process ends
        except RegistryError as error:
            log.warning(what, reason=str(error))
        except Exception:
            log.exception(what)

    async def _run(self, effect: Effect, cause: int | None) -> None:
        """Run an effect and apply the resulting event. A failure is ignored if a newer command has superseded it."""
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
        """Return the wrapper's command count, or None while a command other than ``own`` is in progress.

        If equal before and after a call, no other command was in progress in between. Superseded commands are ignored:
        they may end long afterwards, and their outcome changes nothing.
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
                except InvalidField as error:  # allowed by the ingress, not on the machine: e.g. a link leads elsewhere
                    return LLMDeployFailed(wrapper_id, epoch, str(error))
                return LLMDeployed(wrapper_id, epoch)
            case StopLLM(wrapper_id, epoch):
                await self._cluster.stop(wrapper_id, epoch)
                return LLMStopped(wrapper_id, epoch)
            case BindLease(wrapper_id, epoch, request_id):
                if wrapper_id not in self.reports:  # after a restart: the grant needs a timestamp of the wrapper
                    await self._report(wrapper_id)
                grant = self._grant(request_id)
                if grant is None:
                    return None
                try:
                    over = await _insist(lambda: self._cluster.bind(wrapper_id, epoch, grant))
                except EngineNotReady as error:
                    return LLMDied(wrapper_id, epoch, error.reason)
                if (bound := self.archive.find_request(request_id)) is not None:
                    self.archive.recall_request(bound.like_request_id)  # needed for the comparison
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
        """Return the provenance of a hand-over with machine and wrapper as JSON; None if the wrapper reported none."""
        wrapper = self.allocator.wrapper(wrapper_id)
        if over.provenance is None or wrapper is None:
            return None
        return canonical_json({**over.provenance, "machine": wrapper.machine_id, "wrapper": wrapper_id})

    def _grant(self, request_id: str) -> LeaseGrant | None:
        lease = self.allocator.lease_of(request_id)
        if lease is None:  # released since the decision
            return None
        request = self.allocator.request(request_id)
        handed_over = request.deployed_s is not None  # the lease's time starts at the hand-over
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
        """Return the timestamp of a wrapper's last report: what is known now was true then or later."""
        report = self.reports.get(wrapper_id)
        return None if report is None else report.moment

    # --- watching ---------------------------------------------------------------------------------------

    async def _watch_cluster(self) -> None:
        """Reconcile machines and wrappers periodically until the shutdown; errors don't end it."""
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
        for wrapper_id in sorted(present - watched):  # sorted, so that simulations are repeatable
            self._watchers[wrapper_id] = asyncio.create_task(self._watch_wrapper(wrapper_id))
            self._watchers[wrapper_id].add_done_callback(self._ended)
        for wrapper_id in self._watchers.keys() - present:
            self._watchers.pop(wrapper_id).cancel()
            self.reports.pop(wrapper_id, None)
            self.heard_s.pop(wrapper_id, None)

    async def _apply_all(self, events: Sequence[Event]) -> None:
        """Apply events one by one, with other work in between: a thousand machines may join at once."""
        for event in events:
            self._apply(event)
            await asyncio.sleep(0)

    async def _switch_off(self, wrapper_ids: Sequence[str]) -> None:
        """Remove wrappers of drained machines, unless they still answer prompts of an expired lease.

        Runs in a task of its own, because Serve may take long to end a replica. If it is interrupted (crash, error,
        undrain), the next reconciliation repairs the rest.
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
        """Watch one wrapper as long as it exists. Each has a task of its own, so one that hangs delays no other."""
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
            return  # the cause may not be the wrapper
        except WrapperUnreachable as error:
            self._missed(wrapper_id, error.reason)
            return
        self._misses.pop(wrapper_id, None)
        self._take_report(wrapper_id, report, is_news)

    def _missed(self, wrapper_id: str, reason: str) -> None:
        """Count a missing report; ``watch.failures`` in a row mean that the wrapper has failed."""
        misses = self._misses[wrapper_id] = self._misses.get(wrapper_id, 0) + 1
        wrapper = self.allocator.wrapper(wrapper_id)
        if misses >= self.settings.watch.failures and wrapper is not None and wrapper.status in _WATCHED:
            del self._misses[wrapper_id]
            self._apply(WrapperFailed(wrapper_id, reason))

    async def _report(self, wrapper_id: str, own: Effect | None = None) -> tuple[WrapperReport, bool]:
        """Return a wrapper's report, and whether its status may be applied.

        False if a command other than ``own`` was in progress: the report may be older than that command's outcome.
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
            # It was given up and answers again, or its process is new and empty. A command to the old process may have
            # given the new one its epoch, but no LLM: hence the check of ``starts``.
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
        """Update the machine's memory from a wrapper's report; values that are missing stay unchanged."""
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
        """Wait until a starting wrapper answers, at most ``wrappers.start_timeout_s``. Return the resulting event.

        The timeout restarts whenever another command is sent. ``own``: the command that waits; None is returned if it
        is superseded.
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
        """Until the shutdown: end leases that are over, and once a day delete what ended long ago."""
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
        """Ask the wrapper whether an idle lease was used since the last report, and end the lease if it was not.

        It also ends if the wrapper does not answer.
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
        """Return the request with this id. Raises UnknownRequest, RequestForgotten."""
        return self.archive.request(request_id)


async def _insist(send: Callable[[], Awaitable[T]]) -> T:
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
