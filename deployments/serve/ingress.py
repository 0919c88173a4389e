"""The HTTP ingress: validates requests, maps llmconfigs, calls the registry actor, turns errors into responses.

It is stateless, so any number of replicas may run. While the registry actor restarts, calls are retried for a few
seconds; that is safe because the ids of new requests are created here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import pathlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any, Literal

import ray
import stamina
from fastapi import APIRouter, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import RayActorError, RayError, RayTaskError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from deployments.error_answers import RETRY_AFTER_S, error_answer, fastapi_detail, registry_error
from deployments.machine.disk import disk_problem
from deployments.models.args.mapping import map_llmconfig
from deployments.models.checkpoints import Checkpoints, checkpoints_anywhere
from deployments.models.sources import ModelSources
from deployments.serve.actor import ACTOR_NAME, NAMESPACE
from deployments.serve.energy_pages import EnergyPages
from deployments.serve.polls import Polls
from deployments.serve.prompting_service import TITLE, JSONBody, root_router
from deployments.serve.withdrawals import Withdrawals
from registry.accounting.report import MeasurementReport
from registry.accounting.window_report import WindowsPage
from registry.core.events import NewRequest
from registry.core.records import LLMSpec
from registry.errors import InternalError, NoCredentials, RegistryError, RegistryUnavailable
from registry.service.service import Idempotency
from registry.wire.schemas import (
    MAX_EVENTS,
    MAX_ID,
    MAX_REQUESTS,
    MAX_WAIT_S,
    MAX_WINDOWS,
    AcceptedRequest,
    ErrorAnswer,
    EventState,
    HealthState,
    LLMState,
    MachineState,
    MeasurementState,
    PromptingAnswer,
    PromptingRequest,
    RequestState,
    TenantName,
)
from registry.wire.words import RequestStatus, canonical_json

RETRY_FOR_S = 10.0
"""How long a call is retried while the registry actor does not answer, seconds."""

CALL_TIMEOUT_S = 30.0
"""Longest wait for one answer of the actor, beyond the wait that was requested, seconds."""

AT_ONCE = {"state": 64, "events": 8, "measurement": 4, "measured": 4, "windows": 4, "machines": 4, "llms": 4}
"""Most concurrent calls of each method that only reads.

