"""Reads the audit in pages, each with a bounded effort, since nothing else reaches the registry meanwhile."""

# D113: the audit

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, func, select

from registry.store.migrations.tables import AUDIT
from registry.store.rows import AuditFilter, AuditRow, StoredAuditPage, StoredAuditRow

SCANNED = 20_000
"""Most rows that one page looks at: about 20 ms."""


def read_page(connection: Connection, wanted: AuditFilter, after: int, limit: int) -> StoredAuditPage:
    """Return the oldest ``limit`` (> 0) wanted rows with ``audit_id`` > ``after``, of the next SCANNED rows."""
    rows = AUDIT.c
    times = [] if wanted.since_s is None else [rows.at_s >= wanted.since_s]
    times += [] if wanted.before_s is None else [rows.at_s < wanted.before_s]
    callers = [] if wanted.tenant is None else [rows.tenant == wanted.tenant]
    callers += [] if wanted.key_id is None else [rows.key_id == wanted.key_id]
    first, last = _ids(connection, times)
    begin = max(after, first - 1)
    end = min(last, begin + SCANNED)
    scanned = select(AUDIT).where(rows.audit_id > begin, rows.audit_id <= end, *times, *callers)
    page = connection.execute(scanned.order_by(rows.audit_id).limit(limit)).all()
    if len(page) == limit:
        end = page[-1].audit_id
    found = tuple(StoredAuditRow(audit_id, AuditRow(*row)) for audit_id, *row in page)
    return StoredAuditPage(found, end if end < last else None)


def _ids(connection: Connection, times: Sequence[ColumnElement[bool]]) -> tuple[int, int]:
    """Return numbers between which all rows of these times are; (1, 0) if there are no such rows.

    If there are SCANNED or more, these are the first and the last number of the table: refused calls are stored later
    than their times, so the index of times can't show the bounds without being read whole.
    """
    rows = AUDIT.c
    if times:
        some = select(rows.audit_id).where(*times).order_by(rows.at_s).limit(SCANNED).subquery()
        ids = some.c.audit_id
        number, first, last = connection.execute(
            select(func.count(), func.min(ids), func.max(ids)).select_from(some)
        ).one()
        if number < SCANNED:
            return first or 1, last or 0
    # Two queries: SQLite reads the whole table if one asks for both.
    first, last = (connection.scalar(select(of(rows.audit_id))) for of in (func.min, func.max))
    return first or 1, last or 0
