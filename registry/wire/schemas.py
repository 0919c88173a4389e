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
    model_validator,
)

from registry.wire.words import Grade, Priority, Role

MAX_ID = 2**63 - 1
"""Largest measurementId: the maximum of a signed 64-bit column."""

MAX_BUDGET = 1e15
"""Largest budget of a lease, joules or grams: about 280 GWh, or the emissions of the world in ten days."""

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

MAX_AUDIT = 1000
"""Maximum number of audit entries in one answer."""

WARMUP_HEADER = "X-GreenPrompt-Warmup"
"""Header that marks a prompt as a warm-up (``true``); warm-ups are not counted in figures."""

PROMPT_HEADER = "X-GreenPrompt-Prompt"
"""Header with the client's id of a prompt, percent-encoded. Clients give a question the same id in every lease."""

MAX_LLMCONFIG_BYTES = 256 * 1024
"""Longest llmconfig as JSON, bytes: each is stored for ``keep_days``."""

MAX_ARGS_DEPTH = 32
"""Maximum nesting of lists and objects in args."""

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
"""Name of a tenant. Tenants take turns in the queue."""

GpuType = Annotated[StrictStr, StringConstraints(pattern=r"^[A-Za-z0-9][ -~]*$", max_length=128)]
"""A GPU type by Ray's name (``gpuType`` of GET /machines) or the vendor's full product name."""

Budget = Annotated[StrictInt | StrictFloat, Field(gt=0, le=MAX_BUDGET, allow_inf_nan=False)]

NonEmpty = Annotated[StrictStr, StringConstraints(min_length=1, max_length=1024)]


def _can_be_answered(args: dict[str, Any]) -> dict[str, Any]:
    """Check that args are strict JSON, as answers contain them, and return them. Python's parser accepts more.

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
        raise ValueError("contains NaN, an infinity, a lone surrogate or a date, which are not JSON") from None
    return args


Args = Annotated[dict[str, Any], AfterValidator(_can_be_answered)]


class _Asked(BaseModel):
    """Base of bodies that clients send. An unknown field is an error, because it would have no effect."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# D76: requests are strict, answers are open
class _Answered(BaseModel):
    """Base of bodies that the registry sends. An older client ignores fields that a newer registry adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", json_schema_extra={"additionalProperties": True})


class LLMArgs(_Asked):
    """Arguments with Hugging Face's or vLLM's names; both objects are required and may be empty."""

    prompting: Args = Field(description="Arguments of each prompt: max_new_tokens, do_sample, temperature …")
    deployment: Args = Field(description="Arguments of the engine: torch_dtype, max_model_len …")


class LLMConfig(_Asked):
    """The client's description of one LLM."""

    modeltyp: NonEmpty = Field(description="Task of the LLM, e.g. text-generation")
    model: NonEmpty = Field(description="A Hugging Face id, or a path below one of models.local_roots")
    uses_chat_template: StrictBool = Field(
        description="Whether process_prompt puts the question into the chat template"
    )
    args: LLMArgs

    @model_validator(mode="after")
    def _stored_for_months(self) -> LLMConfig:
        length = len(self.model_dump_json())
        if length > MAX_LLMCONFIG_BYTES:
            raise ValueError(f"has {length} bytes as JSON; at most {MAX_LLMCONFIG_BYTES} are stored")
        return self


