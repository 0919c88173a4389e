"""The registry's state as records, as the store keeps them; decisions read and change them. Pure: no clock, no I/O.

Events (events.py) say what happened, commands (commands.py) what a wrapper has to do.
``Allocator.handle(event, now_s)`` turns an event into changed records and commands. Times are UTC seconds since the
epoch; only the registry actor writes them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from registry.wire.words import Grade, Priority, RequestStatus


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


# D74: known by its tenant and its id
MeasurementKey = tuple[str, int]
"""Identifies a measurement: its tenant, and the measurementId that this tenant chose."""


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

    * ``url``: base of its leases' addresses.
    * ``epoch``: grows with every command to the wrapper; reports with an older epoch are ignored.
    * ``spec``: the LLM that runs (READY, LEASED), is being started (DEPLOYING), or will be started for the request
      that holds the wrapper (STARTING, RESTARTING).
    * ``request_id``: the request that holds the wrapper (LEASED) or waits for its LLM (DEPLOYING, STARTING,
      RESTARTING); None: no request does.
    * ``home``: the LLM that the configuration assigns to it, None: none.
    * ``last_used_s``: when a request last got or left it, UTC seconds.
    * ``failures``: number of consecutive failures; ``reason``: describes the last failure of the wrapper or its LLM.
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
    * ``llmconfig``: the client's object as canonical JSON, returned unchanged.
    * ``notes``: which arguments were translated or dropped, and warnings about the tenant's budget.
    * ``failed_on``: wrappers on which its LLM failed to start or died; one entry per failure.
    * ``overtaken``: how many requests behind it were served first because their LLM was already running.
    * ``memory``: minimum memory of its LLM, None if not known.
    * ``model_revision``: commit of the LLM; None: not handed over yet, or a local model.
    * ``max_j`` [J], ``max_g`` [gCO2eq]: budget of its lease, None: no limit.
    * ``like_request_id``: earlier request whose LLM, software and hardware it must get, None: any.
    * ``provenance``: LLM, software and hardware at the hand-over (canonical JSON, see registry.core.provenance), None:
      not handed over yet, or not reported by the wrapper.
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
    * ``machine_id``: the machine that it is pinned to, None: no machine. Set by the first grant, or when it is resumed
      (``pinned_until_s``); None again once all its requests have ended.
    * ``pinned_until_s``: a measurement that is resumed soon after its last LLM was released is pinned to its previous
      machine until then (UTC s). None: not pinned, or pinned without a time limit, since it was served there.
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


# D116: the token itself is not stored
class StoredToken(NamedTuple):
    """What is stored of a lease's token: its id, from which the service makes it with a secret key, and its SHA-256.

    Ids are unique, and not secret. ``token_sha256``: hexadecimal.
    """

    token_id: str
    token_sha256: str


@dataclass(frozen=True, slots=True)
class Lease:
    """The exclusive right of one request to one wrapper, valid until an event ends it.

    ``token_id`` and ``token_sha256`` are as in StoredToken. The lease is due to end at ``deadline_s``, or
    ``idle_limit_s`` seconds after ``last_active_s`` (its last recorded prompt or keep-alive), whichever
    is earlier. Before a lease ends for idleness, its wrapper is asked whether it was used later.
    """

    request_id: str
    wrapper_id: str
    token_id: str
    token_sha256: str
    granted_s: float
    deadline_s: float
    idle_limit_s: float
    last_active_s: float

    @property
    def ends_s(self) -> float:
        """UTC second at which the lease is due to end unless its idle time restarts; at most ``deadline_s``."""
        return min(self.deadline_s, self.last_active_s + self.idle_limit_s)
