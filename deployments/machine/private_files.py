"""Folders and files that other users of this machine can neither read nor replace."""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from registry.errors import BadSettings

ANYONE_ELSE = stat.S_IRWXG | stat.S_IRWXO
"""The bits of a mode that give access to other users, the group included."""

MAY_BE_PASSED = stat.S_IRWXU | stat.S_IXGRP
"""Mode of a folder in which a group can use files whose names it knows, but neither list nor change them."""

_FOR_OWNER = stat.S_IRUSR | stat.S_IWUSR


def private_folder(folder: Path) -> Path:
    """Create a folder for this user alone, unless it exists, and return it.

    For folders with a predictable name: another user may have created one before.

    Raises:
        BadSettings: It exists and is a link or a file, belongs to another user, or is open to other users.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=stat.S_IRWXU)
    if (problem := _openness(folder.lstat())) is not None:
        raise BadSettings(str(folder), f"{problem}; remove it and try again")
    return folder


def is_private(folder: Path, *, may_be_passed: bool = False) -> bool:
    """Whether a path is a folder (no link) of this user that other users can't enter. False if it does not exist.

    ``may_be_passed``: the mode MAY_BE_PASSED counts as well.
    """
    try:
        found = folder.lstat()
    except OSError:
        return False
    passed = may_be_passed and stat.S_IMODE(found.st_mode) == MAY_BE_PASSED
    return _openness(found, but=stat.S_IXGRP if passed else 0) is None


def _openness(found: os.stat_result, but: int = 0) -> str | None:
    """Return why this is not a folder of this user alone; None if it is.

    ``found``: from ``lstat``. ``but``: bits of the mode that others may have.
    """
    if not stat.S_ISDIR(found.st_mode):
        return "is a link or a file, but must be a folder"
    if found.st_uid != os.geteuid():
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & ANYONE_ELSE & ~but:
        return f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o}), who may have changed what is in it"
    return None


def require_unchanged_by_others(folder: Path, setting: str) -> None:
    """Raise BadSettings, naming the setting, if any user can write to a folder, or a stranger owns it.

    Root and the folder's group are trusted. If this user is root, every owner is trusted, because a container's volume
    may belong to any user.
    May raise OSError if the folder does not exist.
    """
    found = folder.stat()
    if os.geteuid() != 0 and found.st_uid not in (os.geteuid(), 0):
        raise BadSettings(setting, f"{folder} belongs to another user (uid {found.st_uid}); choose another folder")
    if found.st_mode & stat.S_IWOTH:
        problem = f"every user of this machine can write to {folder} (mode {stat.S_IMODE(found.st_mode):04o})"
        raise BadSettings(setting, f"{problem}; run `chmod o-w` on it, or choose a folder below it")


def writable_by_others(found: os.stat_result) -> str | None:
    """Return why other users can write to a file, and what to do, about "it"; None if they can't.

    Root, the file's owner and the owner's group are trusted.
    """
    if found.st_mode & stat.S_IWOTH:
        return "every user of this machine can write to it; run `chmod o-w` on it"
    if found.st_mode & stat.S_IWGRP and found.st_gid != _group_of(found.st_uid):
        return f"a group that is not its owner's can write to it (gid {found.st_gid}); run `chmod g-w` on it"
    return None


def _group_of(user: int) -> int | None:
    """Return the primary group of a user; None if this machine does not know the user, as in a container."""
    try:
        return pwd.getpwuid(user).pw_gid
    except KeyError:
        return None


def open_private(file: Path, mode: str) -> IO[str]:
    """Open a text file that only its owner can read and write, whatever the umask says; ``mode`` as for ``open``.

    Raises OSError if the file is a link, which may lead to another file of this user.
    """
    opened = open(file, mode, encoding="utf-8", opener=_for_owner)  # noqa: SIM115 - pathlib has no opener
    os.fchmod(opened.fileno(), _FOR_OWNER)  # a file that exists keeps its mode when it is opened
    return opened


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, _FOR_OWNER)


def write_private(file: Path, text: str, *, executable: bool = False) -> None:
    """Replace a file, in one step, by one that only its owner can read and write, whatever the umask says.

    The folder must not be writable by others.
    """
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)  # left by a crash
    with open_private(new, "x") as opened:
        opened.write(text)
        if executable:
            os.fchmod(opened.fileno(), stat.S_IRWXU)
    new.replace(file)  # drops an old file's mode, and replaces a link instead of its target
