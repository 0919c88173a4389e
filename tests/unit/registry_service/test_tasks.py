"""Background work whose errors are logged."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from registry.errors import StoreUnavailable, WrapperUnreachable
from registry.service.tasks import Tasks, guarded


async def _fail(error: Exception) -> None:
    raise error


async def test_an_error_that_ends_a_task_is_logged() -> None:
    """No background task ends unnoticed."""
    tasks = Tasks()
    with structlog.testing.capture_logs() as logs:
        await asyncio.wait([tasks.spawn(_fail(ZeroDivisionError("boom")))])
        await asyncio.sleep(0)
    assert [(entry["event"], str(entry["exc_info"])) for entry in logs] == [
        ("a task of the registry ended with an error", "boom")
    ]


async def test_stop_ends_every_task() -> None:
    """After ``stop`` no task runs, whether it had begun or not; nothing is logged."""
    tasks, never = Tasks(), asyncio.Event()

    async def wait() -> None:
        await never.wait()

    with structlog.testing.capture_logs() as logs:
        begun = tasks.spawn(wait())
        await asyncio.sleep(0)
        not_begun = tasks.spawn(guarded("it could not wait", wait))
        await tasks.stop()
    assert begun.cancelled()
    assert not_begun.cancelled()
    assert logs == []


async def test_guarded_work_ends_only_with_the_database() -> None:
    """Errors are logged and the caller continues, except when the database fails: then the process ends."""
    with structlog.testing.capture_logs() as logs:
        await guarded("refused", _fail, WrapperUnreachable("a-0", "it is away"))
        await guarded("broken", _fail, ZeroDivisionError())
        with pytest.raises(StoreUnavailable):
            await guarded("fatal", _fail, StoreUnavailable("gone"))
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("refused", "warning"), ("broken", "error")]
