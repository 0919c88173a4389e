"""A whole registry in virtual time: the real service, store and lease gates, with clients and faults made from a seed.

The faults end at some moment. After that, all requests must end without help. This shows that no accepted request was
lost, and that no client waits for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from multiprocessing.util import Finalize
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, delete

from registry.contract.messages import LeaseGrant
from registry.core.decision import Changes, Snapshot
from registry.core.events import Event, NewRequest
from registry.core.records import LLMSpec, Request
from registry.errors import (
    EngineNotReady,
    InvalidField,
    LeaseEnded,
    LLMNeverFits,
    NoSuchLease,
    RegistryError,
    RegistryUnheard,
    ShuttingDown,
    StoreUnavailable,
    UnknownMachine,
    UnknownRequest,
    WrapperUnreachable,
)
from registry.service.history import ids_of
from registry.service.lease_tokens import LeaseTokens
from registry.service.loop import Observer
from registry.service.service import Service
from registry.settings import Settings
from registry.store.migrations.tables import METADATA
from registry.store.store import Store
from registry.wire.words import Priority, RequestStatus, canonical_json
from tests.simulation.machines import CALM, Node, Process, SimulatedCluster, Weather
from tests.simulation.moves import Moves
from tests.support.virtual_time import Stuck, VirtualLoop

EPOCH_S = 1_800_000_000.0
"""Start of every world, UTC seconds."""

CHECK_EVERY_S = 60.0
"""Time between two checks of the whole state, seconds. What a single decision can break is checked at each commit."""

SETTLED_S = 120.0
"""Time after the last fault in which late messages arrive and the registry learns all states, seconds."""

TOLD_WITHIN_S = 45.0
"""After SETTLED_S: maximum time in which prompts of a ``deployed`` request may be refused, seconds."""

T = TypeVar("T")


class Killed(BaseException):
    """The registry's process ends at this point. Not an Exception, so that no handler of the registry catches it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The parameters of a world. Faults of these ``kinds`` happen until ``busy_s``, every ``pause_s`` on average.

    ``repetitions``: how often each client requests the same LLMs, one repetition after another, in a measurement of its
    own. All machines are alike then. 0: each client makes one request, and some clients share a measurement.
    """

    machines: int
    clients: int
    busy_s: float
    kinds: tuple[str, ...]
    pause_s: float
    weather: Weather
    settings: Settings
    homes: bool = False
    broken: bool = False
    check_every_s: float = CHECK_EVERY_S
    repetitions: int = 0


SPECS = tuple(LLMSpec(f"org/llm-{n}", "text-generation", gpus=gpus) for n, gpus in enumerate((0, 0, 0, 1, 2)))
BROKEN = "org/broken"


class Judge(Observer):
    """Measures and checks each decision of a world's service. At some commits it lets the registry die."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world
        self._begun_ns = 0

    def deciding(self, event: Event) -> None:
        self._begun_ns = time.thread_time_ns()

    def committing(self, event: Event, changes: Changes) -> None:
        self._world.before_commit()

    def committed(self, event: Event, changes: Changes) -> None:
        self._world.took_ns.append(time.thread_time_ns() - self._begun_ns)
        self._world.after_commit(event, changes)


