"""The records, events and effects that the registry's decisions are made of. Pure: no clock, no I/O.

Records are what is (and what the store keeps), events are what happened (past tense), effects are what is
to be done about it (imperative). ``Allocator.handle(event, now_s)`` turns an event into changed records and
effects. Times are UTC seconds since the epoch, written by the registry actor alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class RequestStatus(StrEnum):
    """The life of one request for one LLM; also the ``status`` word on the wire."""

    QUEUED = "queued"
    DEPLOYING = "deploying"
    DEPLOYED = "deployed"
    RELEASED = "released"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """True when the request holds nothing and never will again."""
        return self in _ENDED


_ENDED = frozenset({RequestStatus.RELEASED, RequestStatus.EXPIRED, RequestStatus.CANCELLED, RequestStatus.FAILED})


class WrapperStatus(StrEnum):
    """What a wrapper is doing, as the registry knows it."""

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
"""Longest name of a prompt that a client may give, characters as it is sent: percent-encoded."""


class Priority(StrEnum):
    """Rank of a measurement inside its tenant's queue."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Grade(StrEnum):
    """How much is done for the figures of a lease.

    measurement: its LLM is handed over warm, on a machine at rest. The prefix cache is empty for every grade.
    """

    STANDARD = "standard"
    MEASUREMENT = "measurement"


def canonical_json(value: Mapping[str, object]) -> str:
    """The one spelling of a JSON object: sorted keys, no spaces. Equal objects give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class LLMSpec:
    """What has to run: everything that changes the deployed engine, and nothing that does not.

    ``engine_args`` is canonical JSON of vLLM's own engine arguments. Prompting arguments (temperature …)
    are not here: two requests that differ in them share a running LLM.
    ``gpus`` is how many GPUs the LLM needs (0: it can run without any).
    """

    model: str
    modeltyp: str
    revision: str | None = None
    engine_args: str = "{}"
    gpus: int = 0

    @property
    def fingerprint(self) -> str:
        """16 hex digits; equal exactly when the same engine serves both."""
        text = "\0".join((self.model, self.modeltyp, self.revision or "", self.engine_args, str(self.gpus)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class LLMMemory:
    """The least memory that an LLM takes, as far as its checkpoint tells; bytes, on all its GPUs together.

    ``kv_cache_bytes`` is what one sequence of ``context_tokens`` fills; both None where that is not known.
    ``kv_reserved_bytes`` is the KV cache as the client has sized it, None if it has not.
    ``gpu_share`` of a GPU's memory may be used (0 < share ≤ 1). It is spread over ``gpus`` GPUs (None: over all that
    its wrapper has).
    """

    weights_bytes: int
    kv_cache_bytes: int | None = None
    context_tokens: int | None = None
    gpu_share: float = 1.0
    gpus: int | None = None
    kv_reserved_bytes: int | None = None


MeasurementKey = tuple[str, int]
"""What a measurement is known by: its tenant and the measurementId that this tenant chose."""

# --- records -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """An LLM Machine: a node of the Ray cluster that carries wrappers.

    ``machine_id`` is stable over restarts of the node's raylet; ``node_id`` is Ray's id of the moment.
    ``memory_bytes`` is main memory, ``gpu_memory_bytes`` the memory of each GPU, ``zone`` and ``region`` are where it
    stands; None means not known. ``draining``: an operator wants no LLM handed out there any more, until he says so.
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

    ``url`` is the base of the addresses that its leases get. ``epoch`` grows with every command to the
    wrapper; a report that carries an older one is out of date and changes nothing. ``spec`` is the LLM that
    runs (READY, LEASED) or is being started (DEPLOYING). ``request_id`` is the request that holds the wrapper
    (LEASED) or for whom it is deploying (DEPLOYING; None: nobody waits for it any more, or a preload).
    ``home`` is the LLM that the configuration names for it. ``failures`` counts failures in a row,
    ``reason`` is the last one in words.
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
    """One LLM asked for by one client.

    ``seq`` is the order of arrival. ``llmconfig`` is the client's own object as canonical JSON, handed back
    unchanged; ``notes`` says what of it was translated or dropped. ``failed_on`` are the wrappers on which
    its LLM could not be started. ``overtaken`` counts warm matches that went before it. ``memory`` is what its LLM
    takes at least, None where that is not known. ``model_revision`` is the commit of the LLM that it was given;
    None: not yet, or a local model, which has none. ``max_j`` [J] and ``max_g`` [gCO2eq] are what its lease may use
    up, None: no limit.
    ``like_request_id`` is the earlier request whose LLM, software and hardware it must get again, None: any will do.
    ``provenance`` is what its LLM was handed over with (canonical JSON, see registry.core.provenance), None: not yet.
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
        """The key of its measurement."""
        return self.tenant, self.measurement_id


@dataclass(frozen=True, slots=True)
class Measurement:
    """Requests that belong together: served one after another, on one machine.

    ``measurement_id`` is its tenant's choice: another tenant's with the same one is another measurement.

    ``seq`` is when it began, or went on: the arrival of the first of its requests that had not ended when the
    latest was added. ``machine_id`` is the pin: set by the first grant, None again once nothing of it is left.
    A measurement that goes on soon after its last LLM was given back is pinned to the machine of before until
    ``pinned_until_s`` (UTC); None: it is not pinned, or has been served there since, and the pin has no end.
    ``flags`` tell what makes its figures hard to compare (``machine_changed`` …). ``gpu_type`` is the type that its
    machine must have, None: any. ``versions`` is what its latest LLM was handed over with (name → version, as canonical
    JSON), None: nothing was yet, or its wrapper did not say.
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
        """What it is known by."""
        return self.tenant, self.measurement_id


