"""Makes the rows of the event log: for every request that a decision changed, what happened, when, and why."""

from __future__ import annotations

import json
from collections.abc import Callable

from registry.core.commands import Effect
from registry.core.decision import Changes
from registry.core.events import Event, LeaseUsed
from registry.core.records import Request
from registry.store.rows import EventRow


def ids_of(event: Event | Effect) -> dict[str, object]:
    """Return the ids, epoch and reason that an event or effect has, by name. Never contains a token."""
    names = ("wrapper_id", "request_id", "measurement_id", "machine_id", "epoch", "reason")
    return {name: value for name in names if (value := getattr(event, name, None)) is not None}


# D16: the log is kept by request
def rows_of(
    event: Event, changes: Changes, request_of: Callable[[str], Request], now_s: float, cause: int | None
) -> tuple[EventRow, ...]:
    """Return a row for each request that an event changed, or one row without a request if it changed none.

    * ``request_of`` returns a request as it is after the event.
    * ``cause``: number of the event whose command this event answers; None: the cause is external (a client, the clock,
      a periodic check).

    An event can change requests that it does not name: a release may start the next request in the
    queue. LeaseUsed gives no rows: it happens every few seconds, and the lease stores its last use.
    """
    if isinstance(event, LeaseUsed):
        return ()
    about = ids_of(event)
    detail = {str(name): about[name] for name in ("epoch", "reason", "machine_id") if name in about}

    def row(request: Request | None) -> EventRow:
        wrapper_id = about.get("wrapper_id") if request is None else request.wrapper_id or about.get("wrapper_id")
        return EventRow(
            kind=type(event).__name__,
            at_s=now_s,
            wrapper_id=None if wrapper_id is None else str(wrapper_id),
            request_id=None if request is None else request.request_id,
            measurement_id=None if request is None else request.measurement_id,
            cause_id=None if cause is None else str(cause),
            detail=json.dumps(detail if request is None else detail | _state_of(request), sort_keys=True),
        )

    changed = [request.request_id for request in changes.requests] + [lease.request_id for lease in changes.leases]
    return tuple(row(request_of(request_id)) for request_id in dict.fromkeys(changed)) or (row(None),)


def log_fields(row: EventRow) -> dict[str, object]:
    """Return a row as fields of a log line, without those that are missing."""
    ids = {name: getattr(row, name) for name in ("request_id", "measurement_id", "wrapper_id", "cause_id")}
    known = {name: value for name, value in ids.items() if value is not None}
    detail: dict[str, object] = json.loads(row.detail)
    return {"kind": row.kind} | known | detail


def _state_of(request: Request) -> dict[str, object]:
    state: dict[str, object] = {"status": request.status.value}
    if request.reason is not None:
        state["reason"] = request.reason
    if request.overtaken:
        state["overtaken"] = request.overtaken
    return state
