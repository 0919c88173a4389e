"""Prepares the process of a Serve replica, before Serve opens its ports."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import structlog
from ray.serve._private import replica as _replica
from starlette.types import ASGIApp

from deployments.machine.cluster_token import proxy_secret, token_path
from deployments.machine.worker_environment import load_secrets
from deployments.serve.logs import configure_replica_logging
from deployments.serve.patches import DIRECT_INGRESS, REPLICA_PORT
from deployments.serve.proxy_guard import ProxyGuard
from registry.errors import BadSettings
from registry.settings import url_host

log = structlog.get_logger("deployments.serve.replica_process")


def prepare_replica() -> None:
    """Configure the log, load secrets, and close the replica's own port to other networks. Call it in ``__init__``.

    Raises:
        BadSettings: The installed Ray opens that port in another way.
    """
    configure_replica_logging()
    load_secrets()
    _listen_on_node_address()


replica: Any = _replica  # Any: mypy forbids to replace a function in a module that only imports it


# D131: a replica's own port is on its node's address
def _listen_on_node_address() -> None:
    """Make Serve bind this replica's gRPC port to the node's address instead of all interfaces."""
    if (problem := REPLICA_PORT.problem()) is not None:
        raise BadSettings("ray", f"{problem}; use the version in the lock file")
    bind, host = replica.add_port_to_grpc_server, url_host(ray.util.get_node_ip_address())

    def bind_to_node(server: Any, address: str) -> int:
        port: int = bind(server, address.replace("[::]", host))
        return port

    replica.add_port_to_grpc_server = bind_to_node


# D125: replicas serve only what the cluster's HAProxy sends
def has_own_port() -> bool:
    """Whether Serve opens an HTTP port for this replica, as it does with HAProxy.

    Raises:
        BadSettings: The installed Ray decides about it in another way.
    """
    if (problem := DIRECT_INGRESS.problem()) is not None:
        raise BadSettings("ray", f"{problem}; use the version in the lock file")
    return bool(replica.RAY_SERVE_ENABLE_DIRECT_INGRESS)


def proxy_guard() -> Callable[[ASGIApp], ASGIApp]:
    """Return a function that puts a ``ProxyGuard`` around this replica's app. Call it in ``__init__``.

    No setting turns this off: an app is returned unchanged only if it has no HTTP port of its own. The log says so.

    Raises:
        BadSettings: The cluster's token can't be read; and see ``has_own_port``.
    """
    if not has_own_port():
        log.warning("Serve runs without HAProxy here: requests need not come through a HAProxy of the cluster")
        return lambda app: app
    return partial(ProxyGuard, secret=proxy_secret(token_path()))
