"""Who sleeps, who gives way, and what becomes of an LLM that does not do as it should."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine import sleep_mode
from deployments.engine.sleep_mode import RESIDUE_BYTES, SleepMode, who_gives_way
from deployments.machine import process_tree
from deployments.machine.memory import MainMemory

GIB = 2**30


class Engine:
    """Sleeps and wakes; ``obey`` cleared holds both back, ``error`` is raised in their place."""

    def __init__(self) -> None:
        self.level = 0
        self.obey = asyncio.Event()
        self.obey.set()
        self.called = asyncio.Event()
        self.error: Exception | None = None
        self.awakes = True

    async def sleep(self, level: int) -> None:
        await self._wait()
        self.level = level

    async def wake_up(self) -> bool:
        await self._wait()
        self.level = 0
        return self.awakes

    async def _wait(self) -> None:
        self.called.set()
        if self.error is not None:
            raise self.error
        await self.obey.wait()


class LLM:
    """One whose weights take so many GiB."""

    def __init__(self, name: str, gib: float | None = 10.0) -> None:
        self.engine: Any = Engine()
        self.processes: frozenset[psutil.Process] = frozenset()
        self.served_model_name = name
        self.weights_bytes = None if gib is None else int(gib * GIB)


class GPUs:
    """Memory that is back at once, unless ``held`` says otherwise; ``lacks`` are the answers to ``lack``."""

    def __init__(self) -> None:
        self.known = True
        self.held: Mapping[str, int] = {}
        self.lacks: list[bool] = []
        self.kept: list[int] = []

    async def excess(self, timeout_s: float, kept_bytes: int = 0) -> Mapping[str, int]:
        self.kept.append(kept_bytes)
        return self.held

    def lack(self, share: float, kept_bytes: int = 0) -> bool:
        self.kept.append(kept_bytes)
        return self.lacks.pop(0)


class Night:
    """A sleep mode that may use 1000 GiB, ``free_gib`` of which are free; ``ended`` are the LLMs that were ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, budget_gib: float) -> None:
        self.gpus = GPUs()
        self.ended: list[str] = []
        self.free_gib = 900.0
        self.mode: SleepMode[LLM] = SleepMode(int(budget_gib * GIB), self.gpus, self._end)
        monkeypatch.setattr(sleep_mode, "main_memory", lambda: MainMemory(1000 * GIB, int(self.free_gib * GIB)))

    async def _end(self, llm: LLM) -> None:
        self.ended.append(llm.served_model_name)

    @property
    def asleep(self) -> list[str]:
        return [llm.served_model_name for llm in self.mode.asleep]

    async def sleeps(self, *llms: LLM) -> None:
        for llm in llms:
            assert await self.mode.lay_down(llm) is None


Make = Callable[..., Night]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    return lambda budget_gib=25.0: Night(monkeypatch, budget_gib)


async def test_sleeps_and_wakes(make: Make) -> None:
    """An LLM that fits sleeps with its weights in host memory, and is the same one when it wakes."""
    night, llm = make(), LLM("a")
    await night.sleeps(llm)
    assert (night.asleep, llm.engine.level) == (["a"], 1)
    assert await night.mode.wake(llm)
    assert (night.asleep, llm.engine.level, night.ended) == ([], 0, [])


async def test_oldest_gives_way(make: Make) -> None:
    """Where the budget is used up the one that has slept longest is ended, and no other."""
    night = make(budget_gib=25)
    await night.sleeps(LLM("a"), LLM("b"), LLM("c"))
    assert (night.asleep, night.ended) == (["b", "c"], ["a"])


async def test_the_one_wanted_next_does_not_give_way(make: Make) -> None:
    """The LLM that is about to wake is not ended for the one that leaves; then that one does not sleep."""
    night = make(budget_gib=15)
    await night.sleeps(LLM("a"))
    assert "10.0 GiB" in str(await night.mode.lay_down(LLM("b"), spare="a"))
    assert (night.asleep, night.ended) == (["a"], [])


