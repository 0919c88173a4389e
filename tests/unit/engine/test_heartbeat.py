"""When an engine counts as hung, beat by beat: the clock is moved by hand, a beat is two seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import psutil
import pytest

from deployments.engine.heartbeat import BEAT_S, Heartbeat, Work

STALL_S = 60.0
STALL_BEATS = int(STALL_S / BEAT_S)


class NoMoreBeats(Exception):
    """The story is over, and nothing was found."""


class Process:
    """A process of an engine."""

    pid = 77

    def __init__(self, engine: Engine) -> None:
        self.status = lambda: engine.state


class Engine:
    """An engine that answers, or does not; ``tokens`` by prompt."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.answers.set()
        self.error: Exception | None = None
        self.calls = 0
        self.tokens: dict[str, int] = {}
        self.steps = 0
        self.state = psutil.STATUS_SLEEPING

    async def ask(self) -> None:
        if self.error is not None:
            raise self.error
        await self.answers.wait()

    def work(self) -> Work:
        return Work(self.calls, frozenset(self.tokens.items()), self.steps)

    def prompt(self, name: str = "p") -> None:
        self.calls += 1
        self.tokens[name] = 0

    def hang(self) -> None:
        self.answers.clear()

    async def lives(self, beats: int, *, stall_s: float = STALL_S, **story: Callable[[], object]) -> str | None:
        """Why it counts as hung after at most so many beats, or None. ``at_3=f`` calls f in the third."""
        beat = 0

        async def sleep(_seconds: float) -> None:
            nonlocal beat
            beat += 1
            if beat > beats:
                raise NoMoreBeats
            for _ in range(3):
                await asyncio.sleep(0)  # an answer comes
            story.get(f"at_{beat}", lambda: None)()
            story.get("each", lambda: None)()

        process = Process(self)
        try:
            return await Heartbeat(
                self.ask, self.work, [cast("psutil.Process", process)], stall_s=stall_s, sleep=sleep
            ).until_hung()
        except NoMoreBeats:
            return None


@pytest.fixture
async def engine() -> Engine:
    return Engine()


async def test_idle_engine_that_answers_lives(engine: Engine) -> None:
    """Nothing to do is no hang, however long."""
    assert await engine.lives(1000) is None


async def test_idle_engine_that_hangs_is_found_soon(engine: Engine) -> None:
    """An engine without work that does not answer is found after three beats, whatever a step may take."""
    assert await engine.lives(5, at_3=engine.hang) is None
    engine.answers.set()
    assert await engine.lives(6, at_3=engine.hang) == "it has not answered for 6 s"


async def test_prompt_that_comes_late_excuses_nothing(engine: Engine) -> None:
    """A prompt that came after the question is no reason for not answering it."""
    assert await engine.lives(6, at_3=engine.hang, at_5=engine.prompt) == "it has not answered for 6 s"


async def test_long_step_is_no_hang(engine: Engine) -> None:
    """While prompts are in flight an answer may take as long as a step may, and no longer."""
    engine.prompt()
    engine.steps = 4
    assert await engine.lives(STALL_BEATS + 1, at_2=engine.hang) is None
    engine.answers.set()
    assert await engine.lives(STALL_BEATS + 2, at_2=engine.hang) == "it has not answered for 60 s"


async def test_step_of_a_prompt_that_was_given_up(engine: Engine) -> None:
    """The step of a prompt that is given up meanwhile goes on, and may take its time all the same."""
    engine.prompt()
    assert await engine.lives(STALL_BEATS, at_2=engine.hang, at_3=engine.tokens.clear) is None


async def test_step_of_a_prompt_that_nobody_saw(engine: Engine) -> None:
    """So may that of a prompt which came and was given up between two beats."""

    def come_and_go() -> None:
        engine.calls += 1
        engine.hang()

    assert await engine.lives(STALL_BEATS + 1, at_2=come_and_go) is None
    engine.answers.set()
    assert await engine.lives(STALL_BEATS + 2, at_2=come_and_go) == "it has not answered for 60 s"


async def test_turning_without_tokens_is_a_hang(engine: Engine) -> None:
    """An engine that answers but has had no token for its prompts for too long counts as hung."""
    engine.prompt("p")
    engine.prompt("q")
    assert await engine.lives(STALL_BEATS - 1) is None
    assert await engine.lives(STALL_BEATS) == "none of its 2 prompts has got a token for 60 s"


async def test_any_token_is_a_sign_of_life(engine: Engine) -> None:
    """Prompts may wait behind others for as long as those get on."""
    engine.prompt("p")
    engine.prompt("waits")

    def token() -> None:
        engine.tokens["p"] += 1

    assert await engine.lives(10 * STALL_BEATS, each=token) is None


async def test_long_prompt_is_read_in_steps(engine: Engine) -> None:
    """A prompt that takes four steps to read may be without a token for four times as long."""
    engine.prompt()
    engine.steps = 4
    assert await engine.lives(4 * STALL_BEATS - 1) is None
    assert await engine.lives(4 * STALL_BEATS) is not None


async def test_stopped_process_is_found_soon(engine: Engine) -> None:
    """A process that was stopped is found after two beats, work or not; one that goes on in time is not."""
    engine.prompt()

    def stop() -> None:
        engine.state = psutil.STATUS_STOPPED

    def go_on() -> None:
        engine.state = psutil.STATUS_RUNNING

    assert await engine.lives(20, at_3=stop, at_4=go_on) is None
    assert await engine.lives(4, at_3=stop) == "process 77 was stopped (SIGSTOP)"


async def test_engine_that_cannot_be_asked(engine: Engine) -> None:
    """An engine that refuses the question has failed."""
    engine.error = ConnectionError("closed")
    assert await engine.lives(1) == "it can't be asked any more (ConnectionError: closed)"


async def test_engine_whose_call_vllm_cancels(engine: Engine) -> None:
    """A call that is cancelled inside vLLM does not end the watch as if its owner had."""

    async def cancelled() -> None:
        raise asyncio.CancelledError

    engine.ask = cancelled  # type: ignore[method-assign]
    assert await engine.lives(1) == "it can't be asked any more (vLLM cancelled the call)"


async def test_short_limits_are_looked_at_more_often(engine: Engine) -> None:
    """Where a step may take less than the usual time between two looks, it is looked twice in that time."""
    engine.prompt()
    engine.steps = 4
    assert await engine.lives(3, stall_s=1.0, at_1=engine.hang) == "it has not answered for 1 s"
