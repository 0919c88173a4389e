"""An HTTP client of the registry, for a Prompting Service in a few calls.

with RegistryClient("http://127.0.0.1:8000") as registry:
    for request_id in registry.request(measurement_id=1, llms=[llmconfig]):
        with registry.lease(request_id) as lease:
            print(lease.prompt("What is a climate cost?"))
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import httpx

from greenprompt_client.answers import AnswerError, NotDeployed, RequestEnded, checked, read
from greenprompt_client.calls import Calls
from greenprompt_client.held_lease import HeldLease
from registry.accounting.report import MeasurementReport
from registry.accounting.window_report import WindowReport, WindowsPage
from registry.wire.http import require_encrypted
from registry.wire.schemas import (
    MAX_EVENTS,
    MAX_WAIT_S,
    MAX_WINDOWS,
    AuditEntry,
    AuditPage,
    EventState,
    HealthState,
    KeyState,
    LLMState,
    MachineState,
    MeasurementState,
    NewKey,
    PromptingAnswer,
    RequestState,
)

WAIT_S = 20.0
"""How long one poll waits for a change, seconds."""

LOOK_S = 1.0
"""Seconds between checks of a machine that is being drained."""

ENDED = frozenset({"released", "expired", "cancelled", "failed"})


class RegistryClient(Calls):
    """A client of one registry. Not thread-safe, except for the prompts of a lease."""

    def request(
        self,
        measurement_id: int,
        llms: Sequence[Mapping[str, Any]],
        *,
        priority: str | None = None,
        gpu_type: str | None = None,
        grade: str | None = None,
        like: str | None = None,
        max_joules: float | None = None,
        max_gco2eq: float | None = None,
        idempotency_key: str | None = None,
    ) -> list[str]:
        """Request LLMs (llmconfigs); return their request ids, in order.

        Retried like ``status``: the registry recognises a repeated request by its key.

        Args:
            measurement_id: > 0; chosen by the caller.
            llms: llmconfigs.
            priority: ``low``, ``normal`` or ``high`` among the measurements of the same tenant; None: ``normal``.
            gpu_type: Required GPU type; None: any.
            grade: ``measurement`` for an idle machine; None: the registry's default.
            like: Id of an earlier request to be repeated.
            max_joules: Energy limit of each lease, J; None: no limit.
            max_gco2eq: Emission limit of each lease, gCO2eq; None: no limit.
            idempotency_key: Chosen by the caller, a different one for each request; None: a random one. Set it to be
                able to repeat the same request after this call failed.

        Raises:
            AnswerError: The request was refused: 422 if it can't be served here; the text names the field and the
                figures.
            httpx.HTTPError: The registry could not be reached.
        """
        options: dict[str, str | float | None] = {
            "priority": priority,
            "gpuType": gpu_type,
            "grade": grade,
            "like": like,
        }
        options |= {"maxJoules": max_joules, "maxGco2eq": max_gco2eq}
        body: dict[str, Any] = {"measurementId": measurement_id, "llms": list(llms)}
        body |= {name: value for name, value in options.items() if value is not None}
        headers = {"Idempotency-Key": uuid.uuid4().hex if idempotency_key is None else idempotency_key}
        path, created = "/promptingservice/request", HTTPStatus.CREATED
        response = self._insist("POST", path, {}, 60, created, json=body, headers=headers)
        return [accepted.requestId for accepted in read(PromptingAnswer, response).requests]

    def status(self, request_id: str, *, wait_s: float = 0.0, seen: str | None = None) -> RequestState:
        """Return a request's state once its status differs from ``seen``, or after ``wait_s`` seconds (at most 60).

        Without ``seen``: at once if it is deployed or has ended, else when the status changes. Retries for up to
        RETRY_FOR_S seconds while the registry restarts. Above a rate limit it waits as long as the answer says, also
        if that is longer. Raises AnswerError, httpx.HTTPError.
        """
        return self._status(request_id, wait_s, seen, None)

    def _status(self, request_id: str, wait_s: float, seen: str | None, deadline_s: float | None) -> RequestState:
        params: dict[str, float | str] = {"wait": min(wait_s, MAX_WAIT_S)} if wait_s else {}
        if seen is not None:
            params["seen"] = seen
        return read(RequestState, self._insist("GET", _path(request_id), params, wait_s + 60, deadline_s=deadline_s))

    def keep_alive(self, request_id: str) -> RequestState:
        """Restart the idle time of a lease. Retried, and raises, like ``status``."""
        return read(RequestState, self._insist("POST", f"{_path(request_id)}/keepalive", {}, 60))

    def events(self, request_id: str, *, after: int = 0) -> Iterator[EventState]:
        """Yield the events of a request with a number > ``after``. Retried, and raises, like ``status``."""
        while True:
            params: dict[str, float | str] = {"after": after, "limit": MAX_EVENTS}
            page = read(list[EventState], self._insist("GET", f"{_path(request_id)}/events", params, 60))
            yield from page
            if len(page) < MAX_EVENTS:
                return
            after = page[-1].event

    def release(self, request_id: str) -> None:
        """Release an LLM, or cancel a request. Retried, and raises, like ``status``. Idempotent."""
        self._insist("DELETE", _path(request_id), {}, 60, HTTPStatus.NO_CONTENT)

    def wait_until_deployed(
        self,
        request_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[RequestState], None] | None = None,
        poll_s: float = WAIT_S,
    ) -> RequestState:
        """Poll until the LLM is deployed. ``on_change`` gets every state, at least every ``poll_s`` seconds.

        Raises:
            AnswerError, httpx.HTTPError: As in ``status``.
            RequestEnded: It failed, was cancelled or expired.
            TimeoutError: ``timeout_s`` seconds have passed; the request remains.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        state = self._status(request_id, 0.0, None, deadline_s)
        while True:
            if on_change is not None:
                on_change(state)
            if state.status == "deployed":
                return state
            if state.status in ENDED:
                raise RequestEnded(request_id, state.status, state.reason)
            left_s = poll_s if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"request {request_id} is still {state.status} after {timeout_s} s")
            state = self._status(request_id, min(poll_s, left_s), state.status, deadline_s)

    @contextmanager
    def lease(
        self,
        request_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[RequestState], None] | None = None,
    ) -> Iterator[HeldLease]:
        """Wait for an LLM like ``wait_until_deployed``, hold it during the block, and release it in any case.

        Raises BadSettings if the registry is called by https, but the URL of the lease is not https.
        """
        try:
            yield self.held(self.wait_until_deployed(request_id, timeout_s=timeout_s, on_change=on_change))
        finally:
            self.release(request_id)

    def held(self, state: RequestState) -> HeldLease:
        """Return the lease of a deployed request, for prompts. The lease remains the caller's to release.

        Raises:
            NotDeployed: The request waits, has ended (RequestEnded), or its address is not shown to this key.
            BadSettings: The registry is called by https, but the URL of the lease is not https.
        """
        if state.url is None:
            kind = RequestEnded if state.status in ENDED else NotDeployed
            hidden = "its address is shown to its own tenant only" if state.status == "deployed" else None
            raise kind(state.requestId, state.status, hidden or state.reason)
        require_encrypted(self._prompts.base_url, httpx.URL(state.url))
        return HeldLease(state, state.url, self._prompts)

    def drain(self, machine_id: str) -> MachineState:
        """Assign no more LLMs to a machine. Retried like ``status``. Idempotent.

        Raises:
            AnswerError: No machine has this id; the text names the existing ones.
            httpx.HTTPError: The registry could not be reached.
        """
        return read(MachineState, self._insist("POST", f"{_machine_path(machine_id)}/drain", {}, 60))

    def undrain(self, machine_id: str) -> MachineState:
        """Use a machine again. Retried, and raises, like ``drain``."""
        return read(MachineState, self._insist("DELETE", f"{_machine_path(machine_id)}/drain", {}, 60))

    def wait_until_drained(
        self,
        machine_id: str,
        *,
        timeout_s: float | None = None,
        on_look: Callable[[MachineState], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> MachineState:
        """Wait until a machine is ``drained`` or no longer draining. ``on_look`` gets the state at each check.

        Raises:
            AnswerError, httpx.HTTPError: As in ``drain``.
            TimeoutError: ``timeout_s`` seconds have passed; the draining continues.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            path = _machine_path(machine_id)
            state = read(MachineState, self._insist("GET", path, {}, 60, deadline_s=deadline_s))
            if on_look is not None:
                on_look(state)
            if state.drain != "draining":
                return state
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise TimeoutError(f"machine {machine_id} is still being drained after {timeout_s:g} s")
            sleep(LOOK_S)

    def machines(self) -> list[MachineState]:
        """Return all known machines, with their wrappers. Raises AnswerError, httpx.HTTPError."""
        return read(list[MachineState], checked(self._http.get("/machines")))

    def llms(self) -> list[LLMState]:
        """Return the LLMs that run or start. Retried, and raises, like ``status``."""
        return read(list[LLMState], self._insist("GET", "/llms", {}, 60))

    def measurement(self, measurement_id: int) -> MeasurementState:
        """Return a measurement with all its requests. Retried like ``status``. Raises AnswerError (404: unknown)."""
        path, requests, after = f"/measurements/{measurement_id}", list[RequestState](), 0
        while True:
            page = read(MeasurementState, self._insist("GET", path, {"after": after}, 60))
            requests += page.requests
            if page.next is None:
                return page.model_copy(update={"requests": requests})
            after = page.next

    def health(self) -> HealthState:
        """Return the registry's health, even if it can't serve requests now. Raises AnswerError, httpx.HTTPError."""
        response = self._http.get("/healthz")
        try:
            return read(HealthState, response)
        except AnswerError:
            return read(HealthState, checked(response))

    def report(self, measurement_id: int) -> MeasurementReport:
        """Return a measurement's energy and carbon by LLM, without windows. Raises AnswerError, httpx.HTTPError."""
        path = f"/measurements/{measurement_id}/report"
        return read(MeasurementReport, checked(self._http.get(path)))

    def windows(
        self, measurement_id: int, *, request_id: str | None = None, detail: bool = False
    ) -> Iterator[WindowReport]:
        """Yield the final energy windows so far of a measurement, or of one of its leases.

        With ``detail``, each has its complete record. Retried like ``status``. Raises AnswerError (404: unknown
        measurement), httpx.HTTPError.
        """
        params: dict[str, float | str] = {"limit": MAX_WINDOWS}
        if request_id is not None:
            params["request"] = request_id
        if detail:
            params["detail"] = "true"
        while True:
            page = read(WindowsPage, self._insist("GET", f"/measurements/{measurement_id}/windows", params, 60))
            yield from page.windows
            if page.next is None:
                return
            params["after"] = page.next

    def keys(self) -> list[KeyState]:
        """Return all API keys of the registry, without their texts. Raises AnswerError, httpx.HTTPError."""
        return read(list[KeyState], checked(self._http.get("/keys")))

    def create_key(self, role: str, *, tenant: str | None = None, name: str = "", days: float | None = None) -> NewKey:
        """Make an API key. Not retried: a lost answer leaves a key that nobody knows. Raises as ``keys``."""
        body = {"role": role, "tenant": tenant, "name": name, "days": days}
        return read(NewKey, checked(self._http.post("/keys", json=body), HTTPStatus.CREATED))

    def revoke_key(self, key_id: str) -> None:
        """Refuse an API key from now on. Retried like ``status``. Idempotent. Raises as ``keys``."""
        self._insist("DELETE", f"/keys/{quote(key_id, safe='')}", {}, 60, HTTPStatus.NO_CONTENT)

    def audit(
        self,
        *,
        since: datetime | None = None,
        before: datetime | None = None,
        tenant: str | None = None,
        key_id: str | None = None,
    ) -> Iterator[AuditEntry]:
        """Yield the registry's audit, in the order in which it was stored. Needs an operator's key.

        Only calls with ``since`` <= time < ``before`` (aware), for a tenant, with one key; None: all. Retried, and
        raises, like ``status``.
        """
        wanted = {"since": _utc(since), "before": _utc(before), "tenant": tenant, "key": key_id}
        params: dict[str, float | str] = {name: text for name, text in wanted.items() if text is not None}
        while True:
            page = read(AuditPage, self._insist("GET", "/audit", params, 60))
            yield from page.entries
            if page.next is None:
                return
            params["after"] = page.next

    def get(self, path: str) -> Any:
        """Return the JSON of /healthz, /machines, /llms or /measurements/{id}. Raises AnswerError, httpx.HTTPError."""
        return checked(self._http.get(path)).json()


def _utc(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _path(request_id: str) -> str:
    return f"/promptingservice/request/{quote(request_id, safe='')}"


def _machine_path(machine_id: str) -> str:
    return f"/machines/{quote(machine_id, safe='')}"
