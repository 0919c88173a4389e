"""A fake of the registry actor, for tests of the ingress: stores requests, and fails on command."""

from __future__ import annotations

import json
from typing import Any

from registry.accounting.windows import KeptWindow
from registry.core.events import NewRequest
from registry.core.records import Measurement, MeasurementKey, Request
from registry.errors import LeaseEnded, NoSuchLease, UnknownMachine, UnknownMeasurement, UnknownRequest
from registry.service.keys import Access
from registry.service.news import News
from registry.service.service import Idempotency
from registry.store.rows import AuditFilter, AuditRow, StoredAuditPage, StoredAuditRow, WindowPlace
from registry.wire.schemas import (
    AcceptedRequest,
    EventState,
    HealthState,
    LLMState,
    MachineState,
    MeasurementState,
    PromptingAnswer,
    RequestState,
    WrapperState,
)
from registry.wire.words import Grade, Priority, Role
from tests.support.energy_windows import experiment_rows

CREATED = "2026-01-01T00:00:00.000Z"
BASE = "http://127.0.0.1:8000"
TOKEN = "t0ken"
"""Token of the only lease."""
ENDED = "ended"
"""Token of a lease that was released."""


class FakeRegistry:
    """The actor, called by ``call(method, *args, wait_s=…)``.

    ``calls``: the calls so far. ``audited``: their rows for the audit. ``error``: if set, it is raised in place of an
    answer.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], float]] = []
        self.audited: list[AuditRow] = []
        self.error: Exception | None = None
        self.health = "ok"
        self.draining = False
        self.requests: dict[str, RequestState] = {}
        self.news = News()

    async def call(self, method: str, *args: object, wait_s: float = 0.0) -> Any:
        self.audited += [arg for arg in args if isinstance(arg, AuditRow)]
        # Every caller may do everything here.
        args = tuple(arg for arg in args if not isinstance(arg, Access | AuditRow))
        self.calls.append((method, args, wait_s))
        if self.error is not None:
            raise self.error
        if method == "changes":
            return await self._changes(str(args[0]), None if args[1] is None else int(str(args[1])))
        return getattr(self, f"_{method}")(*args)

    def _request(
        self,
        measurement_id: int,
        llms: list[NewRequest],
        tenant: str,
        priority: Priority | None,
        gpu_type: str | None,
        idempotency: Idempotency | None,
        grade: Grade,
        like_request_id: str | None,
    ) -> str:
        states = [
            RequestState(
                requestId=new.request_id,
                llmconfig=json.loads(new.llmconfig),
                status="queued",
                measurementId=measurement_id,
                tenant=tenant,
                address=None,
                link=f"{BASE}/promptingservice/request/{new.request_id}",
                position=1,
                notes=list(new.notes),
                grade=grade.value,
                like=like_request_id,
                createdAt=CREATED,
            )
            for new in llms
        ]
        self.requests |= {state.requestId: state for state in states}
        accepted = [AcceptedRequest.model_validate(state, from_attributes=True) for state in states]
        return PromptingAnswer(requests=accepted).model_dump_json()

    def _state(self, request_id: str) -> tuple[str, str]:
        if request_id not in self.requests:
            raise UnknownRequest(request_id)
        state = self.requests[request_id]
        return state.status, state.model_dump_json()

    async def _changes(self, life: str, place: int | None) -> tuple[str, int, list[str] | None]:
        return "life", *await self.news.after(place if life == "life" else None, 60.0)

    def change(self, request_id: str, **fields: Any) -> None:
        """Change fields of a request, and wake the calls that wait for a change."""
        self.requests[request_id] = self.requests[request_id].model_copy(update=fields)
        self.news.add([request_id])

    def _events(self, request_id: str, after: int, limit: int) -> str:
        self._state(request_id)
        first = EventState(event=after + 1, what="LeaseRequested", at=CREATED, status="queued")
        return json.dumps([first.model_dump(mode="json")])

    def _keep_alive(self, request_id: str) -> str:
        return self._state(request_id)[1]

    def _release(self, request_id: str) -> None:
        self._state(request_id)

    def _withdraw(self, request_ids: list[str], _tenant: str, _key: str | None, _audit: None = None) -> None:
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def _lease_url(self, token: str) -> str:
        if token == ENDED:
            raise LeaseEnded("released")
        if token != TOKEN:
            raise NoSuchLease
        return f"{BASE}/wrappers/a-0/{TOKEN}"

    def _measurement(self, key: MeasurementKey, _after_seq: int = 0, _limit: int = 1) -> str:
        measurement_id = key[1]
        requests = [state for state in self.requests.values() if (state.tenant, state.measurementId) == key]
        if not requests:
            raise UnknownMeasurement(measurement_id)
        return MeasurementState(
            measurementId=measurement_id, machine=None, flags=[], createdAt=CREATED, requests=requests
        ).model_dump_json()

    def _measured(self, key: MeasurementKey, after_seq: int, limit: int) -> tuple[Measurement, list[Request]]:
        self._measurement(key)
        measurement, requests, _ = experiment_rows(key[1])
        return measurement, [each for each in requests if each.seq > after_seq][:limit]

    def _windows(
        self, key: MeasurementKey, request_id: str | None, after: WindowPlace | None, limit: int
    ) -> tuple[list[Request], list[KeptWindow]]:
        self._measurement(key)
        _, requests, windows = experiment_rows(key[1])
        found = [
            each
            for each in windows
            if (after is None or WindowPlace(each.window.begun_s, each.window.window_id) > after)
            and request_id in (None, each.window.request_id)
        ]
        return requests, sorted(found, key=lambda each: (each.window.begun_s, each.window.window_id))[:limit]

    def _machines(self) -> str:
        return f"[{self._machine('a')}]"

    def _machine(self, machine_id: str) -> str:
        if machine_id != "a":
            raise UnknownMachine(machine_id, "there are a")
        wrapper = WrapperState(wrapper="a-0", status="idle", gpus=0, llm=None, leased=False)
        return MachineState(
            machine="a",
            address="10.0.0.1",
            alive=True,
            gpus=0,
            gpuType=None,
            memoryBytes=None,
            drain="draining" if self.draining else None,
            wrappers=[wrapper],
        ).model_dump_json()

    def _drain(self, machine_id: str) -> str:
        self.draining = True
        return self._machine(machine_id)

    def _undrain(self, machine_id: str) -> str:
        self.draining = False
        return self._machine(machine_id)

    def _llms(self) -> str:
        llm = LLMState(
            model="org/tiny",
            modeltyp="text-generation",
            fingerprint="0" * 16,
            deployment={},
            machine="a",
            wrapper="a-0",
            status="ready",
        )
        return json.dumps([llm.model_dump(mode="json")])

    def _audit(self, wanted: AuditFilter, after: int, limit: int) -> StoredAuditPage:
        row = AuditRow("DELETE", "/keys/{key_id}", 204, key_id="0a1b2c3d", role=Role.OPERATOR, at_s=1_800_000_000.0)
        return StoredAuditPage((StoredAuditRow(after + 1, row),)[:limit], None)

    def _add_refusals(self, rows: list[tuple[AuditRow, float]]) -> None:
        pass

    def _health(self) -> tuple[str, str]:
        state = HealthState(status=self.health, wrappers=1, usable=1, queued=0, version="0")
        return state.status, state.model_dump_json()
