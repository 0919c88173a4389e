"""The background tasks of one registry, and work whose errors do not end its task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import ParamSpec

import structlog

from registry.background import spawn
from registry.errors import RegistryError, StoreUnavailable

P = ParamSpec("P")

log = structlog.get_logger("registry.service.tasks")


class Tasks:
    """The background tasks of one registry, in the order of their start. Used in one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], None] = {}

    def spawn(self, name: str, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run this work in a task. If it fails, that is logged; see ``registry.background.spawn``."""
        task = spawn(name, work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)

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

    A CancelledError counts as an error unless ``cancel`` of the current task caused it.

    Raises:
        StoreUnavailable: the database failed, and ``on_fatal`` was called.
        CancelledError: the current task was cancelled.
    """
    try:
        await work(*args, **more)
    except StoreUnavailable:
        raise  # on_fatal was called: the process ends
    except RegistryError as error:
        log.warning(what, reason=str(error))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        log.exception(what)
    except Exception:
        log.exception(what)
