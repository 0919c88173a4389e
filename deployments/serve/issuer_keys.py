"""The public keys of the issuer of JWTs: reads them from its URL or from a file, and keeps them for a while.

A caller can make the ingress read the keys again, by a JWT with an unknown key id. So the ingress reads them at most
once in AGAIN_S seconds. Until the next read, it can't know whether the issuer has added this key. The caller gets a 503
and can try again.
"""

# D134: an OIDC issuer may identify callers

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import httpx
import jwt
import structlog

from deployments.machine.private_files import writable_by_others
from deployments.models.small_files import open_regular, require_regular
from registry.access_errors import JWTNotChecked
from registry.background import spawn
from registry.errors import BadSettings, in_one_line
from registry.oidc_settings import OIDCSettings, encrypted
from registry.strict_yaml import json_object
from registry.wire.http import is_loopback

READ_S = 10.0
"""Longest time for reading the keys, all requests together, seconds."""

MAX_BYTES = 256 * 1024
"""Longest answer of the issuer, and longest file of keys."""

MAX_KEYS = 100
"""Most keys of an issuer."""

EARLY_S = 300.0
"""Age after which the next call has the keys read again, seconds. No caller waits for that."""

OLD_S = 600.0
"""Age after which callers wait for that, seconds: a key that the issuer withdraws is refused after this time."""

KEPT_S = 3600.0
"""How long keys are used while the issuer can't be reached, seconds after they were read."""

AGAIN_S = 15.0
"""Shortest time between the beginnings of two reads, seconds."""

OUTAGE_S = AGAIN_S + READ_S
"""How long after a failed read callers don't wait for the next one, seconds, while they have keys."""

GRACE_S = 1.0
"""How long callers wait after READ_S for a read that does not end when it should, seconds."""

MAX_WAITING = 100
"""Most callers that wait for the keys."""

MAX_RSA_BITS = 8192
"""Longest RSA key: the time to check a signature grows with the square of it."""

log = structlog.get_logger("deployments.serve.issuer_keys")


class UnusableKeys(Exception):
    """What the issuer or the file contains can't be used. The text says what to do."""


class IssuerKey(NamedTuple):
    """A public key for one algorithm. ``key_id``: its `kid`; None: it has none."""

    key_id: str | None
    algorithm: str
    key: jwt.PyJWK


class IssuerKeys:
    """The keys of an issuer; reads them when they are needed. Not thread-safe.

    ``read`` returns the keys, and raises whatever it likes.
    """

    def __init__(self, issuer: str, read: Callable[[], Awaitable[Sequence[IssuerKey]]]) -> None:
        self._issuer = issuer
        self._read = read
        self._keys: Sequence[IssuerKey] = ()
        # Monotonic clock: when the last successful read began, when the last read began, and when one failed last.
        self._read_s = self._tried_s = self._failed_s = -float("inf")
        self._reading: asyncio.Task[None] | None = None
        self._waiting = 0

    async def fitting(self, key_id: str | None, algorithm: str) -> list[jwt.PyJWK]:
        """Return the keys with this id for this algorithm; None: with any id, or none.

        May wait for a read of the keys. Raises JWTNotChecked if they could not be read for KEPT_S seconds, if none
        fits and no read has begun since this call, or if MAX_WAITING callers wait already.
        """
        called_s = monotonic()
        if self._age_s() > EARLY_S:
            self._begin_read()
        if self._age_s() > (KEPT_S if called_s - self._failed_s < OUTAGE_S else OLD_S):
            await self._wait()
        if self._age_s() > KEPT_S:
            raise self._not_checked(f"the keys of {self._issuer} can't be read")
        found = self._of(key_id, algorithm)
        if not found:
            self._begin_read()
            await self._wait()
            found = self._of(key_id, algorithm)
            if not found and self._read_s < called_s:
                raise self._not_checked("its issuer had no such key when its keys were read last")
        return found

    def _age_s(self) -> float:
        return monotonic() - self._read_s

    def _of(self, key_id: str | None, algorithm: str) -> list[jwt.PyJWK]:
        return [each.key for each in self._keys if each.algorithm == algorithm and key_id in (None, each.key_id)]

    def _not_checked(self, problem: str) -> JWTNotChecked:
        return JWTNotChecked(problem, max(1.0, self._tried_s + AGAIN_S - monotonic()))

    def _begin_read(self) -> None:
        """Begin to read the keys, unless that is in progress, or was begun a moment ago."""
        if (self._reading is None or self._reading.done()) and monotonic() - self._tried_s >= AGAIN_S:
            self._tried_s = monotonic()
            self._reading = spawn("read the keys of the issuer of JWTs", self._read_once())

    async def _wait(self) -> None:
        """Wait for the end of the read in progress, if there is one. Raises JWTNotChecked if many callers do so."""
        if self._reading is None or self._reading.done():
            return
        if self._waiting >= MAX_WAITING:
            raise JWTNotChecked("too many callers wait until the keys of its issuer are read", 1.0)
        self._waiting += 1
        try:
            await asyncio.wait({self._reading}, timeout=READ_S + GRACE_S)  # a caller that is cancelled does not end it
        finally:
            self._waiting -= 1

    async def _read_once(self) -> None:
        begun_s = monotonic()
        try:
            async with asyncio.timeout(READ_S):
                keys = await self._read()
        except Exception as error:  # httpx, ssl, OSError, UnusableKeys: for a caller they are all the same
            log.warning("the keys of the issuer of JWTs can't be read", issuer=self._issuer, reason=in_one_line(error))
            self._failed_s = monotonic()
            return
        if [each[:2] for each in keys] != [each[:2] for each in self._keys]:
            log.info("the keys of the issuer of JWTs were read", issuer=self._issuer, keys=len(keys))
        if not keys:
            log.warning("the issuer of JWTs has no usable key, so all JWTs are refused", issuer=self._issuer)
        self._keys, self._read_s = keys, begun_s


