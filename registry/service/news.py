"""A feed of the ids of changed requests, for readers that remember their position. Plain asyncio, no Ray."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice

CHANGES_WAIT_S = 10.0
"""Maximum time that a reader waits in the registry for a change of any request, seconds."""

KEPT = 10_000
"""Number of changes kept: a reader that is further behind has to read all requests again."""


class News:
    """The ids of changed requests, of the last KEPT changes. Used in one event loop.

    A reader's place is the number of changes that the reader has seen. It is valid in one process only.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._changed: deque[str] = deque(maxlen=kept)
        self._count = 0
        self._readers: set[asyncio.Future[None]] = set()

    def add(self, request_ids: Iterable[str]) -> None:
        """Add changed requests and wake the readers."""
        before = self._count
        for request_id in request_ids:
            self._changed.append(request_id)
            self._count += 1
        if self._count > before:
            for reader in self._readers:
                if not reader.done():
                    reader.set_result(None)
            self._readers.clear()

    async def after(self, place: int | None, wait_s: float) -> tuple[int, list[str] | None]:
        """Wait for changes after ``place``, at most ``wait_s`` seconds. Return the current place and the changed ids.

        Each id is returned once. If ``place`` is too old, invalid or None: returns None for the ids, without a wait.
        """
        if place == self._count:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._next()
        if place is None or not self._count - len(self._changed) <= place <= self._count:
            return self._count, None
        new = self._count - place
        return self._count, list(dict.fromkeys(islice(self._changed, len(self._changed) - new, None)))

    async def _next(self) -> None:
        reader = asyncio.get_running_loop().create_future()
        self._readers.add(reader)
        try:
            await reader
        finally:
            self._readers.discard(reader)