@dataclass(frozen=True, slots=True)
class Lease:
    """The exclusive right of one request to one wrapper; held while ``now_s < ends_s``.

    ``token`` is unguessable and part of the address. ``deadline_s`` is when the lease ends whatever happens,
    ``idle_limit_s`` how long it may go without a prompt or keep-alive, counted from ``last_active_s``.
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
        """UTC second at which the lease ends unless it is used before."""
        return min(self.deadline_s, self.last_active_s + self.idle_limit_s)


class WindowKind(StrEnum):
    """What a window of time was used for.

    prompt: one prompt of a lease. lease: all of a lease. idle: the time of a lease without any prompt, or of a machine
    that nobody had. load, wake: the start, or the waking, of an LLM, warm-up included, charged to its deployment.
    """

    PROMPT = "prompt"
    LEASE = "lease"
    IDLE = "idle"
    LOAD = "load"
    WAKE = "wake"


@dataclass(frozen=True, slots=True)
class EnergyWindow:
    """What a window of time on a wrapper cost, as the wrapper has measured it.

    ``window_id`` is ``<process>-<number>``. That of a prompt is ``<process>-p<n>``: it is given when the n-th prompt
    of the wrapper's process begins, so that the answer can name it. ``number`` is the place of the window in the log
    of its process, from 1, without holes; 0 in a window that was read back from the database.
    ``request_id`` and ``measurement_id`` are those of the lease, None without one. Times are UTC seconds.
    ``total_j`` [J], ``o_g`` and ``m_g`` [gCO2eq] are None where they are not known; ``label`` is the label of the
    energy (deployments.energy.figures.Label). ``detail`` is the whole record, as canonical JSON.
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
    """An energy window that is written down, the machine that it was measured on, and the tenant that it counts for.

    None: the machine was not known any more; it is nobody's.
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
    """A client asked for one or more LLMs of a measurement, in this order. ``gpu_type`` None: it does not matter.

    ``priority`` None: the one that the measurement has, normal for a new one. ``like_request_id``: each of them must be
    what that request was given.
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
        """The key of the measurement."""
        return self.tenant, self.measurement_id


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """A client is done with a request, or cancels it."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LeaseLapsed:
    """The wrapper says that the lease of a request, which was handed over there, has ended."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LeaseUsed:
    """A prompt or keep-alive of a lease was seen at ``at_s``."""

    request_id: str
    at_s: float


