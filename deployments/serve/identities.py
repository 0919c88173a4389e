"""Authenticates callers: checks the API key or JWT before the body of a request is read, and what its role allows.

Without ``access.keys`` every caller may do everything, for the tenant that its header ``X-Tenant`` names.
"""

# D132: identities are keys of the registry

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from time import monotonic
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import Depends, Header, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.error_answers import registry_error
from deployments.serve.browsers import READING
from deployments.serve.client_address import client_of, network_of, trusted_client_of
from deployments.serve.jwt_identities import JWTIdentities, is_like_jwt
from deployments.serve.rates import per_minute
from registry.access_errors import JWTRefused, KeyNeeded, KeyRefused, NotAllowed, OtherTenant, TooManyWrongKeys
from registry.errors import RegistryError
from registry.networks import Network
from registry.service.keys import EVERYTHING, Access, parse_key
from registry.store.rows import APIKey
from registry.wire.schemas import TenantName
from registry.wire.words import JWT_MARK, Role

V = TypeVar("V")

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

REQUESTS = "/promptingservice/request"
"""Path of the POST that requests LLMs; those of one request begin with it."""


def allowed_roles(method: str, path: str) -> frozenset[Role] | None:
    """Return the roles that may call a path; None: no key is needed. A path without a rule here is for operators."""
    if path in PUBLIC:
        return None
    if path == REQUESTS:
        return _CLIENTS
    if path.startswith(("/promptingservice/", "/measurements/")):
        return _OWNERS
    if method in READING and path not in ("/keys", "/audit") and not path.startswith("/keys/"):
        return _ALL
    return _OPERATORS


class TrustedClients:
    """Tenants of clients that send no key, by the network that they call from.

    ``proxies``: see ``trusted_client_of``.
    """

    def __init__(self, tenants: Mapping[Network, str], proxies: Sequence[Network] | None = ()) -> None:
        self._tenants = tenants
        self._proxies = proxies

    def key_for(self, scope: Scope) -> APIKey | None:
        """Return a key of the tenant whose network a request comes from; None if there is none."""
        address = trusted_client_of(scope, self._proxies)
        if address is None:
            return None
        for network, tenant in self._tenants.items():
            if address in network:
                return APIKey("", Role.CLIENT, tenant, str(network), "", 0.0)
        return None


class KeyGuard:
    """An ASGI app around another one, which gets only requests whose key allows them.

    ``call(method, *args)`` reaches the registry actor. ``proxies``: see ``client_of``. ``wrong_a_minute``: most unknown
    keys from one network that are looked up in a minute; None: no limit. ``jwts``: checks JWTs; None: only keys are
    accepted.
    """

    def __init__(
        self,
        app: ASGIApp,
        call: Callable[..., Awaitable[Any]],
        trusted: TrustedClients,
        proxies: Sequence[Network] | None = (),
        wrong_a_minute: int | None = None,
        jwts: JWTIdentities | None = None,
    ) -> None:
        self._app = app
        self._call = call
        self._trusted = trusted
        self._proxies = proxies
        self._jwts = jwts
        self._wrong = per_minute(wrong_a_minute)
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
                    if isinstance(error, KeyRefused | JWTRefused):
                        scope[_REFUSED] = error.key_id
                    await registry_error(error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _key(self, scope: Scope, roles: frozenset[Role]) -> APIKey:
        """Return the key of a request, also in its scope.

        Raises KeyNeeded, KeyRefused, JWTRefused, JWTNotChecked, TooManyWrongKeys, NotAllowed, and what the registry
        raises.
        """
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        bearer = _BEARER.fullmatch(given[0].decode("latin-1")) if len(given) == 1 else None
        text = "" if bearer is None else bearer[1].strip()
        if (found := parse_key(text)) is not None:
            key = await self._identified(found, scope)
        elif self._jwts is not None and is_like_jwt(text):
            key = await self._by_jwt(self._jwts, text, scope)
        elif given or (trusted := self._trusted.key_for(scope)) is None:
            raise KeyNeeded(given=bool(given))
        else:
            key = trusted
        scope[_STATE] = key
        if key.role not in roles:
            raise NotAllowed(key.role, " or ".join(sorted(roles)))
        return key

    async def _by_jwt(self, jwts: JWTIdentities, text: str, scope: Scope) -> APIKey:
        """Return the identity of a JWT.

        A wrong JWT counts like a wrong key. A valid one is accepted however many wrong ones its network has sent: the
        check needs no call of the registry, and is as fast as that of a wrong one.
        """
        try:
            return await jwts.identity(text)
        except JWTRefused as refusal:
            if not refusal.key_id:  # one that the issuer has signed for this registry is no guess
                network = network_of(scope, client_of(scope, self._proxies))
                self._require_few_wrong(network)
                self._wrong.count(network)
            raise

    async def _identified(self, this: tuple[str, str], scope: Scope) -> APIKey:
        """Return the key with this id and hash of its secret: ``_asked``, with one call at a time for each key."""
        lock = self._asking.setdefault(this, asyncio.Lock())
        try:
            async with lock:
                return await self._asked(this, scope)
        finally:
            if not lock.locked():
                self._asking.pop(this, None)

    async def _asked(self, this: tuple[str, str], scope: Scope) -> APIKey:
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
            network = network_of(scope, client_of(scope, self._proxies))
            # D117: a key that was accepted before is looked up even if its network sends many wrong ones
            if known is None:
                self._require_few_wrong(network)
            try:
                key: APIKey = await self._call("identify", *this)
            except KeyRefused as refusal:
                if not refusal.key_id:  # a revoked or expired key is no guess
                    self._wrong.count(network)
                self._believed.pop(this, None)
                _remember(self._refused, this, ((refusal.problem, refusal.key_id), now_s + BELIEVED_S))
                raise
        _remember(self._believed, this, (key, now_s + BELIEVED_S))
        return key

    def _require_few_wrong(self, network: str) -> None:
        """Raise TooManyWrongKeys if a network has sent as many wrong keys as it may in a minute."""
        wait_s = self._wrong.used_up(network)
        if wait_s is not None and self._wrong.most is not None:
            raise TooManyWrongKeys(self._wrong.most, wait_s)


def _remember(answers: dict[tuple[str, str], V], which: tuple[str, str], answer: V) -> None:
    if len(answers) >= MOST_BELIEVED:
        answers.clear()
    answers[which] = answer


async def still_allowed(request: Request) -> None:
    """Check the key of a request again, after a wait: it may be revoked or expired by then. Raises like the guard."""
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


def named(key: APIKey) -> str:
    """Return what limits call a key, which has an id. JWTs of a tenant, or of another role, are one caller.

    Users of an issuer may be able to choose their subjects, so a JWT's own limit would be none.
    """
    if JWT_MARK not in key.key_id:
        return f"the API key {key.key_id}"
    return f"the group of all JWTs {f'of the role {key.role}' if key.tenant is None else f'of tenant {key.tenant!r}'}"


def refused_key_id(scope: Scope) -> str | None:
    """Return the id of the revoked or expired key of a request, or of its JWT's identity; None for any other."""
    return scope.get(_REFUSED) or None
