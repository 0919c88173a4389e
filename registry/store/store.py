"""Stores the registry's records: one database, one owner, one transaction per decision.

The only file that accesses the database; tables and revisions are in ``registry/store/migrations``. SQLite (embedded)
and PostgreSQL give the same guarantees.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    URL,
    Column,
    ColumnElement,
    Connection,
    Delete,
    Insert,
    Select,
    Table,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    make_url,
    or_,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.dml import ReturningInsert

from registry.accounting.totals import Sum, Total, total_of
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow
from registry.core.decision import Changes, Snapshot
from registry.core.records import Lease, Machine, Measurement, MeasurementKey, Request, Wrapper
from registry.errors import BadSettings, StoreUnavailable
from registry.store.migrations.tables import (
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
from registry.wire.words import WindowKind

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    R = TypeVar("R", bound=DataclassInstance)

SQLITE_BUSY_S = 5
"""How long a commit waits for another program (a backup, a shell) that holds SQLite's write lock, seconds."""

# Detect a lost server within seconds (libpq's default: hours). The session settings let the server detect a lost
# registry and free the lock. The URL's query takes precedence over _PG_CONNECT.
_PG_CONNECT: Mapping[str, Any] = {
    "application_name": "greenprompt-registry",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
_PG_SESSION = (
    "synchronous_commit = on",
    "statement_timeout = '60s'",
    "tcp_keepalives_idle = 10",
    "tcp_keepalives_interval = 5",
    "tcp_keepalives_count = 3",
)
# The lock belongs to this session, which may be idle for days. Servers before 14 don't have this setting.
_PG_IDLE_LIMIT = text("SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout'")
_PG_OWNER = text(
    "SELECT pid, coalesce(host(client_addr), 'a local client') AS client "
    "FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND objsubid = 1 AND granted "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND (classid::bigint << 32) | objid::bigint = :key"
)

_INSERT_EVENT = insert(EVENTS)
_SEQ = REQUESTS.c.measurement_id, REQUESTS.c.tenant, REQUESTS.c.seq
_WAS_SERVED = and_(REQUESTS.c.deployed_s.is_not(None), REQUESTS.c.machine_id.is_not(None))

# --- rows without a record in registry.core -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EventRow:
    """A row of the event log, written in one transaction with the changes that the event caused.

    ``kind``: the event's class name. ``at_s``: UTC seconds. ``cause_id``: number of the event that led to this one.
    ``detail``: a JSON object without secrets.
    """

    kind: str
    at_s: float
    wrapper_id: str | None = None
    request_id: str | None = None
    measurement_id: int | None = None
    cause_id: str | None = None
    detail: str = "{}"


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An EventRow and its number: ``event_id`` > 0 grows with every event and is never used twice."""

    event_id: int
    event: EventRow


@dataclass(frozen=True, slots=True)
class IdempotencyRow:
    """The answer to a tenant's Idempotency-Key: ``request_ids``, in the order of the body's llms.

    ``key``: at most 1024 characters (PostgreSQL refuses index entries over 2.7 kB). ``body_sha256``: hexadecimal.
    """

    tenant: str
    key: str
    body_sha256: str
    request_ids: tuple[str, ...]
    created_s: float


class Forgotten(NamedTuple):
    """Result of ``Store.forget``: the ids of deleted requests, and whether there is more to delete."""

    request_ids: tuple[str, ...]
    more: bool


class WindowPlace(NamedTuple):
    """Sort key of the energy windows of a measurement: start time (UTC s), then id."""

    begun_s: float
    window_id: str


# --- the store ------------------------------------------------------------------------------------------------


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
        parsed = parse_url(url)
        with ExitStack() as owned, _told_once():
            opened = _open_sqlite if parsed.get_backend_name() == "sqlite" else _open_postgresql
            connection = opened(parsed, lock_wait_s, owned)
            _upgrade(connection)
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
                .where(_WAS_SERVED, tuple_(rows.measurement_id, rows.tenant).in_(live))
                .group_by(rows.measurement_id, rows.tenant)
            )
            of_requests = of_requests.where(or_(unfinished, tuple_(*_SEQ).in_(last)))
            of_measurements = of_measurements.where(
                tuple_(MEASUREMENTS.c.measurement_id, MEASUREMENTS.c.tenant).in_(live)
            )
        with self._transaction() as connection:
            return Snapshot(
                machines=_read(connection, Machine, select(MACHINES)),
                wrappers=_read(connection, Wrapper, select(WRAPPERS)),
                measurements=_read(connection, Measurement, of_measurements),
                requests=_read(connection, Request, of_requests),
                leases=_read(connection, Lease, select(LEASES)),
            )

    def next_seq(self) -> int:
        """Return a number above the ``seq`` of every request, at least 1.

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
            return _read(connection, Request, select(REQUESTS).where(REQUESTS.c.request_id.in_(ids)))

    def measurement(self, key: MeasurementKey) -> Measurement | None:
        """Return the measurement with this key, None if there is none.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        rows = MEASUREMENTS.c
        wanted = select(MEASUREMENTS).where(rows.tenant == key[0], rows.measurement_id == key[1])
        with self._transaction() as connection:
            found = _read(connection, Measurement, wanted)
        return found[0] if found else None

    def requests_of(self, key: MeasurementKey, *, after_seq: int = 0, limit: int | None = None) -> tuple[Request, ...]:
        """Return the first ``limit`` (None: all) requests of a measurement with ``seq`` > ``after_seq``, in order.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        wanted = _of_measurement(key).where(REQUESTS.c.seq > after_seq).order_by(REQUESTS.c.seq).limit(limit)
        with self._transaction() as connection:
            return _read(connection, Request, wanted)

    def last_served(self, key: MeasurementKey) -> Request | None:
        """Return the measurement's latest request that was handed over, None if none was.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        wanted = _of_measurement(key).where(_WAS_SERVED).order_by(REQUESTS.c.seq.desc()).limit(1)
        with self._transaction() as connection:
            found = _read(connection, Request, wanted)
        return found[0] if found else None

    def commit(
        self, changes: Changes, *, events: Sequence[EventRow] = (), idempotency: IdempotencyRow | None = None
    ) -> int | None:
        """Write everything in one transaction. When this returns, it survives a power failure.

        Returns:
            The number of the first event, None if there are no events.

        Raises:
            StoreUnavailable: nothing was written, or everything (connection lost while committing): only a new ``open``
                and ``load`` show which.
        """
        with self._transaction() as connection:
            _put(connection, MACHINES, changes.machines)
            _put(connection, WRAPPERS, changes.wrappers)
            _put(connection, MEASUREMENTS, changes.measurements)
            _put(connection, REQUESTS, changes.requests)
            # Order matters for the constraints: end leases before a new one on the same wrapper, or its removal.
            _remove(connection, LEASES, changes.ended_leases)
            _remove(connection, WRAPPERS, changes.removed_wrappers)
            _put(connection, LEASES, changes.leases)
            if idempotency is not None:
                connection.execute(insert(IDEMPOTENCY_KEYS), _cells(idempotency))
            if not events:
                return None
            number = connection.execute(_INSERT_EVENT, _cells(events[0])).inserted_primary_key
            if len(events) > 1:
                connection.execute(_INSERT_EVENT, [_cells(event) for event in events[1:]])
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

    def keep_windows(self, rows: Sequence[KeptWindow]) -> frozenset[str]:
        """Store energy windows in one transaction. Windows already stored stay unchanged.

        Returns:
            The ids of the new windows.

        Raises:
            StoreUnavailable: as for ``commit``.
        """
        if not rows:
            return frozenset()
        cells = [_cells(row.window) | {"machine_id": row.machine_id, "tenant": row.tenant} for row in rows]
        for row in cells:
            del row["number"]  # only for the wrapper's log; ``detail`` contains it
        with self._transaction() as connection:
            return frozenset(connection.scalars(_insert_once(WINDOWS, connection.dialect.name), cells))

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

        Energy windows, events and idempotency keys are deleted first, then requests (whose ids stay for
        ``was_forgotten``), and measurements with their last request.

        Raises:
            StoreUnavailable: as for ``commit``; nothing of this part was deleted, or (connection lost) all of it.
        """
        requests = REQUESTS.c
        with self._transaction() as connection:
            removed = [
                _remove_some(connection, table, at_s < ended_before_s, limit)
                for table, at_s in (
                    (WINDOWS, WINDOWS.c.ended_s),
                    (EVENTS, EVENTS.c.at_s),
                    (IDEMPOTENCY_KEYS, IDEMPOTENCY_KEYS.c.created_s),
                )
            ]
            if limit in removed:
                return Forgotten((), more=True)
            wanted = select(requests.request_id, requests.measurement_id, requests.tenant)
            ended = connection.execute(wanted.where(requests.ended_s < ended_before_s).limit(limit)).all()
            if ended:
                ids = [row.request_id for row in ended]
                connection.execute(insert(FORGOTTEN_REQUESTS), [{"request_id": request_id} for request_id in ids])
                _remove(connection, REQUESTS, ids)
                keys = {(row.measurement_id, row.tenant) for row in ended}
                connection.execute(_DELETE_EMPTY, [{"id": number, "of": tenant} for number, tenant in keys])
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
        with _told_once():
            self._owned.close()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        # SQLAlchemy would reconnect, but the lock was lost with the old connection.
        if self._connection.invalidated:
            raise StoreUnavailable("the connection was lost, and another registry may have the database by now")
        with _told_once(), self._connection.begin():
            yield self._connection


def _put(connection: Connection, table: Table, records: Sequence[DataclassInstance]) -> None:
    if records:
        connection.execute(_upsert(table, connection.dialect.name), [_cells(record) for record in records])


@cache  # building a statement takes longer than running it
def _upsert(table: Table, dialect: str) -> Insert:
    new = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    columns = {column.name: new.excluded[column.name] for column in table.columns if not column.primary_key}
    return new.on_conflict_do_update(index_elements=list(table.primary_key), set_=columns)


@cache
def _insert_once(table: Table, dialect: str) -> ReturningInsert[Any]:
    new = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    (key,) = table.primary_key
    return new.on_conflict_do_nothing(index_elements=[key]).returning(key)


def _cells(record: DataclassInstance) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _read(connection: Connection, record: type[R], rows: Select[Any]) -> tuple[R, ...]:
    return tuple(starmap(record, connection.execute(rows)))


def _of_measurement(key: MeasurementKey) -> Select[Any]:
    return select(REQUESTS).where(REQUESTS.c.tenant == key[0], REQUESTS.c.measurement_id == key[1])


def _remove(connection: Connection, table: Table, ids: Sequence[str]) -> None:
    if ids:
        connection.execute(_delete(table), [{"id": row_id} for row_id in ids])


def _remove_some(connection: Connection, table: Table, which: ColumnElement[bool], limit: int) -> int:
    """Delete at most ``limit`` matching rows of a table. Return their number."""
    key = list(table.primary_key)
    some = select(*key).where(which).limit(limit)
    return connection.execute(delete(table).where(tuple_(*key).in_(some))).rowcount


_DELETE_EMPTY = delete(MEASUREMENTS).where(
    MEASUREMENTS.c.measurement_id == bindparam("id"),
    MEASUREMENTS.c.tenant == bindparam("of"),
    ~exists().where(
        REQUESTS.c.measurement_id == MEASUREMENTS.c.measurement_id, REQUESTS.c.tenant == MEASUREMENTS.c.tenant
    ),
)


@cache
def _delete(table: Table) -> Delete:
    (key,) = table.primary_key
    return delete(table).where(key == bindparam("id"))


@contextmanager
def _told_once() -> Iterator[None]:
    """Convert the driver's errors to StoreUnavailable, with the first line of the driver's text.

    Later lines and the cause are dropped: PostgreSQL quotes the row there, with a lease's token in it.
    """
    try:
        yield
    except (SQLAlchemyError, UnicodeError, OverflowError) as error:  # SQLAlchemy does not wrap the last two
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise StoreUnavailable(f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}") from None


# --- opening --------------------------------------------------------------------------------------------------


def parse_url(url: str) -> URL:
    """Parse the URL of a database. Raises BadSettings, which does not quote it, if it can't be used."""
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        # The parser's text quotes what it took for the port, which may be part of a password.
        raise BadSettings(
            "database URL", "can't be read; write special characters as %40 (@), %2F (/), %3A (:)"
        ) from None
    if parsed.drivername in {"sqlite", "sqlite+pysqlite"}:
        if not parsed.database or not Path(parsed.database).is_absolute():
            raise BadSettings(
                "database URL", "SQLite needs an absolute path: sqlite:////var/lib/greenprompt/registry.db"
            )
        return parsed
    if parsed.drivername in {"postgresql", "postgresql+psycopg"}:
        return parsed.set(drivername="postgresql+psycopg")
    raise BadSettings("database URL", f"{parsed.drivername!r} is neither sqlite nor postgresql+psycopg")


def _open_sqlite(url: URL, lock_wait_s: float, owned: ExitStack) -> Connection:
    path = Path(str(url.database))
    try:
        _own_file(path, lock_wait_s, owned)
    except OSError as error:
        raise StoreUnavailable(f"{path}: {error.strerror}") from error
    connection = owned.enter_context(create_engine(url, poolclass=NullPool, hide_parameters=True).connect())
    # The driver begins transactions by itself for INSERT etc. but not for CREATE TABLE, so all are begun here.
    driver: Any = connection.connection.driver_connection
    driver.isolation_level = None
    for pragma in (f"busy_timeout = {SQLITE_BUSY_S * 1000}", "synchronous = FULL", "foreign_keys = ON"):
        connection.exec_driver_sql(f"PRAGMA {pragma}")
    if connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar() != "wal":
        raise BadSettings("database URL", f"{path} is on a file system that can't share memory; use a local disk")
    connection.commit()
    event.listen(connection, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return connection


# D34: the registry that can write is the one that acts
def _own_file(path: Path, lock_wait_s: float, owned: ExitStack) -> None:
    """Create the database file, and lock a file beside it for the life of the process."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    owned.callback(os.close, lock)  # the kernel does it too, however the process dies

    def flock() -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    if not _retried(flock, lock_wait_s):
        raise StoreUnavailable(f"{path} is in use by process {os.pread(lock, 20, 0).decode() or 'unknown'}")
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # other users must not read the leases' tokens


def _open_postgresql(url: URL, lock_wait_s: float, owned: ExitStack) -> Connection:
    defaults = {name: value for name, value in _PG_CONNECT.items() if name not in url.query}
    try:
        engine = create_engine(url, poolclass=NullPool, hide_parameters=True, connect_args=defaults)
        connection = owned.enter_context(engine.connect())
    except ModuleNotFoundError as error:
        raise BadSettings("database URL", "PostgreSQL needs psycopg: install the extra [postgres]") from error
    except ProgrammingError as error:
        raise BadSettings("database URL", str(error.orig)) from error
    with connection.begin():
        for setting in _PG_SESSION:
            connection.execute(text(f"SET {setting}"))
        connection.execute(_PG_IDLE_LIMIT)
        encoding = connection.scalar(text("SHOW server_encoding"))
        schema = connection.scalar(text("SELECT current_schema()"))
    if schema is None:
        raise BadSettings("database URL", "no schema of its search_path is there")
    if encoding != "UTF8":
        raise BadSettings("database URL", f"the database keeps {encoding}; make one with ENCODING 'UTF8'")
    key = int.from_bytes(hashlib.sha256(f"greenprompt registry {schema}".encode()).digest()[:8], signed=True)

    # D34: the registry that can write is the one that acts
    def lock() -> bool:
        with connection.begin():
            return bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}))

    if not _retried(lock, lock_wait_s):
        with connection.begin():
            owner = connection.execute(_PG_OWNER, {"key": key}).first()
        holder = f"process {owner.pid} of the server, for {owner.client}" if owner else "a registry that just ended"
        raise StoreUnavailable(f"schema {schema} of the database is in use by {holder}")
    return connection


def _retried(attempt: Callable[[], bool], wait_s: float) -> bool:
    """Repeat an attempt until it succeeds. Return False if it still fails after ``wait_s`` seconds. Blocks."""
    give_up = time.monotonic() + wait_s
    while not attempt():
        if time.monotonic() >= give_up:
            return False
        time.sleep(0.05)
    return True


def migration_config(connection: Connection) -> Config:
    """Return Alembic's configuration for our revisions and an open connection; the caller owns the transaction."""
    config = Config()
    config.set_main_option("script_location", str(resources.files("registry.store") / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection) -> None:
    try:
        with connection.begin():
            command.upgrade(migration_config(connection), "head")
    except CommandError as error:
        raise BadSettings("database", f"was last used by another version of the registry ({error})") from error
