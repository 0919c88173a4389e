"""Builds and runs the store's SQL statements from its tables and records, for SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from itertools import starmap
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Insert,
    Select,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    insert,
    select,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import ReturningInsert

from registry.core.records import MeasurementKey
from registry.store.migrations.tables import AUDIT, EVENTS, MEASUREMENTS, REQUESTS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    R = TypeVar("R", bound=DataclassInstance)

INSERT_EVENT = insert(EVENTS)

INSERT_AUDIT = insert(AUDIT)

DELETE_EMPTY_MEASUREMENT = delete(MEASUREMENTS).where(
    MEASUREMENTS.c.measurement_id == bindparam("id"),
    MEASUREMENTS.c.tenant == bindparam("of"),
    ~exists().where(
        REQUESTS.c.measurement_id == MEASUREMENTS.c.measurement_id, REQUESTS.c.tenant == MEASUREMENTS.c.tenant
    ),
)
"""Deletes measurement ``id`` of tenant ``of`` unless it has requests."""

WAS_SERVED = and_(REQUESTS.c.deployed_s.is_not(None), REQUESTS.c.machine_id.is_not(None))
"""Condition: the request was handed over."""


def put(connection: Connection, table: Table, records: Sequence[DataclassInstance]) -> None:
    """Insert records into a table, or replace those with the same primary key."""
    if records:
        connection.execute(_upsert(table, connection.dialect.name), [cells_of(record) for record in records])


@cache  # building a statement takes longer than running it
def _upsert(table: Table, dialect: str) -> Insert:
    new = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    columns = {column.name: new.excluded[column.name] for column in table.columns if not column.primary_key}
    return new.on_conflict_do_update(index_elements=list(table.primary_key), set_=columns)


@cache
def insert_once(table: Table, dialect: str) -> ReturningInsert[Any]:
    """Return a statement that inserts rows, skips those whose key exists, and returns the new rows' keys."""
    new = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    (key,) = table.primary_key
    return new.on_conflict_do_nothing(index_elements=[key]).returning(key)


def cells_of(record: DataclassInstance) -> dict[str, Any]:
    """Return a record's field values by column name."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def read(connection: Connection, record: type[R], rows: Select[Any]) -> tuple[R, ...]:
    """Run a query, and return its rows as records of a class whose fields are its columns."""
    return tuple(starmap(record, connection.execute(rows)))


def requests_of_measurement(key: MeasurementKey) -> Select[Any]:
    """Return a query for the requests of a measurement."""
    return select(REQUESTS).where(REQUESTS.c.tenant == key[0], REQUESTS.c.measurement_id == key[1])


def remove(connection: Connection, table: Table, ids: Sequence[str]) -> None:
    """Delete the rows with these ids, in a table with one key column."""
    if ids:
        connection.execute(_delete(table), [{"id": row_id} for row_id in ids])


def remove_some(connection: Connection, table: Table, which: ColumnElement[bool], limit: int) -> int:
    """Delete at most ``limit`` matching rows of a table. Return their number."""
    key = list(table.primary_key)
    some = select(*key).where(which).limit(limit)
    return connection.execute(delete(table).where(tuple_(*key).in_(some))).rowcount


@cache
def _delete(table: Table) -> Delete:
    (key,) = table.primary_key
    return delete(table).where(key == bindparam("id"))
