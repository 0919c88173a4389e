"""Runs ``ray stop`` and ``ray start`` on a node, and records the processes that they started."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from deployments.launch.restarts import VITAL
from deployments.machine.private_files import write_private
from registry.errors import StartFailed

RECORD = "node.json"
"""File in a node's folder that records the Ray processes of this machine, and a hash of what they were started with."""

RAY_LIMIT_S = 120
"""Time limit of ``ray start`` and ``ray stop``, seconds."""

# We don't need the log monitor, which forwards workers' output to drivers. It does not end if the head is lost.
_NO_LOG_MONITOR = "--include-log-monitor=false"


@dataclass(frozen=True, slots=True)
class RayStart:
    """How Ray is started on a node."""

    program: str
    """Path of the program ``ray``."""
    options: list[str]
    """Options of ``ray start``."""
    environment: Mapping[str, str]
    """Environment of Ray's processes, without secrets."""
    wanted: str
    """Hash of all that Ray is started with."""

    def run(self, folder: Path, output: IO[str] | None = None) -> None:
        """Stop any running Ray, start it, and record its processes in the node's folder.

        Blocks up to 2 * RAY_LIMIT_S. The caller must hold the lock of the node's folder.

        Args:
            folder: The node's folder.
            output: File for what Ray's commands print; None: standard output.

        Raises:
            StartFailed: Ray does not start; its own message is in the output.
        """
        self.stop(output)
        self._ray(["start", _NO_LOG_MONITOR, *self.options], output)
        write_private(folder / RECORD, json.dumps({"wanted": self.wanted, "running": ray_processes()}))

    def stop(self, output: IO[str] | None = None) -> None:
        """Stop any running Ray. Blocks up to RAY_LIMIT_S. Raises StartFailed if that fails."""
        self._ray(["stop"], output)

    def _ray(self, command: list[str], output: IO[str] | None) -> None:
        try:
            done = subprocess.run(
                [self.program, *command],
                env=self.environment,
                timeout=RAY_LIMIT_S,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired as error:
            raise StartFailed(f"ray {command[0]} was not done after {RAY_LIMIT_S} s") from error
        if done.returncode:
            raise StartFailed(f"ray {command[0]} ended with {done.returncode}")


def is_running(folder: Path, wanted: str) -> bool:
    """Whether the Ray that runs on this machine is the one that was last recorded, with this hash."""
    running = ray_processes()
    return bool(running) and _record(folder) == {"wanted": wanted, "running": running}


def ray_processes() -> list[list[object]]:
    """Return name, pid and start time of the processes that a node needs."""
    # A zombie does not run. Some containers have a first process that reaps none.
    return sorted(
        [process.info["name"], process.pid, process.create_time()]
        for process in psutil.process_iter(["name", "status"])
        if process.info["name"] in VITAL and process.info["status"] != psutil.STATUS_ZOMBIE
    )


def _record(folder: Path) -> object:
    try:
        return json.loads((folder / RECORD).read_bytes())
    except (FileNotFoundError, ValueError):  # missing, or truncated by a crash: treat as missing
        return None
