"""Checks the files in a model's folder before an engine reads them: their kinds, where links lead, their sizes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from deployments.models.small_files import CONFIG_BYTES, CONFIGS, require_small

MOST_FILES: Final = 10_000
"""Most files and folders in the folder of a model. The largest models have some hundreds."""

_TEXTS: Final = (*CONFIGS, "*.jinja")


# D127: a model's folder is checked before an engine reads it
def folder_problem(folder: str, roots: Sequence[Path] | None) -> str | None:
    """Return why an engine must not read a model's folder; None if it may.

    Files must be regular files, and links must lead below ``roots`` (None: anywhere). Hidden files and folders are not
    checked, because engines do not read them. None, too, if there is no such folder. May block on a slow disk.

    Raises:
        FileTooLarge: A configuration or a chat template is too large to be read.
        OSError: The folder can't be read.
    """
    for number, file in enumerate(_files(folder) if Path(folder).is_dir() else ()):
        if number == MOST_FILES:
            return f"its folder has more than {MOST_FILES} files; name a folder with one model only"
        name = os.path.relpath(file.path, folder)
        try:
            found = file.stat()
        except OSError:  # such as a link to nothing; if an engine needs the file, it reports that
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return f"its file {name} is no regular file; replace or remove it"
        if roots is not None and file.is_symlink() and not _below(file.path, roots):
            return f"its file {name} is a link that leads out of models.local_roots; copy the file, or allow its folder"
        if stat.S_ISREG(found.st_mode) and any(fnmatch(file.name, pattern) for pattern in _TEXTS):
            require_small(name, found.st_size, CONFIG_BYTES)
    return None


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder and in its subfolders. Links to folders are yielded, and not followed."""
    unread = [folder]
    while unread:
        with os.scandir(unread.pop()) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
                    if entry.is_dir(follow_symlinks=False):
                        unread.append(entry.path)


def _below(path: str, roots: Sequence[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)
