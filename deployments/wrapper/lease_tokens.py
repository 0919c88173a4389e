"""Finds the token of a lease in a request: in its path, or in its header ``Authorization``. Pure."""

# D115: the token of a lease in a header

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import itemgetter

from registry.wire.lease_token import LEASE_TOKEN

Headers = Sequence[tuple[bytes, bytes]]

NO_TOKEN = ""
"""In place of contradictory tokens; refused like an unknown token."""

_AUTHORIZATION = b"authorization"
_NAME = itemgetter(0)
_BEARER = re.compile(rb"(?i:bearer)[ \t]+(" + LEASE_TOKEN.encode() + rb".*?)[ \t]*")


def lease_call(path: str, headers: Headers) -> tuple[str, str, Headers]:
    """Return the token of a request to a wrapper, its path without the token, and its headers without Authorization.

    The token is in the path, ``/<token>/v1/models``, or in ``Authorization: Bearer <token>``. The header counts only
    if it contains the token of a lease: OpenAI clients always send a key, which is ignored. Tokens are not checked
    here. The token is NO_TOKEN if path and header have different ones, or if there are several headers and one of them
    has a token.
    """
    first, _, rest = path.lstrip("/").partition("/")
    if _AUTHORIZATION not in map(_NAME, headers):
        return first, f"/{rest}", headers
    kept = [header for header in headers if header[0] != _AUTHORIZATION]
    given = [value for name, value in headers if name == _AUTHORIZATION]
    tokens = [found[1].decode("latin-1") for value in given if (found := _BEARER.fullmatch(value))]
    if not tokens:
        return first, f"/{rest}", kept
    in_path = first.startswith(LEASE_TOKEN)
    agree = len(given) == 1 and (first == tokens[0] or not in_path)
    return tokens[0] if agree else NO_TOKEN, f"/{rest}" if in_path else path, kept
