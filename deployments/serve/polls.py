"""Long polls, held in the ingress. They end when their client hangs up; a waiting poll costs the registry nothing.

The registry actor is asked about a request when its poll begins, when the request has changed, and when the poll ends.
One repeated call, made while there are polls, returns the requests that have changed. A poll must not wait in the
actor: Ray continues an actor's call even if its caller was cancelled, so polls of clients that have hung up would stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from registry.background import spawn
from registry.errors import RegistryError, TooManyPolls
from registry.service.keys import EVERYTHING, Access
from registry.service.news import CHANGES_WAIT_S
from registry.wire.words import RequestStatus

MOST_POLLS = 8000
"""Polls that may wait at once in one ingress. The rest of Serve's ``max_ongoing_requests`` is for control calls."""

RETRY_S = 1.0
"""Pause before the next call for changes if the registry did not answer, seconds."""

log = structlog.get_logger("deployments.serve.polls")


# D79: long polls wait here, not in the actor
class Polls:
    """Waits for changes of requests. ``call(method, *args, wait_s=…)`` reaches the registry actor."""

    def __init__(self, call: Callable[..., Awaitable[Any]], *, most: int = MOST_POLLS) -> None:
        self._call = call
        self._most = most
        self._count = 0
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._following: asyncio.Task[None] | None = None

    async def state(
        self, request_id: str, wait_s: float, seen: RequestStatus | None, access: Access = EVERYTHING
    ) -> str:
        """Return a request's JSON RequestState once its status differs from ``seen``, or after ``wait_s`` seconds.

        With ``seen`` None: at once if it is deployed, else once its status changes. Returns at once
        for a request that has ended.

        Raises:
            TooManyPolls: The limit of waiting polls is reached.
            RegistryError: Raised by the registry.
        """
        if wait_s <= 0:
            return await self._state(request_id, access)
        if self._count >= self._most:
            raise TooManyPolls(self._most)
        deadline_s = asyncio.get_running_loop().time() + wait_s
        with self._watched(request_id) as changed:
            while True:
                changed.clear()
                told, text = await self._ask(request_id, access)
                status = RequestStatus(told)
                # D17: a poll waits for what its client does not know
                if seen is None and status is not RequestStatus.DEPLOYED:
                    seen = status
                if status is not seen or status.ended:
                    return str(text)
                try:
                    async with asyncio.timeout_at(deadline_s):
                        await changed.wait()
                except TimeoutError:
                    return await self._state(request_id, access)

    async def _state(self, request_id: str, access: Access) -> str:
        _, text = await self._ask(request_id, access)
        return str(text)

    async def _ask(self, request_id: str, access: Access) -> tuple[str, str]:
        # Without keys everybody may see everything, and this is the most frequent call: nothing for Ray to pickle.
        status, text = await self._call("state", request_id, *(() if access == EVERYTHING else (access,)))
        return status, text

    @contextmanager
    def _watched(self, request_id: str) -> Iterator[asyncio.Event]:
        """Watch a request; the event is set when it may have changed."""
        changed = asyncio.Event()
        self._count += 1
        self._waiting.setdefault(request_id, set()).add(changed)
        if self._following is None or self._following.done():
            self._following = spawn("follow the changes of requests", self._follow())
        try:
            yield changed
        finally:
            self._count -= 1
            events = self._waiting[request_id]
            events.discard(changed)
            if not events:
                del self._waiting[request_id]

    async def _follow(self) -> None:
        """Wake the polls whose request has changed; return when no poll waits any more.

        The first answer of each registry process wakes all polls, because earlier changes are unknown.
        """
        life, place = "", None
        while self._waiting:
            try:
                life, place, changed = await self._call("changes", life, place, wait_s=CHANGES_WAIT_S)
            except RegistryError as error:
                log.warning("the registry does not report changes of requests; retrying", reason=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            for request_id in list(self._waiting) if changed is None else changed:
                for event in self._waiting.get(request_id, ()):
                    event.set()
