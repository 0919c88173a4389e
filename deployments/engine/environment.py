"""The surroundings of a wrapper's engines: variables, a directory for what is short-lived, phases and last words."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from logging.handlers import MemoryHandler
from pathlib import Path

from deployments.engine.warm.forkserver import PHASE_FILE, forkserver_variables

_PREFIX = "gp-engine-"
_LOCK, _SHARED_MEMORY = "owner.lock", "shared_memory"
_LAST_LINES = 8
_LINE_CHARS = 300
_RECORD, _FIELD = "\x1e", "\x1f"  # what no error message holds
_TRACEBACK = "Traceback (most recent call last):"
_TOLD_BY_TYPE = ("ValueError", "RuntimeError", "Exception", "OSError", "ValidationError")


class Phase(StrEnum):
    """How far the start of an LLM is. A cold start can't tell when its engine warms up, or compiles: LOADING there."""

    IMPORTING = "importing"  # vLLM itself, once per wrapper
    CONFIGURING = "configuring"  # the LLM's configuration and tokenizer
    WAKING = "waking"  # in place of those before and after, if it slept
    LOADING = "loading"  # its weights
    WARMING_UP = "warming_up"  # KV cache, first run, first answer
    COMPILING = "compiling"  # amid the warming up, once for each part that has to be
    READY = "ready"


class PhaseClock:
    """Tells phases as they begin, and how long each took. Lives in the event loop."""

    def __init__(self, on_phase: Callable[[Phase], object]) -> None:
        """``took_s`` holds the seconds of each phase that is over."""
        self.phase: Phase | None = None
        self.took_s: dict[str, float] = {}
        self._on_phase = on_phase
        self._since_s = 0.0

    def enter(self, phase: Phase) -> None:
        """A phase begins, and the one before ends. Again: no difference."""
        if phase is self.phase:
            return
        now_s = time.monotonic()
        if self.phase is not None:
            self.took_s[self.phase.value] = self.took_s.get(self.phase.value, 0.0) + now_s - self._since_s
        self.phase, self._since_s = phase, now_s
        self._on_phase(phase)

    def enter_threadsafe(self) -> Callable[[Phase], object]:
        """``enter`` for another thread."""
        loop = asyncio.get_running_loop()
        return lambda phase: loop.call_soon_threadsafe(self.enter, phase)

    async def follow(self, phases: Callable[[], Sequence[Phase]]) -> None:
        """Enter the phases that engine processes announce, until cancelled."""
        seen = 0
        while True:
            announced = phases()
            for phase in announced[seen:]:
                self.enter(phase)
            seen = len(announced)
            await asyncio.sleep(0.05)


