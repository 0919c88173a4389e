"""The HTTP app: validates requests, maps llmconfigs, calls the registry actor.

It has no state except calls in progress, so any number of replicas may run. While the registry
actor restarts, calls are retried for a few seconds. That is safe, because the ids of new requests
are created here.
"""

from __future__ import annotations

import asyncio
import hashlib
import pathlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp

from deployments.error_answers import RETRY_AFTER_S
from deployments.models.args.mapping import map_llmconfig
from deployments.models.checkpoints import Checkpoints
from deployments.models.small_files import FileTooLarge
from deployments.models.sources import ModelSources
from deployments.serve.audit import Audited, AuditTrail, audit_router
from deployments.serve.body_limit import MIB, BodyLimit
from deployments.serve.browsers import GuardedAPI
from deployments.serve.energy_pages import EnergyPages
from deployments.serve.http_errors import add_error_handlers
from deployments.serve.identities import CallerAccess, CallerTenant, KeyGuard, TrustedClients, still_allowed
from deployments.serve.jwt_identities import JWTIdentities
from deployments.serve.polls import Polls
from deployments.serve.prompting_service import TITLE, JSONBody, root_router
from deployments.serve.rate_guard import RateGuard
from deployments.serve.withdrawals import Withdrawals
from registry.access_errors import KeysNotUsed
from registry.access_settings import AccessSettings, RateSettings
from registry.accounting.report import MeasurementReport
from registry.accounting.window_report import WindowsPage
from registry.core.events import NewRequest
from registry.core.records import LLMMemory, LLMSpec
from registry.errors import InvalidField
from registry.networks import Network
from registry.service.service import Idempotency
from registry.wire.schemas import (
    MAX_EVENTS,
    MAX_ID,
    MAX_REQUESTS,
    MAX_WAIT_S,
    MAX_WINDOWS,
    ErrorAnswer,
    EventState,
    HealthState,
    KeyRequest,
    KeyState,
    LLMState,
    MachineState,
    MeasurementState,
    NewKey,
    PromptingAnswer,
    PromptingRequest,
    RequestState,
)
from registry.wire.words import RequestStatus, canonical_json

DESCRIPTION = """
Leases LLMs, each to one client at a time. Request LLMs with `POST /promptingservice/request`. Poll the `link` of each
request until its status is `deployed`, prompt the LLM at `url`, and release it with `DELETE`.

Status words: `queued` → `deploying` → `deployed` → `released`; or `expired` (the lease ran out), `cancelled`
(released before it was handed over), `failed` (see `reason`).

Send an `Idempotency-Key` with each POST. Then the POST can be repeated safely if its answer was lost.

Errors have the format `ErrorAnswer`; below `/v1` of an LLM's `url` they have OpenAI's format, `{"error": {…}}`.

If the registry uses API keys (`access.keys`), every path but `/`, `/healthz` and `/openapi.json` needs one:
`Authorization: Bearer gp_…`. A client's key belongs to a tenant, and shows only this tenant's requests: all others are
404. With `access.oidc`, a JWT of the issuer may be sent in place of a key.

Every path answers 421 to a host name that is not served (`http.allowed_hosts`). Requests that change something are
answered 403 if they come from a web page of another origin, and 415 if a body is not JSON.

Every path can answer 429 with `Retry-After`, because of the settings in `rates`: if a caller calls too often, or if its
address has sent many wrong keys and its own key has not been accepted yet. Releases (`DELETE`) and keep-alives are not
counted as calls.
"""

MAX_BODY_MIB = 4
"""Longest body of a request to the registry, MiB; a thousand usual llmconfigs take 0.5."""

IDEMPOTENCY_KEY = (
    "A text of your choice, e.g. a UUID; a new one for each POST. A repeated key with the same JSON returns the "
    "requests of the first POST; spaces and the order of fields don't matter. A repeated key with another body is a "
    "409. Each tenant has its own keys. They are kept as long as their requests."
)


@dataclass(frozen=True, slots=True)
class IngressConfig:
    """The settings that the ingress needs. ``state_dir`` is checked if the registry does not answer.

    ``hosts``: the host names that are served, see ``BrowserGuard``. ``prompt_mib``: longest body of a prompt, MiB.
    ``trusted_proxies``: see ``client_of``; None: HAProxy is not used.
    """

    sources: ModelSources
    allow_remote_code: tuple[str, ...]
    state_dir: pathlib.Path = pathlib.Path("/")
    hosts: tuple[str, ...] = ()
    access: AccessSettings = field(default_factory=AccessSettings)
    prompt_mib: int = 64
    trusted_proxies: tuple[Network, ...] | None = ()
    rates: RateSettings = field(default_factory=RateSettings)