class SimulatedWorld:
    """One simulation. ``violations``: the broken guarantees. ``story``: all events, as text."""

    def __init__(self, shape: Shape, seed: int, loop: asyncio.AbstractEventLoop) -> None:
        self.shape = shape
        self.random = Random(seed)
        self.violations: list[str] = []
        self.story: list[str] = []
        self.took_ns: list[int] = []
        """CPU time of each decision that changed something, with its commit, ns. Only this differs between two runs."""
        self.decisions = 0
        self.grants = 0
        self.faults = 0
        self.service: Service | None = None
        self._loop = loop
        loop.set_exception_handler(self._on_problem)
        self._broken = asyncio.Event()
        self._is_up = asyncio.Event()
        self._calls: dict[asyncio.Task[Any], None] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        numbers = count(1)
        self._tokens = LeaseTokens(b"a key", lambda: f"token-{next(numbers)}")
        self._last: Snapshot | None = None
        self._dies_after_commits: int | None = None
        self._dies_after_calls: int | None = None
        self._commit_fails: str | None = None
        self._tokens_of: dict[str, str] = {}
        """The newest token of each request, even if its lease has ended, because its client may still use it."""
        self._leases: dict[str, str] = {}
        """The token of each current lease in the database, by request."""
        self._ended_s: dict[str, float] = {}
        """When leases ended, by token."""
        self._holders: dict[str, str] = {}
        """Request whose lease is on each wrapper."""
        self._held: dict[str, str] = {}
        """Wrapper of each request with a lease."""
        self.accepted: dict[str, LLMSpec] = {}
        self._seen_end: dict[str, RequestStatus] = {}
        self._quiet_s = float("inf")
        self.cluster = SimulatedCluster(shape.settings, self.random, on_prompt=self._on_prompt, on_call=self._on_call)
        self.cluster.weather = shape.weather
        self.moves = Moves(self.cluster.nodes, sticky_s=shape.settings.measurements.sticky_s)
        if shape.broken:
            self.cluster.broken.add(BROKEN)
        self._homes = {"*": SPECS[0]} if shape.homes else {}

    @property
    def now_s(self) -> float:
        """Virtual seconds since the world began."""
        return self._loop.time()

    # --- the whole --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the simulation until all requests have ended or a guarantee was broken."""
        for n in range(self.shape.machines):
            self._add_machine(n)
        self._up()
        clients = [self._loop.create_task(self._client(n)) for n in range(self.shape.clients)]
        whole = self._loop.create_task(self._whole(clients))
        watch = self._loop.create_task(self._watch())
        broken = self._loop.create_task(self._broken.wait())
        try:
            await asyncio.wait({whole, watch, broken}, return_when=asyncio.FIRST_COMPLETED)
            for task in (whole, watch, *clients):
                if task.done() and (error := task.exception()) is not None:
                    raise error
        finally:
            self._kill("the end")
            self.cluster.close()
            tasks = [whole, watch, broken, *clients, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _whole(self, clients: list[asyncio.Task[None]]) -> None:
        """Run the faults. Then wait until all requests end, at most for the time that they need one after another."""
        await self._trouble()
        settings = self.shape.settings
        each_s = settings.leases.max_s + 2 * settings.wrappers.deploy_timeout_s
        to_come = 3 * self.shape.repetitions * self.shape.clients
        limit_s = self.now_s + SETTLED_S + each_s * (2 + len(self._open()) + to_come)
        while self._open() or not all(client.done() for client in clients):
            if self.now_s > limit_s:
                waiting = [n for n, client in enumerate(clients) if not client.done()]
                self.fail(f"these never end: {', '.join(self._open())}; clients {waiting}")
                return
            await asyncio.sleep(5.0)
        self._check()
        for request_id in self.accepted:
            self._see(self._request(request_id))

    def _open(self) -> list[str]:
        """Return, as text, the accepted requests that have not ended although they can be served."""
        if self.service is None:
            return ["(the registry does not run)"]
        requests = [request for request in map(self._request, self.accepted) if not request.status.ended]
        misfit = self.service.allocator.misfit
        return [
            f"{request.request_id} is {request.status} ({request.reason})"
            for request in requests
            if request.status is not RequestStatus.QUEUED or misfit(request.request_id) is None
        ]

    def _request(self, request_id: str) -> Request:
        assert self.service is not None
        return self.service.known(request_id)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.shape.check_every_s)
            self._check()

    def _check(self) -> None:
        """Check everything that must hold at any moment while the registry runs."""
        if self.service is None or self.service._loop.closed:
            return
        try:
            self.service.allocator.check()
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
        if (differs := _difference(self.service._store, self.service.allocator.snapshot())) is not None:
            self.fail(f"database and memory differ: {differs}")
        for request_id in self.accepted:
            try:
                self._request(request_id)
            except UnknownRequest:
                self.fail(f"{request_id} was accepted and is not known any more")

    def fail(self, what: str) -> None:
        """Record a broken guarantee, and end the simulation."""
        self.note(f"VIOLATED: {what}")
        self.violations.append(f"at {self.now_s:.3f} s: {what}")
        self._broken.set()

    def _on_problem(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Fail because of an exception that no task retrieved, except those that a killed process leaves behind."""
        if "never retrieved" not in context["message"]:
            self.fail(f"{context['message']}: {context.get('exception')!r}")

    def note(self, what: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{self.now_s:9.3f} {what}")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(f"the simulation itself failed: {error!r}")

    # --- the registry's lives ---------------------------------------------------------------------------

    def _up(self) -> None:
        """Start the registry with the state in its database."""
        if self.service is not None:
            return
        store = Store(_connection(), ExitStack())
        if self._last is not None and (differs := _difference(store, self._last)) is not None:
            self.fail(f"the previous registry did not write all that it knew: {differs}")
        self.service = Service(
            self.shape.settings,
            store,
            self.cluster,
            now_s=lambda: EPOCH_S + self._loop.time(),
            tokens=self._tokens,
            homes=self._homes,
            on_fatal=self._on_fatal,
            ended_kept=2,
            observer=Judge(self),
        )
        self.note("the registry starts")
        start = self.service.start()
        with suppress(StopIteration):
            start.send(None)  # start() has no await: it loads the state and starts the watch tasks
        self._is_up.set()

    def _kill(self, why: str, *, certain: bool = True) -> None:
        """End the registry's process. ``certain``: the last decision is surely in the database."""
        service = self.service
        if service is None:
            return
        self.note(f"the registry dies: {why}")
        self.service = None
        self._is_up.clear()
        self._last = service.allocator.snapshot() if certain else None
        service._loop.closed = True
        service._tasks.cancel()
        for task in self._calls:
            task.cancel()
        service._store.close()
        self._dies_after_calls = self._dies_after_commits = self._commit_fails = None
        self._loop.call_later(self.random.choice((0.5, 3.0, 8.0, 45.0)) * self.random.uniform(0.5, 1.5), self._up)

    def _on_fatal(self, error: RegistryError) -> None:
        if not isinstance(error, StoreUnavailable):
            self.fail(str(error))
        self._kill(str(error), certain=False)

    def before_commit(self) -> None:
        """Called before a decision is written; lets the database fail if that was planned."""
        if self._commit_fails == "before":
            error = StoreUnavailable("the disk is full")
            self._on_fatal(error)
            raise error

    def after_commit(self, event: Event, changes: Changes) -> None:
        """Check a decision that was written. Then lose the commit's answer, or let the registry die, if planned."""
        self.decisions += 1
        self.note(f"{type(event).__name__} {ids_of(event)}")
        # A decision can end a request's lease and grant it a new one; both are written as one change of the lease.
        renewed = [lease for lease in changes.leases if self._leases.get(lease.request_id) != self._tokens.of(lease)]
        for request_id in (*changes.ended_leases, *(lease.request_id for lease in renewed)):
            token = self._leases.pop(request_id, None)
            if token is not None:
                self._ended_s[token] = self.now_s
                del self._holders[self._held.pop(request_id)]
        for lease in renewed:
            holder = self._holders.setdefault(lease.wrapper_id, lease.request_id)
            if holder != lease.request_id:
                self.fail(f"{lease.wrapper_id} is leased to {holder} and to {lease.request_id}")
            token = self._tokens.of(lease)
            if token in self._ended_s:
                self.fail(f"the lease of {lease.request_id} has ended and is back")
            self._held[lease.request_id] = lease.wrapper_id
            self._leases[lease.request_id] = self._tokens_of[lease.request_id] = token
        self.grants += len(renewed)
        for problem in self.moves.judge(changes, EPOCH_S + self.now_s):
            self.fail(problem)
        if self._commit_fails == "after":
            error = StoreUnavailable("the connection was lost while committing")
            self._on_fatal(error)
            raise error
        if self._dies_after_commits is not None:
            self._dies_after_commits -= 1
            if self._dies_after_commits <= 0:
                self._kill("between its decision and what follows")
                raise Killed

    def _on_call(self) -> None:
        if self._dies_after_calls is not None:
            self._dies_after_calls -= 1
            if self._dies_after_calls <= 0:
                self._kill("waiting for a wrapper")
                raise Killed

    def on_log(self, entry: Mapping[str, Any]) -> None:
        """Treat an error in the service's log as a broken guarantee, except in the log of a dying registry."""
        if self.service is not None:
            error = entry.get("exc_info")
            self.fail(f"{entry.get('event')}: {error!r}")

    # --- clients ----------------------------------------------------------------------------------------

    async def _client(self, number: int) -> None:
        """Run one client, which requests LLMs and uses them, and sometimes disappears."""
        random = self.random
        await asyncio.sleep(random.uniform(0.0, self.shape.busy_s))
        models = [*SPECS, LLMSpec(BROKEN, "text-generation")]
        weights = (6, 4, 2, 2, 1, 1 if self.shape.broken else 0)
        specs = random.choices(models, weights, k=random.choice((1, 1, 1, 2, 3)))
        measurement_id = random.randrange(1, max(2, self.shape.clients * 2 // 3))
        ask: dict[str, Any] = {
            "tenant": random.choice(("default", "other")),
            "priority": tuple(Priority)[measurement_id % 3],
            "gpu_type": random.choice((None, None, None, "A100")),
        }
        if not self.shape.repetitions:
            await self._ask_and_use(f"r{number}", measurement_id, specs, ask)
        for repetition in range(self.shape.repetitions):
            await self._ask_and_use(f"r{number}.{repetition}", number + 1, specs, ask)
            await asyncio.sleep(random.choice((0.0, 5.0, 20.0)))

    async def _ask_and_use(
        self, name: str, measurement_id: int, specs: Sequence[LLMSpec], ask: Mapping[str, Any]
    ) -> None:
        random = self.random
        ids = [f"{name}.{n}" for n in range(len(specs))]
        llms = [NewRequest(i, s, canonical_json({"model": s.model})) for i, s in zip(ids, specs, strict=True)]
        try:
            requests = await self._ask(lambda service: service.request(measurement_id, llms, **ask))
        except (LLMNeverFits, InvalidField) as error:
            self.note(f"{ids} refused: {error}")
            return
        if [request.request_id for request in requests] != ids:
            self.fail(f"{ids} were asked for, {requests} answered")
        self.accepted.update(zip(ids, specs, strict=True))
        if random.random() < 0.1:
            return  # the client disappears and never releases its LLMs
        for request_id in ids:
            if random.random() < 0.15:
                self._loop.call_later(random.expovariate(1 / 40.0), self._changes_its_mind, request_id)
        for request_id in ids:
            await self._use(request_id)

    def _changes_its_mind(self, request_id: str) -> None:
        self._spawn(self._release(request_id))

    async def _use(self, request_id: str) -> None:
        """Wait for an LLM, prompt it, and sometimes release it."""
        random = self.random
        while True:
            request = await self._wait(lambda service: service.wait_for_change(request_id, 60.0))
            self._see(request)
            if request.status.ended:
                return
            if request.status is RequestStatus.DEPLOYED:
                break
            if self.now_s > self._quiet_s + SETTLED_S and await self._ask(
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
            idle_s = self.shape.settings.leases.idle_s
            await asyncio.sleep(random.choice((0.1, 2.0, 10.0, 30.0, 1.2 * idle_s)) * random.uniform(0.5, 1.0))
            if random.random() < 0.2:
                with suppress(WrapperUnreachable):
                    await self._wait(lambda service: service.keep_alive(request_id))
        if random.random() < 0.85:
            await self._release(request_id)
            if random.random() < 0.2:
                await self._release(request_id)
            if random.random() < 0.3:
                await self._prompt(request_id, known)

    async def _prompt(self, request_id: str, known: list[Process]) -> bool:
        """Send a prompt until it is answered; return False if the lease has ended. ``known``: processes tried."""
        random = self.random
        refused_s = 0.0
        last_s = self.now_s
        request: Request | None = None
        while True:
            serve = self.cluster.processes.get(self._held.get(request_id, ""))
            # A client on the same side of a cut as the machine reaches the machine, but not the registry.
            beside = _is_cut_off(known) or (bool(known) and (serve is None or random.random() < 0.5))
            process = known[-1] if beside else serve
            if not _is_cut_off(known):
                request = await self._ask(lambda service: service.known(request_id))
                self._see(request)
                if request.status.ended and not known:
                    return False
            token = self._tokens_of.get(request_id, "")
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
                and self.now_s > self._quiet_s + SETTLED_S
            )
            refused_s = refused_s + self.now_s - last_s if alive else 0.0
            last_s = self.now_s
            if refused_s > TOLD_WITHIN_S:
                self.fail(f"{request_id} has the status deployed, but its prompts were refused for {refused_s:.0f} s")

    async def _release(self, request_id: str) -> None:
        await self._ask(lambda service: service.release(request_id))
        self._see(await self._ask(lambda service: service.known(request_id)), must_have_ended=True)

    def _see(self, request: Request, *, must_have_ended: bool = False) -> None:
        if request.status.ended:
            before = self._seen_end.setdefault(request.request_id, request.status)
            if before is not request.status:
                self.fail(f"{request.request_id} was {before} and is {request.status}")
        elif must_have_ended or request.request_id in self._seen_end:
            self.fail(f"{request.request_id} has ended and is {request.status} again")

    async def _ask(self, what: Callable[[Service], T]) -> T:
        """Call the registry, and call again if it dies or shuts down during the call. Raises its other errors."""
        while True:
            await self._is_up.wait()
            if self.service is not None:
                try:
                    return what(self.service)
                except (Killed, ShuttingDown, StoreUnavailable):
                    pass
            await asyncio.sleep(self.random.uniform(0.1, 2.0))

    async def _wait(self, what: Callable[[Service], Coroutine[Any, Any, T]]) -> T:
        """Like ``_ask``, for calls that wait."""
        while True:
            await self._is_up.wait()
            if self.service is None:
                continue
            task = self._loop.create_task(what(self.service))
            self._calls[task] = None
            await asyncio.wait({task})
            del self._calls[task]
            if not task.cancelled():
                error = task.exception()
                if error is None:
                    return task.result()
                if not isinstance(error, Killed | ShuttingDown | StoreUnavailable):
                    raise error
            await asyncio.sleep(self.random.uniform(0.1, 2.0))

    def _on_prompt(self, process: Process, grant: LeaseGrant) -> None:
        """Check that a wrapper may accept this prompt."""
        request_id, name = grant.request_id, f"{process.plan.wrapper_id} ({process.name})"
        ended_s = self._ended_s.get(grant.token)
        if ended_s is None and self._leases.get(request_id) != grant.token:
            self.fail(f"{name} serves {request_id}, which never had a lease")
        if ended_s is not None and self.now_s >= ended_s + self.shape.settings.wrappers.fence_s:
            self.fail(f"{name} serves {request_id}, whose lease ended {self.now_s - ended_s:.1f} s ago")
        if ended_s is None and self._holders.get(process.plan.wrapper_id) != request_id:
            self.fail(f"{name} serves {request_id}, which has another wrapper")
        wanted = self.accepted.get(request_id)
        if wanted is not None and process.running != wanted:
            self.fail(f"{name} serves {request_id} with {process.running}")

    # --- trouble ----------------------------------------------------------------------------------------

    def _add_machine(self, n: int) -> None:
        gpus, gpu_type = self.random.choice(((0, None), (2, "A100"), (2, "A100"), (1, "H100")))
        if n == 0 or self.shape.repetitions:
            gpus, gpu_type = 2, "A100"
        self.cluster.nodes[f"m{n}"] = Node(f"m{n}", gpus, gpu_type)

    async def _trouble(self) -> None:
        """Let faults happen, then repair everything."""
        kinds = self.shape.kinds
        while kinds and self.now_s < self.shape.busy_s:
            kind = self.random.choice(kinds)
            self.note(f"trouble: {kind}")
            self.faults += 1
            self._spawn(getattr(self, f"_{kind}")())
            await asyncio.sleep(self.random.expovariate(1 / self.shape.pause_s))
        await asyncio.sleep(max(0.0, self.shape.busy_s - self.now_s))
        self.note("the trouble is over")
        self._dies_after_calls = self._dies_after_commits = self._commit_fails = None
        self.cluster.weather = CALM
        self.cluster.controller_is_away = False
        for node in self.cluster.nodes.values():
            self.cluster.power_on(node)
            self.cluster.heal(node)
            for process in node.processes:
                process.resume()
        for machine_id in self.cluster.nodes:
            with suppress(UnknownMachine):  # the registry does not know this machine
                await self._ask(partial(_undrain, machine_id))
        self._quiet_s = self.now_s

    def _some_node(self) -> Node:
        return self.random.choice(list(self.cluster.nodes.values()))

    def _some_process(self) -> Process | None:
        living = [process for process in self.cluster.processes.values() if process.alive]
        return self.random.choice(living) if living else None

    async def _machine_off(self) -> None:
        node = self._some_node()
        self.cluster.power_off(node)
        await asyncio.sleep(self.random.choice((5.0, 60.0, 400.0)) * self.random.uniform(0.5, 1.0))
        self.cluster.power_on(node)

    async def _machine_cut(self) -> None:
        node = self._some_node()
        self.cluster.cut(node)
        await asyncio.sleep(self.random.choice((3.0, 15.0, 60.0, 200.0)) * self.random.uniform(0.5, 1.0))
        self.cluster.heal(node)

    async def _machine_joins(self) -> None:
        if len(self.cluster.nodes) < 2 * self.shape.machines:
            self._add_machine(len(self.cluster.nodes))

    async def _process_dies(self) -> None:
        if (process := self._some_process()) is not None:
            self.cluster.kill(process)

    async def _process_hangs(self) -> None:
        if (process := self._some_process()) is not None:
            process.hang()
            await asyncio.sleep(self.random.choice((4.0, 30.0, 120.0)) * self.random.uniform(0.5, 1.0))
            process.resume()

    async def _engine_dies(self) -> None:
        if (process := self._some_process()) is not None:
            process.kill_engine()

    async def _registry_dies(self) -> None:
        self._kill("at some moment")

    async def _registry_dies_deciding(self) -> None:
        self._dies_after_commits = self.random.randint(1, 5)

    async def _registry_dies_calling(self) -> None:
        self._dies_after_calls = self.random.randint(1, 10)

    async def _database_fails(self) -> None:
        self._commit_fails = self.random.choice(("before", "after"))

    async def _controller_away(self) -> None:
        self.cluster.controller_is_away = True
        await asyncio.sleep(self.random.uniform(5.0, 40.0))
        self.cluster.controller_is_away = False

    async def _drained(self) -> None:
        machine_id = self._some_node().machine_id
        with suppress(UnknownMachine):  # the registry does not know this machine yet
            await self._ask(lambda service: service.drain(machine_id))
            await asyncio.sleep(self.random.uniform(5.0, 200.0))
            await self._ask(partial(_undrain, machine_id))

    async def _shut_down(self) -> None:
        if (service := self.service) is None:
            return
        task = self._loop.create_task(service.shutdown())
        self._calls[task] = None
        await asyncio.wait({task})
        del self._calls[task]
        if not task.cancelled():
            task.exception()  # the registry may be killed during its shutdown
        if self.service is service:
            self._kill("it was shut down")


def _undrain(machine_id: str, service: Service) -> None:
    service.undrain(machine_id)


OF_REGISTRY = ("registry_dies", "registry_dies_deciding", "registry_dies_calling", "database_fails", "shut_down")
OF_MACHINES = (
    "machine_off",
    "machine_cut",
    "machine_joins",
    "process_dies",
    "process_hangs",
    "engine_dies",
    "controller_away",
    "drained",
)
KINDS = (*OF_MACHINES, *OF_REGISTRY)
"""The kinds of faults."""


def _is_cut_off(known: list[Process]) -> bool:
    """Whether the client is cut off from the registry, together with the process that answered it last."""
    return bool(known) and known[-1].alive and known[-1].node.cut


# --- from a seed to a verdict -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a simulation. ``digest``: hash of all its events, which is the same for two runs of a seed.

    ``faults``: number of faults, without those of ``Weather`` (late messages and failed calls).
    """

    seed: int
    violations: tuple[str, ...]
    story: tuple[str, ...]
    simulated_s: float
    decisions: int
    grants: int
    stayed: int
    requests: int
    faults: int
    took_ns: tuple[int, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the story."""
        return hashlib.sha256("\n".join(self.story).encode()).hexdigest()

    def __str__(self) -> str:
        told = "\n".join(self.story[-60:])
        return f"seed {self.seed}:\n{told}\n" + "\n".join(self.violations)


def small_world(seed: int) -> Shape:
    """Return a world of a few machines. Each seed has its own kinds of faults, so that each kind also occurs alone."""
    random = Random(f"shape of {seed}")
    chance = lambda most: random.choice((0.0, most * random.random()))  # noqa: E731
    settings = settings_of(
        leases={
            "max_s": random.choice((120, 300, 600)),
            "idle_s": random.choice((60, 120)),
            "at_expiry": random.choice(("cut", "finish")),
        },
        wrappers={
            "per_machine": random.choice((1, 1, 2)),
            "start_timeout_s": 60,
            "deploy_timeout_s": random.choice((60, 120)),
            "prompt_max_s": 60,
            "fence_s": random.choice((20, 30, 60)),
        },
        queue={
            "deploy_attempts": random.choice((2, 3)),
            "wrapper_attempts": random.choice((2, 3)),
            "max_overtake_s": random.choice((0, 60)),
        },
    )
    return Shape(
        machines=random.randint(1, 5),
        clients=random.randint(4, 16),
        busy_s=random.choice((200.0, 400.0, 800.0)),
        kinds=tuple(random.sample(KINDS, random.randint(0, 6))),
        pause_s=random.choice((10.0, 30.0, 100.0)),
        weather=Weather(
            late=chance(0.05),
            twice=chance(0.1),
            start_fails=chance(0.3),
            call_fails=chance(0.3),
            held_is_lost=random.random(),
            engine_start_s=random.choice(((0.5, 3.0), (2.0, 30.0), (20.0, 90.0))),
        ),
        settings=settings,
        homes=random.random() < 0.3,
        broken=random.random() < 0.3,
    )


def two_machines(seed: int) -> Shape:
    """Return a world with two equal machines, whose clients request the same LLMs four times, as ``measure`` does."""
    random = Random(f"machines of {seed}")
    kinds = random.sample([kind for kind in KINDS if kind != "machine_joins"], random.choice((0, 0, 1, 2)))
    shape = replace(small_world(seed), machines=2, clients=random.randint(1, 4), repetitions=4, kinds=tuple(kinds))
    sticky = shape.settings.measurements.model_copy(update={"sticky_s": random.choice((60.0, 600.0))})
    return replace(shape, settings=shape.settings.model_copy(update={"measurements": sticky}))


def large_world(machines: int, clients: int, busy_s: float, *, kinds: Sequence[str], pause_s: float) -> Shape:
    """Return a world of many machines and clients, checked every half hour, to measure costs or to test the scale."""
    return Shape(
        machines=machines,
        clients=clients,
        busy_s=busy_s,
        kinds=tuple(kinds),
        pause_s=pause_s,
        weather=Weather(late=0.001, twice=0.001, start_fails=0.02, call_fails=0.01),
        settings=settings_of(
            watch={"period_s": 10, "report_timeout_s": 5, "failures": 2},
            leases={"max_s": 600, "idle_s": 200},
            wrappers={"deploy_timeout_s": 120},
        ),
        check_every_s=1800.0,
    )


def settings_of(**sections: dict[str, Any]) -> Settings:
    """Return settings with few checks of wrappers, so that thousands of hours can be simulated."""
    watch = {"period_s": 5, "report_timeout_s": 5, "failures": 2}
    return Settings.model_validate({"watch": watch, **sections})


def run(shape: Shape, seed: int) -> Verdict:
    """Simulate a world to its end, and return the verdict."""
    _forget_everything()
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        world = SimulatedWorld(shape, seed, runner.get_loop())
        try:
            with _logs_to(world.on_log):
                runner.run(world.run())
        except Stuck as error:
            world.fail(str(error))
    return Verdict(
        seed=seed,
        violations=tuple(world.violations),
        story=tuple(world.story),
        simulated_s=world.now_s,
        decisions=world.decisions,
        grants=world.grants,
        stayed=world.moves.stayed,
        requests=len(world.accepted),
        faults=world.faults,
        took_ns=tuple(world.took_ns),
    )


@contextmanager
def _logs_to(listener: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Return a context in which logged errors go only to the listener, and other log lines are dropped."""

    def listen(_logger: object, _method: str, entry: MutableMapping[str, Any]) -> Mapping[str, Any]:
        listener(entry)
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[listen], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        yield
    finally:
        structlog.configure(**before)


@cache
def _connection() -> Connection:
    """Return the database of all simulations in this process. Opening one takes longer than most simulations."""
    path = Path(tempfile.mkdtemp(prefix="simulation-")) / "registry.db"
    Finalize(None, shutil.rmtree, (path.parent,), exitpriority=0)  # atexit does not run in a pool's processes
    connection = Store.open(f"sqlite:///{path}")._connection
    driver: Any = connection.connection.driver_connection
    driver.execute("PRAGMA synchronous = OFF")  # power does not fail in a simulation
    return connection


def _forget_everything() -> None:
    with _connection().begin():
        for table in reversed(METADATA.sorted_tables):
            _connection().execute(delete(table))


def _parts(snapshot: Snapshot) -> dict[str, dict[Any, Any]]:
    """Return the records by kind and id."""
    return {
        "machines": {machine.machine_id: machine for machine in snapshot.machines},
        "wrappers": {wrapper.wrapper_id: wrapper for wrapper in snapshot.wrappers},
        "measurements": {measurement.key: measurement for measurement in snapshot.measurements},
        "requests": {request.request_id: request for request in snapshot.requests},
        "leases": {lease.request_id: lease for lease in snapshot.leases},
    }


def _difference(store: Store, known: Snapshot) -> str | None:
    """Return the first record that differs between database and memory, None if there is none.

    All records in memory must be in the database, and all records of unfinished requests in memory.
    """
    written, needed = _parts(store.load()), _parts(store.load(ended=False))
    for kind, records in _parts(known).items():
        for key in records.keys() | needed[kind].keys():
            if records.get(key) != written[kind].get(key):
                return f"{kind} {key}: {written[kind].get(key)} is written, {records.get(key)} is known"
    return None
