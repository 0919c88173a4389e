"""Machines, Ray and Serve as the registry's service meets them, in virtual time: slow, cut off, dead, back again.

A ``Process`` follows ``deployments.wrapper.llm_wrapper``, over the real lease gate. What happens to messages: they take
time, come late, twice, in another order, or when a cut heals, long after their sender has given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from typing import Any

from deployments.wrapper.lease_gate import LeaseGate
from registry.contract.messages import Belief, HandOver, LeaseGrant, Observation, StartedFor, WrapperPlan, WrapperReport
from registry.core.records import LLMSpec, Machine
from registry.errors import (
    EngineNotReady,
    EngineStartFailed,
    StaleEpoch,
    WrapperUnheard,
    WrapperUnreachable,
)
from registry.settings import Settings

COMMAND_TIMEOUT_S, APPS_BELIEVED_S = 10.0, 30.0
"""As in ``deployments.serve.cluster``."""

LONGEST_DELAY_S = 60.0
"""How late a message can come, a cut apart."""


@dataclass(frozen=True, slots=True)
class Weather:
    """How likely it is that something goes wrong, and how long things take. All 0 when ``calm``."""

    late: float = 0.0
    twice: float = 0.0
    start_fails: float = 0.0
    call_fails: float = 0.0
    held_is_lost: float = 0.5
    engine_start_s: tuple[float, float] = (2.0, 30.0)


CALM = Weather()


@dataclass(eq=False)
class Node:
    """A machine. ``known``: Ray takes it for alive. ``held``: messages that a cut keeps back."""

    machine_id: str
    gpus: int = 0
    gpu_type: str | None = None
    number: int = 1
    powered: bool = True
    cut: bool = False
    known: bool = True
    processes: list[Process] = field(default_factory=list)
    held: list[Callable[[], None]] = field(default_factory=list)

    @property
    def node_id(self) -> str:
        """Ray's id of the moment."""
        return f"{self.machine_id}-node-{self.number}"

    @property
    def reached(self) -> bool:
        """True when messages go there and back."""
        return self.powered and not self.cut


