"""The records, events and effects that the registry's decisions are made of. Pure: no clock, no I/O.

Records are the current state (the store keeps them), events say what happened (past tense), effects say what to do
(imperative). ``Allocator.handle(event, now_s)`` turns an event into changed records and effects. Times are UTC seconds
since the epoch; only the registry actor writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class RequestStatus(StrEnum):
    """The status of a request for one LLM; also the ``status`` word on the wire."""

    QUEUED = "queued"
    DEPLOYING = "deploying"
    DEPLOYED = "deployed"
    RELEASED = "released"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """True when the request holds nothing and its status can't change any more."""
        return self in _ENDED


_ENDED = frozenset({RequestStatus.RELEASED, RequestStatus.EXPIRED, RequestStatus.CANCELLED, RequestStatus.FAILED})


class WrapperStatus(StrEnum):
    """The registry's view of what a wrapper is doing."""

    STARTING = "starting"
    IDLE = "idle"
    DEPLOYING = "deploying"
    READY = "ready"
    LEASED = "leased"
    STOPPING = "stopping"
    FAILED = "failed"
    RESTARTING = "restarting"
    LOST = "lost"
    OFF = "off"


MAX_PROMPT_ID = 1024
"""Maximum length of a prompt id that a client chooses, in characters after percent-encoding."""


