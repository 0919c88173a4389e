"""Reads and controls machines and wrappers. No other file asks Ray for nodes, or Serve for applications."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
import structlog
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.machine.worker_environment import forwarded_environment
from deployments.models.sources import ModelSources
from deployments.serve import wrapper_app
from deployments.serve.cluster_calls import ClusterCalls
from deployments.serve.ray_errors import own_error
from deployments.wrapper.config import WrapperConfig
from registry.background import spawn_awaited
from registry.contract.messages import NODE_ID_DIGITS, WrapperPlan
from registry.core.records import Machine
from registry.errors import RegistryError, WrapperUnheard, WrapperUnreachable, in_one_line
from registry.settings import Settings

log = structlog.get_logger("deployments.serve.cluster")

APP_PREFIX = "wrapper-"
"""Prefix of the Serve applications that are wrappers."""

REMOVE_TIMEOUT_S = 60.0
"""Longest wait until deleted wrappers are gone, seconds."""

RECOVERING = "RECOVERING"
"""State of a replica that a restarted Serve controller knows from its record but has not reached yet."""

REMOVE_POLL_S = 0.2
"""Seconds between checks whether deleted wrappers are gone."""

SERVE_TIMEOUT_S = 2.0
"""Longest wait for Serve's controller to report on a wrapper that did not answer, seconds."""

SERVE_NAMESPACE = "serve"


