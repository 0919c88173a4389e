"""Background tasks and threads: none of them fails unnoticed."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from registry.background import spawn, spawn_thread

ROOT = Path(__file__).resolve().parents[3]
STARTS = {"asyncio.create_task", "asyncio.ensure_future", "threading.Thread"}


async def fails() -> None:
    await asyncio.sleep(0)
    raise AttributeError("no output_processor")


async def cancels_itself() -> None:
    raise asyncio.CancelledError


async def goes_on() -> None:
    await asyncio.Event().wait()


async def test_a_failed_task_is_logged_and_its_owner_called() -> None:
    """The log line has the task's name and the reason; the owner gets the exception."""
    errors: list[BaseException] = []
    with capture_logs() as lines:
        await asyncio.wait({spawn("hang watch", fails(), on_failure=errors.append)})
        await asyncio.sleep(0)
    assert [str(error) for error in errors] == ["no output_processor"]
    (line,) = lines
    assert (line["task"], line["reason"]) == ("hang watch", "AttributeError: no output_processor")


async def test_a_task_that_nobody_cancelled_has_failed() -> None:
    """A CancelledError from inside would end a watch just as silently as any other exception."""
    errors: list[BaseException] = []
    with capture_logs() as lines:
        await asyncio.wait({spawn("hang watch", cancels_itself(), on_failure=errors.append)})
        await asyncio.sleep(0)
    assert (len(errors), len(lines)) == (1, 1)


async def test_a_task_that_its_owner_cancels_has_not_failed() -> None:
    """Cancelling is how an owner ends a watch: nothing is logged, nobody called."""
    errors: list[BaseException] = []
    with capture_logs() as lines:
        task = spawn("hang watch", goes_on(), on_failure=errors.append)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await asyncio.sleep(0)
    assert (errors, lines) == ([], [])


def test_a_failed_thread_is_logged_and_its_owner_called() -> None:
    """A thread's exception goes to the log, not only to stderr."""

    def work() -> None:
        raise OSError("NVML is gone")

    errors: list[BaseException] = []
    with capture_logs() as lines:
        spawn_thread("energy-meter", work, on_failure=errors.append).join()
    assert [str(error) for error in errors] == ["NVML is gone"]
    assert [line["task"] for line in lines] == ["energy-meter"]


def test_a_failure_is_logged_without_local_variables(capsys: pytest.CaptureFixture[str]) -> None:
    """One of them may be the token of a lease; the log of a process that configured nothing shows them otherwise."""

    def work() -> None:
        token = "secret-" + str(1234)  # else the line of code itself would show it
        raise OSError(f"a prompt failed after {len(token)} characters")

    spawn_thread("prompts", work).join()
    said = capsys.readouterr()
    assert "a prompt failed after 11 characters" in said.out + said.err
    assert "secret-1234" not in said.out + said.err


PACKAGES = ("registry", "deployments")
FILES = sorted({path for each in PACKAGES for path in (ROOT / each).rglob("*.py")} - {ROOT / "registry/background.py"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_all_tasks_and_threads_are_started_in_one_place(path: Path) -> None:
    """Only ``registry.background`` starts a task or a thread, or hands on what does."""
    tree = ast.parse(path.read_text())
    annotations = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) for part in ast.walk(node.annotation)
    }
    used = {
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in annotations
    }
    assert not used & STARTS
    assert not {name for name in used if name.endswith(".create_task")}
