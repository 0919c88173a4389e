"""What listens on which port of a machine of a cluster, and what others can do there if no firewall closes it."""

from __future__ import annotations

from typing import NamedTuple

from deployments.launch.firewall import SSH


class KnownPort(NamedTuple):
    """What a port belongs to, and what a host outside of the cluster can do if the port answers it."""

    what: str
    risk: str


_METRICS = "reads how busy the cluster is"
_RUNS_CODE = "runs code with Ray's token"

# With the ports of cluster.yaml and the defaults of Ray 2.60.
_ONE_PORT = {
    6390: KnownPort("Ray's GCS", f"ends the cluster with one message, unless Ray's TLS is on; {_RUNS_CODE}"),
    8000: KnownPort("HAProxy: the API and the leases", "reaches the registry around the proxy on --port"),
    8090: KnownPort("Ray's metrics of the machine", _METRICS),
    8265: KnownPort("Ray's dashboard", f"{_RUNS_CODE}, and reads logs"),
    8404: KnownPort("HAProxy's statistics", f"{_METRICS}; they should listen on loopback only"),
    8500: KnownPort("Serve's fallback proxy", "reads the paths of the wrappers; other calls get 403"),
    9101: KnownPort("HAProxy's metrics", f"{_METRICS}; they should listen on loopback only"),
    10001: KnownPort("Ray's server for remote drivers", _RUNS_CODE),
    44217: KnownPort("Ray's metrics of the autoscaler", _METRICS),
    44227: KnownPort("Ray's metrics of the dashboard", _METRICS),
    52365: KnownPort("Ray's agent of the dashboard", _RUNS_CODE),
}

_RANGES = {
    range(10002, 20000): KnownPort("a worker of Ray", _RUNS_CODE),
    range(30000, 31001): KnownPort(
        "a replica: the ingress or a wrapper", "reads the paths of the wrappers; other calls get 403"
    ),
}

_UNKNOWN = KnownPort(
    "unknown: look with `ss -ltnp` on the machine",
    "may run code: without Ray's TLS, some of its ports without fixed numbers need no token",
)

FIRST = tuple(_ONE_PORT)
"""The ports to try first."""


def known_port(port: int, *, http_port: int) -> KnownPort:
    """Return what a port belongs to, as far as its number tells that. ``http_port``: the one that may be open."""
    if port == SSH:
        return KnownPort("ssh", "logs in with a key")
    if port == http_port:
        return KnownPort("HAProxy, or the proxy with TLS: the API and the leases", "calls the API with a key")
    in_range = next((known for ports, known in _RANGES.items() if port in ports), _UNKNOWN)
    return _ONE_PORT.get(port, in_range)
