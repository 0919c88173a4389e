"""Calls to a registry over HTTP: connections, credentials, and which errors are worth another try."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import stamina

from greenprompt_client.answers import AnswerError, checked, is_passing, when_to_call_again
from greenprompt_client.held_lease import RETRY_FOR_S
from registry.errors import BadSettings
from registry.wire.http import base_url_of, http_client

# D99: commands do not wait long for a connection
CONNECT_FOR_S = 5.0
"""How long an interactive command tries to reach a registry before its first answer, seconds.

Serve's proxy needs this long to restart.
"""

LONGEST_BACKOFF_S = 5.0
"""Longest pause between two tries of a call, seconds, unless the registry says when to call again."""

NEAR_S = 1.0
"""Longest pause before a retry shortly before a deadline, seconds."""

TENANT_HEADER = "X-Tenant"
"""Names the tenant, for a registry without API keys."""


class Calls:
    """The calls of one client. Not thread-safe."""

    def __init__(
        self,
        base_url: str,
        *,
        tenant: str | None = None,
        api_key: str | None = None,
        ca_file: Path | None = None,
        timeout_s: float = 60.0,
        connect_for_s: float = RETRY_FOR_S,
    ) -> None:
        """Create a client of the ingress at ``base_url``, e.g. ``http://127.0.0.1:8000``; sends nothing yet.

        ``tenant``: the tenant of the client's requests; None: the tenant of the key, or ``default`` without a key.
        ``api_key``: an API key, or a JWT of the registry's issuer. Sent to the registry, and never to an LLM; None: the
        registry needs none.
        ``ca_file``: file (PEM) of the CA of a registry behind TLS, and of its leases, the only one to be trusted;
        None: what the environment and certifi trust.
        ``connect_for_s`` is how long a call tries to connect, seconds, until the registry has
        answered for the first time.

        Raises:
            BadSettings: The URL is invalid, or not https although ``ca_file`` is given (except for this machine);
                ``ca_file`` has no certificates; or the environment names unusable certificates or an unusable proxy.
                Calls raise it if the registry's certificate is not trusted.
        """
        headers = {} if tenant is None else {TENANT_HEADER: _checked_tenant(tenant)}
        if api_key is not None:
            if base_url_of(base_url).userinfo:
                raise BadSettings("the registry's URL", "has a user name, which would be sent in place of the API key")
            headers["Authorization"] = f"Bearer {_checked_key(api_key)}"
        self._connect_for_s = connect_for_s
        make = partial(http_client, base_url, timeout_s=timeout_s, connect_s=connect_for_s, ca_file=ca_file)
        self._http = make(headers=headers)
        # A wrapper must not get the key: the LLM's code runs there.
        self._prompts = make()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._prompts.close()

    def _insist(
        self,
        method: str,
        path: str,
        params: Mapping[str, float | str],
        timeout_s: float,
        expected: HTTPStatus = HTTPStatus.OK,
        *,
        deadline_s: float | None = None,
        **content: Any,
    ) -> httpx.Response:
        """Retry a call until its answer is not a temporary error; no pause begins after RETRY_FOR_S seconds.

        Above a rate limit, the pause is as long as the answer says, see ``when_to_call_again``; the call can then take
        longer than RETRY_FOR_S. No retry begins after ``deadline_s`` (monotonic clock).

        Raises:
            AnswerError: The last error, also if the status is not ``expected``.
            httpx.HTTPError: The last error.
            TimeoutError: The last error was temporary, and ``deadline_s`` is over.
        """
        begun_s = time.monotonic()
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, self._connect_for_s))

        def passes(error: Exception) -> bool | float:
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                again: bool | float = time.monotonic() - begun_s < self._connect_for_s
            else:
                again = when_to_call_again(error)
            return _before(deadline_s, again)

        try:
            for attempt in stamina.retry_context(
                passes, attempts=None, timeout=RETRY_FOR_S, wait_max=LONGEST_BACKOFF_S
            ):
                with attempt:
                    response = self._http.request(method, path, params=params, timeout=timeout, **content)
                    self._connect_for_s = RETRY_FOR_S  # a registry exists at this URL: a restart is worth waiting for
                    return checked(response, expected)
        except (AnswerError, httpx.TransportError) as error:
            if deadline_s is not None and time.monotonic() >= deadline_s and is_passing(error):
                raise TimeoutError(f"{method} {path}: no answer in time; the last error: {error}") from error
            raise
        raise AssertionError("unreachable")


def _checked_key(api_key: str) -> str:
    """Return the key without white space at its ends.

    Raises BadSettings, without the key in its text, if an HTTP header can't contain the key.
    """
    key = api_key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise BadSettings("API key", "is empty, or has characters that no key has")
    return key


def _checked_tenant(tenant: str) -> str:
    """Return the name of a tenant. Raises BadSettings if an HTTP header can't contain it."""
    if not tenant.isascii() or not tenant.isprintable():
        raise BadSettings("tenant", f"{tenant!r} has characters that no tenant's name has")
    return tenant


def _before(deadline_s: float | None, again: bool | float) -> bool | float:
    """Shorten the pause before a retry, so that it ends at the deadline; no retry after that. See ``stamina``'s hooks.

    ``again``: whether to retry, or the pause, seconds.
    """
    if deadline_s is None or again is False:
        return again
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        return False
    if again is True:
        return True if left_s > LONGEST_BACKOFF_S else min(left_s, NEAR_S)
    return min(left_s, again)
