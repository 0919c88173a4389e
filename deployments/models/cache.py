"""The models of a machine: downloaded before an engine starts, kept in a cache of limited size, locked while in use."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from deployments.models.download import DownloadFailed, DownloadOrder, cached, commit_of, find, lock_of, try_lock
from registry.contract.messages import Download
from registry.errors import EngineStartFailed

LOCK_POLL_S = 0.05
"""Seconds between attempts to lock a model that is being removed."""


@dataclass(slots=True)
class LocalModel:
    """A model on this machine that is not removed before ``release``.

    ``path`` is loaded by the engine. ``revision`` is the commit of its files; None for an operator's own folder, whose
    revision is unknown.
    """

    path: str
    revision: str | None = None
    _lock: IO[str] | None = None

    def release(self) -> None:
        """Mark the model as no longer used by this wrapper. Idempotent."""
        if self._lock is not None:
            _touch(self._lock)
            self._lock.close()
            self._lock = None


class ModelCache:
    """A cache of models from the Hugging Face hub. The wrappers of a machine share its directories.

    ``directory``: the cache; None: the one that the environment names (HF_HUB_CACHE, HF_HOME). ``locks_dir``: lock
    files that show which models are in use and when they were last used. ``max_gib``: size limit of the cache in GiB;
    unused models are removed to keep to it. None: no limit, and nothing is ever removed.
    """

    def __init__(self, directory: Path | None, locks_dir: Path, max_gib: float | None = None) -> None:
        self._directory = directory
        self._locks_dir = locks_dir
        self._max_bytes = None if max_gib is None else int(max_gib * 2**30)

    async def fetch(
        self,
        model: str,
        *,
        revision: str | None = None,
        load_format: str = "auto",
        weights: bool = True,
        on_progress: Callable[[Download], object] = lambda _download: None,
    ) -> LocalModel:
        """Return a model on this machine; download what is missing.

        Cancelling this ends the download; the next call resumes it.

        Args:
            model: Hugging Face id, or the absolute path of a folder.
            revision: Branch, tag or commit; None: the default branch.
            load_format: vLLM's engine argument.
            weights: False: only configuration and tokenizer.
            on_progress: Called in the event loop with the progress of a download, if one is needed.

        Raises:
            EngineStartFailed: It can't be provided; the reason says why and what to do.
        """
        if Path(model).is_absolute():
            if not await asyncio.to_thread(os.path.isdir, model):
                raise EngineStartFailed(model, f"there is no folder {model} on this machine")
            return LocalModel(model)
        cache_dir = self._cache_dir
        async with self._in_use(model) as lock:
            try:
                order = DownloadOrder(
                    model,
                    await asyncio.to_thread(commit_of, model, revision, cache_dir),
                    cache_dir,
                    str(self._locks_dir),
                    max_bytes=self._max_bytes,
                    load_format=load_format,
                    weights=weights,
                    owner_pid=os.getpid(),
                )
                folder = await asyncio.to_thread(find, order) or await _download(order, on_progress)
            except DownloadFailed as failed:
                raise EngineStartFailed(model, failed.problem, failed.permanent) from None
            lock.truncate(0)  # the space reserved for it is now used
            return LocalModel(folder, order.commit, lock)

    async def here(self, model: str, *, revision: str | None = None) -> str | None:
        """Return the folder of a model's files on this machine, None if there are none. Uses no network and no lock.

        An absolute path is returned unchanged, without a check that it exists.
        """
        if Path(model).is_absolute():
            return model
        return await asyncio.to_thread(cached, model, revision, self._cache_dir)

    @property
    def _cache_dir(self) -> str | None:
        return None if self._directory is None else str(self._directory)

    @asynccontextmanager
    async def _in_use(self, model: str) -> AsyncIterator[IO[str]]:
        """Keep other processes from removing a model, until the returned lock is closed or the body fails."""
        self._locks_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_of(model, self._locks_dir).open("a+", encoding="utf-8")
        try:
            while not try_lock(lock, fcntl.LOCK_SH):  # noqa: ASYNC110 - another process holds it
                await asyncio.sleep(LOCK_POLL_S)
            _touch(lock)
            yield lock
        except BaseException:
            lock.close()
            raise


async def _download(order: DownloadOrder, on_progress: Callable[[Download], object]) -> str:
    """Run the download in a separate process and return its folder. The process ends with this task or this process.

    Raises:
        DownloadFailed: The download's own error, or the process ended without a result.
    """
    process = subprocess.Popen(  # noqa: ASYNC220 - asyncio's own needs a child watcher, which not every loop has
        [sys.executable, "-P", "-m", "deployments.models.download", json.dumps(asdict(order))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    reader = asyncio.StreamReader()
    output: Any = process.stdout
    said: deque[str] = deque(maxlen=5)
    try:
        output, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), output
        )
        async for line in reader:
            match _json_object(line):
                case {"done": int(done), "total": int(total)}:
                    on_progress(Download(done, total))
                case {"folder": str(folder)}:
                    return folder
                case {"problem": str(problem), "permanent": bool(permanent)}:
                    raise DownloadFailed(problem, permanent)
                case _:
                    said.append(line.decode(errors="replace").strip())
    finally:
        process.kill()
        output.close()
        await asyncio.to_thread(process.wait)
    raise DownloadFailed(f"its download ended unexpectedly: {' '.join(said) or 'no reason was given'}")


def _touch(lock: IO[str]) -> None:
    """Set the last use of this lock's model to now, with a clock finer than the file system's."""
    os.utime(lock.fileno(), ns=(time.time_ns(), time.time_ns()))


def _json_object(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None
