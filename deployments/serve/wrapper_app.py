"""The Serve application of one wrapper: where it runs, how it is checked and stopped, and its metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.util.metrics import Gauge
from starlette.types import ASGIApp

from deployments.serve.body_limit import MIB, BodyLimit
from deployments.serve.browsers import BrowserGuard
from deployments.serve.replica_process import prepare_replica, proxy_guard
from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.llm_wrapper import LLMWrapper


class WrapperReplica(LLMWrapper):
    """The wrapper as Serve runs it; its metric tells whether LLMs start warm."""

    async def __init__(self, config: WrapperConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        """See ``LLMWrapper``. Prepares this process: see ``prepare_replica`` and ``proxy_guard``."""
        prepare_replica()
        self._guard = proxy_guard()
        self._hosts = config.hosts
        self._body_bytes = config.settings.max_body_mib * MIB
        warm = Gauge(
            "greenprompt_wrapper_warm", "1: LLMs start fast (warm); 0: they start slowly (cold)", tag_keys=("wrapper",)
        )
        await super().__init__(config, lambda is_warm: warm.set(float(is_warm), {"wrapper": config.wrapper_id}))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        # The prompt gate itself requires JSON, except on the path of the Prompting Service's client.
        limited = BodyLimit(super().__serve_build_asgi_app__(), lambda _path: self._body_bytes)
        return self._guard(BrowserGuard(limited, self._hosts))


def deployment(config: WrapperConfig, *, node_id: str, env: Mapping[str, str]) -> serve.Application:
    """Return the Serve application of one wrapper, pinned to its node, with its GPUs reserved through Ray.

    Control calls and prompts share the replica, and Serve's limit on calls would delay both. So
    back-pressure comes from the wrapper's own limit on prompts. ``env`` must contain no secret: Ray logs it.
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": config.gpus,
        "label_selector": {"ray.io/node-id": node_id},
        "runtime_env": {"env_vars": dict(env)},
    }
    serve_deployment: Any = serve.deployment(serve.ingress()(WrapperReplica))
    application: serve.Application = serve_deployment.options(
        name="LLMWrapper",
        num_replicas=1,
        max_ongoing_requests=100_000,
        ray_actor_options=options,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.settings.stop_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        # Else Serve logs each prompt, which costs energy during the prompt, even if no log is kept.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    ).bind(config)
    return application
