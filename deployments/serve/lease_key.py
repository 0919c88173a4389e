"""The secret key from which a registry makes the tokens of its leases, in a file."""

from __future__ import annotations

import secrets
import stat
from pathlib import Path

from deployments.machine.private_files import ANYONE_ELSE, require_unchanged_by_others, write_private
from registry.errors import BadSettings, in_one_line

LEASE_KEY = "lease.key"
"""Name of the file in ``state_dir`` with the key, as hexadecimal digits."""

_BYTES = 32


# D116: a file, not the database, has the key of the leases' tokens
def lease_key(state_dir: Path) -> bytes:
    """Return the key in ``state_dir``. It is made if there is none, or if other users can read it. Blocks.

    With a new key, leases that a crashed registry left in the database end at the start.

    Raises:
        BadSettings: The file can't be read or written, or has something else than a key.
    """
    file = state_dir / LEASE_KEY
    try:
        if file.exists() and not file.stat().st_mode & ANYONE_ELSE:
            key = bytes.fromhex(file.read_text(encoding="utf-8"))
            if len(key) != _BYTES:
                raise ValueError(f"it has {len(key)} bytes instead of {_BYTES}")
            return key
        state_dir.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)  # may be missing with PostgreSQL
        require_unchanged_by_others(state_dir, "state_dir")
        key = secrets.token_bytes(_BYTES)
        write_private(file, key.hex())
    except OSError as error:
        raise BadSettings("state_dir", f"{file} can't be used: {in_one_line(error)}") from error
    except ValueError as error:
        problem = f"{file} has no key ({error}); restore it, or delete it and start again: a new one is made"
        raise BadSettings("state_dir", problem) from None
    return key
