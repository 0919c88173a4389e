"""Prepares the process of a Serve replica, before Serve opens its ports."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica as _replica

from deployments.machine.worker_environment import load_secrets
from deployments.serve.logs import configure_replica_logging
from deployments.serve.patches import REPLICA_PORT
from registry.errors import BadSettings
from registry.settings import url_host


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
