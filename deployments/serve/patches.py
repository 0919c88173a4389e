"""Lists what is patched in Serve's replicas. Does not import Ray."""

from __future__ import annotations

from typing import Final

from deployments.patch import Has, How, Patch

REPLICA_PORT: Final = Patch(
    "Ray",
    "ray.serve._private.replica.add_port_to_grpc_server",
    How.WRAPPED,
    "a replica's own gRPC port, which runs whatever it is sent, listens on its node's address only",
    (Has("ray.serve._private.replica", "Replica._on_initialized", uses=("add_port_to_grpc_server", "[::]:0")),),
    "never: for the life of a replica",
)
