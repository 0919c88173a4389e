"""Wakes clients that wait for the next change of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class Waiters:
    """The futures of clients that wait, by request id. Used in one event loop."""

    def __init__(self) -> None:
        self._by_request: dict[str, set[asyncio.Future[None]]] = {}

    def wake(self, request_ids: Iterable[str]) -> None:
        """Wake all that wait for one of these requests."""
        for request_id in request_ids:
            for future in self._by_request.pop(request_id, ()):
                if not future.done():
                    future.set_result(None)

    async def next_change(self, request_id: str) -> None:
        """Wait until ``wake`` is called for this request."""
        future = asyncio.get_running_loop().create_future()
        self._by_request.setdefault(request_id, set()).add(future)
        try:
            await future
        finally:
            waiting = self._by_request.get(request_id)
            if waiting is not None:
                waiting.discard(future)
                if not waiting:
                    del self._by_request[request_id]
