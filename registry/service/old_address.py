"""The ``address`` of a lease, from which the Prompting Service's own client builds its URLs. Pure.

That client sends its prompts to ``"http://" + address + ":8000/process_prompt"``. So ``address`` has no scheme, port or
path. The lease's token is in its userinfo part, which HTTP clients send as Basic credentials. The ingress answers at
that URL with a redirect to the lease's ``url``.
"""

from __future__ import annotations

from urllib.parse import urlsplit

OLD_PORT = 8000
"""The port that the Prompting Service's client always uses."""

OLD_USER = "lease"
"""User name of the credentials; only the token identifies the lease."""


# D75: reached by a redirect
def old_address(base_url: str, token: str) -> str:
    """Return ``lease:<token>@<host>``, with the host of the registry's base URL.

    ``http://[fd00::1]:8000`` and the token ``t`` give ``lease:t@[fd00::1]``.
    """
    host = urlsplit(base_url).hostname or ""
    return f"{OLD_USER}:{token}@{f'[{host}]' if ':' in host else host}"


def old_address_problems(base_url: str) -> tuple[str, ...]:
    """Return why clients that build their URL from ``address`` can't reach the registry; empty if they can."""
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if parts.scheme != "http":
        why = "is served by TLS only"
    elif port != OLD_PORT:
        why = f"listens on port {port}"
    elif parts.path.strip("/"):
        why = "is served below a path"
    else:
        return ()
    return (f"address can't be used as http://{{address}}:{OLD_PORT}: the registry {why} ({base_url}); use url",)
