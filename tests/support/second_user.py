"""Runs a module of the tests as root where a second user can run Python, too; skips a test where that is impossible."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

NOBODY: Final = 65_534
"""Id of the user and the group ``nobody`` (Debian: group ``nogroup``), which every Linux has."""

ROOT: Final = Path(__file__).resolve().parents[2]
_IN_A_NETWORK: Final = ["unshare", "--net"]
# A folder like /root, which others can't enter, hides the Python in it. In a mount namespace of its own, the process
# and its children see another folder instead, in which nothing but that Python is.
_OPENED: Final = """
set -e
shown=$(mktemp -d)
mount --bind "$2" "$shown"
mount -t tmpfs -o mode=755 tmpfs "$1"
mkdir -p "$2"
mount --move "$shown" "$2"
rmdir "$shown"
shift 2
exec "$@"
"""


def _closed_above(path: Path) -> Path | None:
    """The topmost folder above ``path`` that other users can't enter; None if they can enter all of them."""
    return next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & stat.S_IXOTH), None)


def _before(command: list[str]) -> list[str]:
    python = Path(sys.base_prefix).resolve()
    closed = _closed_above(python)
    if closed is None:
        return command
    opened = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _OPENED, "sh", str(closed), str(python)]
    return [*opened, *command]


def require_root() -> None:
    """Skip the test unless this process is root and may make namespaces."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    tried = subprocess.run(_before([*_IN_A_NETWORK, "true"]), capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode != 0:
        pytest.skip(f"root may not make namespaces here (CAP_SYS_ADMIN): {tried.stderr.strip()}")


def answer_of(module: str, *arguments: str, variables: Mapping[str, str], timeout_s: float = 60) -> Any:
    """Run a module as root with these environment variables, and return the JSON in its last line."""
    done = subprocess.run(
        _before([sys.executable, "-m", module, *arguments]),
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def open_folder() -> Iterator[Path]:
    """A new folder that other users can enter, as pytest's own folders can't be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
