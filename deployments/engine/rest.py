"""Checks that an engine and the wrapper's process become idle after a lease; else they are ended before the next one.

A grammar (JSON schema, regular expression) is compiled in a thread of the engine. vLLM does not stop
the compilation when the client disconnects. It would then use the next lease's time and energy, and
delay the next lease's structured output. Chat templates and tokenizers run in threads of the wrapper's
process, which nothing can stop either.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
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

LOOKS, LOOK_S = 3, 0.001
"""An engine is idle if three checks in a row, 1 ms apart, find no work."""
EAGER_LOOKS, POLL_S = 20, 0.05
"""After 20 checks, one that finds work is followed by a pause of 50 ms. Before, it may have seen a thread of Ray or
gRPC that woke up for a moment, which happens at most hand-overs."""

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


# D128: a wrapper's process that a lease leaves at work is ended, too
def works_here(proc_root: Path = Path("/proc")) -> bool:
    """Whether any thread of this process, except its first one and the calling one, is running or runnable."""
    pid = os.getpid()
    ours = {str(pid), str(threading.get_native_id())}
    threads = os.listdir(f"{proc_root}/{pid}/task")  # noqa: PTH208 - Path costs more than the read
    return any(thread not in ours and _state(proc_root, pid, thread) == "R" for thread in threads)


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
        is_working_here: Callable[[], bool] = works_here,
    ) -> None:
        """Do nothing yet.

        Args:
            prompts_over: Returns when the lease's prompts have ended.
            give_up: Ends the engine of an LLM, with a reason.
            clock: Monotonic, seconds.
            pause: Waits for a number of seconds.
            is_working: Whether any of an LLM's processes computes.
            is_working_here: Whether this process computes for prompts.
        """
        self._prompts_over = prompts_over
        self._give_up = give_up
        self._clock = clock
        self._pause = pause
        self._is_working = is_working
        self._is_working_here = is_working_here
        self.process_problem: str | None = None
        """Why this process must not serve any lease, and has to be replaced; None if it may."""
        self._llm: LLM | None = None
        self._look: asyncio.Task[None] | None = None
        self._tells = self._tells_here = False

    def begin(self, llm: LLM | None) -> None:
        """Start a background check that this LLM and this process become idle after a lease. None: no LLM runs."""
        self._begin(llm, after_lease=True)

    def _begin(self, llm: LLM | None, *, after_lease: bool) -> None:
        if self._llm is not llm:
            self._llm, self._tells = llm, False
        if self._look is not None:
            self._look.cancel()

        def failed(error: BaseException) -> None:  # without the check, nothing can be trusted to be idle
            self._end(llm, f"the check whether it is idle failed: {reason_of(error)}", here=llm is None)

        self._look = spawn("check that an engine is idle", self._watch(llm, after_lease), on_failure=failed)

    async def reached(self, llm: LLM | None) -> None:
        """Return when this LLM and this process are idle: at once if they were found idle after the last lease.

        Blocks until the prompts in flight have ended, and then up to REST_LIMIT_S. An LLM that was
        never seen idle, not even before its first lease, has threads that always run. It is not
        ended; this method then returns after REST_LIMIT_S. The same holds for this process.

        Raises:
            EngineNotReady: The LLM was still busy after REST_LIMIT_S and was ended, or it died; or this process was
                still busy REST_LIMIT_S after a lease.
        """
        await self._looked()
        if llm is not None and self._llm is not llm:
            self._begin(llm, after_lease=False)
            await self._looked()
        self.require_process()
        if llm is not None and llm.died.is_set():
            raise EngineNotReady(llm.death_reason or "it died")

    async def _looked(self) -> None:
        """Return when no check runs; a new check may replace the one that runs."""
        while self._look is not None and not self._look.done():
            await asyncio.wait({self._look})

    def give_up(self, llm: LLM, reason: str) -> None:
        """End an LLM that is not as it was before the last lease."""
        self._give_up(llm, reason)

    def require_process(self) -> None:
        """Raise EngineNotReady if this process must not serve any lease."""
        if self.process_problem is not None:
            raise EngineNotReady(self.process_problem)

    async def _watch(self, llm: LLM | None, after_lease: bool) -> None:
        await self._prompts_over()
        give_up_s, quiet = self._clock() + REST_LIMIT_S, 0
        for look in itertools.count(1):
            here = self._is_working_here()
            quiet = 0 if here or (llm is not None and self._is_working(llm.processes)) else quiet + 1
            if quiet == LOOKS:
                self._tells = self._tells_here = True
                return
            if not quiet and self._clock() >= give_up_s:
                self._never_at_rest(llm, here=here, after_lease=after_lease)
                return
            await self._pause(LOOK_S if quiet or look < EAGER_LOOKS else POLL_S)

    def _never_at_rest(self, llm: LLM | None, *, here: bool, after_lease: bool) -> None:
        """End what is busy, unless it was never seen idle. ``here``: it is this process."""
        model = "none" if llm is None else llm.served_model_name
        late = f"still worked {REST_LIMIT_S:g} s after the end of a lease, without any prompt"
        # A process that works for an LLM without any lease yet may be preparing it.
        if here and self._tells_here and after_lease:
            why = f"(perhaps a chat template or a tokenizer; LLM: {model}), so it is replaced"
            self._end(llm, f"the wrapper's process {late} {why}", here=True)
        elif not here and self._tells:
            self._end(llm, f"it {late} (perhaps it compiles a grammar)", here=False)
        else:
            log.warning("an engine did not come to rest", model=model, in_this_process=here)

    def _end(self, llm: LLM | None, reason: str, *, here: bool) -> None:
        if here:
            self.process_problem = reason
            log.error("the process of a wrapper has to be replaced", reason=reason)
        if llm is not None:
            self._give_up(llm, reason)
