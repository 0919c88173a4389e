"""Names Ray's subfolder in the folder of a local cluster, and keeps a copy of its logs."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

RAY_FOLDER = "r"
"""Subfolder for Ray, which makes its folder writable for all users; the folder above it admits only its owner."""


def keep_logs(folder: Path, kept: Path) -> Path:
    """Copy a failed cluster's logs out of its folder, which will be removed; replaces earlier copies.

    Files that can't be copied, as those that Ray removes meanwhile, are left out.
    """
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept.chmod(0o700)  # if the folder exists, ``mkdir`` does not set its mode
    for logs in folder.glob(f"{RAY_FOLDER}/session_2*/logs"):
        # Copies keep the modes of Ray's logs and their folder, to which all users can write. So they are put into a
        # subfolder, and only this user can enter the folder above it.
        with suppress(OSError):  # also shutil.Error, which copytree raises for all its errors together
            shutil.copytree(logs, kept / logs.parent.name, dirs_exist_ok=True)
    return kept
