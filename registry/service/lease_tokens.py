"""Finds the request of a lease token, also for some time after the lease has ended."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from registry.core.records import Lease

REMEMBERED_TOKENS = 10_000
"""Maximum number of leases whose tokens are remembered: the latest ones, including ended leases."""


class LeaseTokens:
    """Request ids by lease token, of the last REMEMBERED_TOKENS leases since the start of the process."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, str] = OrderedDict()

    def remember(self, leases: Sequence[Lease]) -> None:
        """Remember new or changed leases, and drop the oldest beyond REMEMBERED_TOKENS."""
        for lease in leases:
            self._requests[lease.token] = lease.request_id
            self._requests.move_to_end(lease.token)
        while len(self._requests) > REMEMBERED_TOKENS:
            self._requests.popitem(last=False)

    def request_id(self, token: str) -> str | None:
        """Return the id of the request whose lease has, or had, this token; None if unknown."""
        return self._requests.get(token)
