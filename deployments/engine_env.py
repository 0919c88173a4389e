"""The surroundings of a wrapper's engines: environment variables, a directory for sockets, and their last words."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from deployments.warm_start import PHASE_FILE

_PREFIX = "greenprompt-"
_LOCK = "owner.lock"
_RECORD, _FIELD = "\x1e", "\x1f"  # what no error message holds
_TRACEBACK = "Traceback (most recent call last):"
_TOLD_BY_TYPE = ("ValueError", "RuntimeError", "Exception", "OSError", "ValidationError")


class EngineEnvironment:
    """What every engine of a wrapper finds around it; all of it is gone after ``close``, except the caches.

    ``directory`` holds sockets and short-lived files. Its name is short, because the path of a Unix socket has 107
    characters at most, and it is locked as long as its owner lives, so that a later owner can remove what a killed
    one left behind.
    """

    def __init__(self, cache_dir: Path, *, cpu_threads: int | None) -> None:
        """Make the directory and set the variables in this process, from which the engines inherit them."""
        _remove_orphans()
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = (self.directory / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.phases = self.directory / "phases"
        self._errors = self.directory / "errors"
        self._before: dict[str, str | None] = {}
        for name, value in self._variables(cache_dir, cpu_threads).items():
            self._before[name] = os.environ.get(name)
            os.environ[name] = value
        self.begin_start()

    def _variables(self, cache_dir: Path, cpu_threads: int | None) -> Mapping[str, str]:
        logging_config = self.directory / "logging.json"
        logging_config.write_text(json.dumps(self._logging()), encoding="utf-8")
        chosen = {
            "VLLM_RPC_BASE_PATH": str(self.directory),
            "VLLM_LOGGING_CONFIG_PATH": str(logging_config),
            PHASE_FILE: str(self.phases),
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
        """The operator's logging configuration for vLLM, or a plain one, and errors into a file for ``last_words``."""
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
        logger = config.setdefault("loggers", {}).setdefault("vllm", {})
        assert isinstance(logger, dict)
        logger["handlers"] = [*logger.get("handlers", []), "words"]
        return {"version": 1, "disable_existing_loggers": False} | config

    def begin_start(self) -> None:
        """Forget the phases and the words of the engine before."""
        self.phases.write_text("", encoding="utf-8")
        self._errors.write_text("", encoding="utf-8")

    def last_words(self) -> str | None:
        """The error that ended the engine, as it was raised where it happened; None when it left no words."""
        return root_cause(self._errors.read_text(encoding="utf-8", errors="replace"))

    def close(self) -> None:
        """Remove the directory and put the variables back."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
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


def _remove_orphans() -> None:
    """Remove the directories of owners that were killed: nobody holds their lock any more."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (directory / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
        except (FileNotFoundError, NotADirectoryError, PermissionError, BlockingIOError):
            continue  # being made, not ours, or in use
