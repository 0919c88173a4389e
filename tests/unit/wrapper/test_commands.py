"""The registry's commands to a wrapper, over ports that a test holds: no engine, no prompts, no clock that runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import pytest

from deployments.wrapper.commands import WrapperCommands
from deployments.wrapper.lease_gate import LeaseGate
from deployments.wrapper.ports import OnPhase
from registry.contract.messages import Belief, Download, HandOver, LeaseGrant, StartedFor
from registry.core.records import LLMSpec
from registry.errors import EngineStartFailed, StaleEpoch, WrapperUnreachable
from tests.support.fake_counters import ManualClock
from tests.support.wrapper_ports import NoPrompts, PlainHandOvers, StartedLLM

T = TypeVar("T")

A, B = LLMSpec("org/a", "text-generation"), LLMSpec("org/b", "text-generation")
FIRST = LeaseGrant("request-1", 1, "token-1", "{}", ends_in_s=60.0, idle_limit_s=60.0)
SECOND = LeaseGrant("request-2", 2, "token-2", "{}", ends_in_s=60.0, idle_limit_s=60.0, grade="measurement")


class HeldLLMs:
    """An engine that starts an LLM when ``go`` is set, or fails with ``problem``."""

    def __init__(self) -> None:
        self.running: StartedLLM | None = None
        self.revision: str | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.starting = asyncio.Event()
        self.problem: Exception | None = None
        self.leftover: str | None = None
        self.started_for: list[StartedFor | None] = []

    async def replace(
        self, spec: LLMSpec, revision: str | None, started_for: StartedFor | None, on_phase: OnPhase
    ) -> StartedLLM:
        self.started_for.append(started_for)
        on_phase("downloading", Download(1, 4))
        self.starting.set()
        await self.go.wait()
        if self.problem is not None:
            raise self.problem
        self.revision, self.running = revision or "head", StartedLLM(spec)
        return self.running

    async def stop(self) -> None:
        self.running = self.revision = None

    async def clear_away(self) -> None:
        await self.stop()
        if self.leftover is not None:
            raise WrapperUnreachable("a-0", self.leftover)

    def give_up(self, llm: StartedLLM, reason: str) -> None:
        llm.die(reason)


class Wrapper:
    """A wrapper's commands and what they reach."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.gate = LeaseGate(self.clock, fence_s=30.0, process="this")
        self.llms = HeldLLMs()
        self.commands: WrapperCommands[StartedLLM] = WrapperCommands(
            "a-0",
            gate=self.gate,
            prompts=NoPrompts(),
            llms=self.llms,
            hand_overs=PlainHandOvers(),
            finish_prompts=False,
        )

    async def swap(self, epoch: int, spec: LLMSpec) -> asyncio.Task[None]:
        """A deployment that has begun, and goes on until ``llms.go`` is set."""
        self.llms.go.clear()
        self.llms.starting.clear()
        deploy = asyncio.create_task(self.commands.deploy(epoch, spec, None))
        await self.llms.starting.wait()
        return deploy


@pytest.fixture
async def wrapper() -> Wrapper:
    """A wrapper that runs A."""
    wrapper = Wrapper()
    await wrapper.commands.deploy(1, A, None)
    return wrapper


async def test_an_llm_that_is_replaced_is_not_reported_as_running(wrapper: Wrapper) -> None:
    """From the command on, the old one answers nobody and the new one is only being started: neither runs."""
    assert wrapper.commands.report().running == A.fingerprint
    deploy = await wrapper.swap(2, B)
    report = wrapper.commands.report()
    assert (report.running, report.starting, report.starts) == (None, B.fingerprint, 1)
    assert (report.phase, report.download) == ("downloading", Download(1, 4))
    assert wrapper.commands.engine_state() == (None, "being started (downloading)")
    wrapper.llms.go.set()
    await deploy
    report = wrapper.commands.report()
    assert (report.running, report.starting, report.starts) == (B.fingerprint, None, 2)
    assert (report.phase, report.download) == (None, None)


async def test_a_start_is_joined_and_outlives_its_caller(wrapper: Wrapper) -> None:
    """The same LLM is not started again; who pays for it stays, and cancelling a caller does not end it."""
    first = await wrapper.swap(2, B)
    again = asyncio.create_task(wrapper.commands.deploy(3, B, None, StartedFor("r", 1)))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    wrapper.llms.go.set()
    await again
    assert wrapper.llms.started_for == [None, None]
    assert wrapper.commands.report().starts == 2


