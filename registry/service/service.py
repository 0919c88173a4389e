"""The registry without HTTP and Ray: accepts requests, and grants leases for LLMs. Plain asyncio.

The registry actor calls ``Service``, which builds and connects these modules:

* ``loop`` applies every event, one at a time: decide (allocator) → commit (store) → act (commands).
* ``commands`` sends commands to wrappers; ``turns`` finds results that are out of date.
* ``reconciling`` creates and removes wrappers; ``watch`` and ``wrapper_reports`` record what wrappers report.
* ``expiry`` ends leases in time; ``retention`` deletes what ended long ago.

If a decision or a commit fails, the process ends. Any other failure is logged, and the service continues.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from registry.accounting.windows import KeptWindow
from registry.contract.messages import Cluster, WrapperReport
from registry.core.allocator import Allocator
from registry.core.decision import Changes
from registry.core.events import (
    LeaseReleased,
    LeaseRequested,
    LeaseUsed,
    MachineDrained,
    MachineUndrained,
    NewRequest,
    ShutdownBegun,
)
from registry.core.records import LLMSpec, Request, WrapperStatus
from registry.core.request_events import unknown_like
from registry.errors import (
    IdempotencyConflict,
    LeaseEnded,
    NoSuchLease,
    RegistryError,
    RequestWithdrawn,
    ShuttingDown,
    UnknownRequest,
)
from registry.service.accounts import Accounts
from registry.service.archive import KEPT, Archive
from registry.service.audit import Audit, of_withdrawal
from registry.service.commands import Commands
from registry.service.expiry import Expiry
from registry.service.keys import EVERYTHING, Access, Keys
from registry.service.lease_tokens import LeaseTokens
from registry.service.loop import Loop, Observer
from registry.service.news import News
from registry.service.reconciling import Reconciler
from registry.service.retention import Retention
from registry.service.tasks import Tasks, guarded
from registry.service.turns import Turns
from registry.service.waiters import Waiters
from registry.service.watch import Watches
from registry.service.wrapper_reports import WrapperReports
from registry.settings import Settings
from registry.store.rows import AuditRow, IdempotencyRow, StoredEvent
from registry.store.store import Store
from registry.wire.schemas import MAX_WAIT_S
from registry.wire.words import Grade, Priority, RequestStatus

log = structlog.get_logger("registry.service.service")

STOP_MARGIN_S = 10.0
"""A shutdown waits this much longer than an LLM may take to stop, seconds."""

REMEMBERED_WITHDRAWALS = 10_000
"""Maximum number of withdrawn POSTs that are remembered, in case they still arrive; the oldest are dropped first."""

GRANT_WAIT_S = 0.25
"""Maximum time that a POST's answer waits for the hand-over of an LLM that already runs and is free, seconds. The
hand-over usually takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's Idempotency-Key and the SHA-256 of its request body (as canonical JSON)."""

    key: str
    body_sha256: str