class EngineEnvironment:
    """What every engine of a wrapper finds around it; all of it is gone after ``close``, except the caches.

    ``directory`` holds sockets and short-lived files. It is locked as long as its owner lives, so that a later owner
    can remove what a killed one left behind.
    """

    def __init__(
        self, cache_dir: Path, *, cpu_threads: int | None, preload: Sequence[str] = (), without: Sequence[str] = ()
    ) -> None:
        """Make the directory and set the variables in this process, from which the engines inherit them.

        Args:
            cache_dir: Directory for compiled kernels and the like, which stays.
            cpu_threads: Threads of an engine that computes on the CPU; None for one that does not.
            preload: Modules for the forkserver to import besides those that every engine needs.
            without: Variables that must not be set.
        """
        remove_orphans()
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_base()))
        self._lock = (self.directory / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._sockets, self._temporary = self.directory / "s", self.directory / "tmp"
        self._sockets.mkdir()
        self._temporary.mkdir()
        self._phases = self.directory / "phases"
        self._errors = self.directory / "errors"
        self._log = self.directory / "log"
        ours = {**self._variables(cache_dir, cpu_threads), **forkserver_variables(preload)}
        self._before = {name: os.environ.get(name) for name in (*ours, *without)}
        _set(ours | dict.fromkeys(without))
        self.begin_start()

    def _variables(self, cache_dir: Path, cpu_threads: int | None) -> Mapping[str, str]:
        logging_config = self.directory / "logging.json"
        logging_config.write_text(json.dumps(self._logging()), encoding="utf-8")
        chosen = {
            "VLLM_RPC_BASE_PATH": str(self._sockets),
            "TMPDIR": str(self._temporary),
            "VLLM_LOGGING_CONFIG_PATH": str(logging_config),
            PHASE_FILE: str(self._phases),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            # An engine lives on one machine: nothing of it has to be reachable from outside.
            "VLLM_HOST_IP": "127.0.0.1",
        }
        # An operator's own choice stands.
        defaults = {
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "VLLM_CACHE_ROOT": str(cache_dir / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache_dir / "inductor"),
            "TRITON_CACHE_DIR": str(cache_dir / "triton"),
        }
        if cpu_threads is not None:
            # vLLM would bind the threads of every engine to the same cores, also those of other wrappers.
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            chosen["OMP_NUM_THREADS"] = str(cpu_threads)
        return chosen | {name: value for name, value in defaults.items() if name not in os.environ}

    def _logging(self) -> Mapping[str, object]:
        """The operator's logging configuration for vLLM, or a plain one, and files for last words and lines."""
        own = os.environ.get("VLLM_LOGGING_CONFIG_PATH")
        level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
        config: dict[str, dict[str, object]] = (
            json.loads(Path(own).read_text(encoding="utf-8"))
            if own
            else {
                "formatters": {"plain": {"format": "%(levelname)s %(asctime)s [%(processName)s] %(message)s"}},
                "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain", "level": level}},
                "loggers": {"vllm": {"handlers": ["stderr"], "level": level, "propagate": False}},
            }
        )
        config.setdefault("formatters", {})["words"] = {"format": f"{_RECORD}%(message)s{_FIELD}"}
        config.setdefault("handlers", {})["words"] = {
            "class": "logging.FileHandler",
            "filename": str(self._errors),
            "formatter": "words",
            "level": "ERROR",
            "delay": True,
        }
        config["formatters"]["lines"] = {"format": "%(levelname)s %(message)s"}
        config["handlers"]["lines"] = {
            "class": "logging.FileHandler",
            "filename": str(self._log),
            "formatter": "lines",
            "level": "INFO",
            "delay": True,
        }
        logger = config.setdefault("loggers", {}).setdefault("vllm", {})
        assert isinstance(logger, dict)
        logger["handlers"] = [*logger.get("handlers", []), "words", "lines"]
        return {"version": 1, "disable_existing_loggers": False} | config

    def begin_start(self, *, alone: bool = True) -> None:
        """Forget phases and words of the engine before, and remove what it left behind if it was killed.

        Where another engine lives (not ``alone``) nothing is removed: it can't be told whose it is.
        """
        if alone:
            _remove_shared_memory(self.directory)
            for entry in (*self._sockets.iterdir(), *self._temporary.glob("vllm_dist_*")):
                entry.unlink()
        self._phases.write_text("", encoding="utf-8")
        self._errors.write_text("", encoding="utf-8")
        self._log.write_text("", encoding="utf-8")

    def remember_shared_memory(self, files: Iterable[Path]) -> None:
        """These belong to the engine: whoever outlives it removes them if it can't do so itself."""
        with (self.directory / _SHARED_MEMORY).open("a", encoding="utf-8") as list_:
            list_.writelines(f"{file}\n" for file in files)

    def remove_shared_memory(self) -> None:
        """Remove what an engine that was killed could not remove itself. None of its processes runs any more."""
        _remove_shared_memory(self.directory)

    def phases(self) -> Sequence[Phase]:
        """What the engine's processes have announced so far, in order."""
        return [Phase(word) for word in self._phases.read_text(encoding="utf-8").split()]

    def last_words(self) -> str | None:
        """The error that ended the engine, as it was raised where it happened; None when it left no words."""
        return root_cause(self._errors.read_text(encoding="utf-8", errors="replace"))

    def last_lines(self) -> str:
        """The end of the engine's log, for an engine that left no words; empty when there is none."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line[:_LINE_CHARS] for line in lines[-_LAST_LINES:])

    def close(self) -> None:
        """Remove the directory and put the variables back."""
        _set(self._before)
        _remove_shared_memory(self.directory)
        shutil.rmtree(self.directory)
        self._lock.close()


def root_cause(errors: str) -> str | None:
    """The first cause among logged errors: vLLM's later ones only say that an earlier process failed.

    Args:
        errors: Records as ``EngineEnvironment`` has them written: separator, message, separator, traceback.

    Returns:
        The message of the exception, with its type where that tells something; None when there is no traceback.
    """
    causes = []
    for record in errors.split(_RECORD)[1:]:
        message, _, traceback = record.partition(_FIELD)
        if _TRACEBACK in traceback:
            causes.append(("failed to start" in message, _exception_text(traceback)))
    if not causes:
        return None
    return next((text for decisive, text in causes if decisive), causes[0][1])


def _exception_text(traceback: str) -> str:
    """What stands behind the last frame of a traceback."""
    lines = traceback.rstrip().splitlines()
    last_frame = max(index for index, line in enumerate(lines) if line.startswith("  File ") or _TRACEBACK in line)
    words = [line for line in lines[last_frame + 1 :] if not line.startswith("    ")]
    kind, separator, text = "\n".join(words).partition(": ")
    name = kind.rpartition(".")[2]
    return text if separator and name in _TOLD_BY_TYPE else name + separator + text


def _set(variables: Mapping[str, str | None]) -> None:
    """Set environment variables of this process; None removes one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _base() -> Path:
    """Where temporary files go, if that is short: the path of a Unix socket has 107 characters, of which we need 58."""
    usual = Path(tempfile.gettempdir())
    return usual if len(os.fsencode(usual)) < 49 else Path("/tmp")  # noqa: S108 - what is made there has a random name


def _remove_shared_memory(directory: Path) -> None:
    listed = directory / _SHARED_MEMORY
    if listed.exists():
        for file in listed.read_text(encoding="utf-8").splitlines():
            Path(file).unlink(missing_ok=True)
        listed.unlink()


@contextmanager
def log_handlers_kept() -> Iterator[None]:
    """Handlers that pass on to others go on doing so, whatever a library does about logging meanwhile.

    ``logging.config.dictConfig``, which vLLM calls before it makes an engine, closes every handler of the process.
    Those of Serve's replicas (``MemoryHandler``) lose their file by that, and a controller of Serve's that comes back
    takes a replica which can't name its log file for a broken one, and ends it.
    """
    known = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]
    handlers = [handler for logger in loggers for handler in logger.handlers if isinstance(handler, MemoryHandler)]
    targets = [(handler, handler.target) for handler in handlers]
    try:
        yield
    finally:
        for handler, target in targets:
            handler.setTarget(target)


def remove_shared_memory(base: Path) -> None:
    """Remove the shared memory of all engines whose directories are in ``base``; none of them may run any more."""
    for directory in base.glob(f"{_PREFIX}*"):
        _remove_shared_memory(directory)


def remove_orphans() -> None:
    """Remove what owners that were killed left behind: nobody holds their lock any more."""
    for directory in _base().glob(f"{_PREFIX}*"):
        try:
            with (directory / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_shared_memory(directory)
                shutil.rmtree(directory)
        except (FileNotFoundError, NotADirectoryError, PermissionError, BlockingIOError):
            continue  # being made, not ours, or in use
