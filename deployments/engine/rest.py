"""Checks that an engine becomes idle after a lease; one that does not is ended before the next lease.

A grammar (JSON schema, regular expression) is compiled in a thread of the engine. vLLM does not stop
the compilation when the client disconnects. It would then use the next lease's time and energy, and
delay the next lease's structured output.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
import structlog

from registry.background import reason_of, spawn
from registry.errors import EngineNotReady

# D86: an engine that a lease leaves at work is ended
REST_LIMIT_S: Final = 5.0
"""How long an engine may go on working after a lease, seconds."""

LOOKS, LOOK_S, POLL_S = 3, 0.001, 0.05
"""An engine is idle if three checks in a row, 1 ms apart, find no work; a busy one is checked again after 50 ms."""

log = structlog.get_logger("deployments.engine.rest")


class LLM(Protocol):
    """A running LLM."""

    served_model_name: str
    processes: Any
    died: asyncio.Event
    death_reason: str | None


def works(processes: Iterable[psutil.Process], proc_root: Path = Path("/proc")) -> bool:
    """Whether any thread of these processes, except the first of each, is running or runnable.

    The first threads handle the prompts. They are skipped, because vLLM itself reports prompts in
    flight, and because these threads poll for a short time after a prompt. Takes 10 µs per thread.

    Source: proc_pid_stat(5), state R.
    """
    for process in processes:
        with suppress(FileNotFoundError, ProcessLookupError):  # the process has ended meanwhile
            for thread in os.listdir(f"{proc_root}/{process.pid}/task"):  # noqa: PTH208 - Path costs more than the read
                if thread != str(process.pid) and _state(proc_root, process.pid, thread) == "R":
                    return True
    return False


def _state(proc_root: Path, pid: int, thread: str) -> str | None:
    try:
        fd = os.open(f"{proc_root}/{pid}/task/{thread}/stat", os.O_RDONLY)  # Path would double the cost
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        text = os.read(fd, 512)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    return text[text.rindex(b")") + 2 :][:1].decode("ascii")


class EngineRest:
    """Checks after each lease that its LLM becomes idle. For one event loop."""

    def __init__(
        self,
        prompts_over: Callable[[], Awaitable[object]],
        give_up: Callable[[Any, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
        is_working: Callable[[Any], bool] = works,
    ) -> None:
        """Do nothing yet.

        Args:
            prompts_over: Returns when the lease's prompts have ended.
            give_up: Ends the engine of an LLM, with a reason.
            clock: Monotonic, seconds.
            pause: Waits for a number of seconds.
            is_working: Whether any of an LLM's processes computes.
        """
        self._prompts_over = prompts_over
        self._give_up = give_up
        self._clock = clock
        self._pause = pause
        self._is_working = is_working
        self._llm: LLM | None = None
        self._look: asyncio.Task[None] | None = None
        self._tells = False

    def begin(self, llm: LLM | None) -> None:
        """Start a background check that this LLM becomes idle after its lease."""
        if self._llm is not llm:
            self._llm, self._tells = llm, False
        if self._look is not None:
            self._look.cancel()
        self._look = None if llm is None else self._spawn_watch(llm)

    def _spawn_watch(self, llm: LLM) -> asyncio.Task[None]:
        def failed(error: BaseException) -> None:  # without the check, the engine can't be trusted to be idle
            self._give_up(llm, f"the check whether it is idle failed: {reason_of(error)}")

        return spawn("check that an engine is idle", self._watch(llm), on_failure=failed)

    async def reached(self, llm: LLM | None) -> None:
        """Return when this LLM is idle: at once if it was found idle after its last lease, or is None.

        Blocks until the prompts in flight have ended, and then up to REST_LIMIT_S. An LLM that was
        never seen idle, not even before its first lease, has threads that always run. It is not
        ended; this method then returns after REST_LIMIT_S.

        Raises:
            EngineNotReady: It was still busy after REST_LIMIT_S and was ended, or it died.
        """
        if llm is None:
            return
        if self._llm is not llm or self._look is None:
            self.begin(llm)
        assert self._look is not None
        await asyncio.wait({self._look})
        if llm.died.is_set():
            raise EngineNotReady(llm.death_reason or "it died")

    async def _watch(self, llm: LLM) -> None:
        await self._prompts_over()
        give_up_s, quiet = self._clock() + REST_LIMIT_S, 0
        while True:
            quiet = 0 if self._is_working(llm.processes) else quiet + 1
            if quiet == LOOKS:
                self._tells = True
                return
            if not quiet and self._clock() >= give_up_s:
                self._never_at_rest(llm)
                return
            await self._pause(LOOK_S if quiet else POLL_S)

    def _never_at_rest(self, llm: LLM) -> None:
        if self._tells:
            reason = (
                f"it still worked {REST_LIMIT_S:g} s after the end of a lease, without any prompt "
                "(perhaps it compiles a grammar)"
            )
            self._give_up(llm, reason)
        else:
            log.warning("an engine did not come to rest", model=llm.served_model_name)
