"""The token of a lease in an URL, and in the header ``Authorization``. Pure."""

from __future__ import annotations

LEASE_TOKEN = "lease_"  # noqa: S105 - the beginning of all tokens, not one of them
"""How tokens of leases begin, so that no other secret in a header is taken for one.

Tokens of older registries, whose wrappers know tokens in paths only, do not begin so.
"""


def split_url(url: str) -> tuple[str, str | None]:
    """Return the base URL without the token of a lease's ``url``, and the token.

    Returns the unchanged ``url`` and None if the lease is of an older registry, and its wrapper ignores the header.
    """
    base_url, _, token = url.rpartition("/")
    return (base_url, token) if token.startswith(LEASE_TOKEN) else (url, None)


# D115: the token of a lease in a header
def lease_headers(token: str | None) -> dict[str, str]:
    """Return the headers for requests below the base URL without the token; none if the token is None."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}
