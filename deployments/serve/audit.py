"""The ingress's part of the audit: describes the calls that change something, counts refused calls, shows the audit.

``AuditTrail`` is around the whole app, so it sees every answer. Times and rows are the registry's: see
``registry.service.audit``.
"""

# D113: the audit

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from time import monotonic
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.serve.browsers import READING
from deployments.serve.client_address import client_of
from deployments.serve.identities import key_of, refused_key_id
from deployments.serve.jwt_identities import MAX_SUBJECT
from registry.access_errors import TooManyWrongKeys
from registry.background import spawn
from registry.errors import InvalidField, RegistryError, UnknownRequest
from registry.networks import Network
from registry.service.audit import Refusals
from registry.service.views import iso
from registry.store.rows import AuditFilter, AuditRow, StoredAuditPage, StoredAuditRow
from registry.wire.schemas import MAX_AUDIT, MAX_ID, AuditEntry, AuditPage, TenantName
from registry.wire.words import JWT_MARK, Role

SEND_EVERY_S = 60.0
"""How often refused calls are sent to the registry, seconds. So much is lost if this process ends."""

log = structlog.get_logger("deployments.serve.audit")

_CODE = re.compile(rb'\{"code":"([a-z0-9_]{1,64})"')
# No secret that somebody puts in place of an id: an API key has 55 characters, a token of an older lease has 43, and
# tokens of leases and of hubs have an underscore. An id has at most 39 (IPv6).
_ID = re.compile(r"[A-Za-z0-9.:-]{1,40}")
_KEY_ID = f"^([0-9a-f]{{8}}|https?://[!-~]{{1,255}}{JWT_MARK}[ -~]{{1,{MAX_SUBJECT}}})$"
_METHODS = READING | {"POST", "PUT", "PATCH", "DELETE"}
_REFUSED = (401, 403)
_ELSEWHERE = "/process_prompt"  # redirected to a lease: changes nothing here
_PROXIES, _KEYS = "greenprompt_proxies", "greenprompt_keys"


class AuditTrail:
    """An ASGI app around another one, which counts refused calls. ``call(method, *args)`` reaches the registry actor.

    Refused are 401, 403 and too many wrong keys on every path, every error on a path that changes something, and reads
    of a request that the client's key may not see. ``proxies``: the networks of trusted proxies, which name the
    addresses of their clients. ``keys``: whether the registry asks for API keys.
    """

    def __init__(
        self, app: ASGIApp, call: Callable[..., Awaitable[Any]], proxies: Sequence[Network] | None, *, keys: bool
    ) -> None:
        self._app = app
        self._call = call
        self._proxies = proxies
        self._keys = keys
        self._refusals = Refusals()
        self._sending: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_PROXIES], scope[_KEYS] = self._proxies, self._keys
        changes = scope["method"] not in READING and scope["path"] != _ELSEWHERE
        status, code = 0, None

        async def noting(message: Message) -> None:
            nonlocal status, code
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status >= 400 and code is None:
                found = _CODE.match(message.get("body", b"")[:100])
                code = None if found is None else found[1].decode()
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            refused = status in _REFUSED or code == TooManyWrongKeys.code
            if refused or (changes and status >= 400) or _is_hidden(scope, code):
                self._note(row_of(scope, status, code))

    def _note(self, row: AuditRow) -> None:
        self._refusals.add(row, monotonic())
        if self._sending is None or self._sending.done():
            self._sending = spawn("send refused calls to the audit", self._send())

    async def _send(self) -> None:
        """Send what was counted, once per SEND_EVERY_S; return after a period without refused calls."""
        while self._refusals:
            await asyncio.sleep(SEND_EVERY_S)
            counted, self._refusals = self._refusals, Refusals()
            try:
                await self._call("add_refusals", counted.rows(monotonic()))
            except RegistryError as error:
                log.warning("the registry does not take the refused calls; retrying", reason=str(error))
                self._refusals.add_all(counted)


