"""Authenticates callers: checks the API key before the body of a request is read, and what the key's role allows.

Without ``access.keys`` every caller may do everything, for the tenant that its header ``X-Tenant`` names.
"""

# D132: identities are keys of the registry

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from time import monotonic
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import Depends, Header, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.error_answers import registry_error
from deployments.serve.browsers import READING
from registry.access_errors import KeyNeeded, KeyRefused, NotAllowed, OtherTenant
from registry.errors import RegistryError
from registry.networks import Network
from registry.service.keys import EVERYTHING, Access, parse_key
from registry.store.rows import APIKey
from registry.wire.schemas import TenantName
from registry.wire.words import Role

V = TypeVar("V")
Address = IPv4Address | IPv6Address

SOURCE_HEADER = b"x-greenprompt-source"
"""HAProxy sets this header to the address of its client, and removes what a client sent under this name."""

# D114: the client's address behind a proxy
FORWARDED_HEADER = b"x-greenprompt-forwarded"
"""HAProxy sets this header to the client's ``X-Forwarded-For`` header, and removes what came under this name.

It is empty if there is none, and ``several`` if there is more than one.
"""

PROXY_HEADERS = (b"x-forwarded-for", b"forwarded", b"x-real-ip", b"via")
"""Headers that proxies set. Nothing is read from them; HAProxy has removed the first one."""

BELIEVED_S = 2.0
"""How long the registry's answer about a key is used again, seconds. A revoked key is refused after this time."""

MOST_BELIEVED = 10_000
"""Most keys that are remembered."""

STRANGERS_AT_ONCE = 4
"""Most concurrent calls to the registry about keys that it has not accepted before."""

PUBLIC = frozenset({"/", "/healthz", "/openapi.json", "/get_status", "/process_prompt"})
"""Paths that need no key. The last two need the token of a lease."""

_BEARER = re.compile("Bearer +(.*)", re.IGNORECASE)
_STATE, _AGAIN, _REFUSED = "greenprompt_key", "greenprompt_key_again", "greenprompt_key_refused"
_ALL = frozenset(Role)
_OWNERS = frozenset({Role.CLIENT, Role.OPERATOR})
_OPERATORS = frozenset({Role.OPERATOR})
_CLIENTS = frozenset({Role.CLIENT})


def allowed_roles(method: str, path: str) -> frozenset[Role] | None:
    """Return the roles that may call a path; None: no key is needed. A path without a rule here is for operators."""
    if path in PUBLIC:
        return None
    if path == "/promptingservice/request":
        return _CLIENTS
    if path.startswith(("/promptingservice/", "/measurements/")):
        return _OWNERS
    if method in READING and path not in ("/keys", "/audit") and not path.startswith("/keys/"):
        return _ALL
    return _OPERATORS


class TrustedClients:
    """Tenants of clients that send no key, by the network that they call from.

    A call through one of the ``proxies`` comes from the address that the proxy names: see ``client_of``.
    """

    def __init__(self, tenants: Mapping[Network, str], proxies: Sequence[Network] | None = ()) -> None:
        self._tenants = tenants
        self._proxies = proxies

    def key_for(self, scope: Scope) -> APIKey | None:
        """Return a key of the tenant whose network a request comes from; None if there is none."""
        address = self._client(scope)
        if address is None:
            return None
        for network, tenant in self._tenants.items():
            if address in network:
                return APIKey("", Role.CLIENT, tenant, str(network), "", 0.0)
        return None

    def _client(self, scope: Scope) -> Address | None:
        """Return the address of a client that can be trusted by it; None if there is none.

        A proxy that shows itself by a header, but is not trusted, has the same address for all its clients.
        """
        source = _source(scope)
        if source is None or self._proxies is None:
            return None
        by_a_proxy = bool(_forwarded(scope)) or _has_a_proxys_header(scope)
        if by_a_proxy and not _is_among(source.address, self._proxies):
            return None
        return client_of(scope, self._proxies)


