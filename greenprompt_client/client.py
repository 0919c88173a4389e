"""A client of the registry over HTTP: what a Prompting Service does, in a few calls.

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
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import stamina
from pydantic import TypeAdapter

from registry.accounting.report import MeasurementReport
from registry.accounting.window_report import WindowReport, WindowsPage
from registry.errors import RegistryError
from registry.wire.http import http_client
from registry.wire.schemas import (
    MAX_WAIT_S,
    MAX_WINDOWS,
    PROMPT_HEADER,
    WARMUP_HEADER,
    ErrorAnswer,
    HealthState,
    MachineState,
    MeasurementState,
    PromptingAnswer,
    RequestState,
)

T = TypeVar("T")

WAIT_S = 20.0
"""How long one poll waits for a change, seconds."""

RETRY_FOR_S = 30.0
"""How long a call that may be repeated is repeated while the registry restarts, seconds."""

CONNECT_FOR_S = 5.0
"""How long a command that a person typed tries to reach a registry that has not answered it yet, seconds: as long as
Serve's proxy is away when it is started again."""

LOOK_S = 1.0
"""How often a machine that is being drained is looked at, seconds."""

TENANT_HEADER = "X-Tenant"
"""Who asks; a name, not a proof."""

_PASSING = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)
"""Answers after which a call is repeated, if they say so; not 504, after which it would wait as long again."""

UNEXPECTED = "unexpected_answer"
"""``answer_code`` of an answer that is not a registry's."""

ENDED = frozenset({"released", "expired", "cancelled", "failed"})


class AnswerError(RegistryError):
    """The registry or a wrapper answered with an error. ``answer_code`` is its stable code.

    ``passing``: the same call can succeed in a while, without any change.
    """

    code = "answer_error"

    def __init__(self, status: int, answer_code: str, message: str, passing: bool = False) -> None:
        super().__init__(status, answer_code, message, passing)
        self.status, self.answer_code, self.message, self.passing = status, answer_code, message, passing

    def __str__(self) -> str:
        return f"{self.message} (HTTP {self.status}, {self.answer_code})"


class RequestEnded(RegistryError):
    """A request ended before its LLM was handed over; ``reason`` is the registry's."""

    code = "request_ended"

    def __init__(self, request_id: str, status: str, reason: str | None) -> None:
        super().__init__(request_id, status, reason)
        self.request_id, self.status, self.reason = request_id, status, reason

    def __str__(self) -> str:
        return f"request {self.request_id} is {self.status}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class HeldLease:
    """An LLM that is ours until we give it back."""

    state: RequestState
    url: str
    _http: httpx.Client

    def prompt(
        self, question: str, *, timeout_s: float = 600.0, prompt_id: str | None = None, warmup: bool = False
    ) -> dict[str, Any]:
        """The wrapper's answer to a question: ``answer``, ``sci_score``, ``usage`` and more.

        What it says of energy is provisional; ``window`` names the final energy window, see ``windows``. That tells
        ``prompt_id``, the same for the same question in every lease, and whether it was a ``warmup``, which counts in
        no figure.

        Asks again for up to RETRY_FOR_S seconds while the LLM has too many prompts or is being restarted, but never
        after ``timeout_s`` seconds without an answer. Several threads may prompt at once.

        Raises:
            AnswerError: the lease has ended (410), the LLM is not back yet (503), or the engine refused.
            httpx.HTTPError: the wrapper could not be reached, or took longer than ``timeout_s`` seconds.
        """
        url, body = f"{self.url}/process_prompt", {"question": question}
        headers = {WARMUP_HEADER: "true"} if warmup else {}
        if prompt_id is not None:
            headers[PROMPT_HEADER] = quote(prompt_id, safe="")
        # No decorator: what is repeated would be logged with its arguments, and the URL is the key.
        for attempt in stamina.retry_context(_may_ask_again, attempts=None, timeout=RETRY_FOR_S):
            with attempt:
                answer: dict[str, Any] = _checked(
                    self._http.post(url, json=body, headers=headers, timeout=timeout_s)
                ).json()
                return answer
        raise AssertionError("unreachable")


