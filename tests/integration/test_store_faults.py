"""What the store promises when processes are killed, connections break, disks fill up and URLs are wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.pool import NullPool

from registry.core.decision import Changes
from registry.core.records import LLMSpec, Machine, Measurement, Request
from registry.errors import BadSettings, StoreUnavailable
from registry.store.rows import EventRow
from registry.store.store import Store

SECRET = "hunter2-s3cret"

COMMITTER = """
import itertools, sys
from registry.core.decision import Changes
from registry.core.records import LLMSpec, Measurement, Request
from registry.store.rows import EventRow
from registry.store.store import Store

store = Store.open(sys.argv[1])
for n in itertools.count():
    request = Request(f"r-{n}", 7, n, LLMSpec("m", "text-generation"), "{}")
    both = Changes(measurements=(Measurement(7, 0),), requests=(request,))
    store.commit(both, events=(EventRow("E", 1.0, request_id=request.request_id),))
    print(n, flush=True)
"""

HOLDER = """
import sys
from registry.store.store import Store

store = Store.open(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


@contextmanager
def process(code: str, url: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs ``code`` on the database; killed at the end, if it still lives."""
    command = [sys.executable, "-c", code, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def machine(number: int) -> Changes:
    return Changes(machines=(Machine(f"m-{number}", "node" * 200, "10.0.0.1"),))


# --- kill -9 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acknowledged", [1, 10, 60])
def test_what_was_acknowledged_survives_a_kill(database_url: str, acknowledged: int):
    """Kill -9 in the middle of commits loses none that returned, and leaves none by half."""
    with process(COMMITTER, database_url) as committer:
        assert committer.stdout is not None
        for _ in range(acknowledged):
            assert committer.stdout.readline()
        committer.send_signal(signal.SIGKILL)
        last = acknowledged + len(committer.stdout.readlines())
        assert committer.wait() == -signal.SIGKILL

    store = Store.open(database_url)
    requests = {request.request_id for request in store.load().requests}
    events = [stored.event.request_id for stored in store.events(limit=100_000)]
    store.close()
    assert events in ([f"r-{n}" for n in range(last)], [f"r-{n}" for n in range(last + 1)])
    assert requests == set(events)


# --- one owner ------------------------------------------------------------------------------------------------


def test_an_open_database_is_refused_to_others(store: Store, database_url: str):
    """While one registry has the database no other one gets it, and it is told who has it."""
    holder = os.getpid()
    if store._connection.dialect.name != "sqlite":
        with store._connection.begin():
            holder = store._connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    with pytest.raises(StoreUnavailable, match=rf"in use by process {holder}\b"):
        Store.open(database_url, lock_wait_s=0.0)
    store.commit(machine(1))


def test_a_refused_open_leaves_no_trace(store: Store, database_url: str):
    """Being refused does not take the database from its owner, nor from the next one."""
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="in use"):
            Store.open(database_url, lock_wait_s=0.0)
    store.commit(machine(1))
    store.close()
    again = Store.open(database_url, lock_wait_s=0.0)
    assert len(again.load().machines) == 1
    again.close()


def test_the_successor_of_a_killed_registry_waits_for_its_end(database_url: str, monkeypatch: pytest.MonkeyPatch):
    """A restarted registry gets the database as soon as its predecessor is dead, without anybody cleaning up."""
    pause: Callable[[float], None] = time.sleep
    with process(HOLDER, database_url) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        waits: list[float] = []

        def kill_while_waiting(seconds: float) -> None:
            if not waits:
                holder.kill()
                holder.wait()
            waits.append(seconds)
            pause(seconds)

        monkeypatch.setattr("registry.store.database.time.sleep", kill_while_waiting)
        store = Store.open(database_url)
        store.commit(machine(1))
        store.close()
        assert waits


def test_schemas_of_one_server_are_separate(postgres: Connection, postgres_url: str):
    """Two registries can share a PostgreSQL database when each has a schema of its own."""
    other = make_url(postgres_url).update_query_dict({"options": "-csearch_path=test_other"})
    postgres.execute(text("CREATE SCHEMA test_other"))
    try:
        first, second = Store.open(postgres_url), Store.open(other.render_as_string(hide_password=False))
        first.commit(machine(1))
        assert second.load().machines == ()
        first.close()
        second.close()
    finally:
        postgres.execute(text("DROP SCHEMA test_other CASCADE"))


def test_an_idle_session_is_kept(postgres_url: str):
    """A server that ends idle sessions does not end the registry's, with its lock: that one has no limit."""
    url = make_url(postgres_url)
    options = f"{url.query['options']} -cidle_session_timeout=3600000"
    limited = url.update_query_dict({"options": options}).render_as_string(hide_password=False)
    with create_engine(limited, poolclass=NullPool).connect() as plain:
        assert plain.scalar(text("SHOW idle_session_timeout")) == "1h"
    store = Store.open(limited)
    assert store._connection.scalar(text("SHOW idle_session_timeout")) == "0"
    store.close()


def test_a_lost_connection_is_not_replaced(postgres: Connection, postgres_url: str):
    """The lock goes with the connection, so nothing is written over a new one: another registry may own it all."""
    store = Store.open(postgres_url)
    store.commit(machine(1))
    with store._connection.begin():
        backend = store._connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    postgres.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": backend})

    with pytest.raises(StoreUnavailable):
        store.commit(machine(2))
    with pytest.raises(StoreUnavailable, match="connection was lost"):
        store.commit(machine(3))
    with pytest.raises(StoreUnavailable, match="connection was lost"):
        store.load()
    successor = Store.open(postgres_url)
    assert [it.machine_id for it in successor.load().machines] == ["m-1"]
    successor.close()
    store.close()


# --- disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk() -> Iterator[None]:
    """Every SQLite database that is opened now is full at 40 pages (160 KiB)."""

    def fill(connection: object, _: object) -> None:
        connection.execute("PRAGMA max_page_count = 40")  # type: ignore[attr-defined]

    event.listen(Engine, "connect", fill)
    yield
    event.remove(Engine, "connect", fill)


def test_a_full_disk_loses_nothing_that_was_committed(sqlite_url: str, tiny_disk: None):
    """A commit that no longer fits fails whole; everything before it can be read, then and after opening again."""
    store = Store.open(sqlite_url)
    written = 0
    with pytest.raises(StoreUnavailable, match="full"):  # noqa: PT012 - which commit is the first to fail is its matter
        for _ in range(1000):
            store.commit(machine(written), events=(EventRow("E", float(written)),))
            written += 1
    assert written > 3

    expected = {f"m-{n}" for n in range(written)}
    assert {it.machine_id for it in store.load().machines} == expected
    assert len(store.events()) == written
    store.close()
    again = Store.open(sqlite_url)
    assert {it.machine_id for it in again.load().machines} == expected
    again.close()


def test_a_path_that_can_hold_no_database_is_told(tmp_path: Path):
    """Something else in the database's place, or in the way to it, is named."""
    (tmp_path / "file").write_text("this is no database, and long enough to be sure of it " * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        Store.open(f"sqlite:///{tmp_path}/file")
    with pytest.raises(StoreUnavailable, match=r"file/registry\.db: File exists"):
        Store.open(f"sqlite:///{tmp_path}/file/registry.db")


# --- URLs and servers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "registry.db",
        "sqlite://",
        "sqlite:///relative.db",
        "sqlite:///:memory:",
        f"mysql://u:{SECRET}@127.0.0.1/test",
        f"postgresql+asyncpg://u:{SECRET}@127.0.0.1/test",
        f"postgresql+psycopg://u:x@{SECRET}@127.0.0.1:{SECRET}/test",
        f"postgresql+psycopg://u:{SECRET}@127.0.0.1/test?no_such_option=1",
    ],
)
def test_an_unusable_url_is_a_bad_setting(url: str):
    """What can never work is told as such, without the password."""
    with pytest.raises(BadSettings) as caught:
        Store.open(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_missing_driver_is_a_bad_setting(monkeypatch: pytest.MonkeyPatch):
    """PostgreSQL's driver is an extra: who lacks it is told its name."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(BadSettings, match=r"\[postgres\]"):
        Store.open("postgresql+psycopg://127.0.0.1:1/test")


def test_a_server_that_does_not_answer_is_told_once(postgres_url: str):
    """The driver's own words arrive in one error, without SQL and without the password."""
    nowhere = make_url(postgres_url).set(host="127.0.0.1", port=1, password=SECRET)
    with pytest.raises(StoreUnavailable, match="refused") as caught:
        Store.open(nowhere.render_as_string(hide_password=False))
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert str(caught.value).count("registry's database") == 1


def test_no_row_is_quoted_in_an_error(store: Store):
    """Tokens and other contents never reach an error's text, nor a traceback's."""
    spec = LLMSpec("m", "text-generation")
    request = Request("r-1", 7, 1, spec, "{}", reason=SECRET, created_s=None)  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable) as caught:
        store.commit(Changes(measurements=(Measurement(7, 1),), requests=(request,)))
    assert SECRET not in str(caught.value)
    assert "INSERT" not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_schema_that_is_not_there_is_a_bad_setting(postgres_url: str):
    """A search_path without a schema to make tables in is told before anything is tried."""
    url = make_url(postgres_url).update_query_dict({"options": "-csearch_path=no_such_schema"})
    with pytest.raises(BadSettings, match="search_path"):
        Store.open(url.render_as_string(hide_password=False))


def test_a_database_that_can_not_hold_every_character_is_refused(postgres: Connection, postgres_url: str):
    """A model's name or an engine's message in any script must fit: only UTF-8 will do."""
    postgres.execute(text("DROP DATABASE IF EXISTS test_latin1"))
    postgres.execute(
        text("CREATE DATABASE test_latin1 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    )
    try:
        url = make_url(postgres_url).set(database="test_latin1").difference_update_query(["options"])
        with pytest.raises(BadSettings, match="LATIN1"):
            Store.open(url.render_as_string(hide_password=False))
    finally:
        postgres.execute(text("DROP DATABASE test_latin1"))
