"""The composition root: starts Ray, Serve, the registry actor and the ingress from the settings, and stops them."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import socket
import stat
import time
import warnings
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import ray
import stamina
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import ActorUnavailableError, RayError
from ray.serve.schema import ApplicationStatus

from deployments.machine.private_files import ANYONE_ELSE, require_unchanged_by_others, write_private
from deployments.models.args.mapping import map_llmconfig
from deployments.models.sources import ModelSources
from deployments.serve import ingress
from deployments.serve.actor import ACTOR_NAME, NAMESPACE, RegistryActor
from deployments.serve.cluster import RayCluster
from deployments.serve.energy_metrics import EnergyMetrics
from deployments.serve.http_app import IngressConfig
from deployments.serve.issuer_keys import require_files
from deployments.serve.logs import REGISTRY_LOG, configure_logging
from deployments.serve.proxy_guard import NotThroughProxy
from deployments.serve.ray_folder import RAY_FOLDER, keep_logs
from deployments.serve.steady_clock import SteadyClock
from registry.access_errors import KeyRefused
from registry.core.records import LLMSpec
from registry.errors import BadSettings, InvalidField, RegistryError, StartFailed, in_one_line
from registry.service.audit import at_start
from registry.service.keys import Keys, parse_key
from registry.service.lease_tokens import LeaseTokens
from registry.service.service import Service
from registry.settings import LOOPBACK_OF, OPERATOR_KEY, Settings, differing, url_host
from registry.store.database import parse_url
from registry.store.store import Store
from registry.wire.words import Role

INGRESS_APP = "registry"
"""Name of the ingress among Serve's applications."""

KEY_BYTES = 32
"""Length of the key from which a registry makes the tokens of its leases."""

READY_POLL_S = 0.2

READY_LIMIT_S = 60
"""Longest wait for the registry actor to load its database, seconds."""


class Running(NamedTuple):
    """The addresses of a running registry: its base URL and Ray's dashboard."""

    url: str
    dashboard: str


def model_sources(settings: Settings) -> ModelSources:
    """Return the allowed models, from the settings of the process that starts the registry."""
    return ModelSources(settings.models.huggingface, settings.models.local_roots, Path.cwd())


def home_llms(settings: Settings) -> dict[str, LLMSpec]:
    """Return the LLMs named in the configuration, by machine id or ``*``. Raises BadSettings that names the entry."""
    homes: dict[str, LLMSpec] = {}
    sources = model_sources(settings)
    for number, entry in enumerate(settings.deploy):
        field = f"deploy[{number}].llm"
        try:
            located = sources.locate(entry.llm.model, field=f"{field}.model")
            allowed = settings.models.allow_remote_code
            args = map_llmconfig(entry.llm.model_dump(), field=field, located=located, allow_remote_code=allowed)
        except InvalidField as error:
            raise BadSettings(error.field, error.problem) from error
        homes[entry.machine] = args.spec
    return homes


def build_service(
    settings: Settings, sources: ModelSources, key: bytes, on_fatal: Callable[[RegistryError], None]
) -> Service:
    """Return a service with the real database and cluster. ``key``: the secret from which lease tokens are made.

    Raises StoreUnavailable, BadSettings.
    """
    configure_logging(settings.state_dir / REGISTRY_LOG)
    service = Service(
        settings,
        Store.open(settings.store_url),
        RayCluster(settings, sources),
        now_s=SteadyClock(),
        tokens=LeaseTokens(key, secrets.token_urlsafe),
        homes=home_llms(settings),
        on_fatal=on_fatal,
        on_energy=EnergyMetrics().count,
    )
    if settings.access.keys:
        _keep_operator_key(service.keys, settings.state_dir / OPERATOR_KEY)
    return service


def _keep_operator_key(keys: Keys, file: Path) -> None:
    """Make sure that the file has a valid operator key. The operator's commands on this machine use it.

    A key that other users could read is revoked. Raises StoreUnavailable, BadSettings.
    """
    try:
        if _has_operator_key(keys, file):
            return
        key, text = keys.new(Role.OPERATOR, tenant=None, name=f"operator of {socket.gethostname()}")
        file.parent.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)  # may be missing with PostgreSQL
        require_unchanged_by_others(file.parent, "state_dir")
        write_private(file, text)
    except (OSError, ValueError) as error:
        raise BadSettings("state_dir", f"{file} can't be used: {in_one_line(error)}") from error
    made = at_start("/keys", HTTPStatus.CREATED)
    keys.add(key, made)  # last: if this fails, the key in the file is not valid, and the next start replaces it


