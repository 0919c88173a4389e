"""Checks that a disk has space left."""

from __future__ import annotations

import shutil
from pathlib import Path

LEAST_FREE_BYTES = 64 * 2**20
"""Least free space; with less, the database, Ray's session and the logs soon can't be written."""


def disk_problem(folder: Path) -> str | None:
    """Return the problem with the disk of a folder; None if it has enough free space."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder} can't be read ({error.strerror})"
    return None if free >= LEAST_FREE_BYTES else f"the disk of {folder} is full ({free / 2**20:.0f} MiB are free)"