class Service:
    """Owns the registry's state, and everything that runs on it.

    Must be created, started and used in one event loop of asyncio.

    * ``now_s`` returns UTC seconds. ``tokens`` makes the tokens of leases.
    * ``homes`` maps a machine id or ``*`` to an LLM.
    * ``on_fatal`` is called when the database or a decision fails, and must end the process.
    * ``on_energy`` is called for each stored energy window.
    * ``ended_kept``: maximum number of finished measurements in memory.
    * ``observer`` is called at each step of ``loop``.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        cluster: Cluster,
        *,
        now_s: Callable[[], float],
        tokens: LeaseTokens,
        homes: Mapping[str, LLMSpec],
        on_fatal: Callable[[RegistryError], None],
        on_energy: Callable[[KeptWindow], None] = lambda _: None,
        ended_kept: int = KEPT,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self.tokens = tokens
        self.allocator = Allocator(settings.limits, tokens.new)
        self.archive = Archive(store, self.allocator, ended_kept)
        self.accounts = Accounts(
            store, self.allocator, self.archive, budgets=settings.budgets.tenants, now_s=now_s, on_kept=on_energy
        )
        self.news = News()
        self._store = store
        self._cluster = cluster
        self._now_s = now_s
        self._waiters = Waiters()
        self._tasks = tasks = Tasks()
        self._answered_again: set[str] = set()
        """First request id of each POST that was repeated with the same Idempotency-Key and got the same answer."""
        self._withdrawn: OrderedDict[str, None] = OrderedDict()
        """First request id of each POST that was withdrawn before it arrived."""
        self._wrappers_changed = asyncio.Event()

        self._loop = loop = Loop(
            self.allocator,
            store,
            now_s=now_s,
            on_fatal=on_fatal,
            on_changes=self._publish,
            act=lambda event, effects, number: self._commands.start(event, effects, number),  # made below
            observer=observer or Observer(),
        )
        self.keys = Keys(store, now_s, loop.fail_stop)
        self.audit = Audit(store, loop)
        turns, accounts, archive = Turns(), self.accounts, self.archive
        self._reports = reports = WrapperReports(loop, cluster, turns, accounts=accounts, settings=settings)
        self._commands = Commands(
            loop, cluster, reports, tokens, turns, tasks=tasks, archive=archive, accounts=accounts, settings=settings
        )
        self._watches = watches = Watches(loop, reports, tasks, settings.watch)
        self._reconciler = Reconciler(loop, cluster, reports, watches, tasks=tasks, settings=settings, homes=homes)
        gone = self._answered_again.difference_update
        self._retention = Retention(loop, store, archive, accounts, tasks=tasks, settings=settings, on_forgotten=gone)
        self._expiry = Expiry(loop, reports, self._retention, tasks=tasks, settings=settings)

    @property
    def wrapper_reports(self) -> Mapping[str, WrapperReport]:
        """The last report of each wrapper."""
        return self._reports.latest

    @property
    def heard_s(self) -> Mapping[str, float]:
        """By wrapper: when this process received the wrapper's last report, UTC seconds."""
        return self._reports.heard_s

    # --- life -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the database, and start the background work. Does not wait for machines or wrappers.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        self._retention.begin()
        stored = self._store.load(ended=False)
        self.allocator.load(stored, self._store.next_seq())
        self.tokens.remember(stored.leases)
        self._tasks.spawn("reconcile", self._reconciler.run(self.tokens.lost(stored.leases)))
        self._tasks.spawn("end leases", self._expiry.run())
        self._tasks.spawn("store the use of keys", self.keys.run())

    async def shutdown(self) -> None:
        """Stop every LLM and every wrapper, then close the database. New requests are refused at once.

        The settings limit how long each step may take. Queued requests stay queued for the next start.
        Idempotent.

        Raises:
            StoreUnavailable: the database failed.
        """
        if self._loop.closed:
            return
        self._loop.stopping = True
        self._loop.apply(ShutdownBegun())
        try:
            async with asyncio.timeout(self.settings.wrappers.stop_timeout_s + STOP_MARGIN_S):
                while self._stopping_wrappers():
                    self._wrappers_changed.clear()
                    await self._wrappers_changed.wait()
        except TimeoutError:
            log.warning(
                "LLMs did not stop in time; their wrappers are removed anyway", wrappers=self._stopping_wrappers()
            )
        await self._tasks.stop()
        await asyncio.gather(*map(self._reports.fetch_last_windows, self.allocator.wrappers()))
        wrapper_ids = [wrapper.wrapper_id for wrapper in self.allocator.wrappers()]
        await guarded("wrappers could not be removed", self._cluster.remove, wrapper_ids)
        self._loop.close()

    def _stopping_wrappers(self) -> list[str]:
        return [w.wrapper_id for w in self.allocator.wrappers() if w.status is WrapperStatus.STOPPING]

    def _publish(self, changes: Changes) -> None:
        """Update tokens, archive and news after a decision, and wake the clients that wait."""
        self.tokens.remember(changes.leases)
        self.archive.note(changes)
        request_ids = [request.request_id for request in changes.requests]
        self.news.add(request_ids)
        self._waiters.wake(request_ids)
        if changes.wrappers or changes.removed_wrappers:
            self._wrappers_changed.set()

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
        access: Access = EVERYTHING,
        audit: AuditRow | None = None,
    ) -> tuple[Request, ...]:
        """Accept requests for LLMs, and return them in the order given. They are stored when this returns.

        ``audit``: the call, whose row is stored in the same transaction.

        The caller chooses the request ids, so a retry is safe: for known ids or a known Idempotency-Key,
        the existing requests are returned.

        Raises:
            QueueFull, LLMNeverFits, InvalidField, TenantBudgetUsed, ShuttingDown: nothing was accepted.
            IdempotencyConflict: the key was used with another body.
            RequestWithdrawn: ``withdraw`` was called for these requests before.
            StoreUnavailable: the database failed.
        """
        if self._loop.closed:
            raise ShuttingDown
        like = None if like_request_id is None else self.archive.find_request(like_request_id)
        if like is not None and not access.sees(like.tenant):
            raise unknown_like(like.request_id)
        if llms[0].request_id in self._withdrawn:
            raise RequestWithdrawn(llms[0].request_id)
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
        self._loop.apply(asked, idempotency=row, audit=audit)
        return tuple(self.allocator.request(request_id) for request_id in ids)

    def release(self, request_id: str, access: Access = EVERYTHING, audit: AuditRow | None = None) -> None:
        """Release or cancel a request. ``audit``: the call that does it. Idempotent.

        Raises:
            UnknownRequest: no request has this id.
            RequestForgotten: the request was deleted after ``keep_days``.
            ShuttingDown: the registry's database is closed.
            StoreUnavailable: the database failed.
        """
        request = self.known(request_id, access)
        if not request.status.ended:
            self._loop.apply(LeaseReleased(request_id), audit=audit and replace(audit, tenant=request.tenant))

    def withdraw(self, ids: Sequence[str], *, tenant: str, key: str | None, audit: AuditRow | None = None) -> None:
        """Release the requests of a POST whose answer did not reach the client. Idempotent.

        The client does not know their ids. The Idempotency-Key ``key`` is deleted, so that a retry
        creates new requests. Nothing happens if a retry has already got these requests. Ray may
        deliver the withdrawal before the POST: ``request`` then refuses these ids. ``audit``: the POST.

        Raises:
            ShuttingDown: the registry's database is closed.
            StoreUnavailable: the database does not answer.
        """
        known = [request_id for request_id in ids if self._knows(request_id)]
        if not known:
            self._withdrawn[ids[0]] = None
            if len(self._withdrawn) > REMEMBERED_WITHDRAWALS:
                self._withdrawn.popitem(last=False)
        if not known or ids[0] in self._answered_again:
            return
        if key is not None:
            with self._loop.fail_stop():
                self._store.forget_idempotency_key(tenant, key)
        for request_id in known:
            self.release(request_id, audit=audit and replace(of_withdrawal(audit), subject=request_id))

    def leased_with(self, token: str) -> str:
        """Return the id of the request whose lease has this token.

        Raises:
            LeaseEnded: the lease with this token has ended, and is among the last REMEMBERED_TOKENS since the start.
            NoSuchLease: no known lease has, or had, this token.
            RequestForgotten: the request was deleted after ``keep_days``.
            StoreUnavailable: the database does not answer.
        """
        request_id = self.tokens.request_id(token)
        if request_id is None:
            raise NoSuchLease
        lease, status = self.allocator.lease_of(request_id), self.known(request_id).status
        if lease is None or self.tokens.of(lease) != token:
            raise LeaseEnded(status.value if status.ended else "replaced")
        return request_id

    async def granted(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """Return the current requests of a POST. If the first one's LLM was running and free, wait for its hand-over.

        Waits at most GRANT_WAIT_S seconds for the wrapper's confirmation.

        Raises:
            UnknownRequest, RequestForgotten: as for ``release``.
        """
        first = requests[0]
        wrapper = None if first.wrapper_id is None else self.allocator.wrapper(first.wrapper_id)
        if wrapper is not None and wrapper.status is WrapperStatus.LEASED:
            await self.wait_for_change(first.request_id, GRANT_WAIT_S, RequestStatus.DEPLOYING)
        return tuple(self.known(request.request_id) for request in requests)

    async def keep_alive(self, request_id: str, access: Access = EVERYTHING) -> Request:
        """Restart the idle time of a request's lease, unless the wrapper has just ended the lease. Return the request.

        Without a lease, the request is returned unchanged. While the LLM is being restarted, the wrapper
        may not know the lease yet; the idle time restarts in that case too.

        Raises:
            UnknownRequest, RequestForgotten: as for ``release``.
            WrapperUnreachable: the wrapper did not answer; the lease is unchanged.
            ShuttingDown: the registry's database is closed.
        """
        request = self.known(request_id, access)
        lease = self.allocator.lease_of(request_id)
        if lease is not None:
            stands = await self._cluster.touch(lease.wrapper_id, request_id)
            held = self.allocator.lease_of(request_id) is not None  # it may have ended during the call
            if held and (stands or self.allocator.request(request_id).status is RequestStatus.DEPLOYING):
                self._loop.apply(LeaseUsed(request_id, self._now_s()))
            request = self.known(request_id)
        return request

    def drain(self, machine_id: str, audit: AuditRow | None = None) -> None:
        """Allow no new leases on a machine, and remove its wrappers once their leases have ended. Idempotent.

        Raises:
            UnknownMachine: no machine has this id.
            ShuttingDown: the registry's database is closed.
        """
        self._loop.apply(MachineDrained(machine_id), audit=audit)

    def undrain(self, machine_id: str, audit: AuditRow | None = None) -> None:
        """Allow new leases on a drained machine; its wrappers are created again. Idempotent.

        Raises:
            UnknownMachine, ShuttingDown: as for ``drain``.
        """
        self._loop.apply(MachineUndrained(machine_id), audit=audit)

    def is_off(self, machine_id: str) -> bool:
        """True when a drained machine has no wrapper left: its GPUs are free, and it may be switched off.

        Raises:
            UnknownMachine: no machine has this id.
        """
        return self._reconciler.is_off(machine_id)

    def misses_reports(self, wrapper_id: str) -> bool:
        """True when a wrapper has missed its last report. False again once it counts as failed."""
        return self._watches.misses_reports(wrapper_id)

    async def wait_for_change(self, request_id: str, wait_s: float, seen: RequestStatus | None = None) -> Request:
        """Wait until a request's status differs from ``seen``, at most ``wait_s`` seconds. Return the request.

        Waits longer than MAX_WAIT_S are cut to MAX_WAIT_S. With ``seen=None``: return at once if it is ``deployed``,
        else wait for the next change of status. Requests that have ended return at once.

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
                    await self._waiters.next_change(request_id)
        except TimeoutError:
            pass  # nothing changed: return the current state
        return self.known(request_id)

    def history(
        self, request_id: str, *, after: int = 0, limit: int = 1000, access: Access = EVERYTHING
    ) -> tuple[StoredEvent, ...]:
        """Return the oldest ``limit`` (> 0) events of a request with a number above ``after``, in order.

        Raises:
            UnknownRequest, RequestForgotten: as for ``release``.
            StoreUnavailable: the database does not answer.
        """
        self.known(request_id, access)
        return self._store.events(after=after, limit=limit, request_id=request_id)

    def known(self, request_id: str, access: Access = EVERYTHING) -> Request:
        """Return the request with this id.

        Raises:
            UnknownRequest: There is none, or none that the caller may see.
            RequestForgotten: It was deleted after ``keep_days``. Its tenant is unknown, so every caller gets this.
        """
        request = self.archive.request(request_id)
        if not access.sees(request.tenant):
            raise UnknownRequest(request_id)
        return request

    def _knows(self, request_id: str) -> bool:
        return self.archive.find_request(request_id) is not None