@pytest.mark.parametrize(
    ("gib", "budget_gib", "free_gib", "reason"),
    [
        (30, 25, 900, "host memory"),
        (10, 25, 109, "host memory"),
        (10, 0, 900, "no LLM may"),
        (None, 25, 900, "unknown"),
    ],
    ids=["budget", "free memory", "off", "unknown"],
)
async def test_may_not_sleep(make: Make, gib: float | None, budget_gib: float, free_gib: float, reason: str) -> None:
    """Beyond the budget, into the reserve, or by a size that is not known: it does not sleep, and says so."""
    night, llm = make(budget_gib), LLM("a", gib)
    night.free_gib = free_gib
    assert reason in str(await night.mode.lay_down(llm))
    assert (night.asleep, llm.engine.called.is_set()) == ([], False)


async def test_gpus_that_tell_nothing(make: Make) -> None:
    """Where it can't be seen whether a GPU has its memory back no LLM sleeps."""
    night = make()
    night.gpus.known = False
    assert "unknown" in str(await night.mode.lay_down(LLM("a")))


async def test_gpu_memory_must_be_back(make: Make) -> None:
    """An LLM that sleeps and keeps more of a GPU than its residue has to be ended."""
    night = make()
    await night.sleeps(LLM("a"))
    night.gpus.held = {"GPU-1": 3 * GIB}
    assert await night.mode.lay_down(LLM("b")) == "GPU-1 still holds 3.0 GiB too much"
    assert night.asleep == ["a"]
    assert night.gpus.kept == [RESIDUE_BYTES, 2 * RESIDUE_BYTES]


async def test_fails_to_sleep(make: Make) -> None:
    """An engine that fails when it is put to sleep does not sleep; the reason is its own."""
    night, llm = make(), LLM("a")
    llm.engine.error = RuntimeError("CUDA error")
    assert "CUDA error" in str(await night.mode.lay_down(llm))
    assert night.asleep == []


