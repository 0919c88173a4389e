"""The faults of a simulated world, which end before its requests do."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from registry.errors import UnknownMachine
from registry.service.service import Service
from tests.simulation.machines import CALM, Node, Process

if TYPE_CHECKING:  # the world makes its faults
    from tests.simulation.simulated_world import SimulatedWorld


class Faults:
    """The faults of a world, which happen until ``busy_s``."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world

    async def run(self) -> None:
        """Let faults happen, then repair everything."""
        kinds = self._world.shape.kinds
        while kinds and self._world.now_s < self._world.shape.busy_s:
            kind = self._world.random.choice(kinds)
            self._world.note(f"trouble: {kind}")
            self._world.faults += 1
            self._world.spawn(getattr(self, f"_{kind}")())
            await asyncio.sleep(self._world.random.expovariate(1 / self._world.shape.pause_s))
        await asyncio.sleep(max(0.0, self._world.shape.busy_s - self._world.now_s))
        self._world.note("the trouble is over")
        self._world.dies_after_calls = self._world.dies_after_commits = self._world.commit_fails = None
        self._world.cluster.weather = CALM
        self._world.cluster.controller_is_away = False
        for node in self._world.cluster.nodes.values():
            self._world.cluster.power_on(node)
            self._world.cluster.heal(node)
            for process in node.processes:
                process.resume()
        for machine_id in self._world.cluster.nodes:
            with suppress(UnknownMachine):  # the registry does not know this machine
                await self._world.ask(partial(_undrain, machine_id))
        self._world.quiet_s = self._world.now_s

    def _some_node(self) -> Node:
        return self._world.random.choice(list(self._world.cluster.nodes.values()))

    def _some_process(self) -> Process | None:
        living = [process for process in self._world.cluster.processes.values() if process.alive]
        return self._world.random.choice(living) if living else None

    async def _machine_off(self) -> None:
        node = self._some_node()
        self._world.cluster.power_off(node)
        await asyncio.sleep(self._world.random.choice((5.0, 60.0, 400.0)) * self._world.random.uniform(0.5, 1.0))
        self._world.cluster.power_on(node)

    async def _machine_cut(self) -> None:
        node = self._some_node()
        self._world.cluster.cut(node)
        await asyncio.sleep(self._world.random.choice((3.0, 15.0, 60.0, 200.0)) * self._world.random.uniform(0.5, 1.0))
        self._world.cluster.heal(node)

    async def _machine_joins(self) -> None:
        if len(self._world.cluster.nodes) < 2 * self._world.shape.machines:
            self._world.add_machine(len(self._world.cluster.nodes))

    async def _process_dies(self) -> None:
        if (process := self._some_process()) is not None:
            self._world.cluster.kill(process)

    async def _process_hangs(self) -> None:
        if (process := self._some_process()) is not None:
            process.hang()
            await asyncio.sleep(self._world.random.choice((4.0, 30.0, 120.0)) * self._world.random.uniform(0.5, 1.0))
            process.resume()

    async def _engine_dies(self) -> None:
        if (process := self._some_process()) is not None:
            process.kill_engine()

    async def _registry_dies(self) -> None:
        self._world.kill("at some moment")

    async def _registry_dies_deciding(self) -> None:
        self._world.dies_after_commits = self._world.random.randint(1, 5)

    async def _registry_dies_calling(self) -> None:
        self._world.dies_after_calls = self._world.random.randint(1, 10)

    async def _database_fails(self) -> None:
        self._world.commit_fails = self._world.random.choice(("before", "after"))

    async def _controller_away(self) -> None:
        self._world.cluster.controller_is_away = True
        await asyncio.sleep(self._world.random.uniform(5.0, 40.0))
        self._world.cluster.controller_is_away = False

    async def _drained(self) -> None:
        machine_id = self._some_node().machine_id
        with suppress(UnknownMachine):  # the registry does not know this machine yet
            await self._world.ask(lambda service: service.drain(machine_id))
            await asyncio.sleep(self._world.random.uniform(5.0, 200.0))
            await self._world.ask(partial(_undrain, machine_id))

    async def _shut_down(self) -> None:
        if (service := self._world.service) is None:
            return
        task = self._world.loop.create_task(service.shutdown())
        self._world.calls[task] = None
        await asyncio.wait({task})
        del self._world.calls[task]
        if not task.cancelled():
            task.exception()  # the registry may be killed during its shutdown
        if self._world.service is service:
            self._world.kill("it was shut down")


def _undrain(machine_id: str, service: Service) -> None:
    service.undrain(machine_id)
