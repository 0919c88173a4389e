import asyncio
import contextlib
import mmap
import os
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from deployments.machine import process_tree

FAMILY = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest_asyncio.fixture
async def parent() -> AsyncIterator[Process]:
    """A process with a child."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FAMILY, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    yield process
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def test_descendants_are_seen_until_they_end(parent: Process) -> None:
    """A family is found as a whole, and seen to be gone when it has been killed."""
    family = {psutil.Process(parent.pid), *process_tree.descendants(parent.pid)}
    assert len(family) == 2
    assert family <= process_tree.descendants(os.getpid())
    assert process_tree.alive(family) == family
    assert await process_tree.ended(family, 0) == family
    process_tree.kill(family)
    assert await process_tree.ended(family, 10) == set()
    assert process_tree.alive(family) == set()
    process_tree.kill(family)
    assert await process_tree.ended(family, 0) == set()


async def test_stopped_process_is_seen(parent: Process) -> None:
    """A process that was stopped is seen as such until it goes on, and does not count as ended."""
    process = psutil.Process(parent.pid)
    assert process_tree.stopped([process]) == set()
    process.suspend()
    while not process_tree.stopped([process]):  # the signal is on its way
        assert process_tree.alive([process]) == {process}
    process.resume()
    while process_tree.stopped([process]):
        assert process_tree.alive([process]) == {process}
    parent.kill()
    await parent.wait()
    assert process_tree.stopped([process]) == set()


async def test_death_is_told_at_once(parent: Process) -> None:
    """The end of a watched process is told once, as it happens."""
    told: asyncio.Queue[int] = asyncio.Queue()
    watch = process_tree.DeathWatch([psutil.Process(parent.pid)], told.put_nowait)
    parent.kill()
    async with asyncio.timeout(5):
        assert await told.get() == parent.pid
    await parent.wait()
    assert told.empty()
    watch.close()


async def test_earlier_death_is_told_too(parent: Process) -> None:
    """A process that had ended before it was watched is told as well, and not after the watch was closed."""
    watched = [psutil.Process(parent.pid)]
    parent.kill()
    await parent.wait()
    told: list[int] = []
    closed = process_tree.DeathWatch(watched, told.append)
    closed.close()
    await asyncio.sleep(0)
    assert told == []
    watch = process_tree.DeathWatch(watched, told.append)
    await asyncio.sleep(0)
    assert told == [parent.pid]
    watch.close()


async def test_unknown_process_has_no_descendants(parent: Process) -> None:
    """A process that does not exist has no descendants."""
    parent.kill()
    await parent.wait()
    assert process_tree.descendants(parent.pid) == set()


HOLDS = "import sys; file = open(sys.argv[1], 'a'); print(flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[Path, dict[str, str]], int]]:
    """Starts processes that have a file open, in a given environment; their pids."""
    with contextlib.ExitStack() as ends:

        def start(folder: Path, environment: dict[str, str]) -> int:
            command = [sys.executable, "-IS", "-c", HOLDS, str(folder / "log")]
            pipe = subprocess.PIPE
            process = ends.enter_context(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe))
            ends.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            return process.pid

        yield start


def test_users_of_a_folder(tmp_path: Path, holder: Callable[[Path, dict[str, str]], int]) -> None:
    """Who has its temporary files in a folder is found, and who hides its environment but has files open there.

    Who only looks at a file there, or uses a folder whose name begins alike, is not.
    """
    folder, other = tmp_path / "gprompt-1", tmp_path / "gprompt-12"
    for path in (folder / "t" / "engine", other):
        path.mkdir(parents=True)
    found = {
        holder(other, {"TMPDIR": str(folder / "t")}),
        holder(other, {"TMPDIR": str(folder / "t" / "engine")}),
        holder(folder, {}),
    }
    holder(folder, {"TMPDIR": "/tmp"})
    holder(folder, {"HOME": str(folder)})
    holder(other, {"TMPDIR": str(other)})
    holder(other, {})
    assert {process.pid for process in process_tree.users_of(folder)} == found


def test_nobody_uses_an_unknown_folder(tmp_path: Path) -> None:
    """A folder that is not there has no users."""
    assert process_tree.users_of(tmp_path / "none") == set()


def test_shared_memory_is_found_while_it_has_a_name() -> None:
    """Shared memory that a process has in use is found by its file, until that is removed."""
    memory = shared_memory.SharedMemory(create=True, size=4096)
    me = [psutil.Process()]
    found = {file.name for file in process_tree.shared_memory(me)}
    memory.unlink()
    left = {file.name for file in process_tree.shared_memory(me)}
    memory.close()
    assert memory.name in found
    assert memory.name not in left


def test_only_what_lies_in_the_folder_of_shared_memory_is_found(tmp_path: Path) -> None:
    """A process can map any file, and the files that are found are removed: names elsewhere do not count."""
    folder = tmp_path / "dev" / "shm"
    folder.mkdir(parents=True)
    (folder / "planted").write_bytes(b"x" * 4096)
    with (folder / "planted").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert "planted" not in {path.name for path in process_tree.shared_memory([psutil.Process()])}
