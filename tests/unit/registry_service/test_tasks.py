"""Background work whose errors are logged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial

import pytest
import structlog

from registry.errors import StoreUnavailable, WrapperUnreachable
from registry.service.tasks import Tasks, guarded


async def _fail(error: Exception) -> None:
    raise error


async def _cancels_itself() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("work", [partial(_fail, ZeroDivisionError("boom")), _cancels_itself])
async def test_an_error_that_ends_a_task_is_logged(work: Callable[[], Coroutine[object, object, None]]) -> None:
    """No background task ends unnoticed, also not by a CancelledError from inside."""
    tasks = Tasks()
    with structlog.testing.capture_logs() as logs:
        await asyncio.wait([tasks.spawn("reconcile", work())])
        await asyncio.sleep(0)
    assert [(entry["event"], entry["task"]) for entry in logs] == [("a background task failed", "reconcile")]


async def test_stop_ends_every_task() -> None:
    """After ``stop`` no task runs, whether it had begun or not; nothing is logged."""
    tasks, never = Tasks(), asyncio.Event()

    async def wait() -> None:
        await never.wait()

    with structlog.testing.capture_logs() as logs:
        begun = tasks.spawn("begun", wait())
        await asyncio.sleep(0)
        not_begun = tasks.spawn("not begun", guarded("it could not wait", wait))
        await tasks.stop()
    assert begun.cancelled()
    assert not_begun.cancelled()
    assert logs == []


async def test_guarded_work_ends_only_with_the_database() -> None:
    """Errors are logged and the caller continues, except when the database fails: then the process ends."""
    with structlog.testing.capture_logs() as logs:
        await guarded("refused", _fail, WrapperUnreachable("a-0", "it is away"))
        await guarded("broken", _fail, ZeroDivisionError())
        await guarded("cancelled from inside", _cancels_itself)
        with pytest.raises(StoreUnavailable):
            await guarded("fatal", _fail, StoreUnavailable("gone"))
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("refused", "warning"),
        ("broken", "error"),
        ("cancelled from inside", "error"),
    ]
