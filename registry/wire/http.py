"""The HTTP client of GreenPrompt's programs; proxies and certificates are taken from the environment."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

from registry.errors import BadSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that are this machine: never contacted through a proxy, whatever the environment says."""


def base_url_of(text: str) -> httpx.URL:
    """Parse a base URL. Raises BadSettings if it has no http(s) scheme or no host, or is invalid."""
    try:
        urlsplit(text)  # stricter than httpx about brackets
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise BadSettings(text, f"is not a base URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise BadSettings(text, "is not a base URL: it needs a scheme and a host, as in http://127.0.0.1:8000")
    return url


def http_client(
    base_url: str, *, timeout_s: float, connect_s: float | None = None, headers: Mapping[str, str] | None = None
) -> httpx.Client:
    """Return a client of the server at ``base_url``, which the caller has to close. Sends nothing yet.

    Timeouts, seconds: ``connect_s`` for the connection (``timeout_s`` if that is shorter, or if None);
    ``timeout_s`` for everything else. The number of connections is not limited.

    Raises:
        BadSettings: ``base_url`` is invalid, or the environment names certificates or a proxy that can't be used; the
            text names the variable.
    """
    own = base_url_of(base_url).host in LOOPBACK
    try:
        return httpx.Client(
            base_url=base_url.rstrip("/"),
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=timeout_s if connect_s is None else min(connect_s, timeout_s)),
            limits=httpx.Limits(),
            trust_env=not own,
        )
    except (OSError, ssl.SSLError) as error:
        names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        raise BadSettings(" and ".join(names) or "certificates", f"can't be used: {error}") from error
    except ValueError as error:  # raised by httpx for an invalid proxy URL
        raise BadSettings("HTTP_PROXY, HTTPS_PROXY or ALL_PROXY", str(error)) from error
    except ImportError as error:  # a SOCKS proxy needs another package
        raise BadSettings("ALL_PROXY", str(error)) from error
