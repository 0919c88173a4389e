"""The environment of a wrapper's engines: variables, a temporary directory, files for their log and errors."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from deployments.engine.media import CLOSED, MediaLimits
from deployments.engine.phases import Phase
from deployments.engine.root_cause import ERROR_FORMAT, root_cause
from deployments.engine.warm.forkserver import forkserver_variables
from deployments.engine.warm.patches import PHASE_FILE
from deployments.machine.private_files import MAY_BE_PASSED, is_private, open_private
from deployments.machine.second_user import OWN, USER, SecondUser, home_of, own_variables

_PREFIX = "gp-engine-"
_LOCK, _SHARED_MEMORY = "owner.lock", "shared_memory"
_LAST_LINES = 8
_LINE_CHARS = 300
_MOST_BYTES = 4 * 2**20
_PHASES = {phase.value for phase in Phase}
_LOGGING = "logging.json"
_OPEN_TO_ALL = Path("/tmp")  # noqa: S108 - what is made there has a random name


class EngineEnvironment:
    """The environment that all engines of a wrapper share; ``close`` removes all of it except the caches.

    ``directory`` holds sockets and temporary files. Its owner keeps it locked, so that a later owner can recognise and
    remove the directory of a killed one.
    """

    def __init__(
        self,
        cache_dir: Path,
        *,
        cpu_threads: int | None,
        preload: Sequence[str] = (),
        media: MediaLimits = CLOSED,
        without: Sequence[str] = (),
        user: SecondUser | None = None,
    ) -> None:
        """Create the directory and set the variables in this process; the engines inherit them.

        Args:
            cache_dir: Directory for compiled kernels and similar caches, which is kept.
            cpu_threads: Threads of an engine that computes on the CPU; None for one on GPUs.
            preload: Modules for the forkserver to import in addition to those that every engine needs.
            media: The images, audio and video that prompts may contain; by default none by URL.
            without: Variables to remove, because an engine must not see them.
            user: The user as whom engines run; None: the user of this process.
        """
        remove_orphans()
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_OPEN_TO_ALL if user else _base()))
        self._lock = open_private(self.directory / _LOCK, "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._sockets, self._temporary = self.directory / "s", self.directory / "tmp"
        self._sockets.mkdir()
        self._temporary.mkdir(mode=stat.S_IRWXU)
        self._phases = self.directory / "phases"
        self._errors = self.directory / "errors"
        self._log = self.directory / "log"
        self._left_by_engines = [(self._sockets, "*"), (self._temporary, "vllm_dist_*")]
        ours = {**self._variables(cache_dir, cpu_threads), **forkserver_variables(preload), **media.variables}
        if user is not None:
            ours |= self._share(user, cache_dir)
        self._before = {name: os.environ.get(name) for name in (*ours, *without)}
        _set(ours | dict.fromkeys(without))
        self.begin_start()

    # D129: the second user owns what its engines write, and no folder that holds anything else
    def _share(self, user: SecondUser, cache_dir: Path) -> Mapping[str, str]:
        """Let engines of a second user use this directory, but not others. Return the variables for that.

        Engines may do anything in folders of their own, so this process follows no path through these.
        """
        sockets, temporary = self.directory / "es", self.directory / "etmp"
        for folder in (sockets, temporary):
            folder.mkdir(mode=stat.S_IRWXU)
            os.chown(folder, user.uid, user.gid)
        for file in (self._phases, self._errors, self._log):
            open_private(file, "x").close()
            os.chown(file, user.uid, user.gid)
        (self.directory / _LOGGING).chmod(0o644)
        self._sockets.chmod(0o711)
        os.chown(self.directory, -1, user.gid)
        self.directory.chmod(MAY_BE_PASSED)
        self._left_by_engines += [(sockets, "*"), (temporary, "vllm_dist_*")]
        own = own_variables(user, home_of(user, cache_dir))
        own |= {"VLLM_RPC_BASE_PATH": str(sockets), "TMPDIR": str(temporary)}
        # With 1, this process would run code that an engine sends (pickles).
        return {USER: user.text, OWN: json.dumps(own), "VLLM_ALLOW_INSECURE_SERIALIZATION": "0"}

    @property
    def sockets(self) -> Path:
        """The folder in which this process creates the sockets on which engines talk to it."""
        return self._sockets

    def _variables(self, cache_dir: Path, cpu_threads: int | None) -> Mapping[str, str]:
        logging_config = self.directory / _LOGGING
        logging_config.write_text(json.dumps(self._logging()), encoding="utf-8")
        chosen = {
            "VLLM_RPC_BASE_PATH": str(self._sockets),
            "TMPDIR": str(self._temporary),
            "VLLM_LOGGING_CONFIG_PATH": str(logging_config),
            PHASE_FILE: str(self._phases),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            # All processes of an engine run on one machine, so none needs to be reachable from outside.
            "VLLM_HOST_IP": "127.0.0.1",
        }
        # Values set by the operator are kept.
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
        """Return the operator's logging configuration for vLLM, or a default, plus files for errors and log lines."""
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
        config.setdefault("formatters", {})["greenprompt_errors"] = {"format": ERROR_FORMAT}
        config.setdefault("handlers", {})["greenprompt_errors"] = {
            "class": "logging.FileHandler",
            "filename": str(self._errors),
            "formatter": "greenprompt_errors",
            "level": "ERROR",
            "delay": True,
        }
        config["formatters"]["greenprompt_lines"] = {"format": "%(levelname)s %(message)s"}
        config["handlers"]["greenprompt_lines"] = {
            "class": "logging.FileHandler",
            "filename": str(self._log),
            "formatter": "greenprompt_lines",
            "level": "INFO",
            "delay": True,
        }
        logger = config.setdefault("loggers", {}).setdefault("vllm", {})
        assert isinstance(logger, dict)
        logger["handlers"] = [*logger.get("handlers", []), "greenprompt_errors", "greenprompt_lines"]
        return {"version": 1, "disable_existing_loggers": False} | config

    def begin_start(self, *, alone: bool = True) -> None:
        """Clear the phases and logs of the previous engine, and remove the files that it left if it was killed.

        If another engine exists (not ``alone``), no file is removed, because it may belong to that engine.
        """
        if alone:
            _remove_shared_memory(self.directory)
            for folder, pattern in self._left_by_engines:
                _empty(folder, pattern)
        self._phases.write_text("", encoding="utf-8")
        self._errors.write_text("", encoding="utf-8")
        self._log.write_text("", encoding="utf-8")

    def remember_shared_memory(self, files: Iterable[Path]) -> None:
        """Record the engine's shared memory files, to be removed later if it can't remove them itself."""
        with (self.directory / _SHARED_MEMORY).open("a", encoding="utf-8") as list_:
            list_.writelines(f"{file}\n" for file in files)

    def remove_shared_memory(self) -> None:
        """Remove the files that a killed engine could not remove. None of its processes may run any more."""
        _remove_shared_memory(self.directory)

    def phases(self) -> Sequence[Phase]:
        """Return the phases that the engine's processes have announced so far, in order."""
        return [Phase(word) for word in _text(self._phases).split() if word in _PHASES]

    def first_error(self) -> str | None:
        """Return the error that ended the engine, as it was raised at its origin; None if none was logged."""
        return root_cause(_text(self._errors))

    def last_lines(self) -> str:
        """Return the last lines of the engine's log, for an engine that logged no error; empty if there are none."""
        lines = _text(self._log, last=True).splitlines()
        return "\n".join(line[:_LINE_CHARS] for line in lines[-_LAST_LINES:])

    def close(self) -> None:
        """Remove the directory and restore the variables."""
        _set(self._before)
        _remove_shared_memory(self.directory)
        shutil.rmtree(self.directory)
        self._lock.close()


