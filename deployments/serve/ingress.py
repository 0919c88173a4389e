"""The HTTP ingress: the Serve deployment of the HTTP app, on the head."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME

from deployments.models.checkpoints import checkpoints_anywhere
from deployments.serve.actor_calls import ActorCalls
from deployments.serve.http_app import IngressConfig, build_app
from deployments.serve.replica_process import has_own_port, prepare_replica, proxy_guard
from registry.errors import BadSettings


class Ingress:
    """The Serve deployment of the app."""

    def __init__(self, config: IngressConfig) -> None:
        """``config`` is fixed for the life of the replica. Prepares this process: see ``prepare_replica``.

        Raises:
            BadSettings: HAProxy is wanted, but Serve runs without it; and see ``proxy_guard``.
        """
        prepare_replica()
        if config.trusted_proxies is not None and not has_own_port():
            remedy = "start it with `greenprompt ray-start` on all machines, or set http.haproxy to false"
            raise BadSettings("http.haproxy", f"Ray was started without HAProxy; {remedy}")
        self._app = build_app(config, ActorCalls(config.state_dir).call, checkpoints_anywhere(), proxy_guard())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def deployment(config: IngressConfig) -> serve.Application:
    """Return the Serve application of the ingress.

    It runs on the head, so that it survives the loss of an LLM Machine and adds nothing to the measured energy of one.
    """
    serve_deployment: Any = serve.deployment(serve.ingress()(Ingress))
    application: serve.Application = serve_deployment.options(
        name="Ingress",  # D50: it is on the head
        num_replicas=1,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
    ).bind(config)
    return application
