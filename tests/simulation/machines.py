"""Simulated machines, Ray and Serve for the registry's service, in virtual time. Machines can be slow, cut off or dead.

A ``Process`` runs the real commands of a wrapper with the real lease gate. Its engine and its prompts only take time.
Messages may arrive late, twice or in another order. If a machine is cut off, its messages arrive when the connection
is back, long after the timeout of their sender.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from typing import Any

from deployments.serve.cluster_calls import ClusterCalls
from deployments.wrapper.commands import WrapperCommands
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.ports import LLM, OnPhase
from registry.contract.messages import Belief, LeaseGrant, StartedFor, WrapperPlan, WrapperReport
from registry.core.records import LLMSpec, Machine
from registry.errors import EngineNotReady, EngineStartFailed, WrapperUnheard, WrapperUnreachable
from registry.settings import Settings
from tests.support.wrapper_ports import KeptTasks, PlainHandOvers, StartedLLM

LONGEST_DELAY_S = 60.0
"""Maximum delay of a message to or from a machine that is not cut off, seconds."""


@dataclass(frozen=True, slots=True)
class Weather:
    """Probabilities of faults, and how long the start of an engine takes. In ``CALM`` nothing fails."""

    late: float = 0.0
    twice: float = 0.0
    start_fails: float = 0.0
    call_fails: float = 0.0
    held_is_lost: float = 0.5
    engine_start_s: tuple[float, float] = (2.0, 30.0)


CALM = Weather()


@dataclass(eq=False)
class Node:
    """A machine. ``known``: Ray reports it as alive. ``held``: messages that wait for its connection."""

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
        """The machine's current id in Ray."""
        return f"{self.machine_id}-node-{self.number}"

    @property
    def reached(self) -> bool:
        """Whether messages to and from the machine arrive."""
        return self.powered and not self.cut


