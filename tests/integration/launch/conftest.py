"""For the tests of the proxies for TLS: one of them, with all that is behind it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from deployments.launch.haproxy import haproxy_environment
from deployments.launch.local_ray import free_ports
from tests.support.app_server import served_in_thread
from tests.support.tls_front import (
    Front,
    Registry,
    Wrapper,
    changed_copy,
    ingress_of,
    made_certificates,
    running,
    wait_for,
)


@pytest.fixture(scope="module", params=["haproxy.cfg", "Caddyfile"])
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A proxy of configs/front, HAProxy as Serve runs it, and the ingress, one behind the other."""
    folder, name = tmp_path_factory.mktemp("front"), str(request.param)
    registry, wrapper = Registry(), Wrapper()
    with ExitStack() as stack:
        ingress = served_in_thread(ingress_of(registry, wrapper), log_level="error", ws="none")
        _, ingress_port = stack.enter_context(ingress)
        port, back = free_ports(2)
        of_serve = folder / "serve.cfg"
        of_serve.write_text(
            "global\ndefaults\n    mode http\n    option abortonclose\n    timeout client 60s\n    timeout connect 9s\n"
            "    timeout server 60s\n    errorfile 503 /nowhere/500.http\n"
            f"frontend http_frontend\n    bind 127.0.0.1:{back}\n    default_backend back\n"
            f"backend back\n    server all 127.0.0.1:{ingress_port}\n"
        )
        script = haproxy_environment(folder / "h", "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
        behind = stack.enter_context(subprocess.Popen([script, "-db", "-f", str(of_serve)]))
        stack.callback(behind.kill)
        ca = made_certificates(folder)
        log = stack.enter_context(running(name, changed_copy(name, folder, port=port, back=back)))
        found = Front(f"https://localhost:{port}", ca, log, registry, wrapper, behind)
        with found.http() as http:
            wait_for(http, log)
        yield found
