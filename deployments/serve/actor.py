"""The registry actor: named, detached, restarted by Ray; the only owner of the registry's state.

Every method is a thin wrapper around the service. Most results are the JSON text of an answer, which the
ingress passes on unchanged: Ray takes five times as long to pickle a RequestState as pydantic to write it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

import ray
import structlog
from pydantic import BaseModel

from registry.accounting.windows import KeptWindow
from registry.background import spawn_awaited
from registry.core.events import NewRequest
from registry.core.records import Measurement, MeasurementKey, Request
from registry.errors import RegistryError, UnknownRequest
from registry.service import views
from registry.service.keys import EVERYTHING, Access
from registry.service.news import CHANGES_WAIT_S
from registry.service.service import Idempotency, Service
from registry.settings import Settings
from registry.store.rows import APIKey, AuditFilter, AuditRow, StoredAuditPage, WindowPlace
from registry.wire.schemas import NewKey
from registry.wire.words import Grade, Priority, Role

ACTOR_NAME = "greenprompt-registry"
"""Name of the actor, in the namespace below."""

NAMESPACE = "greenprompt"
"""Ray namespace of everything that the registry starts."""

EXIT_FAILED = 70
"""Exit status of the actor's process after a failure of its database or of a decision; Ray restarts it."""

RETRY_PAUSE_S = 1.0
"""Pause between two restarts of a registry that can't start, seconds."""

log = structlog.get_logger("deployments.serve.actor")


