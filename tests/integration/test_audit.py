"""The audit in real databases: it survives a crash, is only added to, and is deleted by age."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest

from registry.core.decision import Changes
from registry.core.records import Machine
from registry.errors import ShuttingDown, StoreUnavailable
from registry.service.keys import Keys
from registry.service.retention import DAY_S
from registry.store.migrations.tables import AUDIT
from registry.store.rows import AuditFilter, AuditRow
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
    return [stored.row for stored in store.audit()]


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


async def test_old_rows_are_deleted(registry: Registry) -> None:
    """After ``keep_days``, like the requests; the others stay as they were written, and no number is used twice."""
    service = await registry.start(keep_days=90)
    registry.ask(OLD, audit=POSTED)
    service.release(OLD, audit=POSTED)
    registry.clock.now_s += 45 * DAY_S
    registry.ask(NEW, audit=POSTED)
    (*_, last) = registry.store.audit()
    registry.clock.now_s += 45 * DAY_S + 1
    await registry.until_forgotten(OLD)
    assert registry.store.audit() == (last,)
    assert last.audit_id == 3
    registry.clock.now_s += 90 * DAY_S
    service.release(NEW)
    await registry.until_forgotten_audit()
    service.audit.add_refusals([(POSTED, 1.0)])
    assert [stored.audit_id for stored in registry.store.audit()] == [4]


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
    assert [stored.audit_id for stored in store.audit(after=1, limit=1)] == [2]
    wanted = {
        AuditFilter(since_s=10.0): [1, 3],
        AuditFilter(before_s=10.0): [2],
        AuditFilter(tenant="lab"): [1],
        AuditFilter(key_id="ffffffff"): [3],
        AuditFilter(10.0, 11.0, "rivals"): [],
    }
    assert {each: [stored.audit_id for stored in store.audit(each)] for each in wanted} == wanted
    store.add_audit([AuditRow(ODD, ODD, 404, subject=ODD, source=ODD)])
    assert (rows(store)[-1].subject or "").startswith("naïve 模型 🌱 ' \" ")


def test_every_field_has_its_column() -> None:
    """The columns are the number of the row and then its fields; NULL may be where the field may be None."""
    assert [column.name for column in AUDIT.columns] == ["audit_id", *(field.name for field in fields(AuditRow))]
    may = {name for name, hint in get_type_hints(AuditRow).items() if type(None) in get_args(hint)}
    assert {column.name for column in AUDIT.columns if column.nullable} == may