Call = Callable[..., Awaitable[Any]]
"""``call(method, *args, wait_s=…)`` returns what the registry actor's method returns, mostly JSON text."""

Middleware = Callable[[ASGIApp], ASGIApp]

Responses = dict[int | str, dict[str, Any]]

# Without a description, FastAPI uses the status phrases of `http`. Those of 413 and 422 changed in Python 3.13.
ERRORS: Responses = {
    422: {"model": ErrorAnswer, "description": "Unprocessable Content"},
    429: {"model": ErrorAnswer},
    503: {"model": ErrorAnswer},
}
LIMITED: Responses = {413: {"model": ErrorAnswer, "description": "Content Too Large"}, **ERRORS}
UNKNOWN: Responses = {404: {"model": ErrorAnswer}, **ERRORS}


def build_app(
    config: IngressConfig, call: Call, checkpoints: Checkpoints | None = None, guard: Middleware = lambda app: app
) -> FastAPI:
    """Return the FastAPI app around ``call`` of the registry.

    ``checkpoints`` estimates the memory of LLMs; None leaves it unknown. ``guard`` puts another app around all of it.
    """
    app = GuardedAPI(
        config.hosts,
        inner=_guards(config, call),
        outer=lambda app: guard(AuditTrail(app, call, config.trusted_proxies, keys=config.access.keys)),
        title=TITLE,
        description=DESCRIPTION,
        version=version("greenprompt-llm-registry"),
    )
    _add_post(app, config, call, checkpoints)
    _add_requests(app, call)
    _add_measurements(app, call)
    _add_machines(app, call)
    _add_keys(app, config, call)
    app.include_router(audit_router(call, ERRORS, keys=config.access.keys))
    app.include_router(root_router(call))
    add_error_handlers(app)
    return app


def _guards(config: IngressConfig, call: Call) -> Callable[[ASGIApp], ASGIApp]:
    """Return a function that puts the limits of bodies and rates around an app, and the guard of keys if it is used."""
    rates, keys, proxies = config.rates, config.access.keys, config.trusted_proxies
    trusted = TrustedClients(config.access.trusted_clients, proxies)
    jwts = None if config.access.oidc is None else JWTIdentities(config.access.oidc)

    def limit(path: str) -> int:
        # A prompt to the root is redirected, and its body is dropped.
        return (config.prompt_mib if path == "/process_prompt" else MAX_BODY_MIB) * MIB

    def guarded(app: ASGIApp) -> ASGIApp:
        limited = RateGuard(BodyLimit(app, limit), rates, proxies, keys=keys)
        return KeyGuard(limited, call, trusted, proxies, rates.wrong_keys_per_minute, jwts) if keys else limited

    return guarded


def _add_post(app: FastAPI, config: IngressConfig, call: Call, checkpoints: Checkpoints | None) -> None:
    """Add the route that requests LLMs."""
    withdrawals, prompting = Withdrawals(call), APIRouter(route_class=JSONBody)

    @prompting.post(
        "/promptingservice/request",
        status_code=201,
        response_model=PromptingAnswer,
        responses={409: {"model": ErrorAnswer}, **LIMITED},
    )
    async def request_llms(
        body: PromptingRequest,
        caller: CallerTenant,
        audited: Audited,
        idempotency_key: Annotated[
            str | None, Header(min_length=1, max_length=255, description=IDEMPOTENCY_KEY)
        ] = None,
    ) -> Response:
        """Request one or more LLMs for a measurement. They are leased one after another, on one machine."""
        llms = await _mapped_llms(body, config, checkpoints)
        tenant, access = caller
        with withdrawals.unless_answered([llm.request_id for llm in llms], tenant, idempotency_key, audited):
            idempotency = None if idempotency_key is None else Idempotency(idempotency_key, _sha256(body))
            wanted = body.measurementId, llms, tenant, body.priority_given, body.gpuType, idempotency
            return _json_response(await call("request", *wanted, body.grade, body.like, access, audited), status=201)

    app.include_router(prompting)


