"""Stores the registry's records in one database, with one transaction per decision.

Only this package accesses the database: ``database`` opens it, ``statements`` builds its SQL, ``migrations`` has the
tables and revisions. SQLite (embedded) and PostgreSQL give the same guarantees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from sqlalchemy import Column, ColumnElement, Connection, and_, delete, func, insert, or_, select, tuple_

from registry.accounting.totals import Sum, Total, total_of
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow
from registry.core.decision import Changes, Snapshot
from registry.core.records import Lease, Machine, Measurement, MeasurementKey, Request, Wrapper
from registry.errors import StoreUnavailable
from registry.store.audit_pages import read_page
from registry.store.database import converted_errors, open_database
from registry.store.migrations.tables import (
    API_KEYS,
    AUDIT,
    EVENTS,
    FORGOTTEN_REQUESTS,
    IDEMPOTENCY_KEYS,
    LEASES,
    MACHINES,
    MEASUREMENTS,
    REQUESTS,
    WINDOWS,
    WRAPPERS,
)
from registry.store.rows import (
    ALL_ROWS,
    APIKey,
    AuditFilter,
    AuditRow,
    EventRow,
    Forgotten,
    IdempotencyRow,
    StoredAuditPage,
    StoredEvent,
    WindowPlace,
)
from registry.store.statements import (
    DELETE_EMPTY_MEASUREMENT,
    INSERT_AUDIT,
    INSERT_EVENT,
    WAS_SERVED,
    cells_of,
    insert_once,
    put,
    read,
    remove,
    remove_some,
    requests_of_measurement,
)
from registry.wire.words import WindowKind

_SEQ = REQUESTS.c.measurement_id, REQUESTS.c.tenant, REQUESTS.c.seq


class Store:
    """The database of one registry, which is its only user while the store is open.

    Not thread-safe: only the registry actor's thread uses it. Every method blocks until the database answers.
    """

    def __init__(self, connection: Connection, owned: ExitStack) -> None:
        self._connection = connection
        self._owned = owned

    @classmethod
    def open(cls, url: str, *, lock_wait_s: float = 5.0) -> Store:
        """Lock the database for this process, create it if needed, and migrate its tables.

        ``url``: ``sqlite:////absolute/path.db`` (its directory is created) or ``postgresql+psycopg://…`` (directly or
        through a session pooler: the lock belongs to the session). ``lock_wait_s``: how long to wait for the lock of an
        earlier registry that is still ending, seconds ≥ 0.

        Raises:
            BadSettings: the URL can't be used, or a newer version of the registry has changed the tables.
            StoreUnavailable: another registry uses the database, or the database does not answer.
        """
        with ExitStack() as owned:
            connection = open_database(url, lock_wait_s, owned)
            return cls(connection, owned.pop_all())

    def load(self, *, ended: bool = True) -> Snapshot:
        """Return all committed records.

        With ``ended=False``: only unfinished measurements and requests, plus each such measurement's last request that
        was handed over. The rest is not read.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        rows, of_requests, of_measurements = REQUESTS.c, select(REQUESTS), select(MEASUREMENTS)
        if not ended:
            unfinished = rows.ended_s.is_(None)
            live = select(rows.measurement_id, rows.tenant).where(unfinished)
            last = (
                select(rows.measurement_id, rows.tenant, func.max(rows.seq).label("seq"))
                .where(WAS_SERVED, tuple_(rows.measurement_id, rows.tenant).in_(live))
                .group_by(rows.measurement_id, rows.tenant)
            )
            of_requests = of_requests.where(or_(unfinished, tuple_(*_SEQ).in_(last)))
            of_measurements = of_measurements.where(
                tuple_(MEASUREMENTS.c.measurement_id, MEASUREMENTS.c.tenant).in_(live)
            )
        with self._transaction() as connection:
            return Snapshot(
                machines=read(connection, Machine, select(MACHINES)),
                wrappers=read(connection, Wrapper, select(WRAPPERS)),
                measurements=read(connection, Measurement, of_measurements),
                requests=read(connection, Request, of_requests),
                leases=read(connection, Lease, select(LEASES)),
            )

    def next_seq(self) -> int:
        """Return a number above the ``seq`` of every stored request, at least 1.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        with self._transaction() as connection:
            return int(connection.scalar(select(func.max(REQUESTS.c.seq))) or 0) + 1

    def requests(self, request_ids: Iterable[str]) -> tuple[Request, ...]:
        """Return the requests with these ids; unknown ids are ignored.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        # Clients can send any text as an id, and PostgreSQL refuses some characters.
        ids = [request_id for request_id in request_ids if request_id.isprintable()]
        with self._transaction() as connection:
            return read(connection, Request, select(REQUESTS).where(REQUESTS.c.request_id.in_(ids)))

    def measurement(self, key: MeasurementKey) -> Measurement | None:
        """Return the measurement with this key, None if there is none.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        rows = MEASUREMENTS.c
        wanted = select(MEASUREMENTS).where(rows.tenant == key[0], rows.measurement_id == key[1])
        with self._transaction() as connection:
            found = read(connection, Measurement, wanted)
        return found[0] if found else None

    def requests_of(self, key: MeasurementKey, *, after_seq: int = 0, limit: int | None = None) -> tuple[Request, ...]:
        """Return the first ``limit`` (None: all) requests of a measurement with ``seq`` > ``after_seq``, in order.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        wanted = requests_of_measurement(key).where(REQUESTS.c.seq > after_seq).order_by(REQUESTS.c.seq).limit(limit)
        with self._transaction() as connection:
            return read(connection, Request, wanted)

    def last_served(self, key: MeasurementKey) -> Request | None:
        """Return the measurement's latest request that was handed over, None if none was.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        wanted = requests_of_measurement(key).where(WAS_SERVED).order_by(REQUESTS.c.seq.desc()).limit(1)
        with self._transaction() as connection:
            found = read(connection, Request, wanted)
        return found[0] if found else None

    def commit(
        self,
        changes: Changes,
        *,
        events: Sequence[EventRow] = (),
        idempotency: IdempotencyRow | None = None,
        audit: AuditRow | None = None,
    ) -> int | None:
        """Write everything in one transaction. When this returns, it survives a power failure.

        Returns:
            The number of the first event, None if there are no events.

        Raises:
            StoreUnavailable: nothing was written; or, if the connection was lost during the commit,
                possibly everything. Only a new ``open`` and ``load`` show which.
        """
        with self._transaction() as connection:
            put(connection, MACHINES, changes.machines)
            put(connection, WRAPPERS, changes.wrappers)
            put(connection, MEASUREMENTS, changes.measurements)
            put(connection, REQUESTS, changes.requests)
            # Order matters for the constraints: a lease must end before its wrapper gets a new one or is removed.
            remove(connection, LEASES, changes.ended_leases)
            remove(connection, WRAPPERS, changes.removed_wrappers)
            put(connection, LEASES, changes.leases)
            if idempotency is not None:
                connection.execute(insert(IDEMPOTENCY_KEYS), cells_of(idempotency))
            if audit is not None:
                connection.execute(INSERT_AUDIT, cells_of(audit))
            if not events:
                return None
            number = connection.execute(INSERT_EVENT, cells_of(events[0])).inserted_primary_key
            if len(events) > 1:
                connection.execute(INSERT_EVENT, [cells_of(event) for event in events[1:]])
            return None if number is None else int(number[0])

    def events(self, *, after: int = 0, limit: int = 1000, request_id: str | None = None) -> tuple[StoredEvent, ...]:
        """Return the oldest ``limit`` (> 0) events with ``event_id`` > ``after``, of one request or all, in order.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        wanted = select(EVENTS).where(EVENTS.c.event_id > after).order_by(EVENTS.c.event_id).limit(limit)
        if request_id is not None:
            wanted = wanted.where(EVENTS.c.request_id == request_id)
        with self._transaction() as connection:
            return tuple(StoredEvent(event_id, EventRow(*row)) for event_id, *row in connection.execute(wanted))

    def newest_event_s(self) -> float | None:
        """Return the UTC second of the newest event, None if there is none.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        with self._transaction() as connection:
            newest: float | None = connection.scalar(select(func.max(EVENTS.c.at_s)))
        return newest

    def idempotent_request_ids(self, tenant: str, key: str) -> tuple[str, tuple[str, ...]] | None:
        """Return (body_sha256, request_ids) of this tenant's first use of this key, None if unused.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        rows = IDEMPOTENCY_KEYS.c
        wanted = select(rows.body_sha256, rows.request_ids).where(rows.tenant == tenant, rows.key == key)
        with self._transaction() as connection:
            row = connection.execute(wanted).one_or_none()
        return None if row is None else (row.body_sha256, row.request_ids)

    def forget_idempotency_key(self, tenant: str, key: str) -> None:
        """Remove a tenant's key, so that it can be used again. Idempotent.

        Raises:
            StoreUnavailable: as for ``commit``.
        """
        rows = IDEMPOTENCY_KEYS.c
        with self._transaction() as connection:
            connection.execute(delete(IDEMPOTENCY_KEYS).where(rows.tenant == tenant, rows.key == key))

    def api_keys(self) -> tuple[APIKey, ...]:
        """Return all API keys, also revoked and expired ones.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        with self._transaction() as connection:
            return read(connection, APIKey, select(API_KEYS).order_by(API_KEYS.c.created_s, API_KEYS.c.key_id))

    def put_api_keys(self, keys: Sequence[APIKey], audit: AuditRow | None = None) -> None:
        """Store new or changed API keys, and the call that changed them, in one transaction.

        Raises:
            StoreUnavailable: as for ``commit``.
        """
        with self._transaction() as connection:
            put(connection, API_KEYS, keys)
            if audit is not None:
                connection.execute(INSERT_AUDIT, cells_of(audit))

    def add_audit(self, rows: Sequence[AuditRow]) -> None:
        """Add rows to the audit, in one transaction.

        Raises:
            StoreUnavailable: as for ``commit``.
        """
        if rows:
            with self._transaction() as connection:
                connection.execute(INSERT_AUDIT, [cells_of(row) for row in rows])

    def audit(self, wanted: AuditFilter = ALL_ROWS, *, after: int = 0, limit: int = 1000) -> StoredAuditPage:
        """Return the oldest ``limit`` (> 0) rows of the audit that are wanted, with ``audit_id`` > ``after``, in order.

        A page may have fewer, or none, and still be followed by others: it looks at a bounded number of rows.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        with self._transaction() as connection:
            return read_page(connection, wanted, after, limit)

    def keep_windows(self, rows: Sequence[KeptWindow]) -> frozenset[str]:
        """Store energy windows in one transaction. Windows already stored stay unchanged.

        Returns:
            The ids of the new windows.

        Raises:
            StoreUnavailable: as for ``commit``.
        """
        if not rows:
            return frozenset()
        cells = [cells_of(row.window) | {"machine_id": row.machine_id, "tenant": row.tenant} for row in rows]
        for row in cells:
            del row["number"]  # only for the wrapper's log; ``detail`` contains it
        with self._transaction() as connection:
            return frozenset(connection.scalars(insert_once(WINDOWS, connection.dialect.name), cells))

    def windows(
        self,
        key: MeasurementKey,
        *,
        request_id: str | None = None,
        after: WindowPlace | None = None,
        limit: int | None = None,
    ) -> tuple[KeptWindow, ...]:
        """Return the first ``limit`` (None: all) energy windows of a measurement, sorted by start time.

        Optionally only those of one request, and only those after ``after``.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        order = WINDOWS.c.begun_s, WINDOWS.c.window_id
        of_measurement = and_(WINDOWS.c.tenant == key[0], WINDOWS.c.measurement_id == key[1])
        wanted = select(WINDOWS).where(of_measurement).order_by(*order).limit(limit)
        if request_id is not None:
            wanted = wanted.where(WINDOWS.c.request_id == request_id)
        if after is not None:
            wanted = wanted.where(tuple_(*order) > tuple(after))
        with self._transaction() as connection:
            rows = connection.execute(wanted).all()
        return tuple(KeptWindow(EnergyWindow(*row[:-2]), *row[-2:]) for row in rows)

    def costs_of_requests(self, request_ids: Sequence[str]) -> dict[str, dict[WindowKind, Total]]:
        """Return the cost of the windows of each of these requests, by kind; kinds without windows are left out.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        costs: dict[str, dict[WindowKind, Total]] = {request_id: {} for request_id in request_ids}
        for request_id, kind, part in self._costs(WINDOWS.c.request_id, WINDOWS.c.request_id.in_(request_ids)):
            costs[request_id][kind] = total_of((costs[request_id].get(kind, Total()), part))
        return costs

    def costs_of_tenant(self, tenant: str, kinds: Sequence[WindowKind], since_s: float) -> dict[WindowKind, Total]:
        """Return the cost, by kind, of a tenant's windows of these kinds that ended at ``since_s`` (UTC s) or later.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        rows = WINDOWS.c
        which = and_(rows.tenant == tenant, rows.kind.in_(kinds), rows.ended_s >= since_s)
        costs: dict[WindowKind, Total] = {}
        for _, kind, part in self._costs(rows.tenant, which):
            costs[kind] = total_of((costs.get(kind, Total()), part))
        return costs

    def _costs(self, by: Column[str], which: ColumnElement[bool]) -> Iterator[tuple[str, WindowKind, Total]]:
        """Yield the sums of the windows that match ``which``, grouped by a column, kind and label."""
        rows = WINDOWS.c
        figures = [each for of in (rows.total_j, rows.o_g, rows.m_g) for each in (func.count(of), func.sum(of))]
        groups = by, rows.kind, rows.label
        wanted = select(*groups, func.count(), *figures).where(which).group_by(*groups)
        with self._transaction() as connection:
            found = connection.execute(wanted).all()
        for whose, kind, label, n, known_j, j, known_o, o, known_m, m in found:
            sums = Sum(n, known_j, j or 0.0), Sum(n, known_o, o or 0.0), Sum(n, known_m, m or 0.0)
            yield whose, kind, Total(*sums, label)

    # D14: what has ended is forgotten, its ids are not
    def forget(self, *, ended_before_s: float, limit: int) -> Forgotten:
        """Delete part of what ended before this UTC second: at most ``limit`` (> 0) rows of each kind.

        Energy windows, events, idempotency keys and the audit are deleted first, then requests; each measurement is
        deleted with its last request. The requests' ids are kept for ``was_forgotten``.

        Raises:
            StoreUnavailable: as for ``commit``: nothing of this part was deleted, or all of it.
        """
        requests = REQUESTS.c
        with self._transaction() as connection:
            removed = [
                remove_some(connection, table, at_s < ended_before_s, limit)
                for table, at_s in (
                    (WINDOWS, WINDOWS.c.ended_s),
                    (EVENTS, EVENTS.c.at_s),
                    (IDEMPOTENCY_KEYS, IDEMPOTENCY_KEYS.c.created_s),
                    (AUDIT, AUDIT.c.at_s),
                )
            ]
            if limit in removed:
                return Forgotten((), more=True)
            wanted = select(requests.request_id, requests.measurement_id, requests.tenant)
            ended = connection.execute(wanted.where(requests.ended_s < ended_before_s).limit(limit)).all()
            if ended:
                ids = [row.request_id for row in ended]
                connection.execute(insert(FORGOTTEN_REQUESTS), [{"request_id": request_id} for request_id in ids])
                remove(connection, REQUESTS, ids)
                keys = {(row.measurement_id, row.tenant) for row in ended}
                connection.execute(DELETE_EMPTY_MEASUREMENT, [{"id": number, "of": tenant} for number, tenant in keys])
            return Forgotten(tuple(row.request_id for row in ended), more=len(ended) == limit)

    def was_forgotten(self, request_id: str) -> bool:
        """True when ``forget`` has deleted a request with this id.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        if not request_id.isprintable():
            return False  # clients can send any text, and PostgreSQL refuses some characters
        wanted = select(FORGOTTEN_REQUESTS).where(FORGOTTEN_REQUESTS.c.request_id == request_id)
        with self._transaction() as connection:
            return connection.execute(wanted).first() is not None

    def close(self) -> None:
        """Close and unlock the database; SQLite's log is merged into the database file. Idempotent.

        Raises:
            StoreUnavailable: the database does not answer; it is unlocked all the same.
        """
        with converted_errors():
            self._owned.close()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        # SQLAlchemy would reconnect. The lock was lost with the old connection, so another registry may hold it now.
        if self._connection.invalidated:
            raise StoreUnavailable("the connection was lost, and another registry may use the database by now")
        with converted_errors(), self._connection.begin():
            yield self._connection
