"""Periodically compares known with observed machines and wrappers; creates and removes wrappers accordingly."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from registry.contract.messages import Cluster, Observation, WrapperPlan
from registry.core.events import Event, WrapperSwitchedOff
from registry.core.records import LLMSpec, Machine, WrapperStatus
from registry.errors import WrapperUnreachable
from registry.service.loop import Loop
from registry.service.reconcile import plan, wanted_wrappers, with_known_ids
from registry.service.tasks import Tasks, guarded
from registry.service.watch import Watches
from registry.service.wrapper_reports import WrapperReports
from registry.settings import Settings

log = structlog.get_logger("registry.service.reconciling")


class Reconciler:
    """Creates and removes wrappers as machines come and go. ``homes`` maps a machine id or ``*`` to an LLM."""

    def __init__(
        self,
        loop: Loop,
        cluster: Cluster,
        reports: WrapperReports,
        watches: Watches,
        *,
        tasks: Tasks,
        settings: Settings,
        homes: Mapping[str, LLMSpec],
    ) -> None:
        self._loop = loop
        self._allocator = loop.allocator
        self._cluster = cluster
        self._reports = reports
        self._watches = watches
        self._tasks = tasks
        self._settings = settings
        self._homes = homes
        self._deployed: frozenset[str] | None = None
        """Wrappers that are deployed or leaving, as last observed; None before the first observation."""
        self._switching_off: set[str] = set()
        self._overdue: Sequence[Event] = ()

    def is_off(self, machine_id: str) -> bool:
        """True when a drained machine has no wrapper left: its GPUs are free, and it may be switched off.

        Raises:
            UnknownMachine: no machine has this id.
        """
        machine, deployed = self._allocator.known_machine(machine_id), self._deployed
        wrappers = self._allocator.wrappers_on(machine_id)
        gone = {WrapperStatus.OFF} if machine.alive else {WrapperStatus.OFF, WrapperStatus.LOST}
        return (
            machine.draining
            and deployed is not None
            and all(wrapper.status in gone for wrapper in wrappers)
            and deployed.isdisjoint(wrapper.wrapper_id for wrapper in wrappers)
        )

    async def run(self, overdue: Sequence[Event] = ()) -> None:
        """Reconcile every ``watch.period_s`` seconds until the shutdown.

        ``overdue``: events from before this start. The first successful pass applies them after the events of lost
        machines, because each of them can grant leases. Errors are logged and do not end the loop, except
        StoreUnavailable.
        """
        self._overdue = overdue
        while not self._loop.stopping:
            await guarded("the cluster could not be reconciled", self._reconcile)
            await asyncio.sleep(self._settings.watch.period_s)

    async def _reconcile(self) -> None:
        observed = self._named(await self._cluster.observe())
        self._deployed = observed.wrapper_ids | observed.leaving
        wanted = {machine.machine_id: self._wanted_on(machine) for machine in observed.machines}
        steps = plan(self._allocator.machines(), self._allocator.wrappers(), observed, wanted)
        await self._loop.apply_all((*steps.events, *self._overdue))
        self._overdue = ()
        if steps.switch_off:
            self._switching_off.update(steps.switch_off)
            self._tasks.spawn("switch off wrappers", self._switch_off(steps.switch_off))
        if steps.remove:
            await self._cluster.remove(steps.remove)
        if steps.create:
            await self._cluster.create(steps.create)
        await self._loop.apply_all(steps.created)
        self._watches.update({wrapper.wrapper_id for wrapper in self._allocator.wrappers()})

    def _named(self, observed: Observation) -> Observation:
        """Return the observation with the known machine ids, and with our own removals added to ``leaving``."""
        known = self._allocator.machines()
        machines = with_known_ids(observed.machines, known)
        for named, machine in zip(observed.machines, machines, strict=True):
            if named.machine_id != machine.machine_id and all(machine.node_id != each.node_id for each in known):
                log.warning("node has another machine's name", name=named.machine_id, machine_id=machine.machine_id)
        return replace(observed, machines=machines, leaving=observed.leaving | self._switching_off)

    def _wanted_on(self, machine: Machine) -> tuple[WrapperPlan, ...]:
        return wanted_wrappers(
            machine,
            per_machine=self._settings.wrappers.per_machine,
            gpus_per_wrapper=self._settings.wrappers.gpus_per_wrapper,
            base_url=self._settings.base_url,
            homes=self._homes,
        )

    async def _switch_off(self, wrapper_ids: Sequence[str]) -> None:
        """Remove wrappers of drained machines, unless they still answer prompts of an expired lease.

        Runs in a task of its own, because Serve may take long to end a replica. If the removal is
        interrupted (crash, error, undrain), the next reconciliation does the rest.
        """
        await guarded("wrappers could not be switched off", self._remove_unless_used, wrapper_ids)
        self._switching_off.difference_update(wrapper_ids)

    async def _remove_unless_used(self, wrapper_ids: Sequence[str]) -> None:
        prompted = await asyncio.gather(*map(self._is_prompted, wrapper_ids))
        for wrapper_id in (each for each, busy in zip(wrapper_ids, prompted, strict=True) if not busy):
            self._loop.apply(WrapperSwitchedOff(wrapper_id))
        known = {wrapper_id: self._allocator.wrapper(wrapper_id) for wrapper_id in wrapper_ids}
        off = [wrapper_id for wrapper_id, w in known.items() if w is None or w.status is WrapperStatus.OFF]
        if off:
            await self._cluster.remove(off)
        for wrapper_id in off:
            self._reports.latest.pop(wrapper_id, None)  # ``heard_s`` keeps the time of the last report

    async def _is_prompted(self, wrapper_id: str) -> bool:
        try:
            return bool((await self._reports.ask(wrapper_id)).in_flight)
        except WrapperUnreachable:
            return False
