"""A whole registry in virtual time: the real service, store and lease gates, which die, start again and are judged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from itertools import count
from random import Random
from typing import Any, TypeVar

from registry.contract.messages import LeaseGrant
from registry.core.decision import Changes, Snapshot
from registry.core.events import Event
from registry.core.records import LLMSpec, Request
from registry.errors import RegistryError, ShuttingDown, StoreUnavailable
from registry.service.history import ids_of
from registry.service.lease_tokens import LeaseTokens
from registry.service.loop import Observer
from registry.service.service import Service
from registry.store.store import Store
from registry.wire.words import RequestStatus
from tests.simulation.clients import SETTLED_S, Clients
from tests.simulation.database import connection, difference
from tests.simulation.faults import Faults
from tests.simulation.machines import Node, Process, SimulatedCluster
from tests.simulation.moves import Moves
from tests.simulation.shape import BROKEN, SPECS, Shape

EPOCH_S = 1_800_000_000.0
"""Start of every world, UTC seconds."""

T = TypeVar("T")


class Killed(BaseException):
    """The registry's process ends at this point. Not an Exception, so that no handler of the registry catches it."""


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
        self.loop = loop
        loop.set_exception_handler(self._on_problem)
        self._broken = asyncio.Event()
        self._is_up = asyncio.Event()
        self.calls: dict[asyncio.Task[Any], None] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        numbers = count(1)
        self._tokens = LeaseTokens(b"a key", lambda: f"token-{next(numbers)}")
        self._last: Snapshot | None = None
        self.dies_after_commits: int | None = None
        self.dies_after_calls: int | None = None
        self.commit_fails: str | None = None
        self.tokens_of: dict[str, str] = {}
        """The newest token of each request, even if its lease has ended, because its client may still use it."""
        self._leases: dict[str, str] = {}
        """The token of each current lease in the database, by request."""
        self._ended_s: dict[str, float] = {}
        """When leases ended, by token."""
        self._holders: dict[str, str] = {}
        """Request whose lease is on each wrapper."""
        self.held: dict[str, str] = {}
        """Wrapper of each request with a lease."""
        self.accepted: dict[str, LLMSpec] = {}
        self._unended: list[str] = []
        """The accepted requests that were not seen to have ended."""
        self.quiet_s = float("inf")
        self.cluster = SimulatedCluster(shape.settings, self.random, on_prompt=self._on_prompt, on_call=self._on_call)
        self.cluster.weather = shape.weather
        self.moves = Moves(self.cluster.nodes, sticky_s=shape.settings.measurements.sticky_s)
        if shape.broken:
            self.cluster.broken.add(BROKEN)
        self._homes = {"*": SPECS[0]} if shape.homes else {}
        self._clients = Clients(self)
        self._faults = Faults(self)

    @property
    def now_s(self) -> float:
        """Virtual seconds since the world began."""
        return self.loop.time()

    # --- the whole --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the simulation until all requests have ended or a guarantee was broken."""
        for n in range(self.shape.machines):
            self.add_machine(n)
        self._up()
        clients = [self.loop.create_task(self._clients.run(n)) for n in range(self.shape.clients)]
        whole = self.loop.create_task(self._whole(clients))
        watch = self.loop.create_task(self._watch())
        broken = self.loop.create_task(self._broken.wait())
        try:
            await asyncio.wait({whole, watch, broken}, return_when=asyncio.FIRST_COMPLETED)
            for task in (whole, watch, *clients):
                if task.done() and (error := task.exception()) is not None:
                    raise error
        finally:
            self.kill("the end")
            self.cluster.close()
            tasks = [whole, watch, broken, *clients, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _whole(self, clients: list[asyncio.Task[None]]) -> None:
        """Run the faults. Then wait until all requests end, at most for the time that they need one after another."""
        await self._faults.run()
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
            self._clients.see(self._request(request_id))

    def _open(self) -> list[str]:
        """Return, as text, the accepted requests that have not ended although they can be served."""
        if self.service is None:
            return ["(the registry does not run)"]
        # What has ended stays so, and would be read from the database each time.
        self._unended = [request_id for request_id in self._unended if not self._request(request_id).status.ended]
        requests = map(self._request, self._unended)
        misfit = self.service.allocator.misfit
        return [
            f"{request.request_id} is {request.status} ({request.reason})"
            for request in requests
            if request.status is not RequestStatus.QUEUED or misfit(request.request_id) is None
        ]

    def accept(self, requests: Mapping[str, LLMSpec]) -> None:
        """Note requests that the registry has accepted: from now on it must know them."""
        self.accepted.update(requests)
        self._unended += requests

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
        if (differs := difference(self.service._store, self.service.allocator.snapshot())) is not None:
            self.fail(f"database and memory differ: {differs}")
        known = {request.request_id for request in self.service.archive.find_requests(self.accepted)}
        for request_id in self.accepted.keys() - known:
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

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task; if it fails, the simulation does."""
        task = self.loop.create_task(work)
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
        store = Store(connection(), ExitStack())
        if self._last is not None and (differs := difference(store, self._last)) is not None:
            self.fail(f"the previous registry did not write all that it knew: {differs}")
        self.service = Service(
            self.shape.settings,
            store,
            self.cluster,
            now_s=lambda: EPOCH_S + self.loop.time(),
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

    def kill(self, why: str, *, certain: bool = True) -> None:
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
        for task in self.calls:
            task.cancel()
        service._store.close()
        self.dies_after_calls = self.dies_after_commits = self.commit_fails = None
        self.loop.call_later(self.random.choice((0.5, 3.0, 8.0, 45.0)) * self.random.uniform(0.5, 1.5), self._up)

    def _on_fatal(self, error: RegistryError) -> None:
        if not isinstance(error, StoreUnavailable):
            self.fail(str(error))
        self.kill(str(error), certain=False)

    def before_commit(self) -> None:
        """Called before a decision is written; lets the database fail if that was planned."""
        if self.commit_fails == "before":
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
                del self._holders[self.held.pop(request_id)]
        for lease in renewed:
            holder = self._holders.setdefault(lease.wrapper_id, lease.request_id)
            if holder != lease.request_id:
                self.fail(f"{lease.wrapper_id} is leased to {holder} and to {lease.request_id}")
            token = self._tokens.of(lease)
            if token in self._ended_s:
                self.fail(f"the lease of {lease.request_id} has ended and is back")
            self.held[lease.request_id] = lease.wrapper_id
            self._leases[lease.request_id] = self.tokens_of[lease.request_id] = token
        self.grants += len(renewed)
        for problem in self.moves.judge(changes, EPOCH_S + self.now_s):
            self.fail(problem)
        if self.commit_fails == "after":
            error = StoreUnavailable("the connection was lost while committing")
            self._on_fatal(error)
            raise error
        if self.dies_after_commits is not None:
            self.dies_after_commits -= 1
            if self.dies_after_commits <= 0:
                self.kill("between its decision and what follows")
                raise Killed

    def _on_call(self) -> None:
        if self.dies_after_calls is not None:
            self.dies_after_calls -= 1
            if self.dies_after_calls <= 0:
                self.kill("waiting for a wrapper")
                raise Killed

    def on_log(self, entry: Mapping[str, Any]) -> None:
        """Treat an error in the service's log as a broken guarantee, except in the log of a dying registry."""
        if self.service is not None:
            error = entry.get("exc_info")
            self.fail(f"{entry.get('event')}: {error!r}")

    async def ask(self, what: Callable[[Service], T]) -> T:
        """Call the registry, and call again if it dies or shuts down during the call. Raises its other errors."""
        while True:
            await self._is_up.wait()
            if self.service is not None:
                try:
                    return what(self.service)
                except (Killed, ShuttingDown, StoreUnavailable):
                    pass
            await asyncio.sleep(self.random.uniform(0.1, 2.0))

    async def wait(self, what: Callable[[Service], Coroutine[Any, Any, T]]) -> T:
        """Like ``ask``, for calls that wait."""
        while True:
            await self._is_up.wait()
            if self.service is None:
                continue
            task = self.loop.create_task(what(self.service))
            self.calls[task] = None
            await asyncio.wait({task})
            del self.calls[task]
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

    def add_machine(self, n: int) -> None:
        """Add the nth machine. The first has GPUs, and where measurements are repeated all are like it."""
        gpus, gpu_type = self.random.choice(((0, None), (2, "A100"), (2, "A100"), (1, "H100")))
        if n == 0 or self.shape.repetitions:
            gpus, gpu_type = 2, "A100"
        self.cluster.nodes[f"m{n}"] = Node(f"m{n}", gpus, gpu_type)
