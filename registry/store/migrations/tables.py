"""The tables of the newest revision, and the column types that store the fields of records.

Every record of ``registry.core.records`` has a table; its columns are the record's fields, with their names and order.
Only ``registry.store`` uses them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    false,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

from registry.core.records import LLMMemory, LLMSpec, WrapperStatus
from registry.wire.words import Grade, Priority, RequestStatus, Role, WindowKind, canonical_json

# --- column types: how a field becomes a cell, and back -------------------------------------------------------


class _Spec(TypeDecorator[LLMSpec]):
    """Stores an LLMSpec as a JSON object. Equal specs are loaded as one object: thousands of requests share a few."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: LLMSpec | None, dialect: Dialect) -> str | None:
        return None if value is None else canonical_json(asdict(value))

    def process_result_value(self, value: str | None, dialect: Dialect) -> LLMSpec | None:
        return None if value is None else _spec(value)


@lru_cache(maxsize=1024)
def _spec(cell: str) -> LLMSpec:
    return LLMSpec(**json.loads(cell))


class _Memory(TypeDecorator[LLMMemory]):
    """Stores an LLMMemory as a JSON object."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: LLMMemory | None, dialect: Dialect) -> str | None:
        return None if value is None else canonical_json(asdict(value))

    def process_result_value(self, value: str | None, dialect: Dialect) -> LLMMemory | None:
        return None if value is None else LLMMemory(**json.loads(value))


class _Strings(TypeDecorator[tuple[str, ...]]):
    """Stores a tuple of strings as a JSON array. Equal tuples are loaded as one object."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Dialect) -> str:
        return json.dumps(value or ())

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[str, ...]:
        return () if value is None else _strings(value)


@lru_cache(maxsize=1024)
def _strings(cell: str) -> tuple[str, ...]:
    return tuple(json.loads(cell))


class _Word(TypeDecorator[StrEnum]):
    """Stores a StrEnum as its value."""

    impl = Text
    cache_ok = True

    def __init__(self, words: type[StrEnum]) -> None:
        super().__init__()
        self.words = words

    def process_bind_param(self, value: StrEnum | None, dialect: Dialect) -> str | None:
        return None if value is None else value.value

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:
        return None if value is None else self.words(value)