def _set(variables: Mapping[str, str | None]) -> None:
    """Set environment variables of this process; None removes one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _text(file: Path, *, last: bool = False) -> str:
    """Return the first _MOST_BYTES of a file that engines write, or the last ones, as text."""
    with file.open("rb") as opened:
        if last:
            opened.seek(max(0, opened.seek(0, os.SEEK_END) - _MOST_BYTES))
        return opened.read(_MOST_BYTES).decode("utf-8", errors="replace")


def _empty(folder: Path, pattern: str) -> None:
    """Remove what matches ``pattern`` in a folder. Follows no link in it."""
    for entry in folder.glob(pattern):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _base() -> Path:
    """Return the usual temporary folder if its path is short, else /tmp.

    A Unix socket's path has at most 107 characters, of which we need 58.
    """
    usual = Path(tempfile.gettempdir())
    return usual if len(os.fsencode(usual)) < 49 else _OPEN_TO_ALL


def _remove_shared_memory(directory: Path) -> None:
    listed = directory / _SHARED_MEMORY
    if listed.exists():
        for file in listed.read_text(encoding="utf-8").splitlines():
            Path(file).unlink(missing_ok=True)
        listed.unlink()


@contextmanager
def log_handlers_kept() -> Iterator[None]:
    """Restore the targets of all ``MemoryHandler`` objects after a library has reconfigured logging.

    vLLM calls ``logging.config.dictConfig`` before it creates an engine, and that closes every handler of the process.
    The handlers of Serve replicas then lose their file. A restarted Serve controller asks each
    replica for the name of its log file, and ends a replica that does not know it.
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
    """Remove this user's directories that killed processes have left; no process holds their lock.

    Directories that other users could have made are left alone: the files that they list would be removed, too, and
    could be any files of this user.
    """
    found = (directory for base in {_base(), _OPEN_TO_ALL} for directory in base.glob(f"{_PREFIX}*"))
    for directory in (each for each in found if is_private(each, may_be_passed=True)):
        try:
            with (directory / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_shared_memory(directory)
                shutil.rmtree(directory)
        except (FileNotFoundError, NotADirectoryError, BlockingIOError):
            continue  # being created, or in use