class Process:
    """The process of a wrapper: its commands, its engine, its lease gate. ``clock`` is its own, monotonic."""

    def __init__(self, cluster: SimulatedCluster, plan: WrapperPlan, node: Node, name: str) -> None:
        self.plan = plan
        self.node = node
        self.name = name
        self.alive = True
        self.ready = False
        self.held: list[Callable[[], None]] | None = None
        """Calls that wait for a process that hangs; None: it does not."""
        self.tasks: dict[asyncio.Task[Any], None] = {}
        loop, offset_s = asyncio.get_running_loop(), cluster.random.uniform(0, 1e5)
        self.gate = LeaseGate(lambda: loop.time() + offset_s, fence_s=cluster.settings.wrappers.fence_s, process=name)
        self.running: LLMSpec | None = None
        self._cluster = cluster
        self._finish = cluster.settings.leases.at_expiry == "finish"
        self._epoch = self._in_force = 0
        self._spec: LLMSpec | None = None
        self._died: str | None = None
        self._start: asyncio.Task[None] | None = None
        self._starts = 0
        self._revision: str | None = None
        self._commands = asyncio.Lock()
        self._engine_lock = asyncio.Lock()
        self._in_flight: dict[asyncio.Future[None], LeaseGrant] = {}
        self._no_prompts = asyncio.Event()
        self._no_prompts.set()

    # --- the registry's commands ------------------------------------------------------------------------

    def report(self, belief: Belief) -> WrapperReport:
        """As LLMWrapper.report."""
        self._hear(belief)
        grant = self.gate.grant
        return WrapperReport(
            epoch=self._epoch,
            running=None if self.running is None or self._spec is None else self._spec.fingerprint,
            starting=self._spec.fingerprint if self._start is not None and self._spec is not None else None,
            revision=self._revision,
            died=self._died,
            bound=None if grant is None else grant.request_id,
            idle_for_s=self.gate.idle_for_s,
            in_flight=self.gate.in_flight,
            starts=self._starts,
            moment=self.gate.moment,
        )

    async def deploy(
        self, epoch: int, spec: LLMSpec, grant: LeaseGrant | None, started_for: StartedFor | None = None
    ) -> None:
        """As LLMWrapper.deploy."""
        async with self._command(epoch):
            if grant is None:
                self._end_lease("released")
            else:
                self.gate.bind(grant)
            if self._spec != spec or (self._start is None and self.running is None):
                await self._cancel_start()
                self._spec, self._died = spec, None
                self._start = self.spawn(self._swap(spec, None if grant is None else grant.model_revision))
            start = self._start
        if start is not None:
            await asyncio.wait({start})
            if start.cancelled():
                raise StaleEpoch(self.plan.wrapper_id, epoch, self._epoch)
            start.result()

    async def stop(self, epoch: int) -> None:
        """As LLMWrapper.stop."""
        async with self._command(epoch):
            self._end_lease("shutdown")
            self._cut_all()
            await self._cancel_start()
            async with self._engine_lock:
                await self._empty()
                self._spec = self._died = None

    async def bind(self, epoch: int, grant: LeaseGrant) -> HandOver:
        """As LLMWrapper.bind, of a lease that needs no settling."""
        async with self._command(epoch):
            current = self.gate.grant
            if current is not None and current.request_id == grant.request_id:
                self.gate.bind(grant)
                return HandOver(self._revision)
            self._end_lease("released")
        await self._no_prompts.wait()
        async with self._command(epoch):
            self.gate.bind(grant)
            return HandOver(self._revision)

    async def unbind(self, epoch: int, request_id: str, how: str) -> None:
        """As LLMWrapper.unbind."""
        async with self._command(epoch):
            bound = self.gate.grant
            if bound is not None and bound.request_id != request_id:
                self._end_lease("released")
            self.gate.unbind(how)
            if how != "expired" or not self._finish:
                self._cut(request_id)

    async def touch(self, request_id: str) -> bool:
        """As LLMWrapper.touch."""
        bound = self.gate.grant is not None and self.gate.grant.request_id == request_id
        if bound:
            self.gate.touch()
        return bound

    # --- prompts ----------------------------------------------------------------------------------------

    async def prompt(self, token: str, takes_s: float) -> None:
        """As a prompt at the wrapper's address. Raises what its client is told."""
        grant = self.gate.check(token)
        self.gate.require_heard()
        cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._in_flight[cut] = grant
        self._no_prompts.clear()
        self.gate.enter()
        try:
            if self.running is None or self._start is not None:
                raise EngineNotReady("no LLM is deployed")
            self._cluster.on_prompt(self, grant)
            await asyncio.wait({cut}, timeout=takes_s if self._finish else min(takes_s, self.gate.left_s(grant)))
        finally:
            del self._in_flight[cut]
            self.gate.leave(grant)
            if not self._in_flight:
                self._no_prompts.set()
        if not self.alive:
            raise WrapperUnreachable(self.plan.wrapper_id, "the connection broke")
        if cut.done():
            self.gate.check(token)
            raise EngineNotReady("the prompt was cut")

    # --- what can happen to it --------------------------------------------------------------------------

    def kill_engine(self) -> None:
        """The LLM dies."""
        if self.running is not None:
            self.running = self._spec = self._revision = None
            self._died = "its processes are gone"
            self._cut_all()

    def end(self) -> None:
        """The process dies, and everything in it."""
        self.alive = False
        self.running = None
        for task in list(self.tasks):
            task.cancel()
        self._cut_all()
        self.resume()

    def hang(self) -> None:
        """From now on nobody is answered."""
        self.held = [] if self.held is None else self.held

    def resume(self) -> None:
        """It goes on, with what has come meanwhile."""
        held, self.held = self.held, None
        for call in held or ():
            call()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that dies with the process."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks[task] = None
        task.add_done_callback(self._over)
        return task

    # --- inside -----------------------------------------------------------------------------------------

    def _over(self, task: asyncio.Task[Any]) -> None:
        del self.tasks[task]
        if not task.cancelled():
            task.exception()  # whoever waited for it has been told

    def _hear(self, belief: Belief) -> None:
        if belief.epoch < self._epoch:
            return
        self.gate.believe(belief.request_id, belief.as_of)
        bound = self.gate.grant
        if belief.epoch == self._in_force and bound is not None and bound.request_id != belief.request_id:
            self._end_lease("withdrawn")

    @asynccontextmanager
    async def _command(self, epoch: int) -> AsyncIterator[None]:
        if epoch >= self._epoch:
            self._epoch = epoch
            self.gate.commanded = True
        async with self._commands:
            if epoch < self._epoch:
                raise StaleEpoch(self.plan.wrapper_id, epoch, self._epoch)
            self._in_force = epoch
            yield

    def _end_lease(self, how: str) -> None:
        ended = self.gate.grant
        if ended is not None:
            self.gate.unbind(how)
            self._cut(ended.request_id)

    async def _cancel_start(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            start.cancel()
            await asyncio.wait({start})

    async def _swap(self, spec: LLMSpec, revision: str | None) -> None:
        random, weather = self._cluster.random, self._cluster.weather
        try:
            await self._no_prompts.wait()
            async with self._engine_lock:
                await self._empty()
                await asyncio.sleep(random.uniform(*weather.engine_start_s))
                broken = spec.model in self._cluster.broken
                if broken or random.random() < weather.start_fails:
                    raise EngineStartFailed(spec.model, "it can't" if broken else "out of memory", permanent=broken)
                self._revision = revision or self._cluster.commit
                self.running = spec
                self._starts += 1
        except EngineStartFailed:
            self._spec = None
            raise
        finally:
            if self._start is asyncio.current_task():
                self._start = None

    async def _empty(self) -> None:
        if self.running is not None:
            self.running = None
            await asyncio.sleep(self._cluster.random.uniform(0.1, 5.0))
        self._revision = None

    def _cut_all(self) -> None:
        for cut in self._in_flight:
            if not cut.done():
                cut.set_result(None)

    def _cut(self, request_id: str) -> None:
        for cut, grant in self._in_flight.items():
            if grant.request_id == request_id and not cut.done():
                cut.set_result(None)


class SimulatedCluster:
    """``registry.contract.messages.Cluster`` over all of that. It outlives the registries that use it.

    ``on_prompt`` is called when a prompt is let in, ``on_call`` when a call is on its way to a wrapper. ``broken`` are
    models that no machine can start.
    """

    def __init__(
        self,
        settings: Settings,
        random: Random,
        *,
        on_prompt: Callable[[Process, LeaseGrant], None],
        on_call: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.random = random
        self.on_prompt = on_prompt
        self.on_call = on_call
        self.weather = CALM
        self.broken: set[str] = set()
        self.commit = "commit-1"
        self.nodes: dict[str, Node] = {}
        self.processes: dict[str, Process] = {}
        """Where Serve sends the calls for a wrapper."""
        self.apps: dict[str, WrapperPlan] = {}
        self.leaving: set[str] = set()
        self.controller_is_away = False
        self._seen: tuple[frozenset[str], frozenset[str]] | None = None
        self._seen_until_s = 0.0
        self._numbers = count(1)

    # --- what can happen --------------------------------------------------------------------------------

    def power_off(self, node: Node) -> None:
        """A machine stops; Ray finds out by itself."""
        node.powered = False
        self._end_all(node)
        node.held.clear()
        self._ray_finds_out(node)

    def cut(self, node: Node) -> None:
        """Nothing reaches a machine and nothing comes from it; what runs there goes on."""
        node.cut = True
        self._ray_finds_out(node)

    def heal(self, node: Node) -> None:
        """A machine can be reached again. What Ray took for dead ends soon, and its node is started anew."""
        if not node.cut:
            return
        node.cut = False
        held, node.held = node.held, []
        for message in held:
            if self.random.random() >= self.weather.held_is_lost:
                self._later(self.random.uniform(0.0, 5.0), message)
        if not node.known:
            self._later(self.random.uniform(0.1, 20.0), partial(self._restart_node, node, node.number))

    def power_on(self, node: Node) -> None:
        """A machine is started again."""
        if not node.powered:
            node.powered = True
            self._restart_node(node, node.number)

    def kill(self, process: Process) -> None:
        """A wrapper's process dies; Serve starts another in its time."""
        if process.alive:
            process.end()
            process.node.processes.remove(process)
            self._later(self.random.uniform(1.0, 10.0), partial(self._place, process.plan))

    def close(self) -> None:
        """End every process."""
        for node in self.nodes.values():
            self._end_all(node)

    # --- the protocol -----------------------------------------------------------------------------------

    async def observe(self) -> Observation:
        await self._asked()
        machines = tuple(
            Machine(node.machine_id, node.node_id, "10.0.0.1", gpus=node.gpus, gpu_type=node.gpu_type)
            for node in self.nodes.values()
            if node.known
        )
        now_s = asyncio.get_running_loop().time()
        if self._seen is None or now_s >= self._seen_until_s:
            await self._asked()
            self._seen = frozenset(self.apps), frozenset(self.leaving)
            self._seen_until_s = now_s + (0.0 if self.leaving else APPS_BELIEVED_S)
        return Observation(machines, *self._seen)

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        self._seen = None
        await self._asked()
        for plan in wrappers:
            old = self.processes.get(plan.wrapper_id)
            if old is not None and old.alive and old.node.reached:
                old.end()
                old.node.processes.remove(old)
            self.apps[plan.wrapper_id] = plan
            self.leaving.discard(plan.wrapper_id)
            self._later(self.random.uniform(0.1, 2.0), partial(self._place, plan))
        await self._asked()

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        self._seen = None
        await self._asked()
        longest_s = 0.0
        for wrapper_id in wrapper_ids:
            plan = self.apps.pop(wrapper_id, None)
            if plan is not None:
                takes_s = self.random.uniform(0.5, 20.0)
                longest_s = max(longest_s, takes_s)
                self.leaving.add(wrapper_id)
                self._later(takes_s, partial(self._left, wrapper_id))
        await asyncio.sleep(longest_s + 0.2)
        self._seen = None

    async def report(self, wrapper_id: str, belief: Belief) -> WrapperReport:
        limit_s = self.settings.watch.report_timeout_s
        report: WrapperReport = await self._ask(wrapper_id, "report", belief, limit_s=limit_s)
        return report

    async def deploy(
        self,
        wrapper_id: str,
        epoch: int,
        spec: LLMSpec,
        grant: LeaseGrant | None,
        started_for: StartedFor | None = None,
    ) -> None:
        wrappers = self.settings.wrappers
        limit_s = self._last_prompt_s + wrappers.deploy_timeout_s + wrappers.stop_timeout_s + COMMAND_TIMEOUT_S
        await self._ask(wrapper_id, "deploy", epoch, spec, grant, started_for, limit_s=limit_s)

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        await self._ask(
            wrapper_id, "stop", epoch, limit_s=2 * self.settings.wrappers.stop_timeout_s + COMMAND_TIMEOUT_S
        )

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> HandOver:
        limit_s = self._last_prompt_s + COMMAND_TIMEOUT_S
        handed_over: HandOver = await self._ask(wrapper_id, "bind", epoch, grant, limit_s=limit_s)
        return handed_over

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        await self._ask(wrapper_id, "unbind", epoch, request_id, how)

    async def touch(self, wrapper_id: str, request_id: str) -> bool:
        bound: bool = await self._ask(wrapper_id, "touch", request_id)
        return bound

    async def restart(self, wrapper_id: str) -> None:
        self._seen = None
        await self._asked()
        process = self.processes.get(wrapper_id)
        if process is not None and process.node.reached:
            self.kill(process)

    # --- messages ---------------------------------------------------------------------------------------

    @property
    def _last_prompt_s(self) -> float:
        return self.settings.wrappers.prompt_max_s if self.settings.leases.at_expiry == "finish" else 0.0

    async def _asked(self) -> None:
        """Ray or Serve is asked something, and may not answer."""
        await asyncio.sleep(self.random.uniform(0.001, 0.2))
        if self.controller_is_away or self.random.random() < self.weather.call_fails:
            raise WrapperUnreachable("cluster", "it does not answer")

    async def _ask(self, wrapper_id: str, method: str, *args: object, limit_s: float = COMMAND_TIMEOUT_S) -> Any:
        process = self.processes.get(wrapper_id)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if process is None:
            raise WrapperUnreachable(wrapper_id, "there is no such replica")
        self._later(self._delay_s(), partial(self._arrive, process, method, args, answer))
        if self.random.random() < self.weather.twice:
            self._later(self._delay_s(), partial(self._arrive, process, method, args, answer))
        timer = self._later(limit_s, partial(self._give_up, wrapper_id, method, answer))
        try:
            self.on_call()
            return await answer
        except WrapperUnreachable:
            self._seen = None
            raise
        finally:
            timer.cancel()

    def _arrive(self, process: Process, method: str, args: tuple[Any, ...], answer: asyncio.Future[Any]) -> None:
        again = partial(self._arrive, process, method, args, answer)
        if process.node.cut:
            process.node.held.append(again)
        elif not process.alive or not process.ready:
            self._answer(process, answer, WrapperUnreachable(process.plan.wrapper_id, "its replica is not there"))
        elif process.held is not None:
            process.held.append(again)
        elif method == "report":
            self._answer(process, answer, process.report(*args))
        else:
            task = process.spawn(getattr(process, method)(*args))
            task.add_done_callback(lambda task: self._done(process, answer, task))

    def _done(self, process: Process, answer: asyncio.Future[Any], task: asyncio.Task[Any]) -> None:
        wrapper_id = process.plan.wrapper_id
        if task.cancelled():
            self._answer(process, answer, WrapperUnreachable(wrapper_id, "its replica died"))
        elif (error := task.exception()) is None:
            self._answer(process, answer, task.result())
        else:
            self._answer(process, answer, error)

    def _answer(self, process: Process, answer: asyncio.Future[Any], outcome: object) -> None:
        if process.node.cut:
            process.node.held.append(partial(self._answer, process, answer, outcome))
        elif not answer.done():
            self._later(self._delay_s(), partial(_settle, answer, outcome))

    def _give_up(self, wrapper_id: str, method: str, answer: asyncio.Future[Any]) -> None:
        error = WrapperUnheard if self.controller_is_away else WrapperUnreachable
        _settle(answer, error(wrapper_id, f"no answer to {method}"))

    def _delay_s(self) -> float:
        if self.random.random() < self.weather.late:
            return self.random.uniform(0.5, LONGEST_DELAY_S)
        return self.random.uniform(0.001, 0.02)

    def _later(self, delay_s: float, what: Callable[[], object]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay_s, what)

    # --- what Ray and Serve do --------------------------------------------------------------------------

    def _ray_finds_out(self, node: Node) -> None:
        number = node.number

        def look() -> None:
            if node.number == number and not node.reached:
                node.known = False

        self._later(self.random.uniform(4.0, 10.0), look)

    def _restart_node(self, node: Node, number: int) -> None:
        """Ray starts anew on a machine; nothing of before stays."""
        if node.number == number and node.reached:
            self._end_all(node)
            node.number += 1
            node.known = True

    def _end_all(self, node: Node) -> None:
        for process in node.processes:
            process.end()
        node.processes.clear()

    def _place(self, plan: WrapperPlan) -> None:
        """Serve starts the replica of an application, on the node that it is pinned to, as soon as that is possible."""
        process = self.processes.get(plan.wrapper_id)
        running = process is not None and process.alive and process.plan is plan
        if self.apps.get(plan.wrapper_id) is not plan or running:
            return
        node = self.nodes[plan.machine_id]
        if not node.known or not node.reached or node.node_id != plan.node_id:
            if node.number <= _number_of(plan.node_id):
                self._later(5.0, partial(self._place, plan))
            return
        process = Process(self, plan, node, f"process-{next(self._numbers)}")
        node.processes.append(process)
        self.processes[plan.wrapper_id] = process
        self._later(self.random.uniform(1.0, 20.0), partial(setattr, process, "ready", True))

    def _left(self, wrapper_id: str) -> None:
        self.leaving.discard(wrapper_id)
        process = self.processes.get(wrapper_id)
        if process is not None and process.alive and process.node.reached and wrapper_id not in self.apps:
            process.end()
            process.node.processes.remove(process)


def _settle(answer: asyncio.Future[Any], outcome: object) -> None:
    if answer.done():
        return
    if isinstance(outcome, BaseException):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def _number_of(node_id: str) -> int:
    return int(node_id.rpartition("-")[2])
