"""Whether an engine comes to rest after a lease."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import structlog

from deployments.engine.rest import (
    EAGER_LOOKS,
    LOOKS,
    POLL_S,
    REST_LIMIT_S,
    EngineRest,
    works,
    works_here,
)
from registry.errors import EngineNotReady


class Scene:
    """An LLM, whose ``looks`` say whether it works, the last one for good; time passes in pauses alone."""

    def __init__(self, *looks: bool) -> None:
        self.looks = list(looks)
        self.looked = 0
        self.busy_here = False
        self.now_s = 0.0
        self.prompts = asyncio.Event()
        self.prompts.set()
        self.llm: Any = self.another()
        self.rest = EngineRest(
            self.prompts.wait, self.give_up, clock=lambda: self.now_s, pause=self.pause, is_working=self.is_working,
            is_working_here=lambda: self.busy_here,
        )  # fmt: skip

    def another(self) -> Any:
        return SimpleNamespace(served_model_name="tiny", processes=(), died=asyncio.Event(), death_reason=None)

    def is_working(self, _processes: object) -> bool:
        self.looked += 1
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    async def pause(self, pause_s: float) -> None:
        self.now_s += pause_s
        await asyncio.sleep(0)

    def give_up(self, llm: Any, reason: str) -> None:
        llm.death_reason = reason
        llm.died.set()

    async def first_lease(self) -> None:
        """The LLM is handed over for the first time, at rest."""
        later, self.looks = self.looks, [False]
        await self.rest.reached(self.llm)
        self.looks, self.looked, self.now_s = later, 0, 0.0


async def test_an_engine_at_rest_is_handed_over_in_milliseconds() -> None:
    """Three looks, 1 ms apart; none at all where the background has had them since the lease's end."""
    scene = Scene(False)
    await scene.first_lease()
    scene.rest.begin(scene.llm)
    await scene.rest.reached(scene.llm)
    assert scene.looked == LOOKS
    assert scene.now_s == pytest.approx(0.002)
    await scene.rest.reached(scene.llm)
    assert scene.looked == LOOKS


async def test_one_look_at_rest_is_not_enough() -> None:
    """A thread that computes may wait for memory in the moment of a look."""
    scene = Scene(True, False, False, True, False)
    await scene.first_lease()
    scene.rest.begin(scene.llm)
    await scene.rest.reached(scene.llm)
    assert scene.looked == 4 + LOOKS
    assert not scene.llm.died.is_set()


async def test_a_thread_that_woke_up_for_a_moment_costs_a_millisecond() -> None:
    """It is not work, and the next lease may be waiting."""
    scene = Scene(True, False, True, False)
    await scene.first_lease()
    scene.rest.begin(scene.llm)
    await scene.rest.reached(scene.llm)
    assert scene.now_s == pytest.approx(0.005)


async def test_a_busy_engine_is_checked_rarely() -> None:
    """The checks themselves cost time of its processors."""
    scene = Scene(True)
    await scene.first_lease()
    scene.rest.begin(scene.llm)
    await scene.llm.died.wait()
    assert scene.looked == pytest.approx(EAGER_LOOKS + REST_LIMIT_S / POLL_S, abs=2)


async def test_an_engine_that_goes_on_working_is_ended() -> None:
    """After 5 s, whether or not the next lease waits for it; that one is told why."""
    scene = Scene(True)
    await scene.first_lease()
    scene.rest.begin(scene.llm)
    await scene.llm.died.wait()
    assert scene.now_s == pytest.approx(REST_LIMIT_S, abs=0.1)
    with pytest.raises(EngineNotReady, match="still worked 5 s after the end of a lease"):
        await scene.rest.reached(scene.llm)


async def test_an_engine_whose_check_fails_is_ended() -> None:
    """Whether it is idle is not known then, so it is not handed over; the reason says so."""
    scene = Scene(False)
    await scene.first_lease()

    def fails(_processes: object) -> bool:
        raise PermissionError("/proc/77/task")

    scene.rest._is_working = fails
    scene.rest.begin(scene.llm)
    with pytest.raises(EngineNotReady, match="the check whether it is idle failed: PermissionError: /proc/77/task"):
        await scene.rest.reached(scene.llm)


async def test_prompts_that_may_finish_are_no_unrest() -> None:
    """The limit counts from the last prompt's end."""
    scene = Scene(False)
    await scene.first_lease()
    scene.prompts.clear()
    scene.rest.begin(scene.llm)
    waiting = asyncio.create_task(scene.rest.reached(scene.llm))
    await asyncio.wait({waiting}, timeout=0)
    assert scene.looked == 0
    scene.prompts.set()
    await waiting


