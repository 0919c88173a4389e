"""The access token of a cluster. With it, one can run code on all machines.

Ray's own command creates the file and its folder readable by all users (Ray 2.60). `greenprompt ray-token` replaces it.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from deployments.machine.cluster_token import token_path
from deployments.machine.private_files import ANYONE_ELSE, write_private
from registry.errors import BadSettings

__all__ = ["make_token", "require_own_token", "token_path"]

_MOUNT_CLOSED = "mount a secret of Kubernetes with `defaultMode: 0400`"


def make_token(path: Path) -> bool:
    """Create an access token that only this user can read. Returns False if there is one.

    Other users lose access to an existing token, and to the folder ``.ray``.

    Raises:
        BadSettings: The file can't be written, or belongs to another user.
    """
    try:
        path.parent.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        if path.parent.name == ".ray":  # Ray's own folder; another one may have other uses
            path.parent.chmod(stat.S_IRWXU)
        if path.exists():
            require_own_token(path)
            return False
        write_private(path, secrets.token_hex(32))
    except OSError as error:
        raise BadSettings(str(path), f"can't be written ({error.strerror})") from error
    return True


def require_own_token(path: Path | None = None, *, may_be_missing: bool = False) -> None:
    """Check the access token, by default Ray's. If other users can read a token of this user, their access is removed.

    A token of root, as a container has it, is accepted if only root and its group can read it. If this user is root,
    the group's access is removed where the mode can be changed.

    Raises:
        BadSettings: It is missing (unless it may be), can't be read, or belongs to another user; or other users have
            access to it that can't be removed.
    """
    path = token_path() if path is None else path
    try:
        found = path.stat()
    except OSError as error:
        if may_be_missing and isinstance(error, FileNotFoundError):
            return
        problem = f"can't be read ({error.strerror}); `greenprompt ray-token` makes one, for all machines"
        raise BadSettings(str(path), problem) from error
    if found.st_uid not in (os.geteuid(), 0):
        raise BadSettings(str(path), f"belongs to another user (uid {found.st_uid}), who could run code here with it")
    if found.st_uid != os.geteuid():
        if found.st_mode & stat.S_IRWXO:
            raise BadSettings(
                str(path), f"can be read by every user of this machine; run `chmod o-rwx` on it, or {_MOUNT_CLOSED}"
            )
    elif found.st_mode & ANYONE_ELSE:
        try:
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        except OSError as error:
            if found.st_uid == 0 and not found.st_mode & ~stat.S_IRGRP & ANYONE_ELSE:
                return  # Kubernetes lets the group of `fsGroup` read a secret, whatever its mode
            problem = f"can be read by other users, and that can't be changed ({error.strerror})"
            raise BadSettings(str(path), f"{problem}; {_MOUNT_CLOSED}") from error