def _add_requests(app: FastAPI, call: Call) -> None:
    """Add the routes of one request."""
    polls = Polls(call)

    @app.get("/promptingservice/request/{request_id}", response_model=RequestState, responses=UNKNOWN)
    async def request_status(
        request: Request,
        request_id: str,
        access: CallerAccess,
        wait: Annotated[
            float, Query(ge=0, le=MAX_WAIT_S, description="Maximum time to wait for a change of status, seconds")
        ] = 0.0,
        seen: Annotated[
            RequestStatus | None, Query(description="The last status that you know; any other is returned at once")
        ] = None,
    ) -> Response:
        """Return the state of a request. With ``wait``, return it when the status changes, or after that time.

        The state of a request that is `deployed` or has ended is returned at once. To wait for the end of a lease,
        add `seen=deployed`.
        """
        text = await polls.state(request_id, wait, seen, access)
        if wait:
            await still_allowed(request)
        return _json_response(text)

    @app.get("/promptingservice/request/{request_id}/events", response_model=list[EventState], responses=UNKNOWN)
    async def request_events(
        request_id: str,
        access: CallerAccess,
        after: Annotated[int, Query(ge=0, le=MAX_ID, description="Number of the last event that you know")] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_EVENTS, description="Maximum number of events")] = MAX_EVENTS,
    ) -> Response:
        """Return the events of a request, oldest first."""
        return _json_response(await call("events", request_id, after, limit, access))

    @app.delete("/promptingservice/request/{request_id}", status_code=204, responses=UNKNOWN)
    async def release_llm(request_id: str, access: CallerAccess, audited: Audited) -> Response:
        """Release the LLM, or cancel a request that is still waiting. Idempotent."""
        await call("release", request_id, access, audited)
        return Response(status_code=204)

    @app.post("/promptingservice/request/{request_id}/keepalive", response_model=RequestState, responses=UNKNOWN)
    async def keep_alive(request_id: str, access: CallerAccess) -> Response:
        """Extend the lease: its idle time starts again."""
        return _json_response(await call("keep_alive", request_id, access))


def _add_measurements(app: FastAPI, call: Call) -> None:
    """Add the routes for measurements and their energy."""
    energy = EnergyPages(call)

    @app.get("/measurements/{measurement_id}", response_model=MeasurementState, responses=UNKNOWN)
    async def measurement(
        measurement_id: Annotated[int, Path(gt=0, le=MAX_ID)],
        caller: CallerTenant,
        after: Annotated[int, Query(ge=0, le=MAX_ID, description="`next` of the previous page")] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_REQUESTS, description="Requests per page")] = MAX_REQUESTS,
    ) -> Response:
        """Return a measurement of the caller's tenant, with a page of its requests in order of arrival."""
        return _json_response(await call("measurement", (caller.tenant, measurement_id), after, limit, caller.access))

    @app.get(
        "/measurements/{measurement_id}/report",
        response_model=MeasurementReport,
        responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, **UNKNOWN},
    )
    async def report(
        measurement_id: Annotated[int, Path(gt=0, le=MAX_ID)],
        caller: CallerTenant,
        as_: Annotated[
            Literal["json", "csv"] | None,
            Query(alias="format", description="csv: one row per window, as with the header Accept: text/csv"),
        ] = None,
        accept: Annotated[str, Header()] = "*/*",
    ) -> Response:
        """Return the energy of a measurement of the caller's tenant, by LLM.

        The energy windows are in the CSV, and at `/windows`.
        """
        key = caller.tenant, measurement_id
        if as_ == "csv" or (as_ is None and "text/csv" in accept):
            parts = energy.csv(key)
            first = await anext(parts)  # raises here, before anything is sent, if there is no such measurement
            return StreamingResponse(_joined(first, parts), media_type="text/csv")
        return _json_response(await energy.report(key))

    @app.get("/measurements/{measurement_id}/windows", response_model=WindowsPage, responses=UNKNOWN)
    async def windows(
        measurement_id: Annotated[int, Path(gt=0, le=MAX_ID)],
        caller: CallerTenant,
        after: Annotated[str | None, Query(max_length=1024, description="`next` of the previous page")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_WINDOWS, description="Windows per page")] = MAX_WINDOWS,
        request: Annotated[
            str | None, Query(max_length=255, description="requestId; null: windows of all requests")
        ] = None,
        detail: Annotated[bool, Query(description="Whether to add each window's full record")] = False,
    ) -> Response:
        """Return a page of the final energy windows of a measurement of the caller's tenant, ordered by start time.

        A window appears some seconds after its prompt has ended. To get windows that appeared late, start again from
        the first page.
        """
        page = await energy.windows((caller.tenant, measurement_id), request, after, limit, detail=detail)
        return _json_response(page)


