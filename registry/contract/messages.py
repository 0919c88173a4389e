"""The messages between registry and wrappers, the ``Cluster`` protocol, and the reconciliation of both. Pure.

``plan`` compares the known machines and wrappers with the observed ones. It returns what happened (events for the
allocator) and what to do (wrappers to create and remove).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from registry.contract.windows import EnergyWindow
from registry.core.events import Event, MachineJoined, MachineLost, WrapperAdded, WrapperRemoved
from registry.core.records import LLMSpec, Machine, Wrapper, WrapperStatus

_ABSENT = (WrapperStatus.LOST, WrapperStatus.OFF)
"""After these statuses, a wrapper that is observed again counts as new."""


SETTLING: Final = "settling"
"""Phase of a wrapper that waits until its machine is at rest before it hands over an LLM."""


NODE_ID_DIGITS: Final = 6
"""Number of digits of the node id that are appended to a machine id if nodes share a name."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A timestamp of a wrapper process's own monotonic clock, seconds.

    The registry echoes the last one it has received: what it sends with it was true at that time or later, however long
    the message takes.
    """

    process: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Belief:
    """The registry's view of a wrapper, sent with each request for a report.

    ``epoch``: of the newest command to this wrapper. ``request_id``: the request that has a lease on it, None without
    one. ``as_of``: the wrapper's own timestamp at or after which this was true, None before it has sent one.
    ``windows_kept``: number of the last energy window of this process that the registry has stored.
    """

    epoch: int
    request_id: str | None
    as_of: Moment | None
    windows_kept: int = 0


@dataclass(frozen=True, slots=True)
class StartedFor:
    """The request that the start of an LLM is charged to, even if it is cancelled meanwhile."""

    request_id: str
    measurement_id: int


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """What a wrapper needs to serve one lease. Durations [s] count from its receipt.

    ``model_revision``: commit of the LLM at the start of the lease, None before; a restarted engine gets the same one.
    ``as_of``: as in Belief. ``grade``: ``standard`` or ``measurement``. ``max_j`` [J] and ``max_g`` [gCO2eq]: budget of
    the lease, None: no limit. ``used_j`` and ``used_g``: known use by earlier processes of the wrapper.
    ``handed_over_s``: UTC second at which the lease began, None before.
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

    * ``epoch``: of the last command accepted. ``moment``: time of the report.
    * ``running``, ``starting``: fingerprint of the LLM that answers prompts, or is being started; ``revision``: its
      commit, None if not known. ``starts``: number of LLMs started so far.
    * ``died``: why the LLM ended by itself, if it did; ``death_flags``: flags for its measurement because of that.
    * ``bound``: the request whose token is accepted, or will be once the machine is at rest. ``idle_for_s``: seconds
      since the lease was last used (0.0 while a prompt is in flight), None without a lease. ``lease_flags``: what
      happened during the lease that makes its figures hard to compare.
    * ``download``: its progress, None in any other ``phase``.
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
    """The machines and their wrappers. Every call has a time limit of its own.

    A command supersedes every older one: a deploy in progress is cancelled, a lease ended.

    Raises:
        WrapperUnreachable: the wrapper can't be reached.
        WrapperUnheard: the same, for a reason that may have nothing to do with the wrapper.
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
        """Run this LLM instead of any other; returns when it answers. Raises EngineStartFailed.

        ``grant``: the lease whose LLM is being restarted; it stays bound. ``started_for``: the request that a start
        begun by this command is charged to, None: no request. A start in progress keeps its own.
        """

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        """Stop the LLM, if any; returns when the wrapper has verified that it is empty."""

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> HandOver:
        """Accept only this lease's token from now on; for measurement grade, once the machine is at rest."""

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        """Refuse the request's token from now on and end its prompts in flight; tell the client ``how`` it ended."""

    async def touch(self, wrapper_id: str, request_id: str) -> bool:
        """Keep the request's lease alive. Returns False if it is not bound there."""

    async def restart(self, wrapper_id: str) -> None:
        """Replace the wrapper's process; returns when the old one is gone."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Result of ``plan``: events that happened, wrappers to create, wrappers to remove.

    ``created``: events that happen once the wrappers are created. ``switch_off``: wrappers of draining machines that no
    request holds, to be removed.
    """

    events: tuple[Event, ...] = ()
    create: tuple[WrapperPlan, ...] = ()
    created: tuple[Event, ...] = ()
    remove: tuple[str, ...] = ()
    switch_off: tuple[str, ...] = ()