def issuer_keys(settings: OIDCSettings) -> IssuerKeys:
    """Return the keys of the issuer in the settings. Reads nothing yet."""
    if settings.jwks_file is not None:
        file = settings.jwks_file

        async def read() -> Sequence[IssuerKey]:
            text = await asyncio.to_thread(_contents, file)
            return parse_keys(text, settings.algorithms)

        return IssuerKeys(settings.issuer, read)
    return IssuerKeys(settings.issuer, _Website(settings).keys)


def require_files(settings: OIDCSettings) -> None:
    """Raise BadSettings if a file in the settings can't be used.

    It can't be read, other users can write to it, or it does not contain what it should.
    """
    if settings.jwks_file is not None:
        try:
            if not parse_keys(_contents(settings.jwks_file), settings.algorithms):
                allowed = ", ".join(settings.algorithms)
                raise UnusableKeys(f"the list of keys (JWKS) has no key for {allowed} (access.oidc.algorithms)")
        except (OSError, UnusableKeys) as error:
            raise BadSettings("access.oidc.jwks_file", f"{settings.jwks_file} can't be used: {error}") from error
    if settings.ca_file is not None:
        try:
            _only(settings.ca_file)
        except (OSError, UnusableKeys) as error:
            remedy = "; it needs certificates (PEM)" if isinstance(error, ssl.SSLError) else ""
            problem = f"{settings.ca_file} can't be used: {error}{remedy}"
            raise BadSettings("access.oidc.ca_file", problem) from error


def parse_keys(text: bytes, algorithms: Iterable[str]) -> list[IssuerKey]:
    """Return the usable keys of a JWKS, for each algorithm. Keys of other kinds are left out.

    An empty list is returned, too: who withdraws the last key wants no JWT to be accepted. Raises UnusableKeys: it is
    no JWKS, or has too many keys.
    """
    keys = _object(text, "the list of keys (JWKS)").get("keys")
    if not isinstance(keys, list):
        raise UnusableKeys("the list of keys (JWKS) has no list `keys`")
    if len(keys) > MAX_KEYS:
        raise UnusableKeys(f"the list of keys (JWKS) has {len(keys)} keys; {MAX_KEYS} are allowed")
    allowed = list(algorithms)
    return [key for each in keys for algorithm in allowed if (key := _key(each, algorithm)) is not None]


def _key(found: Any, algorithm: str) -> IssuerKey | None:
    """Return a key of a JWKS for an algorithm; None if it is not meant for it, or not safe."""
    if not isinstance(found, dict) or found.get("alg", algorithm) != algorithm or found.get("use", "sig") != "sig":
        return None
    key_id, operations = found.get("kid"), found.get("key_ops", ["verify"])
    if not isinstance(key_id, str | None) or not isinstance(operations, list) or "verify" not in operations:
        return None
    if "d" in found:  # everybody can read the private key
        log.warning("a key of the issuer of JWTs is not used, because its private part is published", kid=key_id)
        return None
    try:
        key = jwt.PyJWK(found, algorithm)
        prepared: Any = key.Algorithm.prepare_key(key.key)  # raises for a curve that is another algorithm's
        too_short = key.Algorithm.check_key_length(prepared)
    except (jwt.PyJWTError, TypeError, ValueError):  # a key of another kind
        return None
    too_long = getattr(prepared, "key_size", 0) > MAX_RSA_BITS
    return None if too_short or too_long else IssuerKey(key_id, algorithm, key)