async def test_an_engine_that_was_never_at_rest_is_left_alone() -> None:
    """Its threads may be made so: to end it at each hand-over would help nobody. That is said once per look."""
    scene = Scene(True)
    with structlog.testing.capture_logs() as logs:
        await scene.rest.reached(scene.llm)
        scene.rest.begin(scene.llm)
        await scene.rest.reached(scene.llm)
    assert not scene.llm.died.is_set()
    assert [entry["event"] for entry in logs] == ["an engine did not come to rest"] * 2
    scene.llm = scene.another()
    await scene.first_lease()
    scene.rest.begin(scene.llm)
    with pytest.raises(EngineNotReady):  # of another one it can be told
        await scene.rest.reached(scene.llm)


async def test_an_llm_that_has_died_is_not_handed_over() -> None:
    """Whatever it died of; without an LLM there is nothing to wait for."""
    scene = Scene(False)
    scene.give_up(scene.llm, "killed")
    with pytest.raises(EngineNotReady, match="killed"):
        await scene.rest.reached(scene.llm)
    await scene.rest.reached(None)
    scene.rest.begin(None)


async def test_a_process_that_goes_on_working_is_replaced() -> None:
    """A template or tokenizer works in the wrapper's process. No LLM runs in that process any more, whichever it is."""
    scene = Scene(False)
    await scene.first_lease()
    scene.busy_here = True
    scene.rest.begin(scene.llm)
    await scene.llm.died.wait()
    assert scene.now_s == pytest.approx(REST_LIMIT_S, abs=0.1)
    for llm in (scene.llm, scene.another(), None):
        with pytest.raises(EngineNotReady, match="the wrapper's process still worked 5 s after the end of a lease"):
            await scene.rest.reached(llm)
    scene.busy_here = False  # other leases may have had its figures meanwhile
    with pytest.raises(EngineNotReady, match="so it is replaced"):
        scene.rest.require_process()


async def test_a_process_whose_llm_has_died_is_checked_after_the_lease() -> None:
    """Its threads go on without the engine, and would disturb the next LLM."""
    scene = Scene(False)
    await scene.first_lease()
    scene.busy_here = True
    scene.rest.begin(None)
    with pytest.raises(EngineNotReady, match="so it is replaced"):
        await scene.rest.reached(scene.another())


async def test_a_process_that_prepares_an_llm_is_left_alone() -> None:
    """Before the first lease of an LLM, and where it was never seen idle; both are waited for, and logged."""
    scene = Scene(False)
    scene.busy_here = True
    with structlog.testing.capture_logs() as logs:
        await scene.rest.reached(scene.llm)
        scene.rest.begin(scene.llm)
        await scene.rest.reached(scene.llm)
        scene.busy_here = False
        scene.rest.begin(scene.llm)
        await scene.rest.reached(scene.llm)
        scene.busy_here = True
        await scene.rest.reached(scene.another())
    assert [(entry["event"], entry["in_this_process"]) for entry in logs] == [
        ("an engine did not come to rest", True)
    ] * 3
    scene.rest.require_process()


def test_threads_of_this_process_are_seen() -> None:
    """All but the first one and the one that looks; those that wait are idle."""
    over = threading.Event()
    thread = threading.Thread(target=lambda: over.wait() or None)
    thread.start()
    try:
        while works_here():  # others of this process come to rest
            over.wait(0.01)
    finally:
        over.set()
        thread.join()
    over.clear()

    def compute() -> None:
        while not over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        while not works_here():
            pass
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("code", "busy"),
    [
        ("print(flush=True); threading.Thread(target=sum, args=(iter(int, 1),)).start()", True),
        ("print(flush=True); sum(iter(int, 1))", False),
        ("threading.Thread(target=time.sleep, args=(99,), daemon=True).start(); print(flush=True); input()", False),
    ],
    ids=["a thread", "the first thread", "nothing"],
)
def test_threads_that_compute_are_seen(code: str, busy: bool) -> None:
    """All but the first one of a process; a process that has ended does nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import threading, time; {code}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        seen = psutil.Process(process.pid)
        in_a_row = 0
        while in_a_row < 20:  # once it has started
            in_a_row = in_a_row + 1 if works([seen]) is busy else 0
    finally:
        process.kill()
        process.communicate()
    assert not works([seen])


def test_states_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    """A thread's name may hold parentheses and spaces; one that is gone is passed over."""
    for thread, text in (("7", "7 (x) R 1"), ("8", "8 (a) R b) S 1"), ("9", None)):
        (tmp_path / "7" / "task" / thread).mkdir(parents=True)
        if text is not None:
            (tmp_path / "7" / "task" / thread / "stat").write_text(text)
    process: Any = SimpleNamespace(pid=7)
    assert not works([process], tmp_path)
    (tmp_path / "7" / "task" / "8" / "stat").write_text("8 (a) S b) R 1")
    assert works([process], tmp_path)
