"""Opens the database: locks it for this process, sets it up for durable commits, and migrates its tables."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from registry.errors import BadSettings, StoreUnavailable

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


def open_database(url: str, lock_wait_s: float, owned: ExitStack) -> Connection:
    """Lock the database for this process, create it if needed, and migrate its tables. Return the only connection.

    The connection and the lock are added to ``owned``, which closes them. Blocks up to ``lock_wait_s``
    seconds for the lock.

    Raises:
        BadSettings: the URL can't be used, or a newer version of the registry has changed the tables.
        StoreUnavailable: another registry uses the database, or the database does not answer.
    """
    parsed = parse_url(url)
    with converted_errors():
        open_locked = _open_sqlite if parsed.get_backend_name() == "sqlite" else _open_postgresql
        connection = open_locked(parsed, lock_wait_s, owned)
        _upgrade(connection)
        return connection


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
    owned.callback(os.close, lock)  # if the process is killed, the kernel closes it

    def flock() -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    if not _retry(flock, lock_wait_s):
        raise StoreUnavailable(f"{path} is in use by process {os.pread(lock, 20, 0).decode() or 'unknown'}")
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it has what clients sent


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
        raise BadSettings("database URL", "no schema of its search_path exists")
    if encoding != "UTF8":
        raise BadSettings("database URL", f"the database has the encoding {encoding}; create one with ENCODING 'UTF8'")
    key = int.from_bytes(hashlib.sha256(f"greenprompt registry {schema}".encode()).digest()[:8], signed=True)

    def lock() -> bool:
        with connection.begin():
            return bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}))

    if not _retry(lock, lock_wait_s):
        with connection.begin():
            owner = connection.execute(_PG_OWNER, {"key": key}).first()
        holder = f"process {owner.pid} of the server, for {owner.client}" if owner else "a registry that just ended"
        raise StoreUnavailable(f"schema {schema} of the database is in use by {holder}")
    return connection


def _retry(attempt: Callable[[], bool], wait_s: float) -> bool:
    """Repeat an attempt until it succeeds. Return False if it still fails after ``wait_s`` seconds. Blocks."""
    give_up = time.monotonic() + wait_s
    while not attempt():
        if time.monotonic() >= give_up:
            return False
        time.sleep(0.05)
    return True


def migration_config(connection: Connection) -> Config:
    """Return Alembic's configuration for our revisions and this open connection.

    The caller begins and ends the transaction.
    """
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


@contextmanager
def converted_errors() -> Iterator[None]:
    """Convert the driver's errors to StoreUnavailable, with the first line of the driver's text.

    Later lines and the cause are dropped, because PostgreSQL quotes the row there, which has what a client sent.
    """
    try:
        yield
    except (SQLAlchemyError, UnicodeError, OverflowError) as error:  # SQLAlchemy does not wrap the last two
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise StoreUnavailable(f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}") from None
