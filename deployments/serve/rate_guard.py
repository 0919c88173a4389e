"""Refuses calls above the limits in ``rates``, before their bodies are read."""

# D117: how often a caller may call

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.error_answers import registry_error
from deployments.serve.client_address import client_of, network_of
from deployments.serve.identities import REQUESTS, key_of, named
from deployments.serve.rates import Rate, per_minute, per_second
from registry.access_errors import TooManyCalls
from registry.access_settings import RateSettings
from registry.networks import Network


class RateGuard:
    """An ASGI app around another one, which gets only as many calls of each caller as the settings allow.

    A caller is a key, a group of JWTs (see ``named``), or the network that a call without one comes from. POSTs of
    requests are counted by tenant, if the tenant is known by a key or by ``access.trusted_clients``. Must be inside the
    guard of keys, if there is one.

    ``keys``: whether the registry asks for API keys. If not, calls from a loopback address are not counted: these
    callers may end every request anyway. ``proxies``: see ``client_of``.
    """

    def __init__(self, app: ASGIApp, settings: RateSettings, proxies: Sequence[Network] | None, *, keys: bool) -> None:
        self._app = app
        self._proxies = proxies
        self._keys = keys
        # Two, so that a flood of addresses does not push out the count of a key.
        self._calls_of_keys = per_second(settings.calls_per_second)
        self._calls_of_addresses = per_second(settings.calls_per_second)
        self._posts = per_minute(settings.posts_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            try:
                self._count(scope)
            except TooManyCalls as error:
                await registry_error(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _count(self, scope: Scope) -> None:
        """Count a call. Raises TooManyCalls."""
        key = key_of(scope)
        if key is not None and key.key_id:
            caller, calls = named(key), self._calls_of_keys
        else:
            address = client_of(scope, self._proxies)
            if not self._keys and address is not None and address.is_loopback:
                return
            caller, calls = f"the address {network_of(scope, address)}", self._calls_of_addresses
        if _is_of_a_lease(scope["method"], scope["path"]):
            return
        remedy = "call less often (a GET of a request can wait for news: ?wait=30)"
        _require(calls, caller, "rates.calls_per_second", remedy)
        if scope["path"] == REQUESTS and scope["method"] == "POST":
            poster = caller if key is None else f"the tenant {key.tenant!r}"
            remedy = "put several LLMs into one POST"
            _require(self._posts, poster, "rates.posts_per_minute", remedy)


def _is_of_a_lease(method: str, path: str) -> bool:
    """Whether a call ends or extends a lease: one program of a tenant must not keep the others from that."""
    if not path.startswith(f"{REQUESTS}/"):
        return False
    return method == "DELETE" or (method == "POST" and path.endswith("/keepalive"))


def _require(rate: Rate, caller: str, setting: str, remedy: str) -> None:
    wait_s = rate.count(caller)
    if wait_s is not None and rate.most is not None:
        raise TooManyCalls(caller, setting, rate.most, wait_s, remedy)