def row_of(scope: Scope, status: int, code: str | None = None) -> AuditRow:
    """Return the row of a call to an AuditTrail.

    ``source`` is None if the address is not clear. ``subject`` is None if the registry asks for keys and the call has
    no valid one, or was refused before its key was checked. The registry adds tenant and id to the row of an accepted
    call.
    """
    path, subject = _what(scope)
    key, source = key_of(scope), client_of(scope, scope[_PROXIES])
    method = scope["method"]
    return AuditRow(
        method=method if method in _METHODS else "other",
        path=path,
        status=status,
        code=code,
        key_id=refused_key_id(scope) if key is None else key.key_id or None,
        role=None if key is None else key.role,
        tenant=None if key is None else key.tenant,
        source=None if source is None else str(source),
        subject=None if key is None and scope[_KEYS] else subject,
    )


def _is_hidden(scope: Scope, code: str | None) -> bool:
    """Whether a client's key asked for a request that does not exist, or that is another tenant's."""
    key = key_of(scope)
    return code == UnknownRequest.code and key is not None and key.role is Role.CLIENT


def _what(scope: Scope) -> tuple[str | None, str | None]:
    """Return the pattern of a call's path, None if there is no such path; and the first id in it, if it has one."""
    app = scope.get("app")  # None: the call did not get so far
    for route in [] if app is None else app.routes:
        if isinstance(route, Route):
            match, found = route.matches(scope)
            if match is not Match.NONE:
                subject = next(iter(map(str, found["path_params"].values())), "")
                return route.path, subject if _ID.fullmatch(subject) else None
    return None, None


async def _accepted(request: Request) -> AuditRow:
    return row_of(request.scope, request.scope["route"].status_code or 200)


Audited = Annotated[AuditRow, Depends(_accepted)]
"""The row of this call, for the registry, which stores it if the call changes something."""

_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z$"


def _time(meaning: str) -> Any:
    return Query(pattern=_TIME, description=f"{meaning}: ISO 8601, UTC, as 2026-11-30T09:00:00Z")


def audit_router(
    call: Callable[..., Awaitable[Any]], responses: dict[int | str, dict[str, Any]], *, keys: bool
) -> APIRouter:
    """Return the route of the audit, for operators. ``keys``: whether the registry asks for API keys."""
    router = APIRouter()

    @router.get("/audit", response_model=AuditPage, responses=responses)
    async def audit(
        since: Annotated[str | None, _time("Time of the earliest entries")] = None,
        before: Annotated[str | None, _time("Only entries before this time")] = None,
        tenant: Annotated[TenantName | None, Query(description="Only calls for this tenant")] = None,
        key: Annotated[
            str | None,
            Query(
                pattern=_KEY_ID,
                description="Only calls with the API key that has this id, or of this `iss#sub` of JWTs",
            ),
        ] = None,
        after: Annotated[int, Query(ge=0, le=MAX_ID, description="`next` of the previous page")] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_AUDIT, description="Entries per page")] = MAX_AUDIT,
    ) -> Response:
        """Return calls that changed something, and refused calls, in the order in which they were stored.

        Refused calls are stored within a minute or two, equal ones as one entry. A page may have fewer entries than
        ``limit``, or none: the last one has no ``next``.
        """
        wanted = AuditFilter(_seconds("since", since), _seconds("before", before), tenant, key)
        found: StoredAuditPage = await call("audit", wanted, after, limit)
        page = AuditPage(entries=[_entry(row, keys=keys) for row in found.rows], next=found.next)
        return Response(page.model_dump_json(), media_type="application/json")

    return router


def _seconds(field: str, time: str | None) -> float | None:
    """Return an ISO 8601 time as UTC seconds. Raises InvalidField if there is no such day or hour."""
    try:
        return None if time is None else datetime.fromisoformat(time).timestamp()
    except ValueError as error:
        raise InvalidField(field, str(error)) from error


def _entry(stored: StoredAuditRow, *, keys: bool) -> AuditEntry:
    row = stored.row
    # Without keys, a caller who knows the id of a request can see and release it.
    shown = keys or (row.path or "").startswith("/machines/")
    return AuditEntry(
        number=stored.audit_id,
        at=iso(row.at_s),
        method=row.method,
        path=row.path,
        status=row.status,
        code=row.code,
        key=row.key_id,
        role=row.role,
        tenant=row.tenant,
        source=row.source,
        about=row.subject if shown else None,
        count=row.count,
    )
