"""Deletes requests, events and energy windows that ended long ago from the database, once a day."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from registry.service.accounts import Accounts
from registry.service.archive import Archive
from registry.service.loop import Loop
from registry.service.tasks import Tasks, guarded
from registry.settings import Settings
from registry.store.store import Store

log = structlog.get_logger("registry.service.retention")

DAY_S = 86_400.0

FORGET_AT_ONCE = 200
"""Maximum number of rows of each kind deleted in one transaction, which blocks the registry for some 20 ms."""

FORGET_PAUSE_S = 0.05
"""Pause between two such transactions, so that other work runs, seconds."""


class Retention:
    """Deletes what ended more than ``keep_days`` ago. ``on_forgotten`` is called with the ids of deleted requests.

    Time in which no registry ran is not counted. Otherwise, a wrong clock at the start could cause the
    deletion of everything.
    """

    def __init__(
        self,
        loop: Loop,
        store: Store,
        archive: Archive,
        accounts: Accounts,
        *,
        tasks: Tasks,
        settings: Settings,
        on_forgotten: Callable[[Iterable[str]], None],
    ) -> None:
        self._loop = loop
        self._store = store
        self._archive = archive
        self._accounts = accounts
        self._tasks = tasks
        self._keep_days = settings.keep_days
        self._on_forgotten = on_forgotten
        self._next_s = 0.0
        self._begun_s = self._before_s = 0.0
        """UTC seconds: the start of this process, and the time of the last event that the previous process stored."""

    def begin(self) -> None:
        """Record the time of the previous process's last event. Call it before this process stores an event.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        self._begun_s = self._loop.now_s()
        newest_s = self._store.newest_event_s()
        self._before_s = self._begun_s if newest_s is None else min(newest_s, self._begun_s)

    def run_if_due(self, now_s: float) -> None:
        """Start ``forget`` in the background if a day has passed since the last time. ``now_s``: UTC seconds."""
        if now_s >= self._next_s and not self._loop.stopping:
            self._next_s = now_s + DAY_S
            self._tasks.spawn("delete old records", guarded("old records could not be deleted", self.forget))

    async def forget(self) -> None:
        """Delete what ended more than ``keep_days`` ago, in small transactions; other tasks run in between.

        Raises:
            StoreUnavailable: the database failed, and ``on_fatal`` was called.
        """
        seen_s = self._before_s + self._loop.now_s() - self._begun_s
        before_s, count = seen_s - self._keep_days * DAY_S, 0
        while not self._loop.closed:
            with self._loop.fail_stop():
                part = self._store.forget(ended_before_s=before_s, limit=FORGET_AT_ONCE)
                self._archive.forgotten(part.request_ids)
            self._accounts.forget(part.request_ids)
            self._on_forgotten(part.request_ids)
            count += len(part.request_ids)
            if not part.more:
                log.info("old requests deleted", count=count, keep_days=self._keep_days)
                return
            await asyncio.sleep(FORGET_PAUSE_S)
