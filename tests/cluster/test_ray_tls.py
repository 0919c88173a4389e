"""What somebody without a certificate or a key reaches of a local registry, by any of its ports."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc  # type: ignore[import-untyped] # its stubs are a package of their own
import httpx
import psutil
import pytest
import ray.core.generated
import ray.serve.generated

from tests.cluster.conftest import REPOSITORY, Registry
from tests.support.listening_ports import listening_ports
from tests.support.startsync import startsync

pytestmark = [pytest.mark.cluster, pytest.mark.vllm, pytest.mark.fault]

CALL_S = 10
PATHS = ("/", "/metrics", "/stats", "/machines", "/api/version", "/api/v0/actors", "/-/routes")
"""Paths at which something of Ray, Serve, HAProxy or the registry answers."""

SECURITY = REPOSITORY / "SECURITY.md"

VITAL = {"gcs_server", "raylet"}
"""The processes whose end is the end of all."""

SPEAK_GRPC = VITAL | {"python", "ray::DashboardAgent", "ray::HAProxyManager", "ray::ProxyActor", "ray::RegistryActor"}
SPEAK_GRPC |= {"ray::ServeController", "ray::ServeReplica"}
"""The processes with a port for gRPC, which needs the key; python is that of `up`."""


class Port(NamedTuple):
    """A TCP port that a process of the registry listens on."""

    process: str
    number: int


def name_of(process: psutil.Process) -> str:
    """The name of a program: of a script its file, of Ray's processes the first word of the title."""
    scripts = [Path(word).name for word in process.cmdline() if word.endswith(".py")]
    found = re.match(r"ray::\w+|.*", process.name())
    assert found is not None
    return (scripts or [found[0]])[0]


def listening(registry: Registry) -> set[Port]:
    """The ports of a registry's processes, except those of the engine, which answer no request."""
    found, engines = set(), registry.engines()
    for process in registry.processes():
        with suppress(psutil.NoSuchProcess):
            found |= {Port(name_of(process), port) for port in listening_ports(process) if process not in engines}
    return found


def methods_of_ray() -> list[str]:
    """The paths of all gRPC methods of the installed Ray and Serve, and of those that have no Python module."""
    found = [
        f"/ray.rpc.{name}"
        for name in ("syncer.RaySyncer/StartSync", "ObjectManagerService/Push", "ObjectManagerService/Pull")
    ]
    for package in (ray.core.generated, ray.serve.generated):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith("_pb2"):
                file = importlib.import_module(f"{package.__name__}.{module.name}").DESCRIPTOR
                services = file.services_by_name.values()
                found += [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    return found


def reached(channel: grpc.Channel, methods: list[str], sent: tuple[bytes, ...]) -> list[str]:
    """The methods by which a server was reached: the call's end is anything but that there is no connection."""
    found = []
    with channel:
        for method in methods:
            try:
                list(channel.stream_stream(method, lambda message: message)(iter(sent), timeout=CALL_S))
                found.append(f"{method}: OK")
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    found.append(f"{method}: {error.code()}")
    return found


def channels(port: int) -> Iterator[grpc.Channel]:
    """A channel in clear, and one that believes the port's own certificate, if it shows one."""
    address = f"127.0.0.1:{port}"
    yield grpc.insecure_channel(address)
    with suppress(OSError, ssl.SSLError):
        shown = ssl.get_server_certificate(("127.0.0.1", port), timeout=CALL_S)
        yield grpc.secure_channel(address, grpc.ssl_channel_credentials(shown.encode()))


def call_without_a_token(port: int) -> None:
    """Send what the report for Ray sends; without TLS it ends a GCS or a raylet."""
    command = [sys.executable, "-c", startsync(), f"127.0.0.1:{port}"]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)


def noise(port: int) -> None:
    """Send a beginning of HTTP/2, as gRPC does, and a kibibyte of nothing in particular."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=CALL_S) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(1024))


def served(port: int) -> set[str]:
    """The paths that a port serves to somebody without credentials."""
    found = set()
    with httpx.Client(timeout=CALL_S, trust_env=False) as client:
        for path in PATHS:
            with suppress(httpx.HTTPError):
                if client.get(f"http://127.0.0.1:{port}{path}").status_code < 300:
                    found.add(path)
    return found


def test_an_open_server_would_be_found() -> None:
    """A server without TLS is reached by each method, also by those that it does not have."""
    methods = methods_of_ray()
    assert {"/ray.serve.ASGIService/HandleRequest", "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"} <= {*methods}
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert len(reached(grpc.insecure_channel(f"127.0.0.1:{port}"), methods, ())) == len(methods)
    finally:
        server.stop(None).wait(10)


def test_who_has_no_key_reaches_nothing_of_ray(
    registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int
) -> None:
    """Each port gets noise, and each call of Ray, in clear and by TLS: no server is reached, nothing ends."""
    (before,) = registry.post(measurement_id, llm("a"))
    lease = registry.until(before, "deployed")["url"]
    # HAProxy's process is another after each reload.
    processes = [process for process in registry.processes() if process.name() != "haproxy"]
    engines, ports = listening_ports(*registry.engines()), sorted(listening(registry))
    for port in ports:
        if port.process in VITAL:
            call_without_a_token(port.number)
    for number in engines:
        noise(number)
    methods, secure, open_to = methods_of_ray(), set(), []
    for port in ports:
        noise(port.number)
        for sent in ((), (os.urandom(64),)):
            for n, channel in enumerate(channels(port.number)):
                secure |= {port.process} if n else set()
                if found := reached(channel, methods, sent):
                    open_to.append((port.process, found[0]))
    # HAProxy speaks HTTP/2, and has no such path.
    assert {each for each in open_to if each[0] != "haproxy"} == set()
    assert {name for name in SPEAK_GRPC if name not in secure} == set()
    left = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert left == processes
    answer = httpx.post(f"{lease}/process_prompt", json={"question": "Are you there?"}, timeout=60)
    assert answer.status_code == 200, answer.text


def test_what_answers_without_credentials_is_in_security_md(
    registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int
) -> None:
    """The ports of a local registry that serve something to everybody are those of the table in SECURITY.md."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    registry.until(request_id, "deployed")
    found = set()
    for port in listening(registry):
        if paths := served(port.number):
            found.add(
                (port.process, "every path" if paths == {*PATHS} else ", ".join(f"`{it}`" for it in sorted(paths)))
            )
    rows = re.findall(r"^\| `([^`]+)` \| (every path|`/.*?) \|", SECURITY.read_text(encoding="utf-8"), re.MULTILINE)
    assert found == set(rows)
