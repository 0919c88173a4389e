"""Logging of all parts: one JSON object per line on standard error, which Ray stores per process.

The registry actor, the ingress and each wrapper configure it. Processes of engines do not: their log is vLLM's. The
registry also logs to a file that outlives Ray's folder. Every line about a request has its ``request_id``
and ``measurement_id``, so that its history can be read from one file. No line contains a secret.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from threading import Lock
from typing import Final, TextIO

import structlog

# D87: the registry keeps its own log
REGISTRY_LOG: Final = "registry.jsonl"
"""Name of the registry's own file in ``state_dir``; older lines are in ``registry.jsonl.1`` and so on."""

FILE_BYTES: Final = 20_000_000
OLDER_FILES: Final = 4


def configure_replica_logging() -> None:
    """Configure structlog for a replica of Serve: lines go to the standard error that the process was started with.

    In a replica, Serve redirects ``print``, ``sys.stdout`` and ``sys.stderr`` to its own log at level INFO. A wrapper's
    log has level WARNING, so these lines would be lost.
    """
    _configure(_Lines(sys.__stderr__))


def configure_logging(file: Path | None = None) -> None:
    """Configure structlog for this process; a later call replaces the configuration.

    Args:
        file: Log file in addition to standard error, readable by its owner only. It is rotated when it holds
            FILE_BYTES; OLDER_FILES older files are kept.
    """
    _configure(_Lines(sys.stderr, file))


def _configure(lines: _Lines) -> None:
    before = structlog.get_config()["logger_factory"]
    if isinstance(before, _Lines):
        before.close()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=lines,
        cache_logger_on_first_use=False,
    )


class _OwnFile(RotatingFileHandler):
    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return open(descriptor, "a", encoding="utf-8")  # noqa: PTH123 - opens a descriptor

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - as logging calls it
        """Ignore the error, as `_Lines` does."""


class _Lines:
    """Factory of structlog loggers and the logger itself; writes to standard error and, if given, to a file.

    A line that can't be written is dropped without an error: if the disk is full, the code that logs must go on.
    """

    def __init__(self, stream: TextIO | None, file: Path | None = None) -> None:
        self._stream = stream
        self._lock = Lock()
        self._file = None if file is None else _OwnFile(file, maxBytes=FILE_BYTES, backupCount=OLDER_FILES, delay=True)

    def __call__(self, *_: object) -> _Lines:
        return self

    def msg(self, line: str) -> None:
        if self._stream is not None:
            with self._lock, suppress(OSError, ValueError):  # ValueError: it is closed
                self._stream.write(f"{line}\n")
                self._stream.flush()
        if self._file is not None:
            self._file.handle(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    log = debug = info = warning = error = critical = exception = msg
