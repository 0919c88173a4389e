"""The audit in real databases: it survives a crash, is only added to, and is deleted by age."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from registry.core.decision import Changes
from registry.core.records import Machine
from registry.errors import ShuttingDown, StoreUnavailable
from registry.service.keys import Keys
from registry.service.retention import DAY_S
from registry.store import audit_pages
from registry.store.migrations.tables import AUDIT
from registry.store.rows import ALL_ROWS, AuditFilter, AuditRow
from registry.store.store import Store
from registry.wire.words import Role
from tests.integration.test_retention import NEW, OLD, Registry

POSTED = AuditRow("POST", "/promptingservice/request", 201, None, "0a1b2c3d", Role.CLIENT, "lab", "10.0.5.7")
CRASH = """
import asyncio, os, sys
from registry.store.rows import AuditRow
from tests.integration.test_retention import OLD, Registry
async def crash():
    registry = Registry(sys.argv[1])
    await registry.start()
    row = AuditRow("POST", "/promptingservice/request", 201, source="10.0.5.7", subject=OLD)
    registry.ask(OLD, audit=row)
    os._exit(9)
asyncio.run(crash())
"""


@pytest.fixture
async def registry(database_url: str) -> AsyncIterator[Registry]:
    registry = Registry(database_url)
    yield registry
    await registry.service.shutdown()


def rows(store: Store) -> list[AuditRow]:
    return [stored.row for stored in store.audit().rows]


def test_the_row_of_a_post_survives_a_crash(database_url: str) -> None:
    """The process ends when the POST is accepted, before its answer: the request and its row are there."""
    ended = subprocess.run([sys.executable, "-c", CRASH, database_url], check=False, timeout=120)
    assert ended.returncode == 9
    store = Store.open(database_url, lock_wait_s=30.0)
    assert [request.request_id for request in store.load().requests] == [OLD]
    assert [(row.subject, row.source, row.at_s) for row in rows(store)] == [(OLD, "10.0.5.7", 1_760_000_000.0)]
    store.close()


def test_a_change_and_its_row_are_one_transaction(store: Store) -> None:
    """If one of them can't be written, neither is."""
    with pytest.raises(StoreUnavailable):
        store.commit(Changes(machines=(Machine("m", "n", "a"),)), audit=replace(POSTED, status=None))  # type: ignore[arg-type]
    assert store.load().machines == ()
    keys = Keys(store, lambda: 5.0, nullcontext)
    key, _ = keys.new(Role.CLIENT, tenant="lab", name="")
    with pytest.raises(StoreUnavailable):
        keys.add(key, replace(POSTED, status=None))  # type: ignore[arg-type]
    assert store.api_keys() == ()
    keys.add(key, POSTED)
    assert rows(store) == [replace(POSTED, subject=key.key_id, at_s=5.0)]
    keys.revoke(key.key_id, POSTED)
    keys.revoke(key.key_id, POSTED)
    assert len(rows(store)) == 2


