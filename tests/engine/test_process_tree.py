import asyncio
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from multiprocessing import shared_memory

import psutil
import pytest_asyncio

from deployments import process_tree

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
