"""Compares the known machines and wrappers with the observed ones. Pure.

The result is what happened (events for the allocator) and what to do (wrappers to create and remove).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from registry.contract.messages import NODE_ID_DIGITS, Observation, WrapperPlan
from registry.core.events import Event, MachineJoined, MachineLost, WrapperAdded, WrapperRemoved
from registry.core.records import LLMSpec, Machine, Wrapper, WrapperStatus

_ABSENT = (WrapperStatus.LOST, WrapperStatus.OFF)
"""After these statuses, a wrapper that is observed again counts as new."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Result of ``plan``: what has happened, and what to do.

    * ``events``: what has happened; they are applied first.
    * ``create``, ``remove``: wrappers to create, and ids of wrappers to remove.
    * ``created``: events to apply once the wrappers are created.
    * ``switch_off``: ids of wrappers of draining machines that no request holds, to be removed.
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
    * ``gpus_per_wrapper`` None: ``per_machine`` wrappers, which share the GPUs evenly. With fewer GPUs than that, one
      wrapper per GPU: Ray would let a wrapper without GPU see all of them.

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
    """Return the observed machines, each with the machine id under which its node is known.

    If a new node has the name of another observed machine, the first digits of its node id are appended
    to its machine id. So it does not take over the other machine's wrappers and leases.
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


def _moved(before: Mapping[str, Machine], there: Mapping[str, Machine]) -> set[str]:
    """Return the ids of machines that have another Ray node than before."""
    return {
        machine_id
        for machine_id, machine in there.items()
        if (old := before.get(machine_id)) is not None and old.node_id != machine.node_id
    }


def plan(
    known_machines: Sequence[Machine],
    known_wrappers: Sequence[Wrapper],
    observed: Observation,
    wanted: Mapping[str, tuple[WrapperPlan, ...]],
) -> Steps:
    """Compare known with observed machines and wrappers.

    ``wanted``: the wrappers of every observed machine. Events of machines come first, so that a wrapper's machine is
    known before the wrapper; losses come before additions, so that nothing is granted on a lost machine.

    A wrapper that is being removed is ignored until it is gone. A draining machine keeps only wrappers
    that requests hold. If a wrapper must move to a new node or change its size, the new wrapper
    has the id of the old one. The record changes only after the new wrapper was created (``created``):
    if the creation is interrupted, the record still shows the difference, and the creation is repeated.
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
    moved = _moved(before, there)
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
    return Steps(tuple(events), tuple(create), tuple(created), tuple(remove), tuple(switch_off))


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