class _Prose(TypeDecorator[str]):
    """Stores text from any source (e.g. an engine's output), and replaces characters that databases refuse.

    So a commit does not fail because of a NUL byte in an error message.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        return value.replace("\0", "\ufffd").encode(errors="replace").decode()


def _must(name: str, type_: TypeEngine[Any] | type[TypeEngine[Any]], *args: ForeignKey, **options: Any) -> Column[Any]:
    return Column(name, type_, *args, nullable=False, **options)


def _may(name: str, type_: TypeEngine[Any] | type[TypeEngine[Any]]) -> Column[Any]:
    return Column(name, type_, nullable=True)


# --- the tables -----------------------------------------------------------------------------------------------

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

MACHINES = Table(
    "machines",
    METADATA,
    _must("machine_id", Text, primary_key=True),
    _must("node_id", Text),
    _must("address", Text),
    _must("alive", Boolean),
    _must("gpus", Integer),
    _may("gpu_type", Text),
    _may("memory_bytes", BigInteger),
    _may("gpu_memory_bytes", BigInteger),
    _must("draining", Boolean, server_default=false()),
    _may("zone", Text),
    _may("region", Text),
)
WRAPPERS = Table(
    "wrappers",
    METADATA,
    _must("wrapper_id", Text, primary_key=True),
    _must("machine_id", Text, ForeignKey("machines.machine_id")),
    _must("url", Text),
    _must("gpus", Integer),
    _must("status", _Word(WrapperStatus)),
    _must("epoch", BigInteger),
    _may("spec", _Spec),
    _may("request_id", Text),
    _may("home", _Spec),
    _must("last_used_s", Float),
    _must("failures", Integer),
    _may("reason", _Prose),
)
MEASUREMENTS = Table(
    "measurements",
    METADATA,
    _must("measurement_id", BigInteger, primary_key=True, autoincrement=False),
    _must("seq", BigInteger),
    _must("tenant", Text, primary_key=True),
    _must("priority", _Word(Priority)),
    _may("machine_id", Text),
    _must("flags", _Strings),
    _must("created_s", Float),
    _may("gpu_type", Text),
    _may("versions", Text),
    _may("pinned_until_s", Float),
)
# A request outlives its wrapper and machine, so these are plain ids, not foreign keys.
REQUESTS = Table(
    "requests",
    METADATA,
    _must("request_id", Text, primary_key=True),
    _must("measurement_id", BigInteger),
    _must("seq", BigInteger),
    _must("spec", _Spec),
    _must("llmconfig", Text),
    _must("status", _Word(RequestStatus)),
    _may("reason", _Prose),
    _must("notes", _Strings),
    _may("wrapper_id", Text),
    _may("machine_id", Text),
    _must("failed_on", _Strings),
    _must("overtaken", Integer),
    _must("created_s", Float),
    _may("deploying_s", Float),
    _may("deployed_s", Float),
    _may("ended_s", Float),
    _may("memory", _Memory),
    _may("model_revision", Text),
    _may("max_j", Float),
    _may("max_g", Float),
    _must("grade", _Word(Grade), server_default=Grade.STANDARD.value),
    _may("like_request_id", Text),
    _may("provenance", Text),
    _must("tenant", Text),
    ForeignKeyConstraint(["measurement_id", "tenant"], ["measurements.measurement_id", "measurements.tenant"]),
    Index(None, "measurement_id", "tenant", "seq"),
    Index(None, "ended_s"),
    Index(None, "seq"),
    Index(None, "wrapper_id"),
)
# ``token_sha256``: the tokens themselves are stored nowhere.
# unique: the database refuses a second lease on a wrapper, even if the registry has a bug.
LEASES = Table(
    "leases",
    METADATA,
    _must("request_id", Text, ForeignKey("requests.request_id"), primary_key=True),
    _must("wrapper_id", Text, ForeignKey("wrappers.wrapper_id"), unique=True),
    _must("token_id", Text),
    _must("token_sha256", Text),
    _must("granted_s", Float),
    _must("deadline_s", Float),
    _must("idle_limit_s", Float),
    _must("last_active_s", Float),
)
EVENTS = Table(
    "events",
    METADATA,
    # SQLite assigns numbers only to INTEGER columns; AUTOINCREMENT never reuses a number.
    _must("event_id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _must("kind", Text),
    _must("at_s", Float),
    _may("wrapper_id", Text),
    _may("request_id", Text),
    _may("measurement_id", BigInteger),
    _may("cause_id", Text),
    _must("detail", Text),
    Index(None, "request_id", "event_id"),
    Index(None, "at_s"),
    sqlite_autoincrement=True,
)
# ``tenant``: the tenant that the window is charged to, None: no tenant. A window outlives its wrapper, and may belong
# to no request, so its ids are not foreign keys.
WINDOWS = Table(
    "windows",
    METADATA,
    _must("window_id", Text, primary_key=True),
    _must("kind", _Word(WindowKind)),
    _must("wrapper_id", Text),
    _may("request_id", Text),
    _may("measurement_id", BigInteger),
    _must("begun_s", Float),
    _must("ended_s", Float),
    _may("total_j", Float),
    _may("o_g", Float),
    _may("m_g", Float),
    _must("label", Text),
    _must("detail", Text),
    _may("machine_id", Text),
    _may("tenant", Text),
    Index(None, "measurement_id", "begun_s", "window_id"),
    Index(None, "request_id"),
    Index(None, "tenant", "kind", "ended_s"),
    Index(None, "ended_s"),
)
# Only the ids are kept, so that the link of a deleted request answers "deleted" (410) and not "unknown" (404).
FORGOTTEN_REQUESTS = Table("forgotten_requests", METADATA, _must("request_id", Text, primary_key=True))
# ``secret_sha256``: the keys themselves are stored nowhere.
API_KEYS = Table(
    "api_keys",
    METADATA,
    _must("key_id", Text, primary_key=True),
    _must("role", _Word(Role)),
    _may("tenant", Text),
    _must("name", Text),
    _must("secret_sha256", Text),
    _must("created_s", Float),
    _may("expires_s", Float),
    _may("revoked_s", Float),
    _may("used_s", Float),
)
# Rows are added, and deleted by age; never changed. Texts come from callers, also from strangers.
AUDIT = Table(
    "audit",
    METADATA,
    _must("audit_id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _must("method", _Prose),
    _may("path", _Prose),
    _must("status", Integer),
    _may("code", Text),
    _may("key_id", Text),
    _may("role", _Word(Role)),
    _may("tenant", Text),
    _may("source", _Prose),
    _may("subject", _Prose),
    _must("at_s", Float),
    _must("count", BigInteger),
    Index(None, "at_s"),
    sqlite_autoincrement=True,
)
IDEMPOTENCY_KEYS = Table(
    "idempotency_keys",
    METADATA,
    _must("tenant", Text, primary_key=True),
    _must("key", Text, primary_key=True),
    _must("body_sha256", Text),
    _must("request_ids", _Strings),
    _must("created_s", Float),
    Index(None, "created_s"),
)
