"""Runs the registry's background work, and logs the errors that end it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import ParamSpec

import structlog

from registry.errors import RegistryError, StoreUnavailable

P = ParamSpec("P")

log = structlog.get_logger("registry.service.tasks")


class Tasks:
    """The background tasks of one registry, in the order of their start. Used in one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], None] = {}

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run this work in a task. If an error ends it, the error is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the registry ended with an error", exc_info=error)

    def cancel(self) -> None:
        """Cancel all tasks. Idempotent."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """Cancel all tasks, and wait until they have ended. Idempotent."""
        tasks = list(self._tasks)
        self.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def guarded(what: str, work: Callable[P, Awaitable[None]], *args: P.args, **more: P.kwargs) -> None:
    """Call and await ``work``. Log its errors with the text ``what``, so that the caller can continue.

    Raises:
        StoreUnavailable: the database failed, and ``on_fatal`` was called.
    """
    try:
        await work(*args, **more)
    except StoreUnavailable:
        raise  # on_fatal was called: the process ends
    except RegistryError as error:
        log.warning(what, reason=str(error))
    except Exception:
        log.exception(what)
