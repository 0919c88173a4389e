"""The machines and wrappers as Ray and Serve know them: the only file that asks either about nodes and apps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments import wrapper as wrapper_module
from deployments.models import ModelSources
from deployments.wrapper import WrapperConfig
from registry.errors import RegistryError, WrapperUnreachable
from registry.reconcile import LeaseGrant, Observation, WrapperPlan, WrapperReport
from registry.settings import Settings, forwarded_environment
from registry.state import LLMSpec, Machine

log = structlog.get_logger("deployments.cluster")

APP_PREFIX = "wrapper-"
"""Serve applications of this prefix are wrappers."""

COMMAND_TIMEOUT_S = 10.0
"""Longest wait for a command that is done in an instant (bind, unbind, touch)."""

REMOVE_TIMEOUT_S = 60.0
"""Longest wait until deleted wrappers are gone."""

APPS_BELIEVED_S = 30.0
"""How long Serve's list of applications is believed while every wrapper answers, seconds.

Serve unpickles the configuration of every deployment each time it is asked: once a second that is 3 % of a core here
and as much in its controller, on a machine whose energy is measured.
"""

SERVE_NAMESPACE = "serve"


class RayCluster:
    """``registry.reconcile.Cluster`` over Ray and Serve. Used on the registry actor's event loop."""

    def __init__(self, settings: Settings, sources: ModelSources) -> None:
        self._settings = settings
        self._sources = sources
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._apps: frozenset[str] | None = None
        self._apps_until_s = 0.0

    async def observe(self) -> Observation:
        """Nodes that are alive, and the wrappers that Serve has. Raises WrapperUnreachable when Ray does not answer."""
        nodes = await self._in_thread("cluster", ray.nodes)
        if self._apps is None or time.monotonic() >= self._apps_until_s:
            self._apps_until_s = time.monotonic() + APPS_BELIEVED_S
            status = await self._in_thread("cluster", serve.status)
            names = (name for name in status.applications if name.startswith(APP_PREFIX))
            self._apps = frozenset(name.removeprefix(APP_PREFIX) for name in names)
        return Observation(machines_of(nodes), self._apps)

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        """Deploy these wrappers, all at once; returns when Serve has accepted them."""
        targets = [
            serve.RunTarget(
                wrapper_module.deployment(
                    WrapperConfig(
                        wrapper_id=want.wrapper_id,
                        gpus=want.gpus,
                        settings=self._settings.wrappers,
                        energy=self._settings.energy,
                        sources=self._sources,
                        cache_dir=self._settings.cache_dir,
                        models=self._settings.models,
                        finish_prompts=self._settings.leases.at_expiry == "finish",
                    ),
                    node_id=want.node_id,
                    env=forwarded_environment(),
                ),
                name=APP_PREFIX + want.wrapper_id,
                route_prefix=f"/wrappers/{want.wrapper_id}",
            )
            for want in wrappers
        ]
        log.info("wrappers are deployed", wrappers=[want.wrapper_id for want in wrappers])
        self._forget(want.wrapper_id for want in wrappers)
        await self._in_thread(
            "cluster",
            lambda: serve.run_many(
                targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
            ),
        )

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        """Delete these wrappers and wait until they are gone."""
        self._forget(wrapper_ids)
        async with asyncio.timeout(REMOVE_TIMEOUT_S):
            await asyncio.gather(
                *(self._in_thread(w, lambda name=APP_PREFIX + w: serve.delete(name)) for w in wrapper_ids)
            )

    async def report(self, wrapper_id: str) -> WrapperReport:
        """The wrapper's own account."""
        limit_s = self._settings.watch.report_timeout_s
        report: WrapperReport = await self._ask(wrapper_id, "report", timeout_s=limit_s)
        return report

    async def deploy(self, wrapper_id: str, epoch: int, spec: LLMSpec, grant: LeaseGrant | None) -> None:
        """Run an LLM. Raises EngineStartFailed, StaleEpoch."""
        wrappers = self._settings.wrappers
        limit_s = self._last_prompt_s + wrappers.deploy_timeout_s + wrappers.stop_timeout_s + COMMAND_TIMEOUT_S
        await self._ask(wrapper_id, "deploy", epoch, spec, grant, timeout_s=limit_s)

    async def stop(self, wrapper_id: str, epoch: int) -> None:
        """Empty a wrapper. Raises StaleEpoch."""
        limit_s = 2 * self._settings.wrappers.stop_timeout_s + COMMAND_TIMEOUT_S
        await self._ask(wrapper_id, "stop", epoch, timeout_s=limit_s)

    async def bind(self, wrapper_id: str, epoch: int, grant: LeaseGrant) -> str | None:
        """Let a lease's token in; the commit of the LLM behind it. Raises StaleEpoch."""
        limit_s = self._last_prompt_s + COMMAND_TIMEOUT_S
        revision: str | None = await self._ask(wrapper_id, "bind", epoch, grant, timeout_s=limit_s)
        return revision

    async def unbind(self, wrapper_id: str, epoch: int, request_id: str, how: str) -> None:
        """Keep a lease's token out. Raises StaleEpoch."""
        await self._ask(wrapper_id, "unbind", epoch, request_id, how)

    async def touch(self, wrapper_id: str, request_id: str) -> None:
        """A keep-alive."""
        await self._ask(wrapper_id, "touch", request_id)

    async def restart(self, wrapper_id: str) -> None:
        """Kill the wrapper's replica; Serve starts another."""
        self._forget([wrapper_id])
        await self._in_thread(wrapper_id, lambda: _kill_replicas(APP_PREFIX + wrapper_id))

    def _forget(self, wrapper_ids: Iterable[str]) -> None:
        """What was known of these wrappers, and of which there are, is out of date."""
        self._apps = None
        for wrapper_id in wrapper_ids:
            self._handles.pop(wrapper_id, None)

    @property
    def _last_prompt_s(self) -> float:
        """How long a wrapper may have to wait for the prompts of a lease that has expired."""
        return self._settings.wrappers.prompt_max_s if self._settings.leases.at_expiry == "finish" else 0.0

    async def _ask(self, wrapper_id: str, method: str, *args: object, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
        """Call a wrapper. Raises its own RegistryError, or WrapperUnreachable for everything else."""
        try:
            async with asyncio.timeout(timeout_s):
                handle = self._handles.get(wrapper_id)
                if handle is None:
                    handle = await asyncio.to_thread(serve.get_app_handle, APP_PREFIX + wrapper_id)
                    self._handles[wrapper_id] = handle
                return await getattr(handle, method).remote(*args)
        except TimeoutError as error:
            self._apps = None  # it may be gone
            raise WrapperUnreachable(wrapper_id, f"no answer to {method} within {timeout_s:g} s") from error
        except RegistryError:
            raise
        except (RayError, RayServeException) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RegistryError):
                raise cause from None
            self._apps = None
            raise WrapperUnreachable(wrapper_id, f"{method}: {type(error).__name__}: {_first_line(error)}") from error

    async def _in_thread(self, what: str, call: Any) -> Any:
        """A blocking Ray call, off the event loop."""
        try:
            return await asyncio.to_thread(call)
        except (RayError, RayServeException, TimeoutError, ConnectionError) as error:
            raise WrapperUnreachable(what, f"{type(error).__name__}: {_first_line(error)}") from error


