"""All JSON bodies of the ingress, shared by the ingress and the clients.

The Prompting Service's contract (field names, status codes, order) never changes. In requests, an unknown field is an
error (422). In answers, later releases may add fields, and clients ignore unknown ones.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
)

from registry.wire.words import Grade, Priority

MAX_ID = 2**63 - 1
"""Largest measurementId: the maximum of a signed 64-bit column."""

MAX_BUDGET = 1e15
"""Largest budget of a lease, joules or grams: some 280 GWh, or the world's emissions of ten days."""

MAX_LLMS_PER_REQUEST = 1000
"""Maximum number of LLMs in one POST."""

MAX_WAIT_S = 60.0
"""Longest time that a GET may wait for a change of status, seconds."""

MAX_EVENTS = 1000
"""Maximum number of events in one answer."""

MAX_REQUESTS = 100
"""Maximum number of a measurement's requests in one answer."""

MAX_WINDOWS = 1000
"""Maximum number of energy windows in one answer."""

WARMUP_HEADER = "X-GreenPrompt-Warmup"
"""Header that marks a prompt as a warm-up (``true``); warm-ups are not counted in figures."""

PROMPT_HEADER = "X-GreenPrompt-Prompt"
"""Header with the client's id of a prompt, percent-encoded; the same question has the same id in every lease."""

MAX_ARGS_DEPTH = 32
"""Maximum nesting of lists and objects in args."""

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
"""The tenant named in the header X-Tenant. Tenants take turns in the queue. The header is not authenticated."""

GpuType = Annotated[StrictStr, StringConstraints(pattern=r"^[A-Za-z0-9][ -~]*$", max_length=128)]
"""A GPU type by Ray's name (``gpuType`` of GET /machines) or the vendor's full product name."""

Budget = Annotated[StrictInt | StrictFloat, Field(gt=0, le=MAX_BUDGET, allow_inf_nan=False)]

NonEmpty = Annotated[StrictStr, StringConstraints(min_length=1, max_length=1024)]


