"""Prepares a wrapper for engines: imports vLLM here and in the warm forkserver, sets the environment of engines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import structlog

from deployments.engine.environment import EngineEnvironment
from deployments.engine.media import MediaLimits
from deployments.engine.vllm_api import VLLM
from deployments.engine.warm.forkserver import WarmForkserver, run_apart
from deployments.engine.warm.patches import shape_problem
from deployments.engine.warm.sockets import hand_sockets_over
from deployments.machine import process_tree
from deployments.machine.child_processes import bind_spawned_processes
from deployments.machine.second_user import SETTING, SecondUser, home_of, require_usable, runs_as, unreadable
from registry.errors import BadSettings, EngineStartFailed

CHECK_S = 20.0
"""Time limit of ``require_readable``, seconds."""

log = structlog.get_logger("deployments.engine.preparation")


class Preparation:
    """The environment and, if a warm start is possible, the forkserver that all engines of a host share.

    ``cold_reason`` says why engines start cold; None if they are forked from the warm forkserver.
    """

    def __init__(
        self,
        vllm: VLLM,
        *,
        gpus: int,
        cache_dir: Path,
        kv_cache_gib: float | None,
        cpu_threads: int,
        preload: Sequence[str],
        media: MediaLimits,
        user: SecondUser | None,
    ) -> None:
        """Do nothing yet; see ``EngineHost`` for the arguments."""
        self.cold_reason: str | None = "not prepared"
        self.forkserver: WarmForkserver | None = None
        self._vllm = vllm
        self._gpus = gpus
        self._cache_dir = cache_dir
        self._kv_cache_gib = kv_cache_gib
        self._cpu_threads = cpu_threads
        self._preload = preload
        self._media = media
        self._user = user
        self._environment: EngineEnvironment | None = None

    @property
    def environment(self) -> EngineEnvironment:
        """The environment of the engines; only usable once ``begun``."""
        assert self._environment is not None
        return self._environment

    @property
    def begun(self) -> bool:
        """Whether ``prepare`` has set the environment."""
        return self._environment is not None

    async def prepare(self) -> None:
        """Import vLLM here and in the warm forkserver, in parallel; see ``EngineHost.prepare``. Call it once."""
        if self._user is not None:
            await asyncio.to_thread(require_usable, self._user, home_of(self._user, self._cache_dir))
        self._environment = EngineEnvironment(
            self._cache_dir,
            cpu_threads=None if self._gpus else self._cpu_threads,
            preload=self._preload,
            media=self._media,
            # VLLM_CPU_KVCACHE_SPACE would override our size, and allows only whole GiB.
            without=() if self._kv_cache_gib is None else ("VLLM_CPU_KVCACHE_SPACE",),
            user=self._user,
        )
        self.forkserver = WarmForkserver(self._environment.directory)
        warm, imported = await asyncio.gather(
            asyncio.to_thread(self.forkserver.start),
            self._vllm.in_thread(self._vllm.import_modules),
            return_exceptions=True,
        )
        if isinstance(imported, BaseException):
            raise imported
        self.cold_reason = str(warm) if isinstance(warm, BaseException) else self._why_cold()
        if self._user is not None:
            self._require_user(self._user)
        if self.cold_reason is None:
            self.forkserver.install()
            for problem in self.forkserver.not_preloaded:
                log.warning("a module could not be preloaded; LLMs that need it start more slowly", reason=problem)
            return
        log.warning("LLMs will start slowly, because a warm start is not possible", reason=self.cold_reason)
        await asyncio.to_thread(self.forkserver.stop)
        self.forkserver = None
        bind_spawned_processes()

    def _why_cold(self) -> str | None:
        binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if not self._gpus and binding != "nobind":
            return f"VLLM_CPU_OMP_THREADS_BIND={binding} binds threads, which only a fresh process can do"
        return shape_problem()

    def _require_user(self, user: SecondUser) -> None:
        """Make sure that engines run as this user. Raises BadSettings.

        A cold engine starts with the environment and the rights of this process, so it is refused.
        """
        assert self.forkserver is not None
        pid = self.forkserver.pid
        if self.cold_reason is not None:
            problem = f"engines of user {user.name!r} need a warm start, which is not possible: {self.cold_reason}"
            raise BadSettings(SETTING, problem)
        if pid is None or not runs_as(pid, user):
            raise BadSettings(SETTING, f"the process from which engines are forked does not run as {user.name!r}")
        hand_sockets_over(self.environment.sockets, user)

    def require_readable(self, model: str) -> None:
        """Make sure that engines can read the files of a model, if they run as a second user. Blocks up to CHECK_S.

        Raises:
            EngineStartFailed: They can't; names a file.
        """
        if self._user is None or self.forkserver is None:
            return
        files = [str(file) for file in Path(model).rglob("*") if file.is_file()]
        try:
            file = run_apart(self.forkserver.context, partial(unreadable, files), CHECK_S)
        except (RuntimeError, TimeoutError) as error:
            problem = f"a process of user {self._user.name!r} ({SETTING}) did not say whether it can read it: {error!r}"
            raise EngineStartFailed(model, problem) from error
        if file is not None:
            remedy = "let this user read it and enter the folders above it, or choose another models.cache_dir"
            problem = f"user {self._user.name!r} ({SETTING}) can't read {file}: {remedy}"
            raise EngineStartFailed(model, problem)

    def processes(self) -> set[psutil.Process]:
        """Return all processes of engines; without a forkserver, all descendants that could be one."""
        if self.forkserver is not None and self.forkserver.pid is not None:
            return process_tree.descendants(self.forkserver.pid)
        tracker = WarmForkserver.tracker_pid()
        return {process for process in process_tree.descendants(os.getpid()) if process.pid != tracker}

    async def close(self) -> None:
        """End the forkserver and remove the environment; no engine may run any more."""
        if self.forkserver is not None:
            await asyncio.to_thread(self.forkserver.stop)
        if self._environment is not None:
            self._environment.close()
