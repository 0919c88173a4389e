"""The messages between registry and wrappers, and the ``Cluster`` protocol. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from registry.contract.windows import EnergyWindow
from registry.core.records import LLMSpec, Machine

SETTLING: Final = "settling"
"""Phase of a wrapper that waits until its machine is at rest before it hands over an LLM."""


NODE_ID_DIGITS: Final = 6
"""Number of digits of the node id that are appended to a machine id if nodes share a name."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A timestamp of the monotonic clock of one wrapper process, seconds.

    Each message of the registry contains the last timestamp that it received from this process. However long a
    message takes, its content is at least as recent as that timestamp.
    """

    process: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Belief:
    """The registry's view of a wrapper, sent with each request for a report.

    * ``epoch``: epoch of the newest command to this wrapper.
    * ``request_id``: the request that has a lease on the wrapper, None without a lease.
    * ``as_of``: timestamp of the wrapper's last report; this view is at least as recent. None: no report yet.
    * ``windows_kept``: number of the last energy window of this process that the registry has stored, 0: none.
    """

    epoch: int
    request_id: str | None
    as_of: Moment | None
    windows_kept: int = 0


@dataclass(frozen=True, slots=True)
class StartedFor:
    """The request that the start of an LLM is charged to, even if the request is cancelled meanwhile."""

    request_id: str
    measurement_id: int


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """What a wrapper needs to serve one lease.

    * ``ends_in_s``: remaining time of the lease, seconds from the receipt of this message.
    * ``idle_limit_s``: maximum idle time, seconds.
    * ``model_revision``: commit of the LLM at the start of the lease, so that a restarted engine gets the same commit;
      None: the lease has not started.
    * ``as_of``: as in Belief.
    * ``max_j`` [J], ``max_g`` [gCO2eq]: budget of the lease, None: no limit.
    * ``used_j`` [J], ``used_g`` [gCO2eq]: known use of the lease so far; a new process of the wrapper continues from
      these values.
    * ``grade``: ``standard`` or ``measurement``.
    * ``handed_over_s``: UTC second at which the lease began, None before.
    """

    request_id: str
    measurement_id: int
    token: str
    llmconfig: str
    ends_in_s: float
    idle_limit_s: float
    model_revision: str | None = None
    as_of: Moment | None = None
    grade: str = "standard"
    max_j: float | None = None
    max_g: float | None = None
    used_j: float = 0.0
    used_g: float = 0.0
    handed_over_s: float | None = None


@dataclass(frozen=True, slots=True)
class HandOver:
    """The state in which a wrapper hands over an LLM.

    ``model_revision``: commit of the LLM, None if it has none. ``flags``: conditions for a measurement that are not met
    (deployments.energy.settling). ``provenance``: the wrapper's part of ``Request.provenance``, None: not reported.
    ``refusal``: why the LLM can't serve its request; the lease then does not begin.
    """

    model_revision: str | None = None
    flags: tuple[str, ...] = ()
    provenance: Mapping[str, object] | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Download:
    """Progress of a model's download. ``total_bytes`` is 0 until the hub has reported the size."""

    done_bytes: int
    total_bytes: int

    @property
    def share(self) -> float:
        """Progress from 0 to 1; 1.0 if the total is 0."""
        return self.done_bytes / self.total_bytes if self.total_bytes else 1.0


