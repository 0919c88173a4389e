"""Calls the registry actor for the ingress.

Calls have a time limit, are retried while the actor restarts, and are limited in number if they
only read.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray
import stamina
from ray.exceptions import RayActorError, RayError, RayTaskError

from deployments.machine.disk import disk_problem
from deployments.serve.actor import ACTOR_NAME, NAMESPACE
from deployments.serve.ray_errors import own_error
from registry.errors import InternalError, RegistryUnavailable

RETRY_FOR_S = 10.0
"""How long a call is retried while the registry actor does not answer, seconds."""

CALL_TIMEOUT_S = 30.0
"""Longest wait for one answer of the actor, in addition to the wait that was requested, seconds.

While AT_ONCE calls of a reading method are in progress, a further one also waits up to this long.
"""

AT_ONCE = {
    "keys": 4,
    "audit": 1,
    "state": 64,
    "events": 8,
    "measurement": 4,
    "measured": 4,
    "windows": 4,
    "machines": 4,
    "llms": 4,
}
"""Most concurrent calls of each method that only reads.

The actor handles all calls in order, so control and health calls wait behind at most this many. (Ray's concurrency
groups don't help: each is a thread with its own event loop.)
"""


class ActorCalls:
    """Calls the registry actor and survives its restarts."""

    def __init__(self, state_dir: pathlib.Path) -> None:
        self._state_dir = state_dir
        self._actor: Any = None
        self._lanes = {method: asyncio.Semaphore(most) for method, most in AT_ONCE.items()}

    async def call(self, method: str, *args: object, wait_s: float = 0.0) -> Any:
        """Return the result of a method of the actor.

        Raises:
            RegistryError: Raised by the registry itself.
            InternalError: The method failed with another exception.
            RegistryUnavailable: No actor could be reached for RETRY_FOR_S seconds. Or it did not
                answer one call within CALL_TIMEOUT_S + ``wait_s``, or a read had to wait for its turn
                (AT_ONCE) for CALL_TIMEOUT_S; such a call is not retried.
        """
        try:
            async for attempt in stamina.retry_context(
                on=(RayActorError, _NoActor), attempts=None, timeout=RETRY_FOR_S, wait_initial=0.05, wait_max=0.5
            ):
                with attempt:
                    async with self._turn(method):
                        return await self._once(method, args, wait_s)
        except (RayError, _NoActor) as error:
            if (own := own_error(error)) is not None:
                raise own from None
            if isinstance(error, RayTaskError):
                cause = getattr(error, "cause", None)
                raise InternalError(f"{method}: {type(cause or error).__name__}: {cause or error}") from error
            raise self._unavailable(type(error).__name__) from error
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _turn(self, method: str) -> AsyncIterator[None]:
        lane = self._lanes.get(method)
        if lane is None:
            yield
            return
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await lane.acquire()
        except TimeoutError as error:
            raise self._unavailable(f"too many calls of {method} were in progress for {CALL_TIMEOUT_S:g} s") from error
        try:
            yield
        finally:
            lane.release()

    async def _once(self, method: str, args: Sequence[object], wait_s: float) -> Any:
        if self._actor is None:
            try:
                self._actor = ray.get_actor(ACTOR_NAME, NAMESPACE)
            except ValueError as error:
                raise _NoActor from error
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + wait_s):
                return await getattr(self._actor, method).remote(*args)
        except TimeoutError as error:
            raise self._unavailable(f"no answer within {CALL_TIMEOUT_S + wait_s:g} s") from error
        except RayActorError:
            self._actor = None
            raise

    def _unavailable(self, reason: str) -> RegistryUnavailable:
        """Return the error. If the disk is full, the text says so: that ends the registry and prevents its restart."""
        return RegistryUnavailable("; ".join(filter(None, (reason, disk_problem(self._state_dir)))))


class _NoActor(Exception):
    """No registry actor has the name (yet)."""
