"""The audit: who changed something in the registry, and who was refused; when, from where, with what outcome.

* A call that changes something is written by its decision, in the same transaction: see ``Loop.apply`` and ``Keys``.
* Refused calls are counted in the ingress (``Refusals``), which sends their rows to the registry once a minute.
* What changes nothing has no row: reads, and calls that are repeated. Neither has a keep-alive, which is called often.

Rows are deleted after ``keep_days``, and never changed.
"""

# D113: the audit

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from http import HTTPStatus

from registry.access_errors import JWTRefused, KeyRefused
from registry.errors import ShuttingDown
from registry.networks import of_one_client
from registry.service.loop import Loop
from registry.store.rows import AuditFilter, AuditRow, StoredAuditPage
from registry.store.store import Store
from registry.wire.words import JWT_MARK

ROWS = 20
"""Most rows with path and source in a minute, for each group of callers, such as a key: see ``_bucket_of``."""

ROWS_OF_ONE = 5
"""Most of these rows from one network, so that a noisy caller does not hide the others; see ``of_one_client``."""

AT_START = "start"
"""The ``method`` of what the registry did at its start, without a call."""

OF_WITHDRAWAL = "withdraw"
"""The ``method`` of the end of a request whose POST was accepted, but not answered."""


def at_start(path: str, status: int) -> AuditRow:
    """Return the row of a change that the registry makes at its start, as the call of this path would."""
    return AuditRow(AT_START, path, status)


def of_withdrawal(posted: AuditRow) -> AuditRow:
    """Return the row of the end of a POST's request, whose answer did not reach the client, from the POST's own."""
    return replace(posted, method=OF_WITHDRAWAL, path=f"{posted.path}/{{request_id}}", status=HTTPStatus.NO_CONTENT)


class Refusals:
    """Counts refused calls. Equal ones share a row, and the number of rows is bounded, whatever callers send.

    Times are seconds of any one clock. Not thread-safe.
    """

    def __init__(self) -> None:
        self._counts: dict[AuditRow, tuple[float, int]] = {}
        """By row: the time of the first call, and the number of calls."""
        self._rows: Counter[object] = Counter()
        """The number of rows of each bucket, and of each network in a bucket."""

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, row: AuditRow, at_s: float, count: int = 1) -> None:
        """Count a refused call, whose ``at_s`` and ``count`` in ``row`` are not used."""
        row = self._row_for(replace(row, at_s=0.0, count=1))
        first_s, so_far = self._counts.get(row, (at_s, 0))
        self._counts[row] = min(first_s, at_s), so_far + count

    def add_all(self, other: Refusals) -> None:
        """Count the calls of another one, too."""
        for row, (at_s, count) in other._counts.items():
            self.add(row, at_s, count)

    def rows(self, now_s: float) -> list[tuple[AuditRow, float]]:
        """Return the rows with their counts, and how long ago the first call of each was, seconds."""
        return [(replace(row, count=count), now_s - at_s) for row, (at_s, count) in self._counts.items()]

    def _row_for(self, row: AuditRow) -> AuditRow:
        """Return the row to count in: this one, or the one of all calls with its outcome."""
        # A valid key has a role. The ids of revoked keys are left out, so that all of them share one row; those of JWTs
        # are left out, too, because users of an issuer may be able to choose them.
        key_id = None if row.role is None or _issuer(row) else row.key_id
        outcome = replace(row, method="", path=None, source=None, subject=None, key_id=key_id)
        if row in self._counts or row == outcome:
            return row
        bucket = _bucket_of(row)
        one = bucket, None if row.source is None else of_one_client(row.source)
        if self._rows[bucket] >= ROWS or self._rows[one] >= ROWS_OF_ONE:
            return outcome
        self._rows.update((bucket, one))
        return row


def _bucket_of(row: AuditRow) -> tuple[str | None, str | None]:
    """Return whose rows are bounded together.

    A key's, or a trusted client's, are its own. Those of a tenant's JWTs are together, and so are those of each other
    role's. There are three more: of wrong keys and JWTs; of revoked and expired keys, and refused JWTs that the issuer
    signed for this registry; of calls whose key is missing or was not looked at.
    """
    if row.role is not None:
        issuer = _issuer(row)
        return f"{issuer}{JWT_MARK}{row.role}" if issuer else row.key_id, row.tenant
    if row.code not in (KeyRefused.code, JWTRefused.code):
        return None, None
    return KeyRefused.code, "known" if row.key_id else None


def _issuer(row: AuditRow) -> str:
    """Return the issuer of a caller's JWT; empty if the caller has none."""
    issuer, mark, _ = (row.key_id or "").partition(JWT_MARK)
    return issuer if mark else ""


class Audit:
    """The stored audit of a registry. Not thread-safe."""

    def __init__(self, store: Store, loop: Loop) -> None:
        self._store = store
        self._loop = loop

    def add_refusals(self, rows: Iterable[tuple[AuditRow, float]]) -> None:
        """Store refused calls, each with how long ago the first one was, seconds.

        Raises:
            ShuttingDown: the registry's database is closed.
            StoreUnavailable: the database failed.
        """
        if self._loop.closed:
            raise ShuttingDown
        now_s = self._loop.now_s()
        with self._loop.fail_stop():
            self._store.add_audit([replace(row, at_s=now_s - ago_s) for row, ago_s in rows])

    def rows(self, wanted: AuditFilter, after: int, limit: int) -> StoredAuditPage:
        """Return the oldest ``limit`` (> 0) rows that are wanted with a number above ``after``: see ``Store.audit``.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        return self._store.audit(wanted, after=after, limit=limit)