class Priority(StrEnum):
    """Rank of a measurement inside its tenant's queue."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Grade(StrEnum):
    """How carefully a lease is prepared for measuring energy.

    measurement: the LLM is handed over warmed up, on a machine at rest. Every grade starts with an empty prefix cache.
    """

    STANDARD = "standard"
    MEASUREMENT = "measurement"


def canonical_json(value: Mapping[str, object]) -> str:
    """Return a JSON object as text with sorted keys and no spaces. Equal objects give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class LLMSpec:
    """Identifies an LLM to run: everything that changes the deployed engine, and nothing else.

    ``engine_args`` is canonical JSON of vLLM's own engine arguments. Prompting arguments (temperature …) are left out:
    requests that differ only in those can use the same running LLM. ``gpus``: GPUs that the LLM needs (0: none).
    """

    model: str
    modeltyp: str
    revision: str | None = None
    engine_args: str = "{}"
    gpus: int = 0

    @property
    def fingerprint(self) -> str:
        """16 hex digits, equal for two specs exactly when the same engine can serve both."""
        text = "\0".join((self.model, self.modeltyp, self.revision or "", self.engine_args, str(self.gpus)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class LLMMemory:
    """The minimum memory of an LLM, worked out from its checkpoint; bytes, sum over all its GPUs.

    ``kv_cache_bytes``: KV cache of one sequence of ``context_tokens``; both None if not known.
    ``kv_reserved_bytes``: size of the KV cache that the client has set, None if it has not.
    ``gpu_share``: fraction of each GPU's memory that may be used (0 < share ≤ 1).
    ``gpus``: number of GPUs that the LLM is spread over (None: all of its wrapper).
    """

    weights_bytes: int
    kv_cache_bytes: int | None = None
    context_tokens: int | None = None
    gpu_share: float = 1.0
    gpus: int | None = None
    kv_reserved_bytes: int | None = None


MeasurementKey = tuple[str, int]
"""Identifies a measurement: its tenant, and the measurementId that this tenant chose."""

# --- records -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """An LLM Machine: a node of the Ray cluster that runs wrappers.

    ``machine_id`` survives restarts of the node's raylet; ``node_id`` is Ray's current id of the node.
    ``memory_bytes`` is main memory, ``gpu_memory_bytes`` the memory of each GPU, ``zone`` and ``region`` its location;
    None means not known. ``draining``: no new leases on this machine until an operator undrains it.
    """

    machine_id: str
    node_id: str
    address: str
    alive: bool = True
    gpus: int = 0
    gpu_type: str | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    draining: bool = False
    zone: str | None = None
    region: str | None = None


@dataclass(frozen=True, slots=True)
class Wrapper:
    """An LLMWrapper on a machine, and the LLM inside it.

    ``url`` is the base of its leases' addresses. ``epoch`` grows with every command to the wrapper; reports with an
    older epoch are ignored. ``spec`` is the LLM that runs (READY, LEASED) or is being started (DEPLOYING).
    ``request_id`` is the request that holds the wrapper (LEASED) or waits for its LLM (DEPLOYING; None: no request
    waits, or a preload). ``home`` is the LLM that the configuration assigns to it. ``failures`` counts consecutive
    failures, ``reason`` describes the last one.
    """

    wrapper_id: str
    machine_id: str
    url: str
    gpus: int = 0
    status: WrapperStatus = WrapperStatus.STARTING
    epoch: int = 0
    spec: LLMSpec | None = None
    request_id: str | None = None
    home: LLMSpec | None = None
    last_used_s: float = 0.0
    failures: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request for one LLM.

    * ``seq``: number in the order of arrival.
    * ``llmconfig``: the client's object as canonical JSON, returned unchanged; ``notes``: what of it was translated or
      dropped.
    * ``failed_on``: wrappers on which its LLM could not be started or died, once for each time.
    * ``overtaken``: how many requests behind it were served first because their LLM was already running.
    * ``memory``: minimum memory of its LLM, None if not known.
    * ``model_revision``: commit of the LLM; None: not handed over yet, or a local model.
    * ``max_j`` [J], ``max_g`` [gCO2eq]: budget of its lease, None: no limit.
    * ``like_request_id``: earlier request whose LLM, software and hardware it must get, None: any.
    * ``provenance``: LLM, software and hardware at the hand-over (canonical JSON, see registry.core.provenance), None:
      not handed over yet.
    """

    request_id: str
    measurement_id: int
    seq: int
    spec: LLMSpec
    llmconfig: str
    status: RequestStatus = RequestStatus.QUEUED
    reason: str | None = None
    notes: tuple[str, ...] = ()
    wrapper_id: str | None = None
    machine_id: str | None = None
    failed_on: tuple[str, ...] = ()
    overtaken: int = 0
    created_s: float = 0.0
    deploying_s: float | None = None
    deployed_s: float | None = None
    ended_s: float | None = None
    memory: LLMMemory | None = None
    model_revision: str | None = None
    max_j: float | None = None
    max_g: float | None = None
    grade: Grade = Grade.STANDARD
    like_request_id: str | None = None
    provenance: str | None = None
    tenant: str = "default"

    @property
    def measurement_key(self) -> MeasurementKey:
        """Identifies its measurement."""
        return self.tenant, self.measurement_id


@dataclass(frozen=True, slots=True)
class Measurement:
    """Requests that belong together: served one after another, on one machine.

    * ``measurement_id``: unique within a tenant only.
    * ``seq``: number of the request that began it, or that resumed it after all earlier ones had ended.
    * ``machine_id``: the machine that it is pinned to; set by the first grant, None once all its requests have ended.
    * ``pinned_until_s``: a measurement that is resumed soon after its last LLM was released is pinned to its previous
      machine until then (UTC s). None: not pinned, or served there since, so that the pin does not expire.
    * ``flags``: what makes its figures hard to compare (``machine_changed`` …).
    * ``gpu_type``: GPU type that its machine must have, None: any.
    * ``versions``: software versions of its latest hand-over (name → version, canonical JSON), None: no hand-over yet,
      or not reported by the wrapper.
    """

    measurement_id: int
    seq: int
    tenant: str = "default"
    priority: Priority = Priority.NORMAL
    machine_id: str | None = None
    flags: tuple[str, ...] = ()
    created_s: float = 0.0
    gpu_type: str | None = None
    versions: str | None = None
    pinned_until_s: float | None = None

    @property
    def key(self) -> MeasurementKey:
        """Identifies it."""
        return self.tenant, self.measurement_id


@dataclass(frozen=True, slots=True)
class Lease:
    """The exclusive right of one request to one wrapper; held while ``now_s < ends_s``.

    ``token`` is unguessable and part of the address. The lease ends at ``deadline_s`` at the latest, and
    ``idle_limit_s`` seconds after ``last_active_s``, its last prompt or keep-alive.
    """

    request_id: str
    wrapper_id: str
    token: str
    granted_s: float
    deadline_s: float
    idle_limit_s: float
    last_active_s: float

    @property
    def ends_s(self) -> float:
        """UTC second at which the lease ends unless it is used earlier."""
        return min(self.deadline_s, self.last_active_s + self.idle_limit_s)


class WindowKind(StrEnum):
    """What a wrapper did during an energy window.

    prompt: one prompt of a lease. lease: a whole lease. idle: the time of a lease without prompts, or of a machine
    without a lease. load, wake: the start of an LLM, or its waking from sleep, with warm-up; charged to its deployment.
    """

    PROMPT = "prompt"
    LEASE = "lease"
    IDLE = "idle"
    LOAD = "load"
    WAKE = "wake"


@dataclass(frozen=True, slots=True)
class EnergyWindow:
    """Energy and emissions of a time window on a wrapper, measured by the wrapper.

    * ``window_id``: ``<process>-<number>``, or ``<process>-p<n>`` for the n-th prompt of the wrapper's process; that is
      known when the prompt starts, so that the answer can contain it.
    * ``number``: position in the log of its process, from 1, without gaps; 0 if read back from the database.
    * ``request_id``, ``measurement_id``: those of the lease, None without one.
    * ``begun_s``, ``ended_s``: UTC seconds.
    * ``total_j`` [J], ``o_g`` and ``m_g`` [gCO2eq]: None if not known.
    * ``label``: label of the energy (deployments.energy.figures.Label).
    * ``detail``: the whole record, canonical JSON.
    """

    window_id: str
    kind: WindowKind
    wrapper_id: str
    request_id: str | None
    measurement_id: int | None
    begun_s: float
    ended_s: float
    total_j: float | None
    o_g: float | None
    m_g: float | None
    label: str
    detail: str
    number: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class KeptWindow:
    """A stored energy window, the machine that it was measured on, and the tenant that it is charged to.

    ``machine_id`` None: the machine was no longer known. ``tenant`` None: charged to no tenant.
    """

    window: EnergyWindow
    machine_id: str | None
    tenant: str | None


# --- events: what happened ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewRequest:
    """One entry of a LeaseRequested."""

    request_id: str
    spec: LLMSpec
    llmconfig: str
    notes: tuple[str, ...] = ()
    memory: LLMMemory | None = None
    max_j: float | None = None
    max_g: float | None = None


@dataclass(frozen=True, slots=True)
class LeaseRequested:
    """A client asked for one or more LLMs of a measurement, in this order. ``gpu_type`` None: any.

    ``priority`` None: that of the measurement, normal if it is new. ``like_request_id``: each request must get the same
    as that earlier request.
    """

    measurement_id: int
    requests: tuple[NewRequest, ...]
    tenant: str = "default"
    priority: Priority | None = None
    gpu_type: str | None = None
    grade: Grade = Grade.STANDARD
    like_request_id: str | None = None

    @property
    def measurement_key(self) -> MeasurementKey:
        """Identifies the measurement."""
        return self.tenant, self.measurement_id


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """A client is done with a request, or cancels it."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LeaseLapsed:
    """A wrapper reports that the lease of a request, handed over there, has ended."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LeaseUsed:
    """A lease had a prompt or keep-alive at ``at_s`` (UTC s)."""

    request_id: str
    at_s: float


@dataclass(frozen=True, slots=True)
class LeaseBound:
    """The wrapper accepts the lease's token from now on. ``model_revision``: commit of the LLM that it runs.

    ``versions``: software versions as in Measurement, None: not known. ``flags`` are added to the measurement's.
    ``provenance`` is as in Request. ``refusal``: why the LLM can't serve the request; the token is then not accepted.
    """

    wrapper_id: str
    epoch: int
    model_revision: str | None = None
    versions: str | None = None
    flags: tuple[str, ...] = ()
    provenance: str | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseFlagged:
    """Something during a lease makes its figures hard to compare; ``flags`` say what."""

    request_id: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LLMDeployed:
    """The LLM of the DeployLLM with this epoch runs and answers."""

    wrapper_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class LLMDeployFailed:
    """The LLM of the DeployLLM with this epoch could not be started; the wrapper is empty and usable.

    ``permanent``: it would fail the same way on every machine.
    """

    wrapper_id: str
    epoch: int
    reason: str
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class LLMStopped:
    """The wrapper is empty after the StopLLM with this epoch."""

    wrapper_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class LLMDied:
    """A wrapper's running LLM crashed, was killed or hung; the wrapper is empty and usable.

    ``epoch``: of the last command that the wrapper accepted. ``flags`` are added to the measurement that held it.
    """

    wrapper_id: str
    epoch: int
    reason: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WrapperAdded:
    """A wrapper was created, or created again, on a machine and is starting."""

    wrapper_id: str
    machine_id: str
    url: str
    gpus: int = 0
    home: LLMSpec | None = None


@dataclass(frozen=True, slots=True)
class WrapperStarted:
    """A wrapper answers. ``running``: fingerprint of the LLM that it runs, None if it is empty.

    ``epoch``: of the last command that the wrapper accepted (0 in a new process).
    """

    wrapper_id: str
    epoch: int = 0
    running: str | None = None


@dataclass(frozen=True, slots=True)
class WrapperFailed:
    """A wrapper does not answer, or a command failed for a reason other than the LLM."""

    wrapper_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class WrapperRemoved:
    """A wrapper was removed permanently: its machine left, or the configuration no longer has it."""

    wrapper_id: str


@dataclass(frozen=True, slots=True)
class WrapperSwitchedOff:
    """A wrapper of a draining machine is to be removed; ignored if a request holds it by now."""

    wrapper_id: str


@dataclass(frozen=True, slots=True)
class MachineJoined:
    """A machine joined or came back, or its properties changed; ``machine.draining`` is ignored."""

    machine: Machine


@dataclass(frozen=True, slots=True)
class MachineLost:
    """A machine was lost with all its wrappers."""

    machine_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class MachineDrained:
    """An operator wants no new leases on a machine; existing leases continue."""

    machine_id: str


@dataclass(frozen=True, slots=True)
class MachineUndrained:
    """An operator wants a machine to be used again."""

    machine_id: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Time has passed: end the leases and pins that are over.

    ``asked``: only the leases of these requests may end for idleness, since their wrappers were asked for their last
    use; None: all leases.
    """

    asked: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ShutdownBegun:
    """The registry shuts down: no new requests, no new grants, every LLM is stopped."""


Event = (
    LeaseRequested
    | LeaseReleased
    | LeaseLapsed
    | LeaseUsed
    | LeaseBound
    | LeaseFlagged
    | LLMDeployed
    | LLMDeployFailed
    | LLMStopped
    | LLMDied
    | WrapperAdded
    | WrapperStarted
    | WrapperFailed
    | WrapperRemoved
    | WrapperSwitchedOff
    | MachineJoined
    | MachineLost
    | MachineDrained
    | MachineUndrained
    | TimePassed
    | ShutdownBegun
)


# --- effects: what is to be done ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeployLLM:
    """Make the wrapper run this LLM instead of any other. Answer: LLMDeployed, LLMDeployFailed.

    ``request_id``: the request that the start is charged to; None for a preload.
    """

    wrapper_id: str
    epoch: int
    spec: LLMSpec
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class StopLLM:
    """Stop the wrapper's LLM. Answer: LLMStopped."""

    wrapper_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class BindLease:
    """Accept prompts with the lease's token, and no others. Answer: LeaseBound."""

    wrapper_id: str
    epoch: int
    request_id: str


@dataclass(frozen=True, slots=True)
class UnbindLease:
    """Refuse the token from now on and end its prompts in flight; tell the client ``how`` it ended. No answer."""

    wrapper_id: str
    epoch: int
    request_id: str
    how: str


@dataclass(frozen=True, slots=True)
class RestartWrapper:
    """Replace the wrapper's process. Answer: WrapperStarted."""

    wrapper_id: str
    epoch: int


Effect = DeployLLM | StopLLM | BindLease | UnbindLease | RestartWrapper


# --- what a decision gives back ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All records, as the store loads them. The order within each tuple has no meaning."""

    machines: tuple[Machine, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    requests: tuple[Request, ...] = ()
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What one event changed: records to write, ids to remove. Each record appears at most once.

    ``ended_leases`` are request ids, ``removed_wrappers`` wrapper ids.
    """

    machines: tuple[Machine, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    requests: tuple[Request, ...] = ()
    leases: tuple[Lease, ...] = ()
    ended_leases: tuple[str, ...] = ()
    removed_wrappers: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """True when there is nothing to write."""
        return not (
            self.machines
            or self.wrappers
            or self.measurements
            or self.requests
            or self.leases
            or self.ended_leases
            or self.removed_wrappers
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of one event: write ``changes`` first, then run ``effects`` in their order."""

    changes: Changes = Changes()
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings that decisions depend on.

    * ``lease_max_s``, ``lease_idle_s``: maximum length of a lease, and of its idle time; seconds > 0.
    * ``deploy_attempts``: after so many failed starts, or deaths during its lease, of its LLM a request fails, ≥ 1.
    * ``wrapper_attempts``: consecutive failures after which a wrapper is given up, ≥ 1.
    * ``max_overtakes``, ``max_overtake_s``: how often, and for how many seconds after its arrival, a request may be
      overtaken by requests whose LLM is already running.
    * ``max_queued``, ``max_queued_per_tenant``: maximum number of queued requests.
    * ``tenant_weights``: (tenant, weight > 0); 1 if absent.
    * ``wrappers_per_machine``: wrappers that share the main memory of a machine without GPUs, ≥ 1.
    * ``kv_cache_bytes``: KV cache of each of these wrappers, None: no separate limit.
    * ``sticky_s``: how many seconds (≥ 0) after its last release a measurement still waits for its previous machine.
    """

    lease_max_s: float = 3600.0
    lease_idle_s: float = 600.0
    deploy_attempts: int = 2
    wrapper_attempts: int = 3
    max_overtakes: int = 4
    max_overtake_s: float = 60.0
    max_queued: int = 100_000
    max_queued_per_tenant: int = 100_000
    tenant_weights: tuple[tuple[str, float], ...] = ()
    wrappers_per_machine: int = 1
    kv_cache_bytes: int | None = None
    sticky_s: float = 600.0