def _add_machines(app: FastAPI, call: Call) -> None:
    """Add the routes of the cluster: machines, LLMs, health."""

    @app.get("/machines", response_model=list[MachineState], responses=ERRORS)
    async def machines() -> Response:
        """Return all LLM Machines with their wrappers and LLMs."""
        return _json_response(await call("machines"))

    @app.get("/machines/{machine_id}", response_model=MachineState, responses=UNKNOWN)
    async def machine(machine_id: str) -> Response:
        """Return one LLM Machine."""
        return _json_response(await call("machine", machine_id))

    @app.post("/machines/{machine_id}/drain", response_model=MachineState, responses=UNKNOWN)
    async def drain(machine_id: str, audited: Audited) -> Response:
        """Grant no new leases on the machine. When its leases have ended, its wrappers are removed. Idempotent."""
        return _json_response(await call("drain", machine_id, audited))

    @app.delete("/machines/{machine_id}/drain", response_model=MachineState, responses=UNKNOWN)
    async def undrain(machine_id: str, audited: Audited) -> Response:
        """Use the machine again; its wrappers are recreated. Idempotent."""
        return _json_response(await call("undrain", machine_id, audited))

    @app.get("/llms", response_model=list[LLMState], responses=ERRORS)
    async def llms() -> Response:
        """Return all LLMs that are running or starting."""
        return _json_response(await call("llms"))

    @app.get(
        "/healthz",
        response_model=HealthState,
        responses={429: {"model": ErrorAnswer}, 503: {"model": HealthState | ErrorAnswer}},
    )
    async def health() -> Response:
        """Return the health of the registry. The status is 503 while no wrapper can serve requests."""
        status, text = await call("health")
        if status == "ok":
            return _json_response(text)
        return Response(text, 503, {"retry-after": str(RETRY_AFTER_S)}, media_type="application/json")


def _add_keys(app: FastAPI, config: IngressConfig, call: Call) -> None:
    """Add the routes of API keys, for operators."""
    responses: Responses = {404: {"model": ErrorAnswer}, 409: {"model": ErrorAnswer}, **LIMITED}
    router = APIRouter(route_class=JSONBody)

    def require_keys() -> None:
        if not config.access.keys:
            raise KeysNotUsed

    @router.get("/keys", response_model=list[KeyState], responses=responses)
    async def keys() -> Response:
        """Return all API keys, without their texts."""
        require_keys()
        return _json_response(await call("keys"))

    @router.post("/keys", status_code=201, response_model=NewKey, responses=responses)
    async def create_key(body: KeyRequest, audited: Audited) -> Response:
        """Make an API key. Its text is in this answer only."""
        require_keys()
        wanted = body.role, body.tenant, body.name, body.days
        return _json_response(await call("create_key", *wanted, audited), status=201)

    @router.delete("/keys/{key_id}", status_code=204, responses=responses)
    async def revoke_key(key_id: str, audited: Audited) -> Response:
        """Revoke a key: within 5 seconds it is refused everywhere. Leases of its tenant continue. Idempotent."""
        require_keys()
        await call("revoke_key", key_id, audited)
        return Response(status_code=204)

    app.include_router(router)


async def _mapped_llms(
    body: PromptingRequest, config: IngressConfig, checkpoints: Checkpoints | None
) -> list[NewRequest]:
    """Return a POST's LLMs with new ids, as engine arguments, with an estimate of their memory.

    Raises:
        InvalidField: An llmconfig can't be mapped; names the field.
    """
    llms = [
        NewRequest(
            uuid.uuid4().hex,  # D5: ids are made here, so the call can be repeated
            *mapped(config, llm.model_dump(), f"llms[{n}]"),
            max_j=body.maxJoules,
            max_g=body.maxGco2eq,
        )
        for n, llm in enumerate(body.llms)
    ]
    if checkpoints is not None:
        reads = (_memory(config, checkpoints, llm.spec, f"llms[{n}].model") for n, llm in enumerate(llms))
        memory = await asyncio.gather(*reads)
        llms = [replace(llm, memory=takes) for llm, takes in zip(llms, memory, strict=True)]
    return llms


async def _memory(config: IngressConfig, checkpoints: Checkpoints, spec: LLMSpec, field: str) -> LLMMemory | None:
    """Return the least memory of an LLM, None if unknown. Raises InvalidField if its checkpoint can't be read here."""
    try:
        return await checkpoints.memory(config.sources.locate(spec.model), spec)
    except FileTooLarge as error:
        raise InvalidField(field, str(error)) from error


def _sha256(body: PromptingRequest) -> str:
    """Return a hash that ignores spaces, escapes and the order of fields."""
    return hashlib.sha256(canonical_json(body.model_dump(mode="json", exclude_unset=True)).encode()).hexdigest()


def mapped(config: IngressConfig, llmconfig: dict[str, Any], field: str) -> tuple[LLMSpec, str, tuple[str, ...]]:
    """Map an llmconfig; return the spec, the llmconfig as canonical JSON, and notes for the client.

    Raises:
        InvalidField: It can't be mapped; names the field below ``field``.
    """
    located = config.sources.locate(llmconfig["model"], field=f"{field}.model")
    args = map_llmconfig(llmconfig, field=field, located=located, allow_remote_code=config.allow_remote_code)
    return args.spec, canonical_json(llmconfig), args.notes


async def _joined(first: str, others: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for each in others:
        yield each


def _json_response(text: str, *, status: int = 200) -> Response:
    return Response(text, status_code=status, media_type="application/json")