def _has_operator_key(keys: Keys, file: Path) -> bool:
    """Whether the file has a valid operator key that only this user can read. Raises OSError, ValueError.

    A valid operator key that other users can read is revoked.
    """
    try:
        found = parse_key(file.read_text(encoding="utf-8"))
        key = None if found is None else keys.identify(*found)
    except (KeyRefused, FileNotFoundError):
        return False  # of another database, revoked, or not made yet
    if key is None or key.role is not Role.OPERATOR:
        return False
    if file.stat().st_mode & ANYONE_ELSE:
        keys.revoke(key.key_id, at_start("/keys/{key_id}", HTTPStatus.NO_CONTENT))
        return False
    return True


def require_engine() -> None:
    """Raise BadSettings if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise BadSettings("vllm", "is not installed; install greenprompt-llm-registry with the extra cpu or gpu")


def check(settings: Settings) -> None:
    """Check everything that can be checked without a cluster. Raises BadSettings."""
    require_engine()
    home_llms(settings)
    if settings.access.oidc is not None:
        require_files(settings.access.oidc)
    parse_url(settings.store_url)


def start(settings: Settings, ray_folder: Path | None, *, on_joined: Callable[[], None] = lambda: None) -> Running:
    """Start or join Ray, then start Serve, the registry and the ingress; return when the registry is ready.

    Args:
        settings: If ``ray.address`` is None, a local cluster is started in ``ray_folder``; when this
            function returns, LLMs can be requested. Otherwise that cluster is joined; then the
            registry answers, but machines may still be missing. A registry that already runs there
            with the same settings is kept.
        ray_folder: Folder for a local cluster's files, from ``local_ray_environment``; None otherwise.
        on_joined: Called when Ray runs; by then Ray has replaced the signal handlers.

    Raises:
        BadSettings: A setting can't work here, or a registry runs there with other settings.
        StartFailed: Ray or Serve does not start, no wrapper was ready in time, or the registry does not answer.
    """
    check(settings)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\..*")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    dashboard = join_ray(settings, ray_folder)
    on_joined()
    # A local cluster's own node has the address 127.0.0.1.
    address = own_address() if settings.ray.address is None else ray.util.get_node_ip_address()
    settings = told_to_clients(settings, address)
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": settings.http.host, "port": settings.http.port})
    except Exception as error:  # Serve has no exception class for this
        raise _start_failed("Serve", error, settings, ray_folder) from error
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _start_registry(settings)
    try:
        application = serve.status().applications.get(INGRESS_APP)
        if application is None or application.status is not ApplicationStatus.RUNNING:
            config = IngressConfig(
                model_sources(settings),
                settings.models.allow_remote_code,
                settings.state_dir,
                settings.served_hosts,
                settings.access,
                settings.wrappers.max_body_mib,
                settings.http.trusted_proxies if settings.http.haproxy else None,
                settings.rates,
            )
            serve.run_many([serve.RunTarget(ingress.deployment(config), name=INGRESS_APP, route_prefix="/")])
    except Exception as error:
        raise _start_failed("The ingress", error, settings, ray_folder) from error
    _wait_until_ready(settings, usable=settings.ray.address is None)
    return Running(settings.base_url, dashboard)


def told_to_clients(settings: Settings, address: str) -> Settings:
    """Return settings whose base URL clients can use: with ``address`` if Serve listens on all interfaces."""
    if settings.http.public_url is not None or settings.http.host not in LOOPBACK_OF:
        return settings
    http = settings.http.model_copy(update={"public_url": f"http://{url_host(address)}:{settings.http.port}"})
    return settings.model_copy(update={"http": http})


def own_address() -> str:
    """Return the address of this machine in its network; 127.0.0.1 without a network. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737): only the route is looked up
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def stop(settings: Settings) -> None:
    """Stop LLMs, wrappers and registry, close the database, leave the cluster.

    Every step has a time limit; a local cluster's processes end with this process in any case.

    Raises:
        StartFailed: The registry of a cluster that keeps running could not be shut down; it is left unchanged.
    """
    if not ray.is_initialized():
        return
    limit_s = 2 * settings.wrappers.stop_timeout_s + 90
    try:
        actor = _running_registry()
        if actor is not None:
            ray.get(actor.shutdown.remote(), timeout=limit_s)
            ray.kill(actor, no_restart=True)
    except RayError as error:
        problem = f"the registry could not be shut down cleanly: {_reason(error)}"
        if settings.ray.address is not None:
            raise StartFailed(f"{problem}; it still runs; try again") from error
        logging.getLogger(__name__).warning(problem)
    if settings.ray.address is None:
        serve.shutdown()
    else:
        serve.delete(INGRESS_APP)
    ray.shutdown()