async def test_a_newer_command_ends_a_start(wrapper: Wrapper) -> None:
    """Its caller is refused as stale, and so is a command that comes late."""
    deploy = await wrapper.swap(2, B)
    await wrapper.commands.stop(3)
    with pytest.raises(StaleEpoch):
        await deploy
    assert (wrapper.commands.spec, wrapper.commands.report().epoch) == (None, 3)
    for late in (wrapper.commands.deploy(2, A, None), wrapper.commands.stop(2), wrapper.commands.bind(2, FIRST)):
        await refused(late)
    await refused(wrapper.commands.unbind(2, "request-1", "released"))


async def refused(command: Awaitable[T]) -> None:
    with pytest.raises(StaleEpoch):
        await command


async def test_a_failed_start_leaves_no_llm(wrapper: Wrapper) -> None:
    """The reason is raised, and the LLM before does not pass for the one that was wanted."""
    wrapper.llms.problem = EngineStartFailed("org/b", "out of memory")
    with pytest.raises(EngineStartFailed):
        await wrapper.commands.deploy(2, B, None)
    report = wrapper.commands.report()
    assert (report.running, report.starting, wrapper.commands.spec) == (None, None, None)


@pytest.mark.parametrize("leftover", [None, "GPU-1 holds 1024 MiB too much"])
async def test_a_death_is_reported_with_what_it_leaves(wrapper: Wrapper, leftover: str | None) -> None:
    """The reason stays until the next LLM is started, the flag with it."""
    wrapper.llms.leftover = leftover
    llm = wrapper.llms.running
    assert llm is not None
    llm.death_reason, llm.out_of_memory = "main memory ran out", True
    llm.died.set()
    assert wrapper.commands.report().running is None
    assert wrapper.commands._death_watch is not None
    await asyncio.wait({wrapper.commands._death_watch})
    report = wrapper.commands.report()
    assert report.died == "; ".join(filter(None, ["main memory ran out", leftover]))
    assert report.death_flags == ("engine_out_of_memory",)
    await wrapper.commands.deploy(2, A, None)
    assert (wrapper.commands.report().died, wrapper.commands.report().death_flags) == (None, ())


async def test_a_failed_death_watch_flags_nothing_of_an_earlier_death(
    wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An LLM ran out of memory; the next one is given up because its watch failed, which is no lack of memory."""
    first = wrapper.llms.running
    assert first is not None
    first.out_of_memory = True
    first.die("main memory ran out")
    assert wrapper.commands._death_watch is not None
    await asyncio.wait({wrapper.commands._death_watch})

    async def fails(*_: object) -> None:
        raise AttributeError("no died")

    monkeypatch.setattr(wrapper.commands, "_notice_death", fails)
    await wrapper.commands.deploy(2, B, None)
    await asyncio.wait({wrapper.commands._death_watch})
    await asyncio.sleep(0)  # its callback
    report = wrapper.commands.report()
    assert report.died == "its death watch failed: AttributeError: no died"
    assert report.death_flags == ()


async def test_a_measured_lease_is_reported_while_its_machine_settles(
    wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is bound for the registry and not for clients; a newer command ends the settling."""
    settles, rested = asyncio.Event(), asyncio.Event()

    async def settle(_llm: StartedLLM | None) -> tuple[str, ...]:
        settles.set()
        await rested.wait()
        return ("not_steady",)

    monkeypatch.setattr(wrapper.commands._hand_overs, "settle", settle)
    bind = asyncio.create_task(wrapper.commands.bind(2, SECOND))
    await settles.wait()
    report = wrapper.commands.report()
    assert (report.phase, report.bound, report.idle_for_s) == ("settling", "request-2", 0.0)
    assert wrapper.gate.grant is None
    await wrapper.commands.unbind(3, "request-2", "released")
    with pytest.raises(StaleEpoch):
        await bind
    rested.set()
    assert await wrapper.commands.bind(4, SECOND) == HandOver("head", ("not_steady",))
    assert await wrapper.commands.bind(5, SECOND) == HandOver("head", ("not_steady",))


async def test_a_lease_that_the_registry_does_not_know_is_withdrawn(wrapper: Wrapper) -> None:
    """Only if it knows the newest command: an older view is ignored, and a newer one announces a command."""
    await wrapper.commands.bind(2, FIRST)
    for epoch in (1, 3):
        await wrapper.commands.hear(Belief(epoch, None, wrapper.gate.moment))
        assert wrapper.gate.grant is not None
    await wrapper.commands.hear(Belief(2, None, wrapper.gate.moment))
    assert wrapper.gate.grant is None
    assert wrapper.commands.touch("request-1") is False
