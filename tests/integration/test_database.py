"""The database of the store, of every kind: its tables, its version, how it is opened and closed."""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import NullPool, create_engine, text

from registry.errors import BadSettings, StoreUnavailable
from registry.store.migrations import tables
from registry.store.rows import EventRow
from registry.store.store import Store
from tests.support.stored_records import (
    SMALL,
    changes,
)


def test_the_revisions_make_the_tables_that_the_code_knows(store: Store, database_url: str):
    """Alembic finds nothing to do between a database that all revisions made and the tables in the code."""
    store.close()
    with create_engine(database_url, poolclass=NullPool).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.METADATA) == []


def test_a_database_of_a_newer_version_is_refused(store: Store, database_url: str):
    """Tables that this version doesn't know are a matter of the installation, not of waiting."""
    store.close()
    with create_engine(database_url, poolclass=NullPool).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(BadSettings, match="9999"):
        Store.open(database_url)


def test_opening_leaves_logging_alone(database_url: str):
    """Alembic's usual environment configures logging; ours does not."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("alembic").level, logging.root.manager.disable)
    named = logging.getLogger("registry.somebody")
    Store.open(database_url).close()
    assert before == (root.level, root.handlers, logging.getLogger("alembic").level, logging.root.manager.disable)
    assert not named.disabled


def test_a_commit_waits_for_the_disk(store: Store):
    """The settings under which a committed transaction survives a power cut are in force."""
    with store._connection.begin():
        ask = store._connection.exec_driver_sql
        if store._connection.dialect.name == "sqlite":
            assert ask("PRAGMA journal_mode").scalar() == "wal"
            assert ask("PRAGMA synchronous").scalar() == 2  # FULL
            assert ask("PRAGMA foreign_keys").scalar() == 1
        else:
            assert ask("SHOW synchronous_commit").scalar() == "on"


def test_closing_leaves_one_file_and_the_lock(sqlite_url: str, tmp_path: Path):
    """A closed SQLite database is one file to copy, which only its owner can read. It may be closed twice."""
    store = Store.open(sqlite_url)
    store.commit(changes(SMALL), events=(EventRow("Something", 1.0),))
    store.close()
    store.close()
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
    assert files == {"registry.db": 0o600, "registry.db.lock": 0o600}


@pytest.mark.parametrize("use", [Store.load, Store.events, lambda store: store.commit(changes(SMALL))])
def test_a_closed_store_says_so(store: Store, use: Any):
    """Using a store after closing it fails, and opens nothing behind the owner's back."""
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        use(store)