def join_ray(settings: Settings, folder: Path | None) -> str:
    """Connect to the configured cluster, or start one in ``folder``; return the URL of its dashboard.

    Raises:
        BadSettings: There is no cluster at the configured address.
        StartFailed: Ray does not start.
    """
    if settings.ray.address is not None:
        try:
            context = ray.init(
                address=settings.ray.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False
            )
        except (ConnectionError, RayError) as error:
            raise BadSettings("ray.address", f"no cluster at {settings.ray.address!r}: {error}") from error
    else:
        assert folder is not None  # local clusters always have a folder
        try:
            context = ray.init(
                address="local",
                namespace=NAMESPACE,
                # Ray's CPUs only limit how many actors start; ours request none.
                num_cpus=max(4, os.cpu_count() or 1),
                num_gpus=settings.ray.num_gpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=settings.ray.dashboard_port,
                log_to_driver=False,
                configure_logging=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder / RAY_FOLDER),
            )
        except Exception as error:  # Ray raises many kinds of exceptions here
            raise _start_failed("Ray", error, settings, folder) from error
    return f"http://{context.dashboard_url}"


def _start_failed(what: str, error: Exception, settings: Settings, folder: Path | None) -> StartFailed:
    """Return a StartFailed with Ray's or Serve's error in one line. A local cluster's logs are kept for inspection."""
    kept = "" if folder is None else f"; logs: {keep_logs(folder, settings.state_dir / 'ray-logs')}"
    return StartFailed(f"{what} does not start: {in_one_line(error)}{kept}")


def _start_registry(settings: Settings) -> None:
    """Make sure that the registry actor runs and is ready. An existing one is never ended.

    Raises:
        BadSettings: The new registry can't start, or one with other settings runs.
        StartFailed: The existing registry does not answer.
    """
    running = _running_registry()
    if running is not None:
        try:
            theirs = _settings_once_ready(running)
        except RayError as error:
            problem = f"the registry of this cluster does not answer: {_reason(error)}; it is left unchanged"
            raise StartFailed(problem) from error
        # D49: `up` neither replaces nor ends a running registry
        if fields := differing(theirs, settings):
            remedy = "to change it, run greenprompt down --address auto first (leases end, queued requests stay)"
            raise BadSettings(", ".join(fields), f"the registry of this cluster runs with another value; {remedy}")
        return
    sources = model_sources(settings)
    # D116: Ray keeps the key with the actor's arguments, also for a restart on a new head if it has a Redis.
    key = secrets.token_bytes(KEY_BYTES)
    actor: Any = (
        ray.remote(RegistryActor)
        .options(
            name=ACTOR_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=10_000,
            num_cpus=0,
            # The database may be a file, so the actor must stay on the head node.
            resources={HEAD_NODE_RESOURCE_NAME: 0.001},
        )
        .remote(settings, lambda s, on_fatal: build_service(s, sources, key, on_fatal))
    )
    try:
        ray.get(actor.ready.remote(), timeout=READY_LIMIT_S)
    except RayError as error:
        ray.kill(actor, no_restart=True)
        raise BadSettings("database", f"the registry can't start: {_reason(error)}") from error


def _running_registry() -> Any:
    """Return the cluster's registry actor, None if there is none."""
    try:
        return ray.get_actor(ACTOR_NAME, NAMESPACE)
    except ValueError:
        return None


@stamina.retry(on=ActorUnavailableError, attempts=None, timeout=READY_LIMIT_S)  # Ray is restarting it
def _settings_once_ready(registry: Any) -> Settings:
    """Return the settings of the cluster's registry once it has loaded its database. Raises RayError."""
    settings: Settings
    settings, _ = ray.get([registry.settings.remote(), registry.ready.remote()], timeout=READY_LIMIT_S)
    return settings


def _reason(error: RayError) -> str:
    """Return the last line of an error that an actor's method raised; the lines before are a traceback."""
    return str(getattr(error, "cause", None) or error).strip().splitlines()[-1]


def _wait_until_ready(settings: Settings, *, usable: bool) -> None:
    """Wait until the ingress reports the registry's health; if ``usable``, until a wrapper is usable.

    Raises:
        StartFailed: That is not the case after ``start_timeout_s``; or HAProxy and the ingress have different tokens.
    """
    host = LOOPBACK_OF.get(settings.http.host, settings.http.host)
    url = f"http://{url_host(host)}:{settings.http.port}/healthz"
    limit_s = settings.wrappers.start_timeout_s
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            answer = httpx.get(url, timeout=10, trust_env=False)  # no proxy for connections to this machine
            if answer.is_success or (not usable and "status" in answer.json()):
                return
            problem = answer.text
            if NotThroughProxy.code in problem:
                remedy = "start Ray again on all machines with `greenprompt ray-start`, with the same token"
                raise StartFailed(f"HAProxy of this machine does not know the cluster's present token; {remedy}")
        except (httpx.HTTPError, ValueError) as error:
            problem = str(error)
        if time.monotonic() >= deadline_s:
            what = "no wrapper" if usable else "the registry"
            raise StartFailed(f"{what} was not ready within {limit_s:g} s: {problem}")
        time.sleep(READY_POLL_S)