class SimulatedLLMs:
    """The engine of a wrapper: starting and stopping take time, and a start can fail."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.running: StartedLLM | None = None
        self.revision: str | None = None
        self._cluster = cluster

    async def replace(
        self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None, on_phase: OnPhase
    ) -> StartedLLM:
        """As LLMSwap.replace."""
        random, weather = self._cluster.random, self._cluster.weather
        await self.stop()
        await asyncio.sleep(random.uniform(*weather.engine_start_s))
        broken = spec.model in self._cluster.broken
        if broken or random.random() < weather.start_fails:
            raise EngineStartFailed(spec.model, "it can't" if broken else "out of memory", permanent=broken)
        self.revision = revision or self._cluster.commit
        self.running = StartedLLM(spec)
        return self.running

    async def stop(self) -> None:
        """As LLMSwap.stop."""
        if self.running is not None:
            self.running = None
            await asyncio.sleep(self._cluster.random.uniform(0.1, 5.0))
        self.revision = None

    async def clear_away(self) -> None:
        """As LLMSwap.clear_away."""
        await self.stop()

    def give_up(self, llm: StartedLLM, reason: str) -> None:
        """As LLMSwap.give_up."""
        llm.die(reason)


class SimulatedHandOvers(PlainHandOvers):
    """Hand-overs that take time, like real ones, so that commands or deaths can happen during a hand-over."""

    def __init__(self, random: Random) -> None:
        self._random = random

    async def refusal(self, llm: LLM | None, grant: LeaseGrant) -> str | None:
        """Wait until the LLM is idle and has answered the probe."""
        if llm is not None:
            await asyncio.sleep(self._random.uniform(0.01, 2.0))
            if llm.died.is_set():
                raise EngineNotReady(llm.death_reason or "it died")
        return None

    async def settle(self, llm: LLM | None) -> tuple[str, ...]:
        """Wait until the machine is at rest."""
        await asyncio.sleep(self._random.uniform(1.0, 20.0))
        return ()

    async def forget_prompts(self, llm: LLM) -> tuple[str, ...]:
        """Wait as long as an engine takes to empty its caches."""
        await asyncio.sleep(self._random.uniform(0.001, 0.1))
        return ()

    async def provenance(
        self, llm: LLM, spec: LLMSpec, revision: str | None, grant: LeaseGrant
    ) -> Mapping[str, object] | None:
        """Wait as long as reading the GPUs takes."""
        await asyncio.sleep(self._random.uniform(0.001, 0.1))
        return None


class SimulatedPrompts:
    """The prompts in flight, each with its lease and the future that cuts it."""

    def __init__(self) -> None:
        self._in_flight: dict[asyncio.Future[None], tuple[LeaseGrant, asyncio.Future[None]]] = {}

    @contextmanager
    def one(self, grant: LeaseGrant) -> Iterator[asyncio.Future[None]]:
        """Return a context in which a prompt is in flight. Its future is done when the prompt is cut."""
        loop = asyncio.get_running_loop()
        cut, ended = loop.create_future(), loop.create_future()
        self._in_flight[cut] = grant, ended
        try:
            yield cut
        finally:
            del self._in_flight[cut]
            ended.set_result(None)

    def break_off(self) -> None:
        """Break the connections of all clients."""
        for cut in self._in_flight:
            if not cut.done():
                cut.set_result(None)

    async def cut(self, request_id: str) -> None:
        """As PromptGate.cut."""
        await self._cut({cut: each for cut, each in self._in_flight.items() if each[0].request_id == request_id})

    async def cut_all(self) -> None:
        """As PromptGate.cut_all."""
        await self._cut(dict(self._in_flight))

    async def over(self) -> None:
        """As PromptGate.over."""
        await _all_done([ended for _, ended in self._in_flight.values()])

    async def _cut(self, prompts: dict[asyncio.Future[None], tuple[LeaseGrant, asyncio.Future[None]]]) -> None:
        for cut in prompts:
            if not cut.done():
                cut.set_result(None)
        await _all_done([ended for _, ended in prompts.values()])


class Process:
    """The process of a wrapper: real commands with the real lease gate. Each process has its own monotonic clock."""

    def __init__(self, cluster: SimulatedCluster, plan: WrapperPlan, node: Node, name: str) -> None:
        self.plan = plan
        self.node = node
        self.name = name
        self.alive = True
        self.ready = False
        self.held: list[Callable[[], None]] | None = None
        """Calls that wait because the process hangs; None if it does not hang."""
        self.tasks = KeptTasks()
        loop, offset_s = asyncio.get_running_loop(), cluster.random.uniform(0, 1e5)
        self.gate = LeaseGate(lambda: loop.time() + offset_s, fence_s=cluster.settings.wrappers.fence_s, process=name)
        self._cluster = cluster
        self._finish = cluster.settings.leases.at_expiry == "finish"
        self._llms = SimulatedLLMs(cluster)
        self._prompts = SimulatedPrompts()
        self.commands: WrapperCommands[StartedLLM] = WrapperCommands(
            plan.wrapper_id,
            gate=self.gate,
            prompts=self._prompts,
            llms=self._llms,
            hand_overs=SimulatedHandOvers(cluster.random),
            finish_prompts=self._finish,
            tasks=self.tasks,
        )

    @property
    def running(self) -> LLMSpec | None:
        """The LLM that answers prompts."""
        running, _ = self.commands.engine_state()
        return None if running is None else running.spec

    async def report(self, belief: Belief) -> WrapperReport:
        """As LLMWrapper.report."""
        await self.commands.hear(belief)
        return self.commands.report()

    async def touch(self, request_id: str) -> bool:
        """As LLMWrapper.touch."""
        return self.commands.touch(request_id)

    def call(self, method: str, *args: Any) -> asyncio.Task[Any]:
        """Start a call of a method by its name, as Serve does."""
        called = getattr(self if method in {"report", "touch"} else self.commands, method)
        return self.tasks.spawn_awaited("a call", called(*args))

    async def prompt(self, token: str, takes_s: float) -> None:
        """Handle a prompt, as at the wrapper's address. Raises the error that the client gets."""
        grant = self.gate.check(token)
        self.gate.require_heard()
        with self._prompts.one(grant) as cut:
            self.gate.enter()
            try:
                running, state = self.commands.engine_state()
                if running is None:
                    raise EngineNotReady(state)
                self._cluster.on_prompt(self, grant)
                left_s = takes_s if self._finish else min(takes_s, self.gate.left_s(grant))
                await asyncio.wait({cut}, timeout=left_s)
            finally:
                self.gate.leave(grant)
        if not self.alive:
            raise WrapperUnreachable(self.plan.wrapper_id, "the connection broke")
        if cut.done():
            self.gate.check(token)
            raise EngineNotReady("the prompt was cut")

    # --- what can happen to it --------------------------------------------------------------------------

    def kill_engine(self) -> None:
        """Let the LLM die."""
        if self._llms.running is not None:
            self._llms.running.death_reason = "its processes are gone"
            self._llms.running.died.set()

    def end(self) -> None:
        """End the process and everything in it."""
        self.alive = False
        self._llms.running = None
        self.tasks.cancel()
        self._prompts.break_off()
        self.resume()

    def hang(self) -> None:
        """Let the process hang: calls get no answer from now on."""
        self.held = [] if self.held is None else self.held

    def resume(self) -> None:
        """End the hang, and handle the calls that have arrived in the meantime."""
        held, self.held = self.held, None
        for call in held or ():
            call()