class KeyGuard:
    """An ASGI app around another one, which gets only requests whose key allows them.

    ``call(method, *args)`` reaches the registry actor.
    """

    def __init__(self, app: ASGIApp, call: Callable[..., Awaitable[Any]], trusted: TrustedClients) -> None:
        self._app = app
        self._call = call
        self._trusted = trusted
        self._believed: dict[tuple[str, str], tuple[APIKey, float]] = {}
        self._refused: dict[tuple[str, str], tuple[tuple[str, str], float]] = {}
        self._asking: dict[tuple[str, str], asyncio.Lock] = {}
        self._strangers = asyncio.Semaphore(STRANGERS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; refuse an HTTP request before its body is read."""
        if scope["type"] == "http":
            roles = allowed_roles(scope["method"], scope["path"])
            if roles is not None:
                try:
                    await self._key(scope, roles)
                    scope[_AGAIN] = partial(self._key, scope, roles)
                except RegistryError as error:
                    if isinstance(error, KeyRefused):
                        scope[_REFUSED] = error.key_id
                    await registry_error(error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _key(self, scope: Scope, roles: frozenset[Role]) -> APIKey:
        """Return the key of a request, also in its scope.

        Raises KeyNeeded, KeyRefused, NotAllowed, and what the registry raises.
        """
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        bearer = _BEARER.fullmatch(given[0].decode("latin-1")) if len(given) == 1 else None
        found = None if bearer is None else parse_key(bearer[1])
        if found is not None:
            key = await self._identified(found)
        elif given or (trusted := self._trusted.key_for(scope)) is None:
            raise KeyNeeded
        else:
            key = trusted
        scope[_STATE] = key
        if key.role not in roles:
            raise NotAllowed(key.role, " or ".join(sorted(roles)))
        return key

    async def _identified(self, this: tuple[str, str]) -> APIKey:
        """Return the key with this id and hash of its secret: ``_asked``, with one call at a time for each key."""
        lock = self._asking.setdefault(this, asyncio.Lock())
        try:
            async with lock:
                return await self._asked(this)
        finally:
            if not lock.locked():
                self._asking.pop(this, None)

    async def _asked(self, this: tuple[str, str]) -> APIKey:
        """Return the registry's answer about a key. An answer, or a refusal, is used again for BELIEVED_S seconds."""
        now_s = monotonic()
        (problem, key_id), until_s = self._refused.get(this, (("", ""), 0.0))
        if problem and now_s < until_s:
            raise KeyRefused(problem, key_id)
        known, until_s = self._believed.get(this, (None, 0.0))
        if known is not None and now_s < until_s:
            return known
        # A key that was accepted before does not wait behind many calls about wrong keys.
        async with nullcontext() if known is not None else self._strangers:
            try:
                key: APIKey = await self._call("identify", *this)
            except KeyRefused as refusal:
                self._believed.pop(this, None)
                _remember(self._refused, this, ((refusal.problem, refusal.key_id), now_s + BELIEVED_S))
                raise
        _remember(self._believed, this, (key, now_s + BELIEVED_S))
        return key


def _remember(answers: dict[tuple[str, str], V], which: tuple[str, str], answer: V) -> None:
    if len(answers) >= MOST_BELIEVED:
        answers.clear()
    answers[which] = answer


async def still_allowed(request: Request) -> None:
    """Check the key of a request again, after a wait: it may have been revoked meanwhile. Raises like the guard."""
    again = request.scope.get(_AGAIN)
    if again is not None:
        await again()


class Caller(NamedTuple):
    """The tenant that a request is for, and which requests its caller may see."""

    tenant: str
    access: Access


Tenant = Annotated[
    TenantName,
    Header(
        description="Name of the tenant. Tenants take turns in the queue. Without API keys it is not authenticated; "
        "with them, a client's key belongs to a tenant, and any other name is refused"
    ),
]


async def _access(request: Request) -> Access:
    key: APIKey | None = request.scope.get(_STATE)
    if key is None:
        return EVERYTHING
    return Access(key.tenant) if key.role is Role.CLIENT else Access(addresses=False)


async def _caller(request: Request, x_tenant: Tenant = "default") -> Caller:
    access = await _access(request)
    if access.tenant is None:
        return Caller(x_tenant, access)
    if "x-tenant" in request.headers and x_tenant != access.tenant:
        raise OtherTenant(x_tenant)
    return Caller(access.tenant, access)


CallerAccess = Annotated[Access, Depends(_access)]
"""Which requests the caller may see."""

CallerTenant = Annotated[Caller, Depends(_caller)]
"""The caller's tenant, by its key or else by X-Tenant, and which requests it may see."""


def key_of(scope: Scope) -> APIKey | None:
    """Return the key of a request, also if its role does not allow the call; None if it has no valid key."""
    key: APIKey | None = scope.get(_STATE)
    return key


def refused_key_id(scope: Scope) -> str | None:
    """Return the id of the revoked or expired key of a request; None for any other request."""
    return scope.get(_REFUSED) or None


def client_of(scope: Scope, proxies: Sequence[Network] | None) -> Address | None:
    """Return the address that a request comes from, for the audit; None if that is not clear.

    Through a trusted proxy: the last forwarded address that is not a trusted proxy's. Through any other proxy: the
    proxy's. ``proxies`` None: there is no HAProxy, and anybody can write its headers, so they are not read.
    """
    if proxies is None:
        return _peer(scope)
    source = _source(scope)
    if source is None:
        return _caller_itself(scope)
    if not _is_among(source.address, proxies):
        return source.address
    if source.by_peer:
        return None  # another machine's HAProxy does not add its client's address to what the client wrote
    for name in reversed(_forwarded(scope)):
        address = _address(name)
        if address is None or not _is_among(address, proxies):
            return address
    return None


def _is_among(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


class _Source(NamedTuple):
    address: Address
    by_peer: bool
    """The address is the connection's; else HAProxy of this machine named it."""


def _source(scope: Scope) -> _Source | None:
    """Return where a request comes from: what HAProxy of this machine says, or else the peer. None: it is not clear.

    A peer elsewhere that names another address is the HAProxy of another machine: the caller is not that machine.
    """
    peer, named = _peer(scope), _values(scope, SOURCE_HEADER)
    if peer is None or not named:
        return None if peer is None else _Source(peer, by_peer=True)
    address = _address(named[0]) if len(named) == 1 else None
    if address is None:
        return None
    if peer.is_loopback:
        return _Source(address, by_peer=False)
    return _Source(peer, by_peer=True) if address == peer or address.is_loopback else None


def _caller_itself(scope: Scope) -> Address | None:
    """Return the peer if it writes HAProxy's header itself: a HAProxy names one address, never several or a text."""
    peer, named = _peer(scope), _values(scope, SOURCE_HEADER)
    by_haproxy = len(named) == 1 and _address(named[0]) is not None
    return None if peer is None or peer.is_loopback or by_haproxy else peer


def _peer(scope: Scope) -> Address | None:
    return _address(str((scope.get("client") or ("", 0))[0]))


def _forwarded(scope: Scope) -> list[str]:
    """Return the forwarded addresses, as text; each was written by the one after it."""
    values = _values(scope, FORWARDED_HEADER)
    if len(values) > 1:
        return [""]  # not from our HAProxy; no address is clear
    return [part.strip() for value in values if value for part in value.split(",")]


def _has_a_proxys_header(scope: Scope) -> bool:
    return any(any(_values(scope, header)) for header in PROXY_HEADERS)


def _values(scope: Scope, header: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for name, value in scope["headers"] if name == header]


def _address(text: str) -> Address | None:
    """Return the address that a text is, without a port; IPv4 for one that is mapped to IPv6. None if it is none.

    None also for an IPv6 address with a zone (``fe80::1%eth0``), since a zone can be any text.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if getattr(address, "scope_id", None) is not None:
        return None
    return getattr(address, "ipv4_mapped", None) or address
