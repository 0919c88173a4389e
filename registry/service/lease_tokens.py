"""Makes the tokens of leases, and finds the request of a token, also for some time after its lease has ended."""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from registry.core.events import LeaseTokenLost
from registry.core.records import Lease, StoredToken
from registry.wire.lease_token import LEASE_TOKEN

REMEMBERED_TOKENS = 10_000
"""Maximum number of leases whose tokens are remembered: the latest ones, including ended leases."""

_LOST = (
    "the token of its lease can't be made again: the cluster was lost, or an older version granted the lease; if the "
    "request has failed, request the LLM again"
)


# D116: a token is made from a key that is not in the database
class LeaseTokens:
    """Makes tokens from a secret ``key`` and the ids that are stored with leases; remembers the request of each token.

    ``new_id`` returns a unique id, which need not be secret. Request ids are remembered for the last REMEMBERED_TOKENS
    leases since the start of the process.
    """

    def __init__(self, key: bytes, new_id: Callable[[], str]) -> None:
        self._key = key
        self._new_id = new_id
        self._requests: OrderedDict[str, str] = OrderedDict()
        """Request ids by the SHA-256 of the token."""

    def new(self) -> StoredToken:
        """Make a new token. Return what is stored of it."""
        token_id = self._new_id()
        return StoredToken(token_id, _sha256(self._made_from(token_id)))

    def of(self, lease: Lease) -> str:
        """Return the token of a lease."""
        return self._made_from(lease.token_id)

    def is_lost(self, lease: Lease) -> bool:
        """Tell whether the token of a lease was made with another key, or without one."""
        return _sha256(self.of(lease)) != lease.token_sha256

    def lost(self, leases: Iterable[Lease]) -> list[LeaseTokenLost]:
        """Return an event for each of these leases whose token is lost."""
        return [LeaseTokenLost(lease.request_id, _LOST) for lease in leases if self.is_lost(lease)]

    def remember(self, leases: Sequence[Lease]) -> None:
        """Remember new or changed leases, and drop the oldest beyond REMEMBERED_TOKENS."""
        for lease in leases:
            self._requests[lease.token_sha256] = lease.request_id
            self._requests.move_to_end(lease.token_sha256)
        while len(self._requests) > REMEMBERED_TOKENS:
            self._requests.popitem(last=False)

    def request_id(self, token: str) -> str | None:
        """Return the id of the request whose lease has, or had, this token; None if unknown."""
        return self._requests.get(_sha256(token))

    def _made_from(self, token_id: str) -> str:
        digest = hmac.digest(self._key, token_id.encode(), "sha256")
        return LEASE_TOKEN + urlsafe_b64encode(digest).decode().rstrip("=")


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()  # callers can send any text