async def test_never_falls_asleep(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that hangs when it is put to sleep is given up."""
    monkeypatch.setattr(sleep_mode, "SLEEP_TIMEOUT_S", 0)
    night, llm = make(), LLM("a")
    llm.engine.obey.clear()
    assert "TimeoutError" in str(await night.mode.lay_down(llm))
    assert night.asleep == []


@pytest.mark.parametrize("how", ["fails", "hangs", "stays asleep"])
async def test_does_not_wake(make: Make, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """An LLM that does not wake is ended, so that it can be started anew."""
    night, llm = make(), LLM("a")
    await night.sleeps(llm)
    if how == "hangs":
        monkeypatch.setattr(sleep_mode, "SLEEP_TIMEOUT_S", 0)
        llm.engine.obey.clear()
    elif how == "fails":
        llm.engine.error = RuntimeError("out of memory")
    else:
        llm.engine.awakes = False
    assert not await night.mode.wake(llm)
    assert (night.asleep, night.ended) == ([], ["a"])


@pytest.mark.parametrize("waking", [False, True])
async def test_cancelled_half_way(make: Make, waking: bool) -> None:
    """An LLM that is neither awake nor asleep when a newer command comes is ended."""
    night, llm = make(), LLM("a")
    if waking:
        await night.sleeps(llm)
    llm.engine.obey.clear()
    llm.engine.called.clear()
    work = asyncio.create_task(night.mode.wake(llm) if waking else night.mode.lay_down(llm))
    await llm.engine.called.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert (night.asleep, night.ended) == ([], ["a"])


async def test_gpu_needed(make: Make) -> None:
    """Sleeping LLMs give way, oldest first, until the engine that is started finds its share of the GPUs free."""
    night = make(budget_gib=100)
    await night.sleeps(LLM("a"), LLM("b"), LLM("c"))
    night.gpus.lacks = [True, True, False]
    await night.mode.make_room(0.92)
    assert (night.asleep, night.ended) == (["c"], ["a", "b"])


async def test_gpu_needed_by_one_that_wakes(make: Make) -> None:
    """The one that wakes stays, and what it keeps of a GPU counts as free: it is its own."""
    night, a = make(budget_gib=100), LLM("a")
    await night.sleeps(a, LLM("b"))
    night.gpus.lacks, night.gpus.kept = [True, True], []
    await night.mode.make_room(0.92, waking=a)
    assert (night.asleep, night.ended) == (["a"], ["b"])
    assert night.gpus.kept[0] == RESIDUE_BYTES


async def test_memory_runs_short(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the machine's memory runs short while LLMs sleep the oldest that lives is killed; else none is."""
    killed: list[frozenset[psutil.Process]] = []
    monkeypatch.setattr(process_tree, "kill", killed.append)
    night, a, b = make(), LLM("a"), LLM("b")
    a.processes, b.processes = frozenset({psutil.Process()}), frozenset({psutil.Process(os.getppid())})
    night.mode.relieve()
    await night.sleeps(a, b)
    night.mode.relieve()
    assert killed == []
    night.free_gib = 99
    night.mode.relieve()
    assert killed == [a.processes]
    monkeypatch.setattr(process_tree, "alive", lambda processes: set(processes) - a.processes)  # not yet buried
    night.mode.relieve()
    assert killed == [a.processes, b.processes]
    monkeypatch.setattr(process_tree, "alive", lambda _: set())
    night.mode.relieve()
    assert len(killed) == 2


async def test_memory_is_minded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's free memory is looked at again and again, for as long as an LLM sleeps."""
    monkeypatch.setattr(sleep_mode, "MEMORY_CHECK_S", 0)
    looked, night, llm = asyncio.Event(), make(), LLM("a")
    llm.processes = frozenset({psutil.Process()})
    await night.sleeps(llm)
    monkeypatch.setattr(process_tree, "kill", lambda _: looked.set())
    night.free_gib = 99
    await looked.wait()
    await night.mode.wake(llm)
    assert night.mode._memory_watch is not None
    await night.mode._memory_watch


async def test_no_llm_sleeps_unwatched(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the watch of the memory fails, all sleeping LLMs are killed: one that is wanted starts from the beginning."""
    killed: list[frozenset[psutil.Process]] = []
    monkeypatch.setattr(process_tree, "kill", killed.append)
    night, a, b = make(), LLM("a"), LLM("b")
    a.processes = frozenset({psutil.Process()})
    await night.sleeps(a, b)

    def fails() -> MainMemory:
        raise OSError("no /proc/meminfo")

    monkeypatch.setattr(sleep_mode, "main_memory", fails)
    assert night.mode._memory_watch is not None
    await asyncio.wait({night.mode._memory_watch})
    await asyncio.sleep(0)
    assert killed == [a.processes, b.processes]


async def test_dead_sleeper_is_forgotten(make: Make) -> None:
    """One that dies in its sleep is ended with all that is left of it; one that has woken is none of our business."""
    night, a, b = make(), LLM("a"), LLM("b")
    await night.sleeps(a, b)
    await night.mode.wake(b)
    await night.mode.forget(a)
    await night.mode.forget(b)
    assert (night.asleep, night.ended) == ([], ["a"])


async def test_close(make: Make) -> None:
    """When everything is stopped nothing sleeps on."""
    night = make()
    await night.mode.close()
    await night.sleeps(LLM("a"), LLM("b"))
    await night.mode.close()
    assert (night.asleep, night.ended, night.mode.kept_bytes) == ([], ["a", "b"], 0)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=5),
    st.integers(0, 9),
    st.integers(0, 20),
    st.integers(-5, 20),
)
def test_who_gives_way(sleepers: list[tuple[int, bool]], need: int, budget: int, free: int) -> None:
    """Whoever gives way is enough, is allowed to, and is the oldest; nobody does in vain, or without need."""
    sizes, may_go = [size for size, _ in sleepers], [may for _, may in sleepers]

    def enough(gone: list[int]) -> bool:
        back = sum(sizes[index] for index in gone)
        return sum(sizes) - back + need <= budget and need <= free + back

    candidates = [index for index, may in enumerate(may_go) if may]
    gone = who_gives_way(sizes, may_go, need, budget=budget, free=free)
    if gone is None:
        assert not enough(candidates)
    else:
        assert list(gone) == candidates[: len(gone)]
        assert enough(list(gone))
        assert not gone or not enough(candidates[: len(gone) - 1])