@dataclass(frozen=True, slots=True)
class WrapperReport:
    """A wrapper's report about itself.

    * ``epoch``: epoch of the last command accepted. ``moment``: time of the report, by the wrapper's own clock.
    * ``running``, ``starting``: fingerprint of the LLM that answers prompts, or is being started; ``revision``: its
      commit, None if not known. ``starts``: number of LLMs started so far.
    * ``died``: why the LLM ended by itself, None if it did not; ``death_flags``: flags that its measurement gets then.
    * ``bound``: the request whose token is accepted, or will be once the machine is at rest. ``idle_for_s``: seconds
      since the lease was last used (0.0 while a prompt is in flight), None without a lease. ``lease_flags``: what
      happened during the lease that makes its figures hard to compare.
    * ``phase``: what is being done until the LLM is handed over, None: nothing. ``download``: progress of its
      download, None in any other phase.
    * ``in_flight``: prompts being answered. ``unfinished``: prompts that the engine has not finished, None without an
      engine.
    * ``memory_bytes``: main memory of its machine. ``gpu_memory_bytes``: memory of each of its GPUs. None: not known.
    * ``warm``: whether LLMs start without a new import of the engine; ``cold_reason``: why not.
    * ``windows``: the oldest finished energy windows that the registry has not stored yet, by number.
    """

    epoch: int
    running: str | None = None
    starting: str | None = None
    revision: str | None = None
    died: str | None = None
    death_flags: tuple[str, ...] = ()
    phase: str | None = None
    download: Download | None = None
    bound: str | None = None
    idle_for_s: float | None = None
    in_flight: int = 0
    unfinished: int | None = None
    starts: int = 0
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    warm: bool | None = None
    cold_reason: str | None = None
    meter: Mapping[str, object] | None = None
    versions: Mapping[str, str] | None = None
    moment: Moment | None = None
    windows: tuple[EnergyWindow, ...] = ()
    lease_flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WrapperPlan:
    """A wrapper that should exist, with its number of GPUs, base URL and ``home`` LLM (None: none).

    ``on_machine``: number of wrappers on its machine, including this one. ``gpu_type`` and ``zone`` are the machine's,
    None if not known.
    """

    wrapper_id: str
    machine_id: str
    node_id: str
    gpus: int
    url: str
    home: LLMSpec | None = None
    on_machine: int = 1
    gpu_type: str | None = None
    zone: str | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """The observed state of the cluster: machines that are alive, and ids of the deployed wrappers.

    ``leaving``: wrappers that are being removed; they are not in ``wrapper_ids``.
    """

    machines: tuple[Machine, ...]
    wrapper_ids: frozenset[str]
    leaving: frozenset[str] = frozenset()


class Cluster(Protocol):
    """The machines and their wrappers. Every call has its own time limit.

    A command supersedes every older command to the wrapper: it cancels a deploy in progress, and ends a
    lease.

    Raises:
        WrapperUnreachable: the wrapper can't be reached.
        WrapperUnheard: the same, but the cause may be the connection and not the wrapper.
        StaleEpoch: the wrapper has accepted a newer command.
    """

    async def observe(self) -> Observation:
        """Return the current machines and wrappers. Raises WrapperUnreachable if the cluster does not answer."""

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        """Deploy these wrappers; returns when they were accepted, not when they answer."""

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        """Delete these wrappers; returns when they are gone."""

    async def report(self, wrapper_id: str, belief: Belief) -> WrapperReport:
        """Send the registry's view to a wrapper and return the wrapper's report. Takes seconds at most."""

    async def deploy(
        self,
        wrapper_id: str,
        epoch: int,
        spec: LLMSpec,
        grant: LeaseGrant | None,
        started_for: StartedFor | None = None,
    ) -> None:
        """Run this LLM instead of any other; returns when it answers.

        ``grant``: the lease whose LLM is being restarted, which stays bound; None: no lease.
        ``started_for``: the request that a start by this command is charged to, None: no request. If a
        start of this LLM is in progress, it stays charged to its own request.

        Raises:
            EngineStartFailed: the LLM could not be started.
            InvalidField: the machine does not accept the LLM's description.
        """

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        """Stop the LLM, if any; returns when the wrapper has verified that it is empty."""

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> HandOver:
        """Accept only this lease's token from now on; for measurement grade, once the machine is at rest.

        Raises:
            EngineNotReady: the wrapper runs no LLM.
        """

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        """Refuse the request's token from now on and end its prompts in flight. ``how``: how the lease ended."""

    async def touch(self, wrapper_id: str, request_id: str) -> bool:
        """Keep the request's lease alive. Returns False if it is not bound there."""

    async def restart(self, wrapper_id: str) -> None:
        """Replace the wrapper's process; returns when the old one is gone."""
