"""API keys: who calls, for which tenant, and what the caller may do. Secrets are stored as hashes only."""

# D132: identities are keys of the registry

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from registry.access_errors import KeyRefused, UnknownKey
from registry.errors import InvalidField
from registry.store.rows import APIKey, AuditRow
from registry.store.store import Store
from registry.wire.words import KEY_PREFIX, Role

_KEY = re.compile(rf"{KEY_PREFIX}([0-9a-f]{{8}})_([A-Za-z0-9_-]{{43}})")

DAY_S = 86_400.0

USED_EVERY_S = 60.0
"""How often the last use of keys is stored, seconds."""


@dataclass(frozen=True, slots=True)
class Access:
    """Which requests a caller may see and end: those of ``tenant``, None: all of them.

    ``addresses``: whether answers contain the address of a lease, which contains its token.
    """

    tenant: str | None = None
    addresses: bool = True

    def sees(self, tenant: str) -> bool:
        """Whether the caller may see the requests of this tenant."""
        return self.tenant in (None, tenant)


EVERYTHING = Access()
"""The access of every caller of a registry without keys."""


def sha256_of(secret: str) -> str:
    """Return the hash under which a secret is stored. Secrets are random, so a fast hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


def parse_key(text: str) -> tuple[str, str] | None:
    """Return the id of a key and the hash of its secret; None if the text is no key."""
    found = _KEY.fullmatch(text.strip())
    return None if found is None else (found[1], sha256_of(found[2]))


class Keys:
    """The keys of a registry: in memory, and in its store. Not thread-safe."""

    def __init__(
        self, store: Store, now_s: Callable[[], float], fail_stop: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Read the keys. ``now_s`` returns UTC seconds. ``fail_stop``: see ``Loop``. Raises StoreUnavailable."""
        self._store = store
        self._fail_stop = fail_stop
        self._now_s = now_s
        self._keys = {key.key_id: key for key in store.api_keys()}
        self._used: dict[str, float] = {}
        """By key id: the last use that is not stored yet, UTC seconds."""

    def __iter__(self) -> Iterator[APIKey]:
        return (replace(key, used_s=self._used.get(key.key_id, key.used_s)) for key in self._keys.values())

    def new(self, role: Role, *, tenant: str | None, name: str, days: float | None = None) -> tuple[APIKey, str]:
        """Return a new key that is not in force yet (see ``add``), and its text, which is kept nowhere.

        ``days``: until it expires; None: never. Raises InvalidField if a client has no tenant, or another role has one.
        """
        if (role is Role.CLIENT) != (tenant is not None):
            problem = "is needed for a client's key" if role is Role.CLIENT else f"a key for the role {role} has none"
            raise InvalidField("tenant", problem)
        now_s = self._now_s()
        key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
        while key_id in self._keys:
            key_id = secrets.token_hex(4)
        expires_s = None if days is None else now_s + days * DAY_S
        key = APIKey(key_id, role, tenant, name, sha256_of(secret), now_s, expires_s)
        return key, f"{KEY_PREFIX}{key_id}_{secret}"

    def add(self, key: APIKey, audit: AuditRow | None = None) -> None:
        """Put a new key in force. ``audit``: the call that made it. Raises StoreUnavailable."""
        self._put([key], audit)

    def revoke(self, key_id: str, audit: AuditRow | None = None) -> None:
        """Refuse a key from now on. ``audit``: the call that says so. Idempotent.

        Raises UnknownKey, StoreUnavailable.
        """
        key = self._keys.get(key_id)
        if key is None:
            raise UnknownKey(key_id)
        if key.revoked_s is None:
            self._put([replace(key, revoked_s=self._now_s())], audit)

    def identify(self, key_id: str, secret_sha256: str) -> APIKey:
        """Return the key with this id and secret, and note its use in memory. Does not access the store.

        Raises KeyRefused: There is no such key, or it has expired or was revoked.
        """
        key, now_s = self._keys.get(key_id), self._now_s()
        known = "" if key is None else key.secret_sha256
        if not hmac.compare_digest(known, secret_sha256) or key is None:
            raise KeyRefused("it is not known here")
        if key.revoked_s is not None:
            raise KeyRefused("it was revoked", key_id)
        if key.expires_s is not None and key.expires_s <= now_s:
            raise KeyRefused("it has expired", key_id)
        self._used[key_id] = now_s
        return key

    async def run(self) -> None:
        """Store the last use of keys every USED_EVERY_S seconds. Raises StoreUnavailable."""
        while True:
            await asyncio.sleep(USED_EVERY_S)
            self.note_used()

    def note_used(self) -> None:
        """Store the last use of keys. Raises StoreUnavailable."""
        if self._used:
            used = [replace(self._keys[key_id], used_s=at_s) for key_id, at_s in self._used.items()]
            self._used.clear()
            self._put(used)

    def _put(self, keys: Sequence[APIKey], audit: AuditRow | None = None) -> None:
        if audit is not None:
            audit = replace(audit, subject=keys[0].key_id, tenant=keys[0].tenant, at_s=self._now_s())
        with self._fail_stop():
            self._store.put_api_keys(keys, audit)
        self._keys |= {key.key_id: key for key in keys}
