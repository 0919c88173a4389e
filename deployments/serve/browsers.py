"""Protects both HTTP apps, the ingress and the wrappers, from web pages in a browser that can reach them.

A page of another site can send requests to a registry in its user's network, and with DNS rebinding it
can read the answers. So requests for unknown host names are refused. A request that would change
something is also refused if it comes from a page of another origin. Programs send neither ``Origin``
nor ``Sec-Fetch-Site``, so they are not affected.
"""

# D112: what a web page may do

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Sequence
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.error_answers import registry_error
from deployments.wrapper.prompt_errors import NotJSON
from registry.errors import RegistryError

Headers = Sequence[tuple[bytes, bytes]]

READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

HEADERS = (
    (b"content-security-policy", b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
"""Headers of every answer that does not have them already."""

_OF_CORS = b"access-control-"
_READ = frozenset(
    {b"host", b"origin", b"sec-fetch-site", b"content-type", b"content-length", b"transfer-encoding"}
)  # fmt: skip
_HOST = re.compile(rb"(\[[0-9a-f:.]+(?:%25[a-z0-9._~-]+)?\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.IGNORECASE)
_LONGEST_HOST = 300
_DEFAULT_PORTS = {b"http": b":80", b"https": b":443"}
_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


class BadHost(RegistryError):
    """The request has no ``Host`` header that can be read, or several."""

    code = "bad_host"
    http_status = 400

    problem: str

    def __str__(self) -> str:
        return f"the request needs one Host header with a host and a port: {self.problem}"


class HostNotAllowed(RegistryError):
    """The ``Host`` header names a host that is not served. To serve it, add it to ``http.allowed_hosts``."""

    code = "host_not_allowed"
    http_status = 421

    host: str

    def __str__(self) -> str:
        return f"the host {self.host!r} is not served here; the setting http.allowed_hosts can allow it"


class CrossOrigin(RegistryError):
    """A web page of another origin tries to change something."""

    code = "cross_origin"
    http_status = 403

    header: str
    value: str

    def __str__(self) -> str:
        return f"{self.header}: {self.value}: a web page of another origin can't change anything here"


class BrowserGuard:
    """An ASGI app around another one, which gets only those requests that no foreign web page can have sent.

    ``hosts`` are the host names to serve besides those of this machine; every IP address is served. Where
    ``needs_json(path)`` is true, a request that changes something can have no body but JSON.
    """

    def __init__(
        self, app: ASGIApp, hosts: Iterable[str], *, needs_json: Callable[[str], bool] = lambda _path: False
    ) -> None:
        self._app = app
        self._hosts = frozenset(
            {"localhost", socket.gethostname().lower(), *(host.removesuffix(".") for host in hosts)}
        )
        self._needs_json = needs_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection: HTTP, WebSocket or lifespan."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RegistryError as error:
            if scope["type"] == "http":
                openai = "/v1/" in scope["path"]
                await registry_error(error, openai=openai)(scope, receive, _with_headers(send))
            else:
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        await self._app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)

    def _check(self, scope: Scope) -> None:
        """Raise BadHost, HostNotAllowed, CrossOrigin or NotJSON if the request is refused."""
        found = [header for header in scope["headers"] if header[0] in _READ]
        hosts = _values(found, b"host")
        # Browsers let any page open a WebSocket, and read what comes.
        reads = scope["type"] == "http" and scope["method"] in READING
        if reads and not hosts:
            return  # a load balancer's health check over HTTP/1.0; browsers always send Host
        host = self._host(hosts)
        if reads:
            return
        for origin in _values(found, b"origin"):
            if not _is_own(origin, host):
                raise CrossOrigin("Origin", _shown(origin))
        for site in _values(found, b"sec-fetch-site"):
            if site not in (b"same-origin", b"none"):
                raise CrossOrigin("Sec-Fetch-Site", _shown(site))
        if scope["type"] == "http" and self._needs_json(scope["path"]):
            _require_json(found)

    def _host(self, values: Sequence[bytes]) -> bytes:
        """Return the Host header. Raises BadHost, HostNotAllowed."""
        if len(values) != 1:
            raise BadHost("there are several" if values else "there is none")
        (value,) = values
        found = _HOST.fullmatch(value) if len(value) <= _LONGEST_HOST else None
        name = "" if found is None else found[1].decode("ascii").lower().removesuffix(".")
        if not name:
            raise BadHost(repr(_shown(value)))
        if name not in self._hosts and not _is_address(name):
            raise HostNotAllowed(name)
        return value


class GuardedAPI(FastAPI):
    """A FastAPI app behind a BrowserGuard. Its answers to unexpected errors pass through the guard, too.

    Its bodies must be JSON, except on the paths of the Prompting Service, whose client sends no Content-Type.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        inner: Callable[[ASGIApp], ASGIApp] = lambda app: app,
        outer: Callable[[ASGIApp], ASGIApp] = lambda app: app,
        **options: Any,
    ) -> None:
        """``inner`` adds an app between the guard and this one, ``outer`` one around the guard."""
        # FastAPI's pages load scripts from elsewhere.
        super().__init__(docs_url=None, redoc_url=None, **options)
        self._hosts = hosts
        self._inner, self._outer = inner, outer

    def build_middleware_stack(self) -> ASGIApp:
        """Return the app with its middleware, and the guard around it."""
        app = self._inner(super().build_middleware_stack())
        return self._outer(BrowserGuard(app, self._hosts, needs_json=_is_ours))


def _is_ours(path: str) -> bool:
    return path != "/process_prompt" and not path.startswith("/promptingservice/")


def _is_address(name: str) -> bool:
    """Whether the host of a Host header is an IP address.

    A browser sends the host of the URL in this header. DNS rebinding needs a name in the URL, so addresses are safe.
    """
    try:
        if name[0] == "[":
            IPv6Address(name[1:-1].replace("%25", "%"))
        else:
            IPv4Address(name)
    except AddressValueError:
        return False
    return True


def _is_own(origin: bytes, host: bytes) -> bool:
    """Whether an Origin header is that of a page from ``host``, a Host header."""
    scheme, _, place = origin.lower().partition(b"://")
    default = _DEFAULT_PORTS.get(scheme)
    return default is not None and place.removesuffix(default) == host.lower().removesuffix(default)


def _require_json(headers: Headers) -> None:
    """Raise NotJSON if the Content-Type of a body is missing, or is not JSON.

    An empty body may lack a Content-Type, but must not have another one. A form that a page submits always has one,
    even an empty form in a browser too old to send ``Origin``.
    """
    given = b"".join(_values(headers, b"content-type"))
    has_body = bool(_values(headers, b"transfer-encoding")) or _values(headers, b"content-length") not in ([], [b"0"])
    if (given or has_body) and given.partition(b";")[0].strip().lower() != b"application/json":
        raise NotJSON(_shown(given))


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for each, value in headers if each == name]


def _shown(value: bytes) -> str:
    return value[:_LONGEST_HOST].decode("latin-1")


def _with_headers(send: Send) -> Send:
    """Return ``send`` that adds HEADERS to an answer, and removes what would let other origins read it."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [header for header in message["headers"] if not header[0].startswith(_OF_CORS)]
            there = dict(headers)
            headers += [header for header in HEADERS if header[0] not in there]
            message = {**message, "headers": headers}
        await send(message)

    return send_with_headers