class PromptingRequest(_Asked):
    """Body of POST /promptingservice/request."""

    measurementId: Annotated[StrictInt, Field(gt=0, le=MAX_ID)]
    llms: Annotated[list[LLMConfig], Field(min_length=1, max_length=MAX_LLMS_PER_REQUEST)]
    priority: Priority = Priority.NORMAL
    gpuType: GpuType | None = Field(None, description="GPUs that the machine must have, e.g. H100; null: no condition")
    maxJoules: Budget | None = Field(
        None, description="Energy that each of these leases may use, joules; null: no limit"
    )
    maxGco2eq: Budget | None = Field(
        None, description="Emissions that each of these leases may cause, grams CO2eq; null: no limit"
    )
    grade: Grade = Field(Grade.STANDARD, description="measurement: the LLM is handed over warm, on a machine at rest")
    like: NonEmpty | None = Field(
        None,
        description="Id of an earlier request to repeat. LLM, software and kind of machine must be the same; else this "
        "request is refused or fails",
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
    url: str | None = Field(
        None, description="As in RequestState; set if the LLM was running and free, so that it was leased at once"
    )
    address: str | None = Field(None, description="As in RequestState; set if url is set")
    notes: list[str] = Field(default=[], description="As in RequestState")


class PromptingAnswer(_Answered):
    """Answer of POST /promptingservice/request: one entry per LLM, in the order of the body."""

    requests: list[AcceptedRequest]


class EnergyState(_Answered):
    """What a lease has used so far, as the sum of its stored energy windows. Windows arrive with some delay.

    null: not known, or not known in full.
    """

    joules: float | None
    idle_j: float | None = Field(description="The part of joules that was used while there was no prompt")
    idle_share: float | None = Field(description="idle_j divided by joules, 0 to 1")
    o_g: float | None = Field(description="Operational emissions, gCO2eq")
    m_g: float | None = Field(description="Embodied emissions, gCO2eq")
    label: str = Field(description="Where the joules come from: measured, measured_sampled, modeled or unavailable")
    known_j: float | None = Field(
        None, description="Sum of the joules that are known: equal to joules if none are missing; null: none are known"
    )
    unknown_windows: int = Field(0, description="Number of the lease's windows whose joules are not known")


class RequestState(_Answered):
    """Answer of GET /promptingservice/request/{requestId}.

    ``url`` and ``address`` are null until ``status`` is ``deployed``, and after the lease has ended. Times are in ISO
    8601, UTC.
    """

    requestId: str
    llmconfig: dict[str, Any]
    status: str
    measurementId: int
    tenant: str = Field("default", description="Tenant of the request, as in the header X-Tenant")
    url: str | None = Field(
        None,
        description="Base URL of the LLM: {url}/process_prompt, {url}/v1 … It contains the token of the lease: keep it "
        "secret",
    )
    address: str | None = Field(
        description="lease:<token>@<host>, for clients that build the URL http://{address}:8000/process_prompt"
    )
    link: str
    position: int | None = Field(None, description="Place in the queue, 1 is next; null: not queued")
    phase: str | None = Field(None, description="Current step while deploying: downloading, loading, warming_up …")
    progress: float | None = Field(None, description="Part of the download that is done, 0 to 1; null: no download")
    bytesDone: int | None = Field(None, description="Bytes of the model's files on the machine; null: no download")
    bytesTotal: int | None = Field(
        None, description="Bytes of all files of the model that vLLM reads; null: no download"
    )
    reason: str | None = Field(None, description="Why the request failed, or what it waits for")
    notes: list[str] = Field(
        [],
        description="Which args were translated or dropped, warnings about the tenant's budget, and why address can't "
        "be used",
    )
    modelRevision: str | None = Field(
        None, description="Commit of the LLM; null: not handed over yet, or a local model, which has no commit"
    )
    grade: str = Field("standard", description="As in the POST")
    like: str | None = Field(None, description="As in the POST")
    provenance: dict[str, Any] | None = Field(
        None, description="Hardware, software, model and arguments at the hand-over; null: not handed over yet"
    )
    machine: str | None = Field(None, description="Machine that runs the LLM")
    wrapper: str | None = None
    flags: list[str] = Field(default=[], description="What makes this measurement's figures hard to compare")
    createdAt: str
    deployingAt: str | None = None
    deployedAt: str | None = None
    endedAt: str | None = None
    expiresAt: str | None = Field(None, description="Deadline: the lease ends then, even if it is in use")
    idleAfter: str | None = Field(None, description="The lease ends then if there is no prompt or keep-alive before")
    maxJoules: float | None = Field(None, description="Energy that the lease may use, joules; null: no limit")
    maxGco2eq: float | None = Field(None, description="Emissions that the lease may cause, grams CO2eq; null: no limit")
    energy: EnergyState | None = Field(
        None, description="What the lease has used so far; null: no energy window of it is stored yet"
    )


class EventState(_Answered):
    """One entry of GET /promptingservice/request/{requestId}/events: an event of the request, its time and its cause.

    ``what`` is the name of an event: LeaseRequested, LLMDeployed, LLMDeployFailed, LeaseBound, TimePassed …
    """

    event: int = Field(description="Number of the event; numbers grow with time and are never used twice")
    what: str
    at: str
    cause: int | None = Field(None, description="Number of the event that caused this one; null: it came from outside")
    status: str | None = Field(None, description="Status of the request after the event")
    reason: str | None = None
    wrapper: str | None = None


class MeasurementState(_Answered):
    """Answer of GET /measurements/{measurementId}."""

    measurementId: int
    machine: str | None
    gpuType: str | None = Field(None, description="GPUs that the machine must have; null: no condition")
    flags: list[str]
    createdAt: str
    versions: dict[str, str] | None = Field(
        None, description="Software versions at the latest hand-over; null: no hand-over yet, or not known"
    )
    requests: list[RequestState] = Field(description="A page of the measurement's requests, in order of arrival")
    next: int | None = Field(None, description="Value of `after` for the next page; null: this is the last page")


class MachineState(_Answered):
    """One machine of GET /machines."""

    machine: str
    address: str
    alive: bool
    gpus: int
    gpuType: str | None
    memoryBytes: int | None = Field(description="Main memory; null: not reported by a wrapper yet")
    gpuMemoryBytes: int | None = Field(None, description="Memory of each GPU; null: no GPU, or not known")
    zone: str | None = Field(None, description="Availability zone, from the labels of its Ray node; null: not known")
    region: str | None = Field(None, description="Region, from the labels of its Ray node; null: not known")
    drain: str | None = Field(
        None, description="draining: gets no new leases; drained: its wrappers are removed; null: in use"
    )
    leases: int = Field(0, description="Number of leases on the machine")
    healthy: bool | None = Field(
        None, description="Whether the machine and all its wrappers work; null: not all answer yet, or there are none"
    )
    lastHeardAt: str | None = Field(
        None, description="Time of the latest answer of one of its wrappers; null: none since the registry's start"
    )
    differs: list[str] = Field(
        [], description="Software in other versions than on most machines; figures may not be comparable"
    )
    wrappers: list[WrapperState]


class WrapperState(_Answered):
    """One wrapper of a machine; ``meter`` lists the energy counters found there."""

    wrapper: str
    status: str
    gpus: int
    llm: str | None
    leased: bool
    starts: int | None = Field(None, description="Number of LLMs started since the start of the wrapper")
    in_flight: int | None = Field(None, description="Number of prompts that are being answered")
    unfinished: int | None = Field(
        None, description="Number of prompts that the engine has not finished; null: no engine"
    )
    phase: str | None = Field(None, description="As in RequestState")
    progress: float | None = Field(None, description="As in RequestState")
    bytesDone: int | None = Field(None, description="As in RequestState")
    bytesTotal: int | None = Field(None, description="As in RequestState")
    warm: bool | None = Field(None, description="Whether LLMs start fast, because the engine is imported already")
    coldReason: str | None = Field(None, description="Why warm is false; else null")
    reason: str | None = None
    meter: dict[str, Any] | None = None
    versions: dict[str, str] | None = None


class LLMState(_Answered):
    """One LLM of GET /llms. It is running or starting."""

    model: str
    modeltyp: str
    fingerprint: str
    revision: str | None = Field(None, description="Commit of its files; null: a local model, or not known yet")
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
    deploying: int = Field(0, description="Number of requests with a wrapper but no lease yet: their LLM is starting")
    version: str


class KeyRequest(_Asked):
    """Body of POST /keys."""

    role: Role
    tenant: TenantName | None = Field(None, description="The tenant of a client's key; null for the other roles")
    name: str = Field(
        "", max_length=200, description="For people: who uses it, and for what", pattern=r"^[^\x00-\x1f\x7f]*$"
    )
    days: float | None = Field(None, gt=0, le=36_500, description="Days until it expires; null: never")


class KeyState(_Answered):
    """An API key, without its text. Times are ISO 8601, UTC."""

    id: str = Field(description="The part of the key between `gp_` and the next `_`; it is not secret")
    role: str
    tenant: str | None
    name: str
    createdAt: str
    expiresAt: str | None
    revokedAt: str | None
    usedAt: str | None = Field(description="The last use, to the minute; null: never")


class NewKey(KeyState):
    """Answer of POST /keys."""

    key: str = Field(description="The key. Only its hash is stored, so it can't be read again")


class AuditEntry(_Answered):
    """A call that changed something, or equal refused calls within a minute."""

    number: int = Field(description="Grows with every entry, in the order in which they were stored")
    at: str = Field(description="Time of the call, of the first if there are several: ISO 8601, UTC")
    method: str = Field(
        description="`start`: by the registry at its start; `withdraw`: by the registry, since the answer to "
        "the POST of this request did not reach its client; empty: several, not recorded one by one"
    )
    path: str | None = Field(description="Pattern of the path; null: there is no such path, or several")
    status: int = Field(description="HTTP status of the answer")
    code: str | None = Field(description="`code` of the error; null: the call was accepted")
    key: str | None = Field(description="Id of the API key, or `iss#sub` of a JWT; null: none was accepted")
    role: str | None = Field(description="Role of the key or JWT")
    tenant: str | None = Field(description="Tenant that the call was for, as far as it is known; without keys, a claim")
    source: str | None = Field(description="Address that the call came from; null: several, or it is not clear")
    about: str | None = Field(
        description="Id of the request, machine or key that the call was about; of a POST, that of its first request; "
        "null: unknown. Without API keys, ids of requests are null: a caller who knows one can release the request"
    )
    count: int = Field(description="Number of equal calls")


class AuditPage(_Answered):
    """Answer of GET /audit, oldest first. It may have no entries and still a next page."""

    entries: list[AuditEntry]
    next: int | None = Field(None, description="Value of `after` for the next page; null: this is the last page")


class ErrorAnswer(_Answered):
    """Body of every error outside ``/v1``: a stable ``code``, and a ``message`` for people.

    ``field``: the invalid field, if any.
    """

    code: str
    message: str
    retryable: bool
    field: str | None = None
    errors: list[dict[str, str]] | None = Field(None, description="All invalid fields of a 422")
    detail: list[dict[str, Any]] | None = Field(None, description="All invalid fields in FastAPI's format: loc, msg …")


MachineState.model_rebuild()