def wanted_wrappers(
    machine: Machine,
    *,
    per_machine: int,
    gpus_per_wrapper: int | None,
    base_url: str,
    homes: Mapping[str, LLMSpec],
) -> tuple[WrapperPlan, ...]:
    """Return the wrappers that a machine should have.

    * Without GPUs: ``per_machine`` wrappers.
    * ``gpus_per_wrapper`` given: as many wrappers as fit; none if the machine has fewer GPUs.
    * ``gpus_per_wrapper`` None: its GPUs are divided evenly among ``per_machine`` wrappers, but no more wrappers than
      GPUs, since Ray hides no GPU from a wrapper that asks for none.

    ``homes`` maps a machine id, or ``*``, to the LLM of the machine's first wrapper.
    """
    if not machine.gpus:
        count, gpus = per_machine, 0
    elif gpus_per_wrapper:
        count, gpus = machine.gpus // gpus_per_wrapper, gpus_per_wrapper
    else:
        count = min(per_machine, machine.gpus)
        gpus = machine.gpus // count
    home = homes.get(machine.machine_id, homes.get("*"))
    return tuple(
        WrapperPlan(
            wrapper_id=f"{machine.machine_id}-{n}",
            machine_id=machine.machine_id,
            node_id=machine.node_id,
            gpus=gpus,
            url=f"{base_url}/wrappers/{machine.machine_id}-{n}",
            home=home if n == 0 else None,
            on_machine=count,
            gpu_type=machine.gpu_type,
            zone=machine.zone,
        )
        for n in range(count)
    )


def with_known_ids(observed: Sequence[Machine], known: Sequence[Machine]) -> tuple[Machine, ...]:
    """Return the observed machines, with the machine ids under which their nodes are known.

    If a new node has the name of another machine that is there, the first digits of its node id are appended, so that
    it does not take over the other machine's wrappers and leases.
    """
    ids = {machine.node_id: machine.machine_id for machine in known if machine.alive}
    taken = {ids[machine.node_id] for machine in observed if machine.node_id in ids}
    machines: list[Machine] = []
    for machine in observed:
        machine_id = ids.get(machine.node_id, machine.machine_id)
        if machine.node_id not in ids:
            if machine_id in taken:
                machine_id = f"{machine_id}-{machine.node_id[:NODE_ID_DIGITS]}"
            taken.add(machine_id)
        machines.append(replace(machine, machine_id=machine_id))
    return tuple(machines)


def plan(
    known_machines: Sequence[Machine],
    known_wrappers: Sequence[Wrapper],
    observed: Observation,
    wanted: Mapping[str, tuple[WrapperPlan, ...]],
) -> Plan:
    """Compare known with observed machines and wrappers.

    ``wanted``: the wrappers of every observed machine. Events of machines come first, so that a wrapper's machine is
    known before the wrapper; losses come before additions, so that nothing is granted on a lost machine.

    A wrapper that is leaving is ignored until it is gone. A draining machine keeps only wrappers that requests hold.
    An old wrapper on a new node, or of another size, looks like the wanted one. Its record therefore stays until the
    new one was created (``created``): if that is interrupted, the next comparison repeats it.
    """
    events: list[Event] = []
    created: list[Event] = []
    create: list[WrapperPlan] = []
    remove: list[str] = []
    switch_off: list[str] = []
    before = {machine.machine_id: machine for machine in known_machines}
    there = {machine.machine_id: _as_told(machine, before.get(machine.machine_id)) for machine in observed.machines}
    wrappers = {wrapper.wrapper_id: wrapper for wrapper in known_wrappers}

    for machine_id, machine in before.items():
        if machine.alive and machine_id not in there:
            events.append(MachineLost(machine_id, "it left the Ray cluster"))
    moved = {
        machine_id
        for machine_id, machine in there.items()
        if (old := before.get(machine_id)) is not None and old.node_id != machine.node_id
    }
    events += [MachineLost(name, "its Ray node was replaced") for name in sorted(moved) if before[name].alive]
    for machine_id, machine in there.items():
        if before.get(machine_id) != machine:
            (created if machine_id in moved else events).append(MachineJoined(machine))

    wanted_ids = {want.wrapper_id for wants in wanted.values() for want in wants}
    for wrapper_id, wrapper in wrappers.items():
        if wrapper_id not in wanted_ids and wrapper.machine_id in there:
            events.append(WrapperRemoved(wrapper_id))
    remove += sorted(observed.wrapper_ids - wanted_ids)

    for want in (want for wants in wanted.values() for want in wants if want.wrapper_id not in observed.leaving):
        known = wrappers.get(want.wrapper_id)
        deployed = want.wrapper_id in observed.wrapper_ids
        held = known is not None and known.request_id is not None and want.machine_id not in moved
        # D31: a drained machine is emptied
        if there[want.machine_id].draining and not held:
            if deployed or (known is not None and known.status is not WrapperStatus.OFF):
                switch_off.append(want.wrapper_id)
            continue
        resized = known is not None and known.gpus != want.gpus
        gone = want.machine_id in moved or not deployed or resized
        lost = known is None or known.status in _ABSENT or want.machine_id in moved
        if gone:
            create.append(want)
        if lost or gone or (known is not None and known.url != want.url):
            added = WrapperAdded(want.wrapper_id, want.machine_id, want.url, want.gpus, want.home)
            (created if want.machine_id in moved or resized else events).append(added)
    return Plan(tuple(events), tuple(create), tuple(created), tuple(remove), tuple(switch_off))


def _as_told(observed: Machine, known: Machine | None) -> Machine:
    """Add to a machine what Ray does not know: memory (from its wrappers) and draining (from the operator)."""
    if known is None:
        return observed
    return replace(
        observed,
        memory_bytes=known.memory_bytes,
        gpu_memory_bytes=known.gpu_memory_bytes,
        draining=known.draining,
    )