class RayCluster(ClusterCalls):
    """``registry.contract.messages.Cluster`` on Ray and Serve. Used on the registry actor's event loop."""

    def __init__(
        self, settings: Settings, sources: ModelSources, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(settings, clock)
        self._sources = sources
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._asking: asyncio.Task[Any] | None = None

    async def _machines(self) -> tuple[Machine, ...]:
        nodes = await self._in_thread("cluster", ray.nodes)
        if not self._settings.wrappers.on_head:
            nodes = [node for node in nodes if not _is_head(node)]
        return machines_of(nodes)

    async def _applications(self) -> tuple[frozenset[str], frozenset[str]]:
        status = await self._in_thread("cluster", serve.status)
        wrappers = {
            name.removeprefix(APP_PREFIX): app.status
            for name, app in status.applications.items()
            if name.startswith(APP_PREFIX)
        }
        leaving = frozenset(name for name, app_status in wrappers.items() if app_status == "DELETING")
        return frozenset(wrappers) - leaving, leaving

    async def create(self, wrappers: Sequence[WrapperPlan]) -> None:
        """Deploy these wrappers together; return when Serve has accepted them."""
        targets = [
            serve.RunTarget(
                wrapper_app.deployment(
                    WrapperConfig(
                        wrapper_id=want.wrapper_id,
                        gpus=want.gpus,
                        settings=self._settings.wrappers,
                        energy=self._settings.energy.of_wrapper(
                            machine=want.machine_id,
                            gpu_type=want.gpu_type,
                            zone=want.zone,
                            gpus=want.gpus,
                            on_machine=want.on_machine,
                        ),
                        sources=self._sources,
                        cache_dir=self._settings.cache_dir,
                        models=self._settings.models,
                        finish_prompts=self._settings.leases.at_expiry == "finish",
                        on_machine=want.on_machine,
                        # clients may use the name of the head, on which this actor runs
                        hosts=(*self._settings.served_hosts, socket.gethostname().lower()),
                    ),
                    node_id=want.node_id,
                    env=forwarded_environment(),
                ),
                name=APP_PREFIX + want.wrapper_id,
                route_prefix=f"/wrappers/{want.wrapper_id}",
            )
            for want in wrappers
        ]
        log.info("deploying wrappers", wrappers=[want.wrapper_id for want in wrappers])
        self._forget(want.wrapper_id for want in wrappers)
        await self._in_thread(
            "cluster",
            lambda: serve.run_many(
                targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
            ),
        )

    async def remove(self, wrapper_ids: Sequence[str]) -> None:
        """Delete these wrappers and wait until they are gone. Uses one thread for all of them.

        Raises:
            TimeoutError: They are not gone after REMOVE_TIMEOUT_S.
            WrapperUnreachable: Serve does not answer.
        """
        self._forget(wrapper_ids)
        names = {APP_PREFIX + wrapper_id for wrapper_id in wrapper_ids}

        def delete() -> None:
            for name in sorted(names):
                serve.delete(name, _blocking=False)

        async with asyncio.timeout(REMOVE_TIMEOUT_S):
            await self._in_thread("cluster", delete)
            while names & (await self._in_thread("cluster", serve.status)).applications.keys():  # noqa: ASYNC110 - no event
                await asyncio.sleep(REMOVE_POLL_S)

    async def restart(self, wrapper_id: str) -> None:
        """Kill the wrapper's replica; Serve starts a new one."""
        self._forget([wrapper_id])
        await self._in_thread(wrapper_id, lambda: _kill_replicas(APP_PREFIX + wrapper_id))

    def _forget(self, wrapper_ids: Iterable[str]) -> None:
        """Discard the cached handles of these wrappers and the list of applications."""
        self._apps = None
        for wrapper_id in wrapper_ids:
            self._handles.pop(wrapper_id, None)

    async def _ask(self, wrapper_id: str, method: str, *args: object, timeout_s: float) -> Any:
        """Return the result of a wrapper's method.

        Raises:
            RegistryError: Raised by the wrapper itself.
            WrapperUnheard: It did not answer in time, perhaps because Serve's controller is down.
            WrapperUnreachable: Everything else.
        """
        try:
            async with asyncio.timeout(timeout_s):
                handle = self._handles.get(wrapper_id)
                if handle is None:
                    handle = await asyncio.to_thread(serve.get_app_handle, APP_PREFIX + wrapper_id)
                    self._handles[wrapper_id] = handle
                return await getattr(handle, method).remote(*args)
        except TimeoutError as error:
            self._apps = None  # the wrapper may be gone
            problem = f"no answer to {method} within {timeout_s:g} s"
            if await self._serve_is_mended(wrapper_id):
                raise WrapperUnheard(wrapper_id, f"{problem}; Serve's controller is being restarted") from error
            raise WrapperUnreachable(wrapper_id, problem) from error
        except (RayError, RayServeException, RegistryError) as error:
            if (own := own_error(error)) is not None:
                raise own from None
            self._apps = None
            raise WrapperUnreachable(wrapper_id, f"{method}: {in_one_line(error)}") from error

    async def _serve_is_mended(self, wrapper_id: str) -> bool:
        """Whether Serve's controller is down, or restarted and has not reached this wrapper's replica again."""
        # One call at a time, because each blocks a thread while no controller runs.
        if self._asking is None or self._asking.done():
            self._asking = spawn_awaited("ask Serve for its status", self._in_thread("cluster", serve.status))
        await asyncio.wait({self._asking}, timeout=SERVE_TIMEOUT_S)
        if not self._asking.done() or self._asking.exception() is not None:
            return True
        application = self._asking.result().applications.get(APP_PREFIX + wrapper_id)
        deployments = [] if application is None else application.deployments.values()
        return any(RECOVERING in deployment.replica_states for deployment in deployments)

    async def _in_thread(self, what: str, call: Any) -> Any:
        """Run a blocking Ray call in a thread and return its result.

        Raises:
            WrapperUnreachable: Ray or Serve does not answer; names ``what``.
        """
        try:
            return await asyncio.to_thread(call)
        except (RayError, RayServeException, TimeoutError, ConnectionError) as error:
            raise WrapperUnreachable(what, in_one_line(error)) from error


def machines_of(nodes: Sequence[dict[str, Any]]) -> tuple[Machine, ...]:
    """Return Ray's living nodes as machines, the head first, then by node id.

    A machine's id is its node's name (its address unless ``ray start --node-name`` sets another). If
    several nodes share a name, as on one host, the first one keeps it. To the ids of the others, the
    beginning of their node id is added; ``with_known_ids`` keeps these ids stable. Zone and region
    are the node's labels (``ray start --labels``). The amount of memory comes from the wrappers,
    because Ray's own ``memory`` is only what was free when the raylet started.

    Source: Ray's documentation, "Use labels to control scheduling", default node labels.
    """
    machines: dict[str, Machine] = {}
    for node in sorted((n for n in nodes if n["Alive"]), key=lambda n: (not _is_head(n), str(n["NodeID"]))):
        resources, node_id = node["Resources"], str(node["NodeID"])
        name = str(node.get("NodeName") or node["NodeManagerAddress"])
        if name in machines:
            name = f"{name}-{node_id[:NODE_ID_DIGITS]}"
        labels = node.get("Labels") or {}
        gpu_types = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
        machines[name] = Machine(
            machine_id=name,
            node_id=node_id,
            address=str(node["NodeManagerAddress"]),
            gpus=int(resources.get("GPU", 0)),
            gpu_type=labels.get("ray.io/accelerator-type") or (gpu_types[0] if gpu_types else None),
            zone=labels.get("ray.io/availability-zone") or None,
            region=labels.get("ray.io/availability-region") or None,
        )
    return tuple(machines.values())


def _is_head(node: dict[str, Any]) -> bool:
    return HEAD_NODE_RESOURCE_NAME in node["Resources"]


def _kill_replicas(app_name: str) -> None:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == SERVE_NAMESPACE and actor["name"].startswith(f"SERVE_REPLICA::{app_name}#"):
            log.warning("a wrapper's replica is killed", actor=actor["name"])
            ray.kill(ray.get_actor(actor["name"], SERVE_NAMESPACE), no_restart=True)
