"""Protects the ports of replicas: refuses what did not come through a HAProxy of the cluster.

Each replica has an HTTP port of its own, and the head one more for Serve's fallback proxy. Only the cluster's HAProxies
need them. A caller that reaches them directly could claim any address, and evade HAProxy's limits.
"""

# D125: replicas serve only what the cluster's HAProxy sends

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.error_answers import registry_error
from deployments.machine.cluster_token import PROXY_HEADER
from registry.errors import RegistryError

_HEADER = PROXY_HEADER.encode("ascii")
_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


class NotThroughProxy(RegistryError):
    """The request came to a port that is only for the HAProxies of the cluster. Use the registry's address."""

    code = "not_through_proxy"
    http_status = 403

    def __str__(self) -> str:
        return "only the HAProxies of the cluster may use this port; send requests to http.port of the registry"


class ProxyGuard:
    """An ASGI app around another one, which gets only requests with the secret in PROXY_HEADER, without that header."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        """``secret``: see ``proxy_secret``."""
        self._app = app
        self._secret = secret.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection: HTTP, WebSocket or lifespan."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        sent = [value for name, value in scope["headers"] if name == _HEADER]
        if len(sent) == 1 and hmac.compare_digest(sent[0], self._secret):
            headers = [header for header in scope["headers"] if header[0] != _HEADER]
            await self._app({**scope, "headers": headers}, receive, send)
        elif scope["type"] == "http":
            answer = registry_error(NotThroughProxy(), openai="/v1/" in scope["path"])
            answer.headers["connection"] = "close"  # its body is not read
            await answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