class RegistryClient:
    """Calls to one registry. Not for use by several threads at once, but for the prompts of a lease."""

    def __init__(
        self,
        base_url: str,
        *,
        tenant: str | None = None,
        timeout_s: float = 60.0,
        connect_for_s: float = RETRY_FOR_S,
    ) -> None:
        """Make a client of the ingress at ``base_url``, as in ``http://127.0.0.1:8000``; nothing is sent yet.

        ``tenant`` is whose turn in the queue its requests take; None: the registry's ``default``. ``connect_for_s`` is
        how long a call tries to connect, seconds, until the registry has answered for the first time.

        Raises:
            BadSettings: that is no URL, or the environment names certificates or a proxy that can't be used.
        """
        headers = {} if tenant is None else {TENANT_HEADER: tenant}
        self._connect_for_s = connect_for_s
        self._http = http_client(base_url, timeout_s=timeout_s, connect_s=connect_for_s, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

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
        """Ask for LLMs (llmconfigs); their request ids, in order.

        Repeated like ``status``: by its key the registry knows a request that it has seen.

        Args:
            measurement_id: > 0; yours to choose.
            llms: llmconfigs.
            priority: ``low``, ``normal`` or ``high`` among the measurements of the same tenant; None: ``normal``.
            gpu_type: None: it does not matter.
            grade: ``measurement`` for a machine at rest; None: the registry's own choice.
            like: id of an earlier request that is to be repeated.
            max_joules: what each of the leases may use up, J; None: no limit.
            max_gco2eq: the same in gCO2eq.
            idempotency_key: yours to choose, another one for each request; None: a random one. Give one to be able to
                ask for the same requests again after this call failed.

        Raises:
            AnswerError: the request was refused: 422 for what can't be served here, with the field and the figures.
            httpx.HTTPError: the registry could not be reached.
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
        response = self._insist("POST", "/promptingservice/request", {}, 60, json=body, headers=headers)
        return [accepted.requestId for accepted in _read(PromptingAnswer, response).requests]

    def status(self, request_id: str, *, wait_s: float = 0.0, seen: str | None = None) -> RequestState:
        """Where a request stands, once its status is another than ``seen`` or after ``wait_s`` seconds (at most 60).

        Without ``seen`` a deployed request is answered at once, and others when their status changes.
        Asks again for up to RETRY_FOR_S seconds while the registry restarts. Raises AnswerError, httpx.HTTPError.
        """
        params: dict[str, float | str] = {"wait": min(wait_s, MAX_WAIT_S)} if wait_s else {}
        if seen is not None:
            params["seen"] = seen
        return _read(RequestState, self._insist("GET", _path(request_id), params, wait_s + 60))

    def release(self, request_id: str) -> None:
        """Give an LLM back, or cancel a request. Repeated like ``status``; releasing twice is no error."""
        self._insist("DELETE", _path(request_id), {}, 60)

    def _insist(
        self, method: str, path: str, params: Mapping[str, float | str], timeout_s: float, **content: Any
    ) -> httpx.Response:
        """Call until there is an answer that is no passing error, for up to RETRY_FOR_S seconds."""
        begun_s = time.monotonic()
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, self._connect_for_s))

        def passes(error: Exception) -> bool:
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                return time.monotonic() - begun_s < self._connect_for_s
            return _is_passing(error)

        for attempt in stamina.retry_context(passes, attempts=None, timeout=RETRY_FOR_S):
            with attempt:
                response = self._http.request(method, path, params=params, timeout=timeout, **content)
                self._connect_for_s = RETRY_FOR_S  # it is there: it will come back
                return _checked(response)
        raise AssertionError("unreachable")

    def wait_until_deployed(
        self,
        request_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[RequestState], None] | None = None,
        poll_s: float = WAIT_S,
    ) -> RequestState:
        """Poll until the LLM is ours. ``on_change`` is told of every answer, at least each ``poll_s`` seconds.

        Raises:
            RequestEnded: it failed, was cancelled or expired.
            TimeoutError: ``timeout_s`` seconds have passed; the request still stands.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        state = self.status(request_id)
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
            state = self.status(request_id, wait_s=min(poll_s, left_s), seen=state.status)

    @contextmanager
    def lease(
        self,
        request_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[RequestState], None] | None = None,
    ) -> Iterator[HeldLease]:
        """Wait for an LLM as ``wait_until_deployed`` does, hold it for the block, and give it back whatever happens."""
        try:
            state = self.wait_until_deployed(request_id, timeout_s=timeout_s, on_change=on_change)
            assert state.url is not None  # deployed
            yield HeldLease(state, state.url, self._http)
        finally:
            self.release(request_id)

    def drain(self, machine_id: str) -> MachineState:
        """Have no more LLMs handed out on a machine. Repeated like ``status``; again is no error.

        Raises:
            AnswerError: no machine has this id; the text names those that there are.
            httpx.HTTPError: the registry could not be reached.
        """
        return _read(MachineState, self._insist("POST", f"{_machine_path(machine_id)}/drain", {}, 60))

    def undrain(self, machine_id: str) -> MachineState:
        """Have a machine used again. Repeated, and raises, like ``drain``."""
        return _read(MachineState, self._insist("DELETE", f"{_machine_path(machine_id)}/drain", {}, 60))

    def wait_until_drained(
        self,
        machine_id: str,
        *,
        timeout_s: float | None = None,
        on_look: Callable[[MachineState], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> MachineState:
        """Look at a machine until it is ``drained``, or is not being drained any more. ``on_look`` is told each time.

        Raises:
            TimeoutError: ``timeout_s`` seconds have passed; the draining goes on.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            state = _read(MachineState, self._insist("GET", _machine_path(machine_id), {}, 60))
            if on_look is not None:
                on_look(state)
            if state.drain != "draining":
                return state
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise TimeoutError(f"machine {machine_id} is still being drained after {timeout_s:g} s")
            sleep(LOOK_S)

    def machines(self) -> list[MachineState]:
        """All machines that the registry knows, with their wrappers."""
        return _read(list[MachineState], _checked(self._http.get("/machines")))

    def measurement(self, measurement_id: int) -> MeasurementState:
        """A measurement with all its requests. Repeated like ``status``. Raises AnswerError (404: there is none)."""
        path, requests, after = f"/measurements/{measurement_id}", list[RequestState](), 0
        while True:
            page = _read(MeasurementState, self._insist("GET", path, {"after": after}, 60))
            requests += page.requests
            if page.next is None:
                return page.model_copy(update={"requests": requests})
            after = page.next

    def health(self) -> HealthState:
        """How the registry is, also where it can serve nobody at the moment."""
        response = self._http.get("/healthz")
        try:
            return _read(HealthState, response)
        except AnswerError:
            return _read(HealthState, _checked(response))

    def report(self, measurement_id: int) -> MeasurementReport:
        """What a measurement cost, by LLM; for its windows see ``windows``. Raises AnswerError, httpx.HTTPError."""
        path = f"/measurements/{measurement_id}/report"
        return _read(MeasurementReport, _checked(self._http.get(path)))

    def windows(
        self, measurement_id: int, *, request_id: str | None = None, detail: bool = False
    ) -> Iterator[WindowReport]:
        """Yield the final energy windows of a measurement, or of one of its leases, that are written down by now.

        With ``detail`` each has its whole record. Repeated like ``status``. Raises AnswerError (404: there is no such
        measurement), httpx.HTTPError.
        """
        params: dict[str, float | str] = {"limit": MAX_WINDOWS}
        if request_id is not None:
            params["request"] = request_id
        if detail:
            params["detail"] = "true"
        while True:
            page = _read(WindowsPage, self._insist("GET", f"/measurements/{measurement_id}/windows", params, 60))
            yield from page.windows
            if page.next is None:
                return
            params["after"] = page.next

    def get(self, path: str) -> Any:
        """The JSON of one of the information pages: /healthz, /machines, /llms, /measurements/{id}."""
        return _checked(self._http.get(path)).json()


def _path(request_id: str) -> str:
    return f"/promptingservice/request/{quote(request_id, safe='')}"


def _machine_path(machine_id: str) -> str:
    return f"/machines/{quote(machine_id, safe='')}"


def _read(kind: type[T], response: httpx.Response) -> T:
    """The body of an answer. Raises AnswerError when it is not what a registry answers."""
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValueError:
        text = "what answers there is no registry, or one that this client does not understand"
        raise AnswerError(response.status_code, UNEXPECTED, text) from None


def _is_passing(error: Exception) -> bool:
    """A refused connection passes, as the registry or its proxy is being restarted; of an answer it says so itself."""
    return isinstance(error, httpx.TransportError) or (isinstance(error, AnswerError) and error.passing)


def _may_ask_again(error: Exception) -> bool:
    """As ``_is_passing``; but who got no answer in all the time there was would wait as long again."""
    return _is_passing(error) and not isinstance(error, httpx.ReadTimeout)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        answer = ErrorAnswer.model_validate_json(response.content)
    except ValueError:
        text = response.text.strip().partition("\n")[0][:200] or response.reason_phrase
        # A proxy's, whose server is being restarted.
        passing = response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        raise AnswerError(response.status_code, UNEXPECTED, text, passing) from None
    passing = answer.retryable and response.status_code in _PASSING
    raise AnswerError(response.status_code, answer.code, answer.message, passing)
