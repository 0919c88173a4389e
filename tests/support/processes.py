"""Processes that a test starts, none of which outlives it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Start = Callable[..., subprocess.Popen[str]]


@contextmanager
def ended_at_last() -> Iterator[Start]:
    """Yield what starts a process as `subprocess.Popen` does, with its output in a pipe; kill them all at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], **how: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **how)
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.communicate()
