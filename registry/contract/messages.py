"""What should be on the machines against what is there, and the protocol of whoever acts on it. Pure.

``plan`` compares the machines and wrappers that the registry knows with what was observed and says what
happened (events, for the allocator) and what to do (wrappers to create and remove).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from registry.core.records import (
    EnergyWindow,
    Event,
    LLMSpec,
    Machine,
    MachineJoined,
    MachineLost,
    Wrapper,
    WrapperAdded,
    WrapperRemoved,
    WrapperStatus,
)

_ABSENT = (WrapperStatus.LOST, WrapperStatus.OFF)
"""A wrapper that is there again after these is new to the registry."""


SETTLING: Final = "settling"
"""Phase of a wrapper that brings its machine to rest before it hands an LLM over."""


NODE_ID_DIGITS: Final = 6
"""Of a node's id as many digits are part of its machine's id where nodes share a name."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment in the life of a wrapper's process, seconds of a clock of its own, which nobody else can read.

    The registry gives back the last one that it has heard of: what it says with it was true then, or later, however
    long it has been on its way.
    """

    process: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Belief:
    """What the registry tells a wrapper of whom it asks for a report.

    ``epoch`` is that of the newest command to this wrapper, ``request_id`` the request whose lease is on it, None
    without one. ``as_of`` is the wrapper's own moment at which that was so at the earliest, None before it told one.
    ``windows_kept`` is the number of the last energy window of this process that the registry has written down.
    """

    epoch: int
    request_id: str | None
    as_of: Moment | None
    windows_kept: int = 0


@dataclass(frozen=True, slots=True)
class StartedFor:
    """The request that an LLM is started for. It pays for the start, also if it is cancelled meanwhile."""

    request_id: str
    measurement_id: int


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """What a wrapper needs to know to serve one lease. Durations count from the moment it is received.

    ``model_revision`` is the commit that the lease has begun with, None before it has: an engine that has to be started
    again for it gets the same one. ``as_of`` is as in a Belief. ``grade`` is ``standard`` or ``measurement``.
    ``max_j`` [J] and ``max_g`` [gCO2eq] are what the lease may use up, None: no limit. ``used_j`` and ``used_g`` are
    what it is known to have used before, under processes of the wrapper that are gone. ``handed_over_s`` is the UTC
    second at which the lease began, None before it has.
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
    """What a lease begins with.

    ``model_revision`` is the commit of the LLM, None if it has none. ``flags`` tell what is not as a measurement wants
    it (deployments.energy.settling). ``provenance`` is the wrapper's part of what a Request keeps, None: it does not
    tell. With a ``refusal`` the lease does not begin: the LLM can't serve its request, and that is why.
    """

    model_revision: str | None = None
    flags: tuple[str, ...] = ()
    provenance: Mapping[str, object] | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Download:
    """How far a model's download is: bytes that are there, of all, once the hub has told how many those are."""

    done_bytes: int
    total_bytes: int

    @property
    def share(self) -> float:
        """The same from 0 to 1."""
        return self.done_bytes / self.total_bytes if self.total_bytes else 1.0


@dataclass(frozen=True, slots=True)
class WrapperReport:
    """A wrapper's own account of itself.

    ``epoch`` is that of the last command taken; ``running`` the fingerprint of the LLM that answers prompts,
    ``starting`` that of the one being started. ``revision`` is the commit of either, None where there is none to know.
    ``died`` is why the LLM ended by itself, if it did, and ``death_flags`` what its measurement is flagged with for it.
    ``idle_for_s`` is how long ago the lease was last used (0.0 while a prompt is in flight), None without a lease.
    ``download`` is how far that is, None in any other ``phase``.
    ``bound`` is the request whose token it accepts, or will once it has settled for it. ``in_flight`` counts the
    prompts that are being answered, ``unfinished`` those that the engine itself has not finished, None without one.
    ``starts`` counts the LLMs it has started. ``memory_bytes`` is the main memory of its machine, ``gpu_memory_bytes``
    the memory of each of its GPUs; None: it can't tell. ``warm`` says whether it starts LLMs without importing the
    engine anew, ``cold_reason`` why it does not. ``moment`` is when it says so. ``windows`` are the oldest of the
    energy windows that are finished and that the registry has not written down yet, in the order of their numbers.
    ``lease_flags`` tell what has happened during the lease that makes its figures hard to compare.
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
    """A wrapper that should exist: ``gpus`` of the GPUs of the machine, its Serve application and its base URL.

    ``on_machine``: how many wrappers share that machine, this one included. ``gpu_type`` and ``zone`` are the
    machine's, None if not known.
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
    """What the cluster shows: machines that are alive, and ids of the wrappers that are deployed.

    ``leaving`` are those that are being removed and not gone yet; they count as deployed no more.
    """

    machines: tuple[Machine, ...]
    wrapper_ids: frozenset[str]
    leaving: frozenset[str] = frozenset()