def machines_of(nodes: Sequence[dict[str, Any]]) -> tuple[Machine, ...]:
    """Ray's living nodes as machines, in the order of their ids.

    A machine's id is its node's name (its address unless ``ray start --node-name`` said otherwise); where several
    nodes share a name, as on one host, the later ones carry the first digits of their node id too. How much memory
    there is its wrappers tell: Ray's own ``memory`` is what was left of it when the raylet started.
    """
    machines: dict[str, Machine] = {}
    for node in sorted((n for n in nodes if n["Alive"]), key=lambda n: (not _is_head(n), str(n["NodeID"]))):
        resources, node_id = node["Resources"], str(node["NodeID"])
        name = str(node.get("NodeName") or node["NodeManagerAddress"])
        if name in machines:
            name = f"{name}-{node_id[:6]}"
        gpu_types = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
        machines[name] = Machine(
            machine_id=name,
            node_id=node_id,
            address=str(node["NodeManagerAddress"]),
            gpus=int(resources.get("GPU", 0)),
            gpu_type=gpu_types[0] if gpu_types else None,
        )
    return tuple(machines.values())


def _is_head(node: dict[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _kill_replicas(app_name: str) -> None:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == SERVE_NAMESPACE and actor["name"].startswith(f"SERVE_REPLICA::{app_name}#"):
            log.warning("a wrapper's replica is killed", actor=actor["name"])
            ray.kill(ray.get_actor(actor["name"], SERVE_NAMESPACE), no_restart=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
