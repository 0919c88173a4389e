"""Starts background tasks and threads. If one fails, the failure is logged and ``on_failure`` is called.

asyncio and threading drop an exception if no code awaits the result, so a failed watch would stop
without a log line. All tasks and threads of ``registry`` and ``deployments`` are started here. The
object that starts one keeps it, and awaits or cancels it when the object itself ends.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

T = TypeVar("T")

OnFailure = Callable[[BaseException], None]
"""Called with the exception that ended a task or thread."""

log = structlog.get_logger("registry.background")


# D105: no task fails unnoticed
def spawn(name: str, work: Coroutine[Any, Any, T], *, on_failure: OnFailure | None = None) -> asyncio.Task[T]:
    """Start a task whose result is not awaited.

    If it fails, that is logged and ``on_failure`` is called in the event loop. Any exception counts
    as a failure, also a CancelledError that was not caused by ``cancel`` of this task.
    """
    task = asyncio.create_task(work, name=name)

    def ended(task: asyncio.Task[T]) -> None:
        if task.cancelled():
            if task.cancelling():
                return
            error: BaseException | None = asyncio.CancelledError("its own code raised CancelledError")
        else:
            error = task.exception()
        if error is not None:
            _failed(name, error, on_failure)

    task.add_done_callback(ended)
    return task


def spawn_awaited(name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task whose owner awaits its result and handles its failure."""
    return asyncio.create_task(work, name=name)


def spawn_thread(name: str, work: Callable[[], None], *, on_failure: OnFailure | None = None) -> threading.Thread:
    """Start a daemon thread. If it fails, that is logged and ``on_failure`` is called in the thread."""

    def run() -> None:
        try:
            work()
        except BaseException as error:
            _failed(name, error, on_failure)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def _failed(name: str, error: BaseException, on_failure: OnFailure | None) -> None:
    # As text: some renderers of tracebacks show local variables, and one of them may be a lease's token.
    text = "".join(traceback.format_exception(error))
    log.error("a background task failed", task=name, reason=reason_of(error), traceback=text)
    if on_failure is not None:
        on_failure(error)


def reason_of(error: BaseException) -> str:
    """Return type and text of an exception, for a log or a status."""
    return f"{type(error).__name__}: {error}"