class Cluster(Protocol):
    """The machines and the wrappers on them. Every call ends within its own time limit.

    A wrapper that can't be reached raises WrapperUnreachable, or WrapperUnheard where that says nothing about it; a
    command older than one that the wrapper has taken raises StaleEpoch. A command supersedes every older one: a deploy
    in progress is cancelled, a lease ended.
    """

    async def observe(self) -> Observation:
        """Machines and wrappers as they are now. Raises WrapperUnreachable when the cluster does not answer."""

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        """Deploy these wrappers; returns when they were accepted, not when they answer."""

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        """Delete these wrappers; returns when they are gone."""

    async def report(self, wrapper_id: str, belief: Belief) -> WrapperReport:
        """What the wrapper says of itself, within seconds, having been told what the registry believes."""

    async def deploy(
        self,
        wrapper_id: str,
        epoch: int,
        spec: LLMSpec,
        grant: LeaseGrant | None,
        started_for: StartedFor | None = None,
    ) -> None:
        """Run this LLM, instead of any other; returns when it answers. Raises EngineStartFailed.

        ``grant`` is the lease that waits for the LLM to come back, and stays bound meanwhile. ``started_for`` pays for
        the start that this command begins, None: no request does. A start in progress keeps its own.
        """

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        """Stop whatever runs; returns when the wrapper is verified to be empty."""

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> HandOver:
        """Accept this lease's token, and no other, from now on; for measurement grade once the machine is at rest."""

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        """Accept no token of this request from now on and end what it has in flight."""

    async def touch(self, wrapper_id: str, request_id: str) -> bool:
        """The lease was used now (a keep-alive). False: it is not bound there, or not any more."""

    async def restart(self, wrapper_id: str) -> None:
        """Replace the wrapper's process; returns when the old one is gone."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Outcome of a comparison: events that happened, wrappers to create, wrappers to remove.

    ``created``: events that have happened once the wrappers are created. ``switch_off``: wrappers of drained machines,
    which are to be removed once nobody uses them.
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
    """The wrappers that a machine should carry.

    ``gpus_per_wrapper`` None divides all GPUs of the machine evenly among ``per_machine`` wrappers, or fewer if it has
    fewer GPUs: Ray hides no GPU from a wrapper that asks for none. A number makes as many wrappers as fit, none where
    the machine has fewer GPUs. A machine without any carries ``per_machine`` wrappers.
    ``homes`` maps a machine id, or ``*``, to the LLM for the machine's first wrapper.
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
    """Return the observed machines, each under the id that its node has already.

    A node that joins with the name of a machine that is there gets an id of its own, with the first digits of its node
    id, so that it never takes over the other one's wrappers and leases.
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
    """Compare what is known with what is there.

    ``wanted`` has the wrappers of every observed machine. Machines first, so that a wrapper's machine is known
    before the wrapper is; what is lost before what is new, so that nothing is granted on a machine that is gone.
    A wrapper that is leaving is left alone until it is gone; a drained machine wants only the wrappers that are held.
    An old wrapper on a new node, or of another size, can't be told from the one that should be there: until that was
    created, what it takes the place of stays known, so that a look which is cut short is made up for by the next one.
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
    """A machine with what its wrappers (memory) and its operator (draining) have told: Ray does not know it."""
    if known is None:
        return observed
    return replace(
        observed,
        memory_bytes=known.memory_bytes,
        gpu_memory_bytes=known.gpu_memory_bytes,
        draining=known.draining,
    )
