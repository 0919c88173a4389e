"""The access token of a cluster: where it is, and the secret that the cluster's HAProxies and replicas make from it."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Final

from registry.errors import BadSettings

PROXY_HEADER: Final = "x-greenprompt-proxy"
"""Header in which a HAProxy of the cluster sends the secret to a replica; what a client sends in it is replaced."""

_PURPOSE: Final = b"greenprompt: this request came through a HAProxy of the cluster"


def token_path() -> Path:
    """Return the file in which Ray looks for the token of a cluster."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


# D125: replicas serve only what the cluster's HAProxy sends
def proxy_secret(path: Path) -> str:
    """Return the secret of PROXY_HEADER, 64 hexadecimal digits, made from the token in a file.

    All machines of a cluster have the same token, so they make the same secret, and none has to be sent to another.
    The token can't be computed from it.

    Raises:
        BadSettings: The file can't be read, or is empty.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        problem = f"can't be read ({reason}); `greenprompt ray-token` makes one, for all machines"
        raise BadSettings(str(path), problem) from error
    if not token:
        raise BadSettings(str(path), "is empty; remove it, and run `greenprompt ray-token`")
    return hmac.new(token.encode(), _PURPOSE, hashlib.sha256).hexdigest()