The actor handles all calls in order, so control and health calls wait behind at most this many. (Ray's concurrency
groups don't help: each is a thread with its own event loop.)
"""

DESCRIPTION = """
Hands LLMs out exclusively. Ask with `POST /promptingservice/request`, poll the `link` of each request until its
status is `deployed`, prompt the LLM at `url`, and give it back with `DELETE`.

Status words: `queued` → `deploying` → `deployed` → `released`; or `expired` (the lease ran out), `cancelled`
(released before it was handed over), `failed` (see `reason`).

Send an `Idempotency-Key` with each POST: it can then be repeated safely when its answer was lost.

Errors have one shape, `ErrorAnswer`; below `/v1` of an LLM's `url` they have OpenAI's, `{"error": {…}}`.
"""

IDEMPOTENCY_KEY = (
    "Yours to choose, another one for each request, e.g. a UUID. The same key with the same JSON (whatever its spaces "
    "and the order of its fields) is answered with the requests that it made the first time; with another body it is a "
    "409. Keys belong to the tenant and are kept as long as their requests."
)


@dataclass(frozen=True, slots=True)
class IngressConfig:
    """The settings that the ingress needs. ``state_dir`` is checked if the registry does not answer."""

    sources: ModelSources
    allow_remote_code: tuple[str, ...]
    state_dir: pathlib.Path = pathlib.Path("/")


class RegistryClient:
    """Calls the registry actor and survives its restarts."""

    def __init__(self, state_dir: pathlib.Path) -> None:
        self._state_dir = state_dir
        self._actor: Any = None
        self._lanes = {method: asyncio.Semaphore(most) for method, most in AT_ONCE.items()}

    async def call(self, method: str, *args: object, wait_s: float = 0.0) -> Any:
        """Return the result of a method of the actor.

        Raises:
            RegistryError: Raised by the registry itself.
            RegistryUnavailable: It did not answer for RETRY_FOR_S seconds.
        """
        try:
            async for attempt in stamina.retry_context(
                on=(RayActorError, _NoActor), attempts=None, timeout=RETRY_FOR_S, wait_initial=0.05, wait_max=0.5
            ):
                with attempt:
                    async with self._lanes.get(method, nullcontext()):
                        return await self._once(method, args, wait_s)
        except (RayError, _NoActor) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RegistryError):
                raise cause from None
            if isinstance(error, RayTaskError):
                raise InternalError(f"{method}: {type(cause or error).__name__}: {cause or error}") from error
            raise self._unavailable(type(error).__name__) from error
        raise AssertionError("unreachable")

    async def _once(self, method: str, args: Sequence[object], wait_s: float) -> Any:
        if self._actor is None:
            try:
                self._actor = ray.get_actor(ACTOR_NAME, NAMESPACE)
            except ValueError as error:
                raise _NoActor from error
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + wait_s):
                return await getattr(self._actor, method).remote(*args)
        except TimeoutError as error:
            raise self._unavailable(f"no answer within {CALL_TIMEOUT_S + wait_s:g} s") from error
        except RayActorError:
            self._actor = None
            raise

    def _unavailable(self, reason: str) -> RegistryUnavailable:
        """Return the error, naming a full disk as its cause: that ends the registry and prevents its restart."""
        return RegistryUnavailable("; ".join(filter(None, (reason, disk_problem(self._state_dir)))))


class _NoActor(Exception):
    """No registry actor has the name (yet)."""


def build_app(
    config: IngressConfig, call: Callable[..., Awaitable[Any]], checkpoints: Checkpoints | None = None
) -> FastAPI:
    """Return the FastAPI app around ``call(method, *args, wait_s=…)`` of the registry.

    ``checkpoints`` estimates the memory of LLMs; None leaves it unknown.
    """
    app = FastAPI(title=TITLE, description=DESCRIPTION, version=version("greenprompt-llm-registry"))
    withdrawals, polls = Withdrawals(call), Polls(call)
    errors: dict[int | str, dict[str, Any]] = {422: {"model": ErrorAnswer}, 503: {"model": ErrorAnswer}}
    unknown: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}, **errors}

    prompting = APIRouter(route_class=JSONBody)

    @prompting.post(
        "/promptingservice/request",
        status_code=201,
        response_model=PromptingAnswer,
        responses={409: {"model": ErrorAnswer}, 429: {"model": ErrorAnswer}, **errors},
    )
    async def request_llms(
        body: PromptingRequest,
        idempotency_key: Annotated[
            str | None, Header(min_length=1, max_length=255, description=IDEMPOTENCY_KEY)
        ] = None,
        x_tenant: Annotated[TenantName, Header()] = "default",
    ) -> Response:
        """Request one or more LLMs for a measurement; they are handed out one after another, on one machine."""
        llms = await _mapped_llms(body, config, checkpoints)
        with withdrawals.unless_answered([llm.request_id for llm in llms], x_tenant, idempotency_key):
            idempotency = None if idempotency_key is None else Idempotency(idempotency_key, _sha256(body))
            wanted = body.measurementId, llms, x_tenant, body.priority_given, body.gpuType, idempotency
            states = json.loads(await call("request", *wanted, body.grade, body.like))
        accepted = [AcceptedRequest.model_validate(state) for state in states]
        return _json_response(PromptingAnswer(requests=accepted).model_dump_json(), status=201)

    app.include_router(prompting)

    @app.get("/promptingservice/request/{request_id}", response_model=RequestState, responses=unknown)
    async def request_status(
        request_id: str,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for news")] = 0.0,
        seen: Annotated[
            RequestStatus | None, Query(description="The status that you know: any other is news, at once")
        ] = None,
    ) -> Response:
        """Return the state of a request; with ``wait``, once its status changes or that many seconds have passed.

        A request that is `deployed` or has ended is answered at once. To wait for the end of a lease, add
        `seen=deployed`.
        """
        return _json_response(await polls.state(request_id, wait, seen))

    @app.get("/promptingservice/request/{request_id}/events", response_model=list[EventState], responses=unknown)
    async def request_events(
        request_id: str,
        after: Annotated[int, Query(ge=0, le=MAX_ID)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = MAX_EVENTS,
    ) -> Response:
        """Return the events of a request, oldest first; ``after`` is the number of the last event seen."""
        return _json_response(await call("events", request_id, after, limit))

    @app.delete("/promptingservice/request/{request_id}", status_code=204, responses=unknown)
    async def release_llm(request_id: str) -> Response:
        """Release the LLM, or cancel a request that is still waiting. Idempotent."""
        await call("release", request_id)
        return Response(status_code=204)

    @app.post("/promptingservice/request/{request_id}/keepalive", response_model=RequestState, responses=unknown)
    async def keep_alive(request_id: str) -> Response:
        """Keep the lease alive: restart its idle time."""
        return _json_response(await call("keep_alive", request_id))

    _add_measurements(app, call, unknown)

    @app.get("/machines", response_model=list[MachineState], responses=errors)
    async def machines() -> Response:
        """Return every LLM Machine, its wrappers and their LLMs."""
        return _json_response(await call("machines"))

    @app.get("/machines/{machine_id}", response_model=MachineState, responses=unknown)
    async def machine(machine_id: str) -> Response:
        """Return one LLM Machine."""
        return _json_response(await call("machine", machine_id))

    @app.post("/machines/{machine_id}/drain", response_model=MachineState, responses=unknown)
    async def drain(machine_id: str) -> Response:
        """Assign no more LLMs to the machine. Running leases go on; then its wrappers are removed. Idempotent."""
        return _json_response(await call("drain", machine_id))

    @app.delete("/machines/{machine_id}/drain", response_model=MachineState, responses=unknown)
    async def undrain(machine_id: str) -> Response:
        """Use the machine again; its wrappers are recreated. Idempotent."""
        return _json_response(await call("undrain", machine_id))

    @app.get("/llms", response_model=list[LLMState], responses=errors)
    async def llms() -> Response:
        """Return every LLM that is running or starting."""
        return _json_response(await call("llms"))

    @app.get("/healthz", response_model=HealthState, responses={503: {"model": HealthState | ErrorAnswer}})
    async def health() -> Response:
        """Return whether requests can be served; 503 while no wrapper is usable."""
        text = await call("health")
        if json.loads(text)["status"] == "ok":
            return _json_response(text)
        return Response(text, 503, {"retry-after": str(RETRY_AFTER_S)}, media_type="application/json")

    app.include_router(root_router(call))
    app.exception_handler(RegistryError)(_on_registry_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(Exception)(_on_fault)
    return app


def _add_measurements(
    app: FastAPI, call: Callable[..., Awaitable[Any]], unknown: dict[int | str, dict[str, Any]]
) -> None:
    """Add the routes for measurements and their energy."""
    energy = EnergyPages(call)

    @app.get("/measurements/{measurement_id}", response_model=MeasurementState, responses=unknown)
    async def measurement(
        measurement_id: Annotated[int, Path(gt=0, le=MAX_ID)],
        after: Annotated[int, Query(ge=0, le=MAX_ID, description="`next` of the page before")] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_REQUESTS, description="Requests in a page")] = MAX_REQUESTS,
        x_tenant: Annotated[TenantName, Header()] = "default",
    ) -> Response:
        """Return a measurement of the caller's tenant with a page of its requests, in order."""
        return _json_response(await call("measurement", (x_tenant, measurement_id), after, limit))

    @app.get(
        "/measurements/{measurement_id}/report",
        response_model=MeasurementReport,
        responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, **unknown},
    )
    async def report(
        measurement_id: Annotated[int, Path(gt=0, le=MAX_ID)],
        as_: Annotated[
            Literal["json", "csv"] | None,
            Query(alias="format", description="csv: one row per window; the same by Accept: text/csv"),
        ] = None,
        accept: Annotated[str, Header()] = "*/*",
        x_tenant: Annotated[TenantName, Header()] = "default",
    ) -> Response:
        """Return the energy of a measurement of the caller's tenant, by LLM. Windows: see `/windows`, or the CSV."""
        key = x_tenant, measurement_id
        if as_ == "csv" or (as_ is None and "text/csv" in accept):
            parts = energy.csv(key)
            first = await anext(parts)  # raises here, before anything is sent, if there is no such measurement
            return StreamingResponse(_joined(first, parts), media_type="text/csv")
        return _json_response(await energy.report(key))

    @app.get("/measurements/{measurement_id}/windows", response_model=WindowsPage, responses=unknown)
    async def windows(
        measurement_id: Annotated[int, Path(gt=0, le=MAX_ID)],
        after: Annotated[str | None, Query(max_length=1024, description="`next` of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_WINDOWS)] = MAX_WINDOWS,
        request: Annotated[str | None, Query(max_length=255, description="requestId: of its lease only")] = None,
        detail: Annotated[bool, Query(description="Whether the records of wrappers go along, all of them")] = False,
        x_tenant: Annotated[TenantName, Header()] = "default",
    ) -> Response:
        """Return the final energy windows of the caller's measurement, a page at a time, ordered by start time.

        A window appears some seconds after its prompt. To get late ones, start again from the first page.
        """
        page = await energy.windows((x_tenant, measurement_id), request, after, limit, detail=detail)
        return _json_response(page)


async def _mapped_llms(
    body: PromptingRequest, config: IngressConfig, checkpoints: Checkpoints | None
) -> list[NewRequest]:
    """Return a POST's LLMs with new ids, as engine arguments, with an estimate of their memory."""
    llms = [
        NewRequest(
            uuid.uuid4().hex,
            *mapped(config, llm.model_dump(), f"llms[{n}]"),
            max_j=body.maxJoules,
            max_g=body.maxGco2eq,
        )
        for n, llm in enumerate(body.llms)
    ]
    if checkpoints is not None:
        places = (config.sources.locate(llm.spec.model) for llm in llms)
        memory = await asyncio.gather(*map(checkpoints.memory, places, (llm.spec for llm in llms)))
        llms = [replace(llm, memory=takes) for llm, takes in zip(llms, memory, strict=True)]
    return llms


def _sha256(body: PromptingRequest) -> str:
    """Return a hash that ignores spaces, escapes and the order of fields."""
    return hashlib.sha256(canonical_json(body.model_dump(mode="json", exclude_unset=True)).encode()).hexdigest()


def mapped(config: IngressConfig, llmconfig: dict[str, Any], field: str) -> tuple[LLMSpec, str, tuple[str, ...]]:
    """Return an llmconfig as (spec, its own JSON, notes). Raises InvalidField that names the field below ``field``."""
    config.sources.locate(llmconfig["model"], field=f"{field}.model")
    args = map_llmconfig(llmconfig, field=field, allow_remote_code=config.allow_remote_code)
    return args.spec, canonical_json(llmconfig), args.notes


async def _on_registry_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryError)
    return registry_error(error)


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [{"field": _field_of(problem["loc"]), "problem": problem["msg"]} for problem in error.errors()]
    first = problems[0]
    return error_answer(
        422,
        "invalid_field",
        f"{first['field']}: {first['problem']}",
        field=first["field"],
        errors=problems,
        detail=fastapi_detail(error.errors()),
    )


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # an unreadable body
        return error_answer(422, "invalid_field", f"body: {error.detail}", field="body")
    if error.status_code == HTTPStatus.UNAUTHORIZED:  # unreadable credentials
        return registry_error(NoCredentials())
    code = {404: "no_such_path", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    answer = error_answer(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}")
    if error.status_code == 405:
        answer.headers["allow"] = ", ".join(_methods_of(request))
    return answer


def _methods_of(request: Request) -> list[str]:
    """Return all methods of a path; FastAPI itself names only those of its first route."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    there = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in there for method in route.methods or ()})


async def _on_fault(_request: Request, error: Exception) -> Response:
    return registry_error(InternalError(type(error).__name__))  # the server logs the traceback


def _field_of(location: Sequence[int | str]) -> str:
    """Convert ``("body", "llms", 0, "model")`` to ``llms[0].model``; a body that is not JSON is ``body``."""
    name = ""
    for part in location[1:] if location[0] in ("body", "query", "path", "header") else location:
        name += f"[{part}]" if isinstance(part, int) and name else f".{part}" if name else str(part)
    return name if name and not name.isdigit() else "body"


async def _joined(first: str, others: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for each in others:
        yield each


def _json_response(text: str, *, status: int = 200) -> Response:
    return Response(text, status_code=status, media_type="application/json")


class Ingress:
    """The Serve deployment of the app."""

    def __init__(self, config: IngressConfig) -> None:
        """``config`` is fixed for the life of the replica."""
        self._app = build_app(config, RegistryClient(config.state_dir).call, checkpoints_anywhere())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def deployment(config: IngressConfig) -> serve.Application:
    """Return the Serve application of the ingress, for the head: it is not lost or measured with an LLM Machine."""
    serve_deployment: Any = serve.deployment(serve.ingress()(Ingress))
    application: serve.Application = serve_deployment.options(
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
    ).bind(config)
    return application
