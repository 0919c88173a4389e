"""Events: what happened, in the past tense. Each is one input of ``Allocator.handle``.

The names of these classes never change: they are stored in the log of events, and clients read them. The test
tests/unit/registry_core/test_events.py lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.core.records import (
    LLMMemory,
    LLMSpec,
    Machine,
    MeasurementKey,
)
from registry.wire.words import Grade, Priority


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

    ``priority`` None: that of the measurement, normal if the measurement is new. ``like_request_id``:
    earlier request whose LLM, software and kind of hardware each request must get; None: any.
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
    """A wrapper reports that it has ended the lease of a request, e.g. because its time was over."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LeaseTokenLost:
    """The token of a lease can't be made again, so neither holder nor wrapper can get it from the registry."""

    request_id: str
    reason: str


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

    ``epoch``: of the last command that the wrapper accepted. ``flags``: added to its measurement's.
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
    """A wrapper of a draining machine is being removed; ignored if a request holds the wrapper by now."""

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

    ``asked``: requests whose wrappers were asked whether their lease was used. Only their leases may end for idleness;
    None: all leases may.
    """

    asked: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ShutdownBegun:
    """The registry shuts down: no new requests, no new grants, every LLM is stopped."""


Event = (
    LeaseRequested
    | LeaseReleased
    | LeaseLapsed
    | LeaseTokenLost
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
