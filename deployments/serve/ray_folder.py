"""Names Ray's subfolder in the folder of a local cluster, and keeps a copy of its logs."""

from __future__ import annotations

import shutil
from pathlib import Path

RAY_FOLDER = "r"
"""Subfolder for Ray, which makes its folder writable for all users; the folder above it admits only its owner."""


def keep_logs(folder: Path, kept: Path) -> Path:
    """Copy a failed cluster's logs out of its folder, which will be removed; replaces earlier copies."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)  # the copies have the modes that Ray gave the logs
    for logs in folder.glob(f"{RAY_FOLDER}/session_2*/logs"):
        shutil.copytree(logs, kept, dirs_exist_ok=True)
    kept.chmod(0o700)
    return kept