def test_a_failure_between_row_and_commit_leaves_neither(store: Store) -> None:
    """The database fails after the row was written, and before the transaction ends: no part of it is stored."""
    keys = Keys(store, lambda: 5.0, nullcontext)
    key, _ = keys.new(Role.CLIENT, tenant="lab", name="")
    written: list[str] = []

    def fail(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO audit"):
            written.append(statement)
            raise OperationalError(statement, {}, Exception("disk full"))

    event.listen(store._connection, "after_cursor_execute", fail)
    for change in (
        lambda: store.commit(Changes(machines=(Machine("m", "n", "a"),)), audit=POSTED),
        lambda: keys.add(key, POSTED),
        lambda: store.add_audit([POSTED]),
    ):
        with pytest.raises(StoreUnavailable):
            change()
    event.remove(store._connection, "after_cursor_execute", fail)
    assert len(written) == 3
    assert (store.load().machines, store.api_keys(), rows(store)) == ((), (), [])
    store.commit(Changes(machines=(Machine("m", "n", "a"),)), audit=POSTED)
    assert rows(store) == [POSTED]


async def test_old_rows_are_deleted(registry: Registry) -> None:
    """After ``keep_days``, like the requests; the others stay as they were written, and no number is used twice."""
    service = await registry.start(keep_days=90)
    registry.ask(OLD, audit=POSTED)
    service.release(OLD, audit=POSTED)
    registry.clock.now_s += 45 * DAY_S
    registry.ask(NEW, audit=POSTED)
    (*_, last) = registry.store.audit().rows
    registry.clock.now_s += 45 * DAY_S + 1
    await registry.until_forgotten(OLD)
    assert registry.store.audit().rows == (last,)
    assert last.audit_id == 3
    registry.clock.now_s += 90 * DAY_S
    service.release(NEW)
    await registry.until_forgotten_audit()
    service.audit.add_refusals([(POSTED, 1.0)])
    assert [stored.audit_id for stored in registry.store.audit().rows] == [4]


async def test_nothing_is_written_after_a_shutdown(registry: Registry) -> None:
    """Refused calls that come then are refused, too: an error of the closed database would end the process."""
    service = await registry.start()
    await service.shutdown()
    with pytest.raises(ShuttingDown):
        service.audit.add_refusals([(POSTED, 1.0)])
    assert registry.fatal == []


ODD = "naïve 模型 🌱 ' \" \0 \ud800"


def test_rows_come_back_as_they_were(store: Store) -> None:
    """In the order in which they were stored, by number and filter; odd characters break no commit."""
    given = [
        replace(POSTED, at_s=10.0, count=2**40),
        AuditRow("GET", None, 401, "key_needed", at_s=9.0),
        replace(POSTED, tenant="rivals", key_id="ffffffff", at_s=11.0),
    ]
    store.add_audit([])
    store.add_audit(given)
    assert rows(store) == given
    assert [stored.audit_id for stored in store.audit(after=1, limit=1).rows] == [2]
    wanted = {
        AuditFilter(since_s=10.0): [1, 3],
        AuditFilter(before_s=10.0): [2],
        AuditFilter(tenant="lab"): [1],
        AuditFilter(key_id="ffffffff"): [3],
        AuditFilter(10.0, 11.0, "rivals"): [],
    }
    assert {each: [stored.audit_id for stored in store.audit(each).rows] for each in wanted} == wanted
    store.add_audit([AuditRow(ODD, ODD, 404, subject=ODD, source=ODD)])
    assert (rows(store)[-1].subject or "").startswith("naïve 模型 🌱 ' \" ")


def pages(store: Store, wanted: AuditFilter, limit: int) -> tuple[list[int], int]:
    """Return the numbers of all rows that are wanted, and the number of pages."""
    numbers: list[int] = []
    after, count = 0, 0
    while True:
        page, count = store.audit(wanted, after=after, limit=limit), count + 1
        numbers += [stored.audit_id for stored in page.rows]
        if page.next is None:
            return numbers, count
        assert page.next > after
        after = page.next


@pytest.mark.parametrize("limit", [3, 1000])
def test_a_page_looks_at_few_rows(store: Store, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Pages lead to all rows that are wanted, also if some are empty. Refused calls are stored after their time."""
    monkeypatch.setattr(audit_pages, "SCANNED", 5)
    given = [replace(POSTED, at_s=n - 7.0 * (n % 3 == 0), tenant="ab"[n > 20], key_id="k" * (n % 2)) for n in range(30)]
    store.add_audit(given)
    assert store.forget(ended_before_s=5.0, limit=1000).more is False
    kept = list(store.audit(limit=1000).rows)
    while (after := store.audit(after=kept[-1].audit_id)).rows:
        kept += after.rows
    assert [each.row for each in kept] == [row for row in given if row.at_s >= 5.0]
    times = [None, 12.0, 17.0, 28.5]
    for since_s, before_s, tenant, key_id in product(times, times, (None, "b", "c"), (None, "k")):
        numbers, count = pages(store, AuditFilter(since_s, before_s, tenant, key_id), limit)
        assert numbers == [
            each.audit_id
            for each in kept
            if (since_s is None or each.row.at_s >= since_s)
            and (before_s is None or each.row.at_s < before_s)
            and tenant in (None, each.row.tenant)
            and key_id in (None, each.row.key_id)
        ]
        assert count <= 6 + len(numbers) // limit
    nothing = [AuditFilter(since_s=99.0), AuditFilter(before_s=5.0), AuditFilter(12.0, 12.0)]
    assert [store.audit(each) for each in nothing] == [((), None)] * 3


@pytest.mark.parametrize(
    "wanted",
    [
        ALL_ROWS,
        AuditFilter(tenant="nobody"),
        AuditFilter(key_id="ffffffff"),
        AuditFilter(since_s=0.0),
        AuditFilter(since_s=1e9),
        AuditFilter(before_s=1e9, tenant="nobody"),
        AuditFilter(1e4, 1e4 + 5, key_id="ffffffff"),
    ],
)
def test_a_page_of_a_long_audit_takes_as_long_as_of_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: AuditFilter
) -> None:
    """SQLite's steps do not grow with the table."""
    monkeypatch.setattr(audit_pages, "SCANNED", 50)
    store = Store.open(f"sqlite:///{tmp_path / 'audit.db'}")
    store.add_audit([replace(POSTED, at_s=float(n)) for n in range(20_000)])
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 100
        return 0

    driver: Any = store._connection.connection.driver_connection
    driver.set_progress_handler(count, 100)
    for after in (0, 10_000):
        store.audit(wanted, after=after, limit=10)
    driver.set_progress_handler(None, 100)
    assert steps < 10_000
    store.close()


def test_every_field_has_its_column() -> None:
    """The columns are the number of the row and then its fields; NULL may be where the field may be None."""
    assert [column.name for column in AUDIT.columns] == ["audit_id", *(field.name for field in fields(AuditRow))]
    may = {name for name, hint in get_type_hints(AuditRow).items() if type(None) in get_args(hint)}
    assert {column.name for column in AUDIT.columns if column.nullable} == may