class RegistryActor:
    """The service in a Ray actor. All methods run on one event loop, and raise the service's RegistryError."""

    def __init__(
        self, settings: Settings, build: Callable[[Settings, Callable[[RegistryError], None]], Service]
    ) -> None:
        """``build`` creates a service; it is called again, with the same settings, after a restart."""
        self._settings = settings
        self._life = uuid.uuid4().hex
        try:
            self._service = build(settings, _fail_stop)
        except RegistryError as error:
            _try_again_later(error)
            raise
        self._started = spawn_awaited("start the registry", self._start())

    async def _start(self) -> None:
        try:
            await self._service.start()
        except RegistryError as error:
            _try_again_later(error)
            raise

    async def settings(self) -> Settings:
        """Return the settings that the actor was created with."""
        return self._settings

    async def ready(self) -> None:
        """Return when the database is loaded and watching has begun; raise the error that prevented it."""
        await asyncio.shield(self._started)

    async def request(
        self,
        measurement_id: int,
        llms: Sequence[NewRequest],
        tenant: str,
        priority: Priority | None,
        gpu_type: str | None,
        idempotency: Idempotency | None,
        grade: Grade = Grade.STANDARD,
        like_request_id: str | None = None,
        access: Access = EVERYTHING,
        audit: AuditRow | None = None,
    ) -> str:
        """Accept requests for LLMs; return the JSON PromptingAnswer.

        The first one is deployed already if its LLM was warm and free.
        """
        await self.ready()
        requests = self._service.request(
            measurement_id,
            llms,
            tenant=tenant,
            priority=priority,
            gpu_type=gpu_type,
            idempotency=idempotency,
            grade=grade,
            like_request_id=like_request_id,
            access=access,
            audit=audit and replace(audit, tenant=tenant, subject=llms[0].request_id),
        )
        return views.prompting_answer(self._service, await self._service.granted(requests)).model_dump_json()

    async def state(self, request_id: str, access: Access = EVERYTHING) -> tuple[str, str]:
        """Return the current status of a request, and its JSON RequestState."""
        await self.ready()
        state = views.request_state(self._service, self._service.known(request_id, access), addresses=access.addresses)
        return state.status, state.model_dump_json()

    async def changes(self, life: str, place: int | None) -> tuple[str, int, list[str] | None]:
        """Return this process's id, its place in the log of changes, and the requests changed since ``place``.

        Waits up to CHANGES_WAIT_S for a change. ``life`` and ``place`` are the first two results of
        the previous call. If ``place`` is None, or ``life`` is not this process's id (after a
        restart), the changes are unknown, and the third result is None.
        """
        await self.ready()
        known = place if life == self._life else None
        return self._life, *await self._service.news.after(known, CHANGES_WAIT_S)

    async def events(self, request_id: str, after: int, limit: int, access: Access = EVERYTHING) -> str:
        """Return a JSON list of EventState of a request, at most ``limit`` with a number above ``after``."""
        await self.ready()
        events = self._service.history(request_id, after=after, limit=limit, access=access)
        return _json(views.event_states(events))

    async def keep_alive(self, request_id: str, access: Access = EVERYTHING) -> str:
        """Extend the lease; return the JSON RequestState with the new times."""
        await self.ready()
        request = await self._service.keep_alive(request_id, access)
        return views.request_state(self._service, request, addresses=access.addresses).model_dump_json()

    async def release(self, request_id: str, access: Access = EVERYTHING, audit: AuditRow | None = None) -> None:
        """End or cancel a request."""
        await self.ready()
        self._service.release(request_id, access, audit and replace(audit, subject=request_id))

    async def withdraw(
        self, request_ids: Sequence[str], tenant: str, key: str | None, audit: AuditRow | None = None
    ) -> None:
        """End the requests of a POST whose answer did not reach its client."""
        await self.ready()
        self._service.withdraw(request_ids, tenant=tenant, key=key, audit=audit)

    async def lease_url(self, token: str) -> str:
        """Return the base URL of the lease with this token."""
        await self.ready()
        url = views.lease_url(self._service, self._service.leased_with(token))
        assert url is not None  # leases have a URL
        return url

    async def measurement(self, key: MeasurementKey, after_seq: int, limit: int, access: Access = EVERYTHING) -> str:
        """Return a JSON MeasurementState with a page of its requests."""
        await self.ready()
        state = views.measurement_state(
            self._service, key, after_seq=after_seq, limit=limit, addresses=access.addresses
        )
        return state.model_dump_json()

    async def measured(
        self, key: MeasurementKey, after_seq: int, limit: int
    ) -> tuple[Measurement, tuple[Request, ...]]:
        """Return a measurement, and at most ``limit`` of its requests with a ``seq`` above ``after_seq``."""
        await self.ready()
        archive = self._service.archive
        return archive.measurement(key), archive.requests_of(key, after_seq=after_seq, limit=limit)

    async def windows(
        self, key: MeasurementKey, request_id: str | None, after: WindowPlace | None, limit: int
    ) -> tuple[tuple[Request, ...], tuple[KeptWindow, ...]]:
        """Return at most ``limit`` energy windows after a position, and their requests."""
        await self.ready()
        archive = self._service.archive
        archive.measurement(key)
        if request_id is not None and archive.request(request_id).measurement_key != key:
            raise UnknownRequest(request_id)
        page = self._service.accounts.page(key, request_id=request_id, after=after, limit=limit)
        return archive.find_requests({each.window.request_id or "" for each in page}), page

    async def machines(self) -> str:
        """Return a JSON list of MachineState."""
        await self.ready()
        return _json(views.machine_states(self._service))

    async def machine(self, machine_id: str) -> str:
        """Return a JSON MachineState."""
        await self.ready()
        return views.machine_state(self._service, machine_id).model_dump_json()

    async def drain(self, machine_id: str, audit: AuditRow | None = None) -> str:
        """Assign no more LLMs to a machine; return its JSON MachineState."""
        await self.ready()
        self._service.drain(machine_id, audit and replace(audit, subject=machine_id))
        return views.machine_state(self._service, machine_id).model_dump_json()

    async def undrain(self, machine_id: str, audit: AuditRow | None = None) -> str:
        """Use a drained machine again; return its JSON MachineState."""
        await self.ready()
        self._service.undrain(machine_id, audit and replace(audit, subject=machine_id))
        return views.machine_state(self._service, machine_id).model_dump_json()

    async def llms(self) -> str:
        """Return a JSON list of LLMState."""
        await self.ready()
        return _json(views.llm_states(self._service))

    async def health(self) -> tuple[str, str]:
        """Return the registry's status, and its JSON HealthState."""
        await self.ready()
        state = views.health_state(self._service)
        return state.status, state.model_dump_json()

    async def identify(self, key_id: str, secret_sha256: str) -> APIKey:
        """Return the API key with this id and secret."""
        await self.ready()
        return self._service.keys.identify(key_id, secret_sha256)

    async def keys(self) -> str:
        """Return a JSON list of KeyState."""
        await self.ready()
        return _json([views.key_state(key) for key in self._service.keys])

    async def create_key(
        self, role: Role, tenant: str | None, name: str, days: float | None, audit: AuditRow | None = None
    ) -> str:
        """Make an API key; return the JSON NewKey. The text of the key is in this answer only."""
        await self.ready()
        key, text = self._service.keys.new(role, tenant=tenant, name=name, days=days)
        self._service.keys.add(key, audit)
        return NewKey(**views.key_state(key).model_dump(), key=text).model_dump_json()

    async def revoke_key(self, key_id: str, audit: AuditRow | None = None) -> None:
        """Refuse an API key from now on."""
        await self.ready()
        self._service.keys.revoke(key_id, audit)

    async def add_refusals(self, rows: Sequence[tuple[AuditRow, float]]) -> None:
        """Add refused calls to the audit, each with how long ago the first one was, seconds."""
        await self.ready()
        self._service.audit.add_refusals(rows)

    async def audit(self, wanted: AuditFilter, after: int, limit: int) -> StoredAuditPage:
        """Return at most ``limit`` rows of the audit with a number above ``after``."""
        await self.ready()
        return self._service.audit.rows(wanted, after, limit)

    async def shutdown(self) -> None:
        """Stop every LLM and wrapper and close the database; the caller then kills the actor."""
        await self._service.shutdown()


def _json(states: Sequence[BaseModel]) -> str:
    return json.dumps([state.model_dump(mode="json") for state in states])


def _try_again_later(error: RegistryError) -> None:
    """End the process of a restarted registry that can't start, so that Ray restarts it again.

    The database may not be reachable yet. Ray does not restart an actor whose constructor raises, but
    restarts one whose process exits, without limit. On the first start this function returns, so
    that the error reaches the process that starts the registry.
    """
    if ray.get_runtime_context().was_current_actor_reconstructed:
        log.critical("the registry can't start yet; it will be restarted", reason=str(error))
        time.sleep(RETRY_PAUSE_S)
        os._exit(EXIT_FAILED)


def _fail_stop(error: RegistryError) -> None:
    # D4: fail-stop
    # A decision that was not written must not be answered: exit at once and load the written state.
    log.critical("the registry can't continue; it will be restarted", reason=str(error))
    os._exit(EXIT_FAILED)
