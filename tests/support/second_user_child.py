"""Becomes the second user of its environment, tries to be root again, and prints what it could do as JSON.

``python -m tests.support.second_user_child SECRET SETUID PORT``: a file of root, a program with root's setuid bit that
prints its user, and a port of the test on loopback.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from deployments.machine.second_user import run_as_second_user


def outcome(attempt: Callable[[], object]) -> str:
    """What an attempt returned, or the name of its error."""
    try:
        return f"returned {attempt()!r}"
    except OSError as error:
        return type(error).__name__


def _connect(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        return "connected"


def main(secret: str, setuid: str, port: str) -> int:
    problem = run_as_second_user()
    parent = os.getppid()
    attempts = {
        "read a file of root": lambda: Path(secret).read_text(),
        "read the variables of the parent": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "enter the parent's folder": lambda: list(Path(f"/proc/{parent}/cwd").iterdir()),
        "kill the parent": lambda: os.kill(parent, 0),
        "setuid": lambda: os.setuid(0),
        "setgid": lambda: os.setgid(0),
        "setgroups": lambda: os.setgroups([0]),
        "connect to loopback": lambda: _connect(int(port)),
    }
    found = {
        "problem": problem,
        "uids": os.getresuid(),
        "gids": os.getresgid(),
        "groups": os.getgroups(),
        "environment": dict(os.environ),
        "own variables at its start": Path("/proc/self/environ").read_text(),
        "folder": str(Path.cwd()),
        "umask": os.umask(0),
        "session": os.getsid(0) == os.getpid(),
        "networks": [name for _, name in socket.if_nameindex()],
        "setuid program": subprocess.run([setuid, "-u"], capture_output=True, text=True, check=False).stdout.strip(),
        "attempts": {name: outcome(attempt) for name, attempt in attempts.items()},
    }
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