class SimulatedCluster(ClusterCalls):
    """``registry.contract.messages.Cluster`` with simulated machines. It remains when the registry process is replaced.

    ``on_prompt`` is called when a wrapper accepts a prompt, ``on_call`` when a call was sent to a wrapper. ``broken``:
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
        super().__init__(settings, clock=lambda: asyncio.get_running_loop().time())
        self.settings = settings
        self.random = random
        self.on_prompt = on_prompt
        self.on_call = on_call
        self.weather = CALM
        self.broken: set[str] = set()
        self.commit = "commit-1"
        self.nodes: dict[str, Node] = {}
        self.processes: dict[str, Process] = {}
        """The process to which Serve sends the calls for a wrapper, by wrapper id."""
        self.apps: dict[str, WrapperPlan] = {}
        self.leaving: set[str] = set()
        self.controller_is_away = False
        self._numbers = count(1)

    # --- what can happen --------------------------------------------------------------------------------

    def power_off(self, node: Node) -> None:
        """Switch a machine off. Ray notices it some seconds later."""
        node.powered = False
        self._end_all(node)
        node.held.clear()
        self._ray_finds_out(node)

    def cut(self, node: Node) -> None:
        """Cut a machine's connection in both directions. Its processes continue."""
        node.cut = True
        self._ray_finds_out(node)

    def heal(self, node: Node) -> None:
        """Restore a machine's connection. If Ray had reported it as dead, its node soon restarts, empty."""
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
        """Switch a machine on again."""
        if not node.powered:
            node.powered = True
            self._restart_node(node, node.number)

    def kill(self, process: Process) -> None:
        """Kill a wrapper's process; Serve starts a new one some seconds later."""
        if process.alive:
            process.end()
            process.node.processes.remove(process)
            self._later(self.random.uniform(1.0, 10.0), partial(self._place, process.plan))

    def close(self) -> None:
        """End every process."""
        for node in self.nodes.values():
            self._end_all(node)

    # --- the protocol -----------------------------------------------------------------------------------

    async def _machines(self) -> tuple[Machine, ...]:
        await self._asked()
        return tuple(
            Machine(node.machine_id, node.node_id, "10.0.0.1", gpus=node.gpus, gpu_type=node.gpu_type)
            for node in self.nodes.values()
            if node.known
        )

    async def _applications(self) -> tuple[frozenset[str], frozenset[str]]:
        await self._asked()
        return frozenset(self.apps), frozenset(self.leaving)

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        self._apps = None
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
        self._apps = None
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
        self._apps = None

    async def restart(self, wrapper_id: str) -> None:
        self._apps = None
        await self._asked()
        process = self.processes.get(wrapper_id)
        if process is not None and process.node.reached:
            self.kill(process)

    # --- messages ---------------------------------------------------------------------------------------

    async def _asked(self) -> None:
        """Wait as long as a call of Ray or Serve takes. Raises WrapperUnreachable if it fails."""
        await asyncio.sleep(self.random.uniform(0.001, 0.2))
        if self.controller_is_away or self.random.random() < self.weather.call_fails:
            raise WrapperUnreachable("cluster", "it does not answer")

    async def _ask(self, wrapper_id: str, method: str, *args: object, timeout_s: float) -> Any:
        process = self.processes.get(wrapper_id)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if process is None:
            raise WrapperUnreachable(wrapper_id, "there is no such replica")
        self._later(self._delay_s(), partial(self._arrive, process, method, args, answer))
        if self.random.random() < self.weather.twice:
            self._later(self._delay_s(), partial(self._arrive, process, method, args, answer))
        timer = self._later(timeout_s, partial(self._give_up, wrapper_id, method, answer))
        try:
            self.on_call()
            return await answer
        except WrapperUnreachable:
            self._apps = None
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
        else:
            task = process.call(method, *args)
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
        """Restart Ray's node on a machine: all its processes end, and it gets a new node id."""
        if node.number == number and node.reached:
            self._end_all(node)
            node.number += 1
            node.known = True

    def _end_all(self, node: Node) -> None:
        for process in node.processes:
            process.end()
        node.processes.clear()

    def _place(self, plan: WrapperPlan) -> None:
        """Start the replica of an application on its node, as Serve does, as soon as that is possible."""
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


async def _all_done(futures: list[asyncio.Future[None]]) -> None:
    if futures:
        await asyncio.wait(futures)
