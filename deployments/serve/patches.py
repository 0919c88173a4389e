"""Lists what is patched or read in Serve's replicas. Does not import Ray."""

from __future__ import annotations

from typing import Final

from deployments.patch import Has, How, Patch

REPLICA_PORT: Final = Patch(
    "Ray",
    "ray.serve._private.replica.add_port_to_grpc_server",
    How.WRAPPED,
    "a replica's own gRPC port listens on its node's address only, because its callers can run any code",
    (Has("ray.serve._private.replica", "Replica._on_initialized", uses=("add_port_to_grpc_server", "[::]:0")),),
    "never: it lasts as long as the replica",
)

DIRECT_INGRESS: Final = Patch(
    "Ray",
    "ray.serve._private.replica.RAY_SERVE_ENABLE_DIRECT_INGRESS",
    How.READ,
    "a replica that opens an HTTP port of its own serves only what HAProxy sends",
    (
        Has(
            "ray.serve._private.replica",
            "Replica._maybe_start_direct_ingress_servers",
            uses=("RAY_SERVE_ENABLE_DIRECT_INGRESS",),
        ),
    ),
    "only read",
)