def _can_be_answered(args: dict[str, Any]) -> dict[str, Any]:
    """Return args unchanged if they are strict JSON, which answers need; Python's parser accepts more.

    Raises:
        ValueError: they are not strict JSON, or nested deeper than MAX_ARGS_DEPTH.
    """
    level: list[Any] = [args]
    for _ in range(MAX_ARGS_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(f"is nested deeper than {MAX_ARGS_DEPTH} levels")
    try:
        json.dumps(args, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        raise ValueError("holds NaN, an infinity, half a character or a date, which are not JSON") from None
    return args


Args = Annotated[dict[str, Any], AfterValidator(_can_be_answered)]


class _Asked(BaseModel):
    """Base of bodies that clients send: an unknown field is an error, because it would have no effect."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# D76: requests are strict, answers are open
class _Answered(BaseModel):
    """Base of bodies that the registry sends: an older client ignores fields that a newer registry adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", json_schema_extra={"additionalProperties": True})


class LLMArgs(_Asked):
    """Arguments with Hugging Face's or vLLM's names; both objects are required and may be empty."""

    prompting: Args = Field(description="How to answer: max_new_tokens, do_sample, temperature …")
    deployment: Args = Field(description="How to run the LLM: torch_dtype, max_model_len …")


class LLMConfig(_Asked):
    """The client's description of one LLM."""

    modeltyp: NonEmpty = Field(description="What the LLM does, e.g. text-generation")
    model: NonEmpty = Field(description="A Hugging Face id or a path below a configured root")
    uses_chat_template: StrictBool = Field(description="Whether process_prompt wraps the question in the chat template")
    args: LLMArgs


class PromptingRequest(_Asked):
    """Body of POST /promptingservice/request."""

    measurementId: Annotated[StrictInt, Field(gt=0, le=MAX_ID)]
    llms: Annotated[list[LLMConfig], Field(min_length=1, max_length=MAX_LLMS_PER_REQUEST)]
    priority: Priority = Priority.NORMAL
    gpuType: GpuType | None = Field(None, description="GPUs that the machine must have, e.g. H100; null: any or none")
    maxJoules: Budget | None = Field(None, description="Energy that each of these leases may use; null: no limit")
    maxGco2eq: Budget | None = Field(
        None, description="Emissions that each of these leases may cause, grams CO2eq; null: no limit"
    )
    grade: Grade = Field(Grade.STANDARD, description="measurement: handed over warm, on a machine at rest")
    like: NonEmpty | None = Field(
        None, description="Id of an earlier request: the same LLM, software and kind of machine again, or nothing"
    )

    @property
    def priority_given(self) -> Priority | None:
        """The priority if the body contains one, else None: the measurement's priority applies."""
        return self.priority if "priority" in self.model_fields_set else None


class AcceptedRequest(_Answered):
    """One accepted LLM of a POST; poll its status at ``link``."""

    requestId: str
    llmconfig: dict[str, Any]
    link: str
    status: str
    url: str | None = Field(None, description="Not null when the LLM was warm and free, and is ours already")
    address: str | None = Field(None, description="As in RequestState; not null when url is not")
    notes: list[str] = Field(default=[], description="What of the args was translated or dropped")


class PromptingAnswer(_Answered):
    """Answer of POST /promptingservice/request: one entry per LLM, in the order of the body."""

    requests: list[AcceptedRequest]


class EnergyState(_Answered):
    """What a lease has used so far, according to the energy windows stored, which arrive with some delay.

    null: not known, in whole or in part.
    """

    joules: float | None
    idle_j: float | None = Field(description="Of the joules, those of the time without any prompt")
    idle_share: float | None = Field(description="The same as a share, 0 to 1")
    o_g: float | None = Field(description="Operational emissions, gCO2eq")
    m_g: float | None = Field(description="Embodied emissions, gCO2eq")
    label: str = Field(description="Where the joules are from: measured, measured_sampled, modeled or unavailable")
    known_j: float | None = Field(None, description="What is known of the joules; the same where nothing is missing")
    unknown_windows: int = Field(0, description="How many windows of it have no known joules")


class RequestState(_Answered):
    """Answer of GET /promptingservice/request/{requestId}.

    ``url`` and ``address`` are null until ``status`` is ``deployed``, and after the lease has ended. Times are ISO 8601
    UTC, durations seconds.
    """

    requestId: str
    llmconfig: dict[str, Any]
    status: str
    measurementId: int
    tenant: str = Field("default", description="Whose turn in the queue its measurement takes")
    url: str | None = Field(None, description="Base URL of the LLM: {url}/process_prompt, {url}/v1 … It is the key")
    address: str | None = Field(
        description="lease:<token>@<host>, for clients that build http://{address}:8000/process_prompt themselves"
    )
    link: str
    position: int | None = Field(None, description="Place in the queue, 1 is next; null unless queued")
    phase: str | None = Field(None, description="What is being done while deploying: loading, warming_up …")
    progress: float | None = Field(None, description="How much of the phase is done, 0 to 1; null when not known")
    bytesDone: int | None = Field(None, description="Of the model, while it is downloaded")
    bytesTotal: int | None = Field(None, description="All that is to be downloaded of it, and what was there before")
    reason: str | None = Field(None, description="Why it failed, or what it waits for")
    notes: list[str] = []
    modelRevision: str | None = Field(
        None, description="Commit of the LLM that was handed over; null before, and for local models, which have none"
    )
    grade: str = Field("standard", description="As in the POST")
    like: str | None = Field(None, description="As in the POST")
    provenance: dict[str, Any] | None = Field(
        None, description="What it was handed over with: hardware, software, model, arguments; null before"
    )
    machine: str | None = Field(None, description="Machine that runs it")
    wrapper: str | None = None
    flags: list[str] = Field(default=[], description="What makes this measurement's figures hard to compare")
    createdAt: str
    deployingAt: str | None = None
    deployedAt: str | None = None
    endedAt: str | None = None
    expiresAt: str | None = Field(None, description="When the lease ends whatever happens")
    idleAfter: str | None = Field(None, description="When the lease ends unless it is used before")
    maxJoules: float | None = Field(None, description="Energy that its lease may use; null: no limit")
    maxGco2eq: float | None = Field(None, description="Emissions that its lease may cause, grams; null: no limit")
    energy: EnergyState | None = Field(None, description="What its lease has cost so far; null: nothing is known yet")


class EventState(_Answered):
    """One entry of GET /promptingservice/request/{requestId}/events: what happened to the request, when, and why.

    ``what`` is the name of an event: LeaseRequested, LLMDeployed, LLMDeployFailed, LeaseBound, TimePassed …
    """

    event: int = Field(description="Its number; numbers grow with time and are never used twice")
    what: str
    at: str
    cause: int | None = Field(None, description="Number of the event that led to this one; null: it came from outside")
    status: str | None = Field(None, description="Of the request, from then on")
    reason: str | None = None
    wrapper: str | None = None


class MeasurementState(_Answered):
    """Answer of GET /measurements/{measurementId}."""

    measurementId: int
    machine: str | None
    gpuType: str | None = Field(None, description="GPUs that its machine must have; null: any or none")
    flags: list[str]
    createdAt: str
    versions: dict[str, str] | None = Field(
        None, description="Of the software that its latest LLM was handed over with; null: none was yet, or not known"
    )
    requests: list[RequestState] = Field(description="A page of its requests, in their order")
    next: int | None = Field(None, description="`after` of the next page; null: this is the last one")


class MachineState(_Answered):
    """One machine of GET /machines."""

    machine: str
    address: str
    alive: bool
    gpus: int
    gpuType: str | None
    memoryBytes: int | None = Field(description="Main memory; null until a wrapper there has told")
    gpuMemoryBytes: int | None = Field(None, description="Memory of each GPU; null: none, or not known")
    zone: str | None = Field(None, description="Availability zone, by its Ray node's labels; null: not known")
    region: str | None = Field(None, description="Region, likewise")
    drain: str | None = Field(
        None, description="draining: no LLM is handed out there any more; drained: nothing of ours is left on it"
    )
    leases: int = Field(0, description="LLMs that are in use there")
    healthy: bool | None = Field(
        None, description="Whether it is there and all its wrappers serve; null: they are starting, or it has none"
    )
    lastHeardAt: str | None = Field(
        None, description="When a wrapper there last answered; null: not since the registry was started"
    )
    differs: list[str] = Field(
        [], description="Software whose version is not that of most machines: figures may not compare"
    )
    wrappers: list[WrapperState]


class WrapperState(_Answered):
    """One wrapper of a machine; ``meter`` lists the energy counters found there."""

    wrapper: str
    status: str
    gpus: int
    llm: str | None
    leased: bool
    starts: int | None = Field(None, description="LLMs that it has started since it was started itself")
    in_flight: int | None = Field(None, description="Prompts that are being answered")
    unfinished: int | None = Field(None, description="Prompts that the engine has not finished; null without one")
    phase: str | None = None
    progress: float | None = Field(None, description="How much of the phase is done, 0 to 1; null when not known")
    bytesDone: int | None = Field(None, description="Of the model, while it is downloaded")
    bytesTotal: int | None = Field(None, description="All that is to be downloaded of it, and what was there before")
    warm: bool | None = Field(None, description="Whether LLMs start without importing the engine first")
    coldReason: str | None = Field(None, description="Why not, if so")
    reason: str | None = None
    meter: dict[str, Any] | None = None
    versions: dict[str, str] | None = None


class LLMState(_Answered):
    """One LLM of GET /llms, which runs or is being started."""

    model: str
    modeltyp: str
    fingerprint: str
    revision: str | None = Field(None, description="Commit of its files; null for local models, and until it is known")
    deployment: dict[str, Any]
    machine: str
    wrapper: str
    status: str


class HealthState(_Answered):
    """Answer of GET /healthz."""

    status: str
    wrappers: int
    usable: int
    queued: int
    deploying: int = Field(0, description="Requests whose LLM is being started or handed over for the first time")
    version: str


class ErrorAnswer(_Answered):
    """Body of every error outside ``/v1``: a stable ``code`` and a sentence; ``field``: the invalid field, if any."""

    code: str
    message: str
    retryable: bool
    field: str | None = None
    errors: list[dict[str, str]] | None = Field(None, description="Every invalid field of a 422")
    detail: list[dict[str, Any]] | None = Field(None, description="The same as FastAPI lists it: loc, msg, type …")


MachineState.model_rebuild()
