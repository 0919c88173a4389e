"""Calls wrappers with time limits, and observes the cluster with a cache. Used over Ray and in a simulation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from deployments.engine.rest import REST_LIMIT_S
from deployments.wrapper.probe import PROBE_MAX_S
from registry.contract.messages import Belief, HandOver, LeaseGrant, Observation, StartedFor, WrapperReport
from registry.core.records import LLMSpec, Machine
from registry.settings import Settings
from registry.wire.words import Grade

COMMAND_TIMEOUT_S = 10.0
"""Longest wait for a command that completes at once (unbind, touch), seconds."""

# D22: a registry at rest uses little CPU time
APPS_BELIEVED_S = 30.0
"""How long Serve's list of applications is reused while every wrapper answers, seconds.

Serve unpickles the configuration of every deployment at each call: once a second, that costs 3 % of a core here and as
much in its controller, on a machine whose energy is measured.
"""


class ClusterCalls(ABC):
    """The part of ``registry.contract.messages.Cluster`` that calls wrappers and observes the cluster.

    A subclass implements the access to machines, applications and wrappers. ``clock`` returns
    monotonic seconds. Every call of a wrapper also raises what ``_ask`` raises.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._apps: tuple[frozenset[str], frozenset[str]] | None = None
        self._apps_until_s = 0.0

    @abstractmethod
    async def _machines(self) -> tuple[Machine, ...]:
        """Return the machines that are alive. Raises WrapperUnreachable if Ray does not answer."""

    @abstractmethod
    async def _applications(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the ids of the deployed wrappers, and of those being removed. Raises as ``_machines``."""

    @abstractmethod
    async def _ask(self, wrapper_id: str, method: str, *args: object, timeout_s: float) -> Any:
        """Return the result of a wrapper's method.

        Raises:
            RegistryError: Raised by the wrapper itself.
            WrapperUnheard: It did not answer in time, perhaps because Serve's controller is down.
            WrapperUnreachable: Everything else.
        """

    async def observe(self) -> Observation:
        """Return the nodes that are alive and Serve's wrappers. Raises WrapperUnreachable if Ray does not answer."""
        machines = await self._machines()
        if self._apps is None or self._clock() >= self._apps_until_s:
            self._apps = await self._applications()
            self._apps_until_s = self._clock() + (0.0 if self._apps[1] else APPS_BELIEVED_S)
        return Observation(machines, *self._apps)

    async def report(self, wrapper_id: str, belief: Belief) -> WrapperReport:
        """Return the wrapper's report."""
        limit_s = self._settings.watch.report_timeout_s
        report: WrapperReport = await self._ask(wrapper_id, "report", belief, timeout_s=limit_s)
        return report

    async def deploy(
        self,
        wrapper_id: str,
        epoch: int,
        spec: LLMSpec,
        grant: LeaseGrant | None,
        started_for: StartedFor | None = None,
    ) -> None:
        """Run an LLM. Raises EngineStartFailed, StaleEpoch."""
        wrappers = self._settings.wrappers
        limit_s = self._last_prompt_s + wrappers.deploy_timeout_s + wrappers.stop_timeout_s + COMMAND_TIMEOUT_S
        await self._ask(wrapper_id, "deploy", epoch, spec, grant, started_for, timeout_s=limit_s)

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        """Stop the LLM of a wrapper. Raises StaleEpoch."""
        limit_s = 2 * self._settings.wrappers.stop_timeout_s + COMMAND_TIMEOUT_S
        await self._ask(wrapper_id, "stop", epoch, timeout_s=limit_s)

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> HandOver:
        """Admit a lease's token. Raises StaleEpoch, EngineNotReady."""
        settle_s = self._settings.energy.settle_max_s if grant.grade == Grade.MEASUREMENT else 0.0
        limit_s = self._last_prompt_s + REST_LIMIT_S + PROBE_MAX_S + settle_s + COMMAND_TIMEOUT_S
        over: HandOver = await self._ask(wrapper_id, "bind", epoch, grant, timeout_s=limit_s)
        return over

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        """Refuse a lease's token from now on. Raises StaleEpoch."""
        await self._ask(wrapper_id, "unbind", epoch, request_id, how, timeout_s=COMMAND_TIMEOUT_S)

    async def touch(self, wrapper_id: str, request_id: str) -> bool:
        """Keep a lease alive; return False if it is not bound there."""
        bound: bool = await self._ask(wrapper_id, "touch", request_id, timeout_s=COMMAND_TIMEOUT_S)
        return bound

    @property
    def _last_prompt_s(self) -> float:
        """Longest time that prompts of an expired lease can delay a command, seconds."""
        return self._settings.wrappers.prompt_max_s if self._settings.leases.at_expiry == "finish" else 0.0
