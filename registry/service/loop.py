"""Applies events to the registry's state: decide (allocator) → commit (store) → act (commands).

There is no await between decision and commit, so no other event can come in between. If a decision or
a commit fails, the process ends: to load the database after the restart is simpler than to roll memory back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import structlog

from registry.core.allocator import Allocator
from registry.core.commands import Effect
from registry.core.decision import Changes, Decision
from registry.core.events import Event
from registry.errors import InternalError, RegistryError, ShuttingDown, StoreUnavailable
from registry.service.history import ids_of, log_fields, rows_of
from registry.store.rows import AuditRow, IdempotencyRow
from registry.store.store import Store

log = structlog.get_logger("registry.service.loop")


class Observer:
    """Base class of observers: the loop calls their methods at each step. The methods of this class do nothing.

    Errors that they raise reach the caller of ``Loop.apply``.
    """

    def deciding(self, event: Event) -> None:
        """Is called before the allocator decides on an event."""

    def committing(self, event: Event, changes: Changes) -> None:
        """Is called before a decision is written. Not called if there is nothing to write."""

    def committed(self, event: Event, changes: Changes) -> None:
        """Is called after a decision was written, before its effects start."""

    def handled(self, event: Event) -> None:
        """Is called last for every event: it was applied or refused, or its decision or commit failed."""


# D102: the other parts of the service reach each other through the loop
class Loop:
    """Owns the registry's state in memory and in the database. Every event goes through ``apply``.

    Used in one event loop of asyncio.

    * ``now_s`` returns UTC seconds.
    * ``on_fatal`` is called when a decision or the database fails, and must end the process.
    * ``on_changes`` is called after the commit with the changes of a decision, unless there are none.
    * ``act`` is called after that with the event, its effects and its number (None: it was not stored).

    ``on_changes`` and ``act`` must not raise.
    """

    def __init__(
        self,
        allocator: Allocator,
        store: Store,
        *,
        now_s: Callable[[], float],
        on_fatal: Callable[[RegistryError], None],
        on_changes: Callable[[Changes], None],
        act: Callable[[Event, Sequence[Effect], int | None], None],
        observer: Observer,
    ) -> None:
        self.allocator = allocator
        self.now_s = now_s
        self.stopping = False
        """True from the beginning of a shutdown: periodic work ends."""
        self.closed = False
        """True at the end of a shutdown: nothing can be written any more."""
        self._store = store
        self._on_fatal = on_fatal
        self._on_changes = on_changes
        self._act = act
        self._observer = observer

    def apply(
        self,
        event: Event,
        *,
        cause: int | None = None,
        idempotency: IdempotencyRow | None = None,
        audit: AuditRow | None = None,
    ) -> None:
        """Decide on an event, commit the changes, start the effects. Blocks until the database has committed.

        ``cause``: number of the event whose command this event answers. ``idempotency`` and ``audit`` are written in
        the same transaction; ``audit`` only if something changes.

        Raises:
            RegistryError: the event was refused; nothing has changed.
            ShuttingDown: the registry's database is closed.
            StoreUnavailable: the commit failed, and ``on_fatal`` was called.
            Exception: the decision failed because of a bug, and ``on_fatal`` was called.
        """
        try:
            self._apply(event, cause, idempotency, audit)
        finally:
            self._observer.handled(event)

    async def apply_all(self, events: Sequence[Event]) -> None:
        """Apply events one by one. Other tasks run in between, since a thousand machines may join at once.

        Raises:
            RegistryError: as for ``apply``; the events before it were applied.
        """
        for event in events:
            self.apply(event)
            await asyncio.sleep(0)

    @contextmanager
    def fail_stop(self) -> Iterator[None]:
        """Call ``on_fatal``, which ends the process, if the database fails inside this block.

        Raises:
            StoreUnavailable: the database failed.
        """
        try:
            yield
        except StoreUnavailable as error:
            self._on_fatal(error)
            raise

    def close(self) -> None:
        """Close the database. Idempotent.

        Raises:
            StoreUnavailable: the database does not answer; it is unlocked all the same.
        """
        self.closed = True
        self._store.close()

    def _apply(
        self, event: Event, cause: int | None, idempotency: IdempotencyRow | None, audit: AuditRow | None
    ) -> None:
        if self.closed:
            raise ShuttingDown
        now_s = self.now_s()
        decision = self._decide(event, now_s)
        changes, number = decision.changes, None
        if not changes.empty or idempotency is not None:
            audit = None if audit is None else replace(audit, at_s=now_s)
            number = self._commit(event, changes, now_s, cause, idempotency, audit)
        if not changes.empty:
            self._on_changes(changes)
        self._act(event, decision.effects, number)

    def _decide(self, event: Event, now_s: float) -> Decision:
        self._observer.deciding(event)
        try:
            return self.allocator.handle(event, now_s)
        except RegistryError:
            raise  # refused; nothing has changed
        except Exception as error:  # the records in memory may be half changed, so the process must end
            log.exception("a decision failed", kind=type(event).__name__, **ids_of(event))
            self._on_fatal(InternalError(f"{type(event).__name__}: {error}"))
            raise

    def _commit(
        self,
        event: Event,
        changes: Changes,
        now_s: float,
        cause: int | None,
        idempotency: IdempotencyRow | None,
        audit: AuditRow | None,
    ) -> int | None:
        """Write a decision. Return the number of its first row in the event log, None if it has no rows."""
        self._observer.committing(event, changes)
        rows = rows_of(event, changes, self.allocator.request, now_s, cause)
        with self.fail_stop():
            number = self._store.commit(changes, events=rows, idempotency=idempotency, audit=audit)
        for row in rows:
            log.info("event", **log_fields(row))
        self._observer.committed(event, changes)
        return number