class _Website:
    """Reads the keys from the issuer by HTTP."""

    def __init__(self, settings: OIDCSettings) -> None:
        self._settings = settings

    async def keys(self) -> Sequence[IssuerKey]:
        """Return the issuer's keys. Raises UnusableKeys, httpx.HTTPError, OSError, and errors of a proxy's URL."""
        settings = self._settings
        place = httpx.URL(settings.jwks_url or settings.issuer)
        async with httpx.AsyncClient(
            verify=await asyncio.to_thread(_trust, place, settings.ca_file),  # at each read: the CA's file may change
            timeout=READ_S,
            trust_env=not is_loopback(place.host),
            follow_redirects=False,
            # Not compressed, so that MAX_BYTES limits the memory.
            headers={"accept": "application/json", "accept-encoding": "identity"},
        ) as http:
            url = settings.jwks_url or await self._discovered(http)
            return parse_keys(await _read(http, url), settings.algorithms)

    async def _discovered(self, http: httpx.AsyncClient) -> str:
        """Return the URL of the keys that the issuer's configuration names. Raises like ``keys``."""
        issuer = self._settings.issuer
        # OpenID Connect Discovery 1.0, sections 4.1 and 4.3
        place = f"{issuer.removesuffix('/')}/.well-known/openid-configuration"
        found = _object(await _read(http, place), place)
        if found.get("issuer") != issuer:
            raise UnusableKeys(f"{place} belongs to another issuer; correct access.oidc.issuer, to the letter")
        given = found.get("jwks_uri")
        try:
            url = encrypted(given if isinstance(given, str) else "")
        except ValueError as error:
            raise UnusableKeys(f"jwks_uri in {place} {error}") from error
        if _origin(url) != _origin(issuer):
            problem = "is on another host than the issuer; if it is right, set access.oidc.jwks_url to it"
            raise UnusableKeys(f"jwks_uri in {place} {problem}")
        return url


async def _read(http: httpx.AsyncClient, url: str) -> bytes:
    """Return the body of a GET. Raises UnusableKeys if the answer is no 200, compressed, or too long."""
    async with http.stream("GET", url) as answer:
        if answer.is_redirect:
            raise UnusableKeys(f"{url} is redirected, which is not followed; set access.oidc.jwks_url to the final URL")
        if answer.status_code != httpx.codes.OK:
            raise UnusableKeys(f"{url} answers {answer.status_code}")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise UnusableKeys(f"{url} answers in a compressed form, which was not asked for")
        body = bytearray()
        async for part in answer.aiter_raw():
            body += part
            if len(body) > MAX_BYTES:
                raise UnusableKeys(f"{url} answers with more than {MAX_BYTES // 1024} KiB")
        return bytes(body)


def _contents(file: Path) -> bytes:
    """Return what a file contains. Raises OSError; UnusableKeys if it is too long, or if other users can change it."""
    with open_regular(file) as opened:
        _require_trusted(os.fstat(opened.fileno()))
        text = opened.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise UnusableKeys(f"it has more than {MAX_BYTES // 1024} KiB")
    return text


def _require_trusted(found: os.stat_result) -> None:
    """Raise UnusableKeys if other users can write to a file: they could sign JWTs of an operator."""
    if (problem := writable_by_others(found)) is not None:
        raise UnusableKeys(problem)


def _trust(place: httpx.URL, ca_file: Path | None) -> ssl.SSLContext:
    """Return what trusts the certificate of a host. Reads files. Raises OSError, UnusableKeys."""
    if place.scheme != "https":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nothing, and is not used
    return httpx.create_ssl_context() if ca_file is None else _only(ca_file)


def _only(ca_file: Path) -> ssl.SSLContext:
    """Return what trusts only the CA in a file. Raises OSError; UnusableKeys if other users can change it."""
    found = ca_file.stat()
    require_regular(ca_file.name, found)  # a read of a named pipe may not end
    _require_trusted(found)
    return ssl.create_default_context(cafile=ca_file)


def _object(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object. Raises UnusableKeys."""
    try:
        return json_object(text.decode())
    except UnicodeDecodeError as error:
        raise UnusableKeys(f"{what} is no JSON: {error}") from error
    except ValueError as error:
        raise UnusableKeys(f"{what} {error}") from error


def _origin(url: str) -> tuple[str, str, int | None]:
    parsed = httpx.URL(url)
    return parsed.scheme, parsed.host, parsed.port
