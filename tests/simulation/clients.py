"""The clients of a simulated world: they request LLMs, prompt them, change their minds, and disappear."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from registry.core.events import NewRequest
from registry.core.records import LLMSpec, Request
from registry.errors import (
    EngineNotReady,
    InvalidField,
    LeaseEnded,
    LLMNeverFits,
    NoSuchLease,
    RegistryUnheard,
    WrapperUnreachable,
)
from registry.wire.words import Priority, RequestStatus, canonical_json
from tests.simulation.machines import Process
from tests.simulation.shape import BROKEN, SPECS

if TYPE_CHECKING:  # the world makes its clients
    from tests.simulation.simulated_world import SimulatedWorld

SETTLED_S = 120.0
"""Time after the last fault in which late messages arrive and the registry learns all states, seconds."""

TOLD_WITHIN_S = 45.0
"""After SETTLED_S: maximum time in which prompts of a ``deployed`` request may be refused, seconds."""


class Clients:
    """The clients of a world, and how their requests have ended."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world
        self._seen_end: dict[str, RequestStatus] = {}

    async def run(self, number: int) -> None:
        """Run one client, which requests LLMs and uses them, and sometimes disappears."""
        random = self._world.random
        await asyncio.sleep(random.uniform(0.0, self._world.shape.busy_s))
        models = [*SPECS, LLMSpec(BROKEN, "text-generation")]
        weights = (6, 4, 2, 2, 1, 1 if self._world.shape.broken else 0)
        specs = random.choices(models, weights, k=random.choice((1, 1, 1, 2, 3)))
        measurement_id = random.randrange(1, max(2, self._world.shape.clients * 2 // 3))
        ask: dict[str, Any] = {
            "tenant": random.choice(("default", "other")),
            "priority": tuple(Priority)[measurement_id % 3],
            "gpu_type": random.choice((None, None, None, "A100")),
        }
        if not self._world.shape.repetitions:
            await self._ask_and_use(f"r{number}", measurement_id, specs, ask)
        for repetition in range(self._world.shape.repetitions):
            await self._ask_and_use(f"r{number}.{repetition}", number + 1, specs, ask)
            await asyncio.sleep(random.choice((0.0, 5.0, 20.0)))

    async def _ask_and_use(
        self, name: str, measurement_id: int, specs: Sequence[LLMSpec], ask: Mapping[str, Any]
    ) -> None:
        random = self._world.random
        ids = [f"{name}.{n}" for n in range(len(specs))]
        llms = [NewRequest(i, s, canonical_json({"model": s.model})) for i, s in zip(ids, specs, strict=True)]
        try:
            requests = await self._world.ask(lambda service: service.request(measurement_id, llms, **ask))
        except (LLMNeverFits, InvalidField) as error:
            self._world.note(f"{ids} refused: {error}")
            return
        if [request.request_id for request in requests] != ids:
            self._world.fail(f"{ids} were asked for, {requests} answered")
        self._world.accept(dict(zip(ids, specs, strict=True)))
        if random.random() < 0.1:
            return  # the client disappears and never releases its LLMs
        for request_id in ids:
            if random.random() < 0.15:
                self._world.loop.call_later(random.expovariate(1 / 40.0), self._changes_its_mind, request_id)
        for request_id in ids:
            await self._use(request_id)

    def _changes_its_mind(self, request_id: str) -> None:
        self._world.spawn(self._release(request_id))

    async def _use(self, request_id: str) -> None:
        """Wait for an LLM, prompt it, and sometimes release it."""
        random = self._world.random
        while True:
            request = await self._world.wait(lambda service: service.wait_for_change(request_id, 60.0))
            self.see(request)
            if request.status.ended:
                return
            if request.status is RequestStatus.DEPLOYED:
                break
            if self._world.now_s > self._world.quiet_s + SETTLED_S and await self._world.ask(
                lambda service: service.allocator.misfit(request_id) is not None
            ):
                await self._release(request_id)  # accepted before sizes were known; its status says that it never fits
                return
        known: list[Process] = []
        for _ in range(random.choice((0, 1, 2, 4))):
            if not await self._prompt(request_id, known):
                return
            while _is_cut_off(known) and await self._prompt(request_id, known):  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(random.uniform(1.0, 10.0))
            idle_s = self._world.shape.settings.leases.idle_s
            await asyncio.sleep(random.choice((0.1, 2.0, 10.0, 30.0, 1.2 * idle_s)) * random.uniform(0.5, 1.0))
            if random.random() < 0.2:
                with suppress(WrapperUnreachable):
                    await self._world.wait(lambda service: service.keep_alive(request_id))
        if random.random() < 0.85:
            await self._release(request_id)
            if random.random() < 0.2:
                await self._release(request_id)
            if random.random() < 0.3:
                await self._prompt(request_id, known)

    async def _prompt(self, request_id: str, known: list[Process]) -> bool:
        """Send a prompt until it is answered; return False if the lease has ended. ``known``: processes tried."""
        random = self._world.random
        refused_s = 0.0
        last_s = self._world.now_s
        request: Request | None = None
        while True:
            serve = self._world.cluster.processes.get(self._world.held.get(request_id, ""))
            # A client on the same side of a cut as the machine reaches the machine, but not the registry.
            beside = _is_cut_off(known) or (bool(known) and (serve is None or random.random() < 0.5))
            process = known[-1] if beside else serve
            if not _is_cut_off(known):
                request = await self._world.ask(lambda service: service.known(request_id))
                self.see(request)
                if request.status.ended and not known:
                    return False
            token = self._world.tokens_of.get(request_id, "")
            try:
                await asyncio.sleep(random.uniform(0.001, 0.1))
                if process is None or not process.ready or not process.alive or process.held is not None:
                    raise WrapperUnreachable("?", "nobody answers")
                if not beside and not process.node.reached:
                    raise WrapperUnreachable("?", "it is cut off")
                if not known or known[-1] is not process:
                    known.append(process)
                await process.prompt(token, random.choice((0.5, 5.0, 40.0)) * random.uniform(0.1, 1.0))
            except (EngineNotReady, RegistryUnheard, WrapperUnreachable, LeaseEnded, NoSuchLease):
                if request is not None and request.status.ended:
                    return False
            else:
                return True
            await asyncio.sleep(random.uniform(1.0, 5.0))
            alive = (
                request is not None
                and request.status is RequestStatus.DEPLOYED
                and self._world.now_s > self._world.quiet_s + SETTLED_S
            )
            refused_s = refused_s + self._world.now_s - last_s if alive else 0.0
            last_s = self._world.now_s
            if refused_s > TOLD_WITHIN_S:
                self._world.fail(
                    f"{request_id} has the status deployed, but its prompts were refused for {refused_s:.0f} s"
                )

    async def _release(self, request_id: str) -> None:
        await self._world.ask(lambda service: service.release(request_id))
        self.see(await self._world.ask(lambda service: service.known(request_id)), must_have_ended=True)

    def see(self, request: Request, *, must_have_ended: bool = False) -> None:
        """Check what a client is told of its request: what has ended stays as it is."""
        if request.status.ended:
            before = self._seen_end.setdefault(request.request_id, request.status)
            if before is not request.status:
                self._world.fail(f"{request.request_id} was {before} and is {request.status}")
        elif must_have_ended or request.request_id in self._seen_end:
            self._world.fail(f"{request.request_id} has ended and is {request.status} again")


def _is_cut_off(known: list[Process]) -> bool:
    """Whether the client is cut off from the registry, together with the process that answered it last."""
    return bool(known) and known[-1].alive and known[-1].node.cut