@dataclass(frozen=True, slots=True)
class LeaseBound:
    """The wrapper accepts the lease's token from now on. ``model_revision``: the commit of the LLM that it runs.

    ``versions``: of the software there, as a measurement keeps them; None: not known. ``flags`` are the measurement's
    from now on, ``provenance`` is as in a Request. With a ``refusal`` it accepts nothing, since the LLM can't
    serve the request.
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
    """Something happened during a lease that makes its figures hard to compare; ``flags`` say what."""

    request_id: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LLMDeployed:
    """The LLM of this epoch's DeployLLM runs and answers."""

    wrapper_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class LLMDeployFailed:
    """The LLM of this epoch's DeployLLM could not be started; the wrapper is empty and usable.

    ``permanent``: it would fail in the same way on every machine.
    """

    wrapper_id: str
    epoch: int
    reason: str
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class LLMStopped:
    """The wrapper is empty after this epoch's StopLLM."""

    wrapper_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class LLMDied:
    """The running LLM of a wrapper ended by itself (crash, kill, hang); the wrapper is empty and usable.

    ``epoch`` is that of the last command the wrapper had taken. ``flags`` are for the measurement whose lease it ran.
    """

    wrapper_id: str
    epoch: int
    reason: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WrapperAdded:
    """A machine has a (new) wrapper, which is starting."""

    wrapper_id: str
    machine_id: str
    url: str
    gpus: int = 0
    home: LLMSpec | None = None


@dataclass(frozen=True, slots=True)
class WrapperStarted:
    """A wrapper answers. ``running`` is the fingerprint of the LLM that it runs, None when it is empty.

    ``epoch`` is that of the last command it had taken (0 for a fresh one).
    """

    wrapper_id: str
    epoch: int = 0
    running: str | None = None


@dataclass(frozen=True, slots=True)
class WrapperFailed:
    """A wrapper does not answer, or answered a command with an error that is not the LLM's fault."""

    wrapper_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class WrapperRemoved:
    """A wrapper is gone for good (its machine left, or the configuration no longer has it)."""

    wrapper_id: str


@dataclass(frozen=True, slots=True)
class WrapperSwitchedOff:
    """The wrapper of a machine that is being drained is removed from it, unless somebody holds it by now."""

    wrapper_id: str


@dataclass(frozen=True, slots=True)
class MachineJoined:
    """A machine is there (again), or what is known of it changed; but not whether it is draining."""

    machine: Machine


@dataclass(frozen=True, slots=True)
class MachineLost:
    """A machine is gone, and with it all its wrappers."""

    machine_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class MachineDrained:
    """An operator wants no more leases on a machine; those that there are end as they would."""

    machine_id: str


@dataclass(frozen=True, slots=True)
class MachineUndrained:
    """An operator wants a machine to be used again."""

    machine_id: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing but time: ends the leases that are over.

    With ``asked``, of those that were not used for too long only these requests': their wrappers have been asked.
    """

    asked: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ShutdownBegun:
    """No new requests, no new grants; every LLM is to be stopped."""


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

    ``request_id`` is the request that causes the start, and pays for it; None for a preload.
    """

    wrapper_id: str
    epoch: int
    spec: LLMSpec
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class StopLLM:
    """Empty the wrapper. Answer: LLMStopped."""

    wrapper_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class BindLease:
    """Let the holder of the lease's token, and nobody else, prompt. Answer: LeaseBound."""

    wrapper_id: str
    epoch: int
    request_id: str


@dataclass(frozen=True, slots=True)
class UnbindLease:
    """Refuse the token from now on and end what it has in flight; ``how`` is told to its holder. No answer."""

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
    """Everything the registry knows, as the store loads it. Order within a kind means nothing."""

    machines: tuple[Machine, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    requests: tuple[Request, ...] = ()
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """Records as they are after one event: put these, remove those. Each record appears at most once.

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
        """True when nothing is to be written."""
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
    """The operator's choices that decisions depend on.

    ``lease_max_s``/``lease_idle_s``: length of a lease and how long it may idle, seconds > 0.
    ``deploy_attempts``: on how many wrappers a failing LLM is tried, ≥ 1. ``wrapper_attempts``: restarts of a
    failing wrapper in a row before it is given up, ≥ 1. ``max_overtakes``/``max_overtake_s``: how often, and
    for how long after its arrival, a request may be overtaken by warm matches. ``max_queued`` and
    ``max_queued_per_tenant``: caps on requests that wait. ``tenant_weights``: (tenant, weight > 0); 1 if absent.
    ``wrappers_per_machine`` wrappers share the main memory of a machine without GPU, ≥ 1, and each has
    ``kv_cache_bytes`` for the KV cache (None: no limit of its own). ``sticky_s`` (>= 0): how long after its last LLM
    was given back a measurement still waits for the machine that it was served on, seconds.
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
