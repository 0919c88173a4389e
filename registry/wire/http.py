"""The HTTP client of GreenPrompt's programs; proxies, and certificates by default, are taken from the environment."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from registry.errors import BadSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""The usual names of this machine, for programs that take a list of hosts; `is_loopback` knows all."""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address, so that no other machine can be meant."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_CA_REMEDY = "name the file of its CA: --ca-file, GREENPROMPT_CA_FILE, or RegistryClient(ca_file=…)"

_OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
_UNKNOWN_ISSUER = (18, 19, 20, 21)  # self-signed (also in the chain), or a CA that is not known
"""OpenSSL's codes of certificates that are refused."""


class _Client(httpx.Client):
    """A client that says what to do if it does not trust a server's certificate, and does not leave https."""

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send a request.

        Raises BadSettings if the certificate is refused, or if the base URL is https and the request's URL is not;
        else like ``httpx.Client``.
        """
        require_encrypted(self.base_url, request.url)
        try:
            return super().send(request, **options)
        except httpx.ConnectError as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            raise BadSettings(_place(request.url), refusal) from error


def require_encrypted(base: httpx.URL, url: httpx.URL) -> None:
    """Raise BadSettings if a registry is called by https, but the URL of one of its leases is not https."""
    if base.scheme == "https" and url.scheme != "https":
        problem = f"is not https, although the registry is called by https: its leases have URLs at {_place(url)}"
        raise BadSettings("http.public_url", f"{problem}; set it to the https URL in the registry's settings")


def _place(url: httpx.URL) -> str:
    """Return scheme, host and port of a URL. The rest may contain a token."""
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


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
    base_url: str,
    *,
    timeout_s: float,
    connect_s: float | None = None,
    headers: Mapping[str, str] | None = None,
    ca_file: Path | None = None,
) -> httpx.Client:
    """Return a client of the server at ``base_url``, which the caller has to close. Sends nothing yet.

    Timeouts, seconds: ``connect_s`` for the connection (``timeout_s`` if that is shorter, or if None);
    ``timeout_s`` for everything else. The number of connections is not limited.
    ``ca_file``: the only certificates (PEM) to trust; None: those of the environment, else those of certifi.

    Raises:
        BadSettings: ``base_url`` is invalid, or http with a ``ca_file`` and not this machine's; ``ca_file`` has no
            certificates; or the environment names certificates or a proxy that can't be used. The text names the file
            or the variable. A call raises it if the server's certificate is not trusted, or if its URL is not https
            although ``base_url`` is.
    """
    url = base_url_of(base_url)
    own = is_loopback(url.host)
    verify = True if ca_file is None else _trust(ca_file)
    if ca_file is not None and url.scheme != "https" and not own:
        problem = f"has no use with {_place(url)}, because http is not encrypted"
        raise BadSettings(str(ca_file), f"{problem}; use the registry's https URL, or no file of a CA")
    try:
        return _Client(
            base_url=base_url.rstrip("/"),
            headers=headers,
            verify=verify,
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


def _trust(ca_file: Path) -> ssl.SSLContext:
    """Return what trusts the certificates of a file only. Raises BadSettings."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise BadSettings(str(ca_file), "has no certificates (PEM)") from None
    except OSError as error:
        raise BadSettings(str(ca_file), f"can't be read: {error.strerror}") from error


def _refusal(error: httpx.ConnectError) -> str | None:
    """Return why a server's certificate is refused, and what to do; None if that was not the problem."""
    below = error.__cause__
    # httpcore raises its error a second time, `from None`, which leaves the reason in its context only. Contexts beyond
    # that may be earlier problems, which were dealt with.
    cause = None if below is None else below.__cause__ or below.__context__
    if not isinstance(cause, ssl.SSLCertVerificationError):
        return None
    remedy = ""
    if cause.verify_code in _UNKNOWN_ISSUER:
        remedy = f"; {_CA_REMEDY}"
    elif cause.verify_code in _OTHER_NAME:
        remedy = "; use a name that the certificate has"
    return f"its certificate is not trusted: {cause.verify_message.rstrip('.')}{remedy}"
