"""Rows of the database that have no record in ``registry.core``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from registry.wire.words import Role


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
    """An EventRow with its number ``event_id`` > 0. Numbers grow with every event and are never used twice."""

    event_id: int
    event: EventRow


@dataclass(frozen=True, slots=True)
class IdempotencyRow:
    """The answer to a tenant's Idempotency-Key: ``request_ids``, in the order of the body's llms.

    ``key``: at most 1024 characters, since PostgreSQL refuses index entries over 2.7 kB.
    ``body_sha256``: hexadecimal. ``created_s``: UTC seconds.
    """

    tenant: str
    key: str
    body_sha256: str
    request_ids: tuple[str, ...]
    created_s: float


@dataclass(frozen=True, slots=True)
class APIKey:
    """An API key, without its secret.

    ``key_id``: the part of the key that is not secret. ``tenant``: None except for a client.
    ``secret_sha256``: hexadecimal. ``expires_s``, ``revoked_s``, ``used_s``: UTC seconds, None for never.
    """

    key_id: str
    role: Role
    tenant: str | None
    name: str
    secret_sha256: str
    created_s: float
    expires_s: float | None = None
    revoked_s: float | None = None
    used_s: float | None = None


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One call of the registry in the audit, or several equal calls that were refused. It has no secret.

    ``method`` is ``start`` for what the registry did at its start, and ``withdraw`` for the end of a request whose POST
    was not answered. ``path``: the pattern of the path; None: there is no such path. ``status``: of the HTTP answer.
    ``code``: of the error; None: the call was accepted.

    ``key_id``, ``role``: those of the API key; None: none was accepted. ``tenant``: the one that the call was for, as
    far as it is known. ``source``: address of the client; None: it is not clear. ``subject``: id of what the call was
    about, if it has one.

    ``at_s``: UTC seconds, of the first of ``count`` equal calls. The registry sets it when it stores the row.
    """

    method: str
    path: str | None
    status: int
    code: str | None = None
    key_id: str | None = None
    role: Role | None = None
    tenant: str | None = None
    source: str | None = None
    subject: str | None = None
    at_s: float = 0.0
    count: int = 1


@dataclass(frozen=True, slots=True)
class StoredAuditRow:
    """An AuditRow with its number ``audit_id`` > 0. Numbers grow with every row and are never used twice."""

    audit_id: int
    row: AuditRow


class StoredAuditPage(NamedTuple):
    """Rows of the audit, and the number after which the next page begins; None: this is the last page."""

    rows: tuple[StoredAuditRow, ...]
    next: int | None


class AuditFilter(NamedTuple):
    """Which rows of the audit are wanted: ``since_s`` ≤ time < ``before_s``, UTC seconds. None: all."""

    since_s: float | None = None
    before_s: float | None = None
    tenant: str | None = None
    key_id: str | None = None


ALL_ROWS = AuditFilter()


class Forgotten(NamedTuple):
    """Result of ``Store.forget``: the ids of deleted requests, and whether there is more to delete."""

    request_ids: tuple[str, ...]
    more: bool


class WindowPlace(NamedTuple):
    """Sort key of the energy windows of a measurement: start time (UTC s), then id."""

    begun_s: float
    window_id: str
