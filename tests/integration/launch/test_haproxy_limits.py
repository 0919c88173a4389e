"""What idle connections, one address, several crowds and long polls can take of HAProxy."""

from __future__ import annotations

import json
import re
import select
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Self

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from deployments.launch.haproxy import haproxy_environment


class Limited:
    """HAProxy with Serve's own defaults and our limits, in front of a server that the test plays."""

    def __init__(self, folder: Path, *, client_s: int = 60, errors: IO[bytes] | None = None) -> None:
        self._folder = folder
        self._errors = errors
        self._client_s = client_s
        self._open = ExitStack()

    def __enter__(self) -> Self:
        script = haproxy_environment(self._folder, "0" * 64)["RAY_SERVE_HAPROXY_BINARY_PATH"]
        self._front = self._open.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._back = self._open.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._back.settimeout(10)
        (defaults,) = re.findall(r"^defaults\n(?s:.*?)(?=^frontend)", HAPROXY_CONFIG_TEMPLATE, re.MULTILINE)
        defaults = re.sub(r".*(\{\{|state-from-file).*\n|\{%.*?%\}", "", defaults)
        config = self._folder / "haproxy.cfg"
        config.write_text(
            f"global\n{defaults}    timeout client {self._client_s}s\n    timeout connect 9s\n"
            "    timeout http-keep-alive 90s\n    errorfile 503 /nowhere/500.http\n"
            f"frontend http_frontend\n    bind fd@{self._front.fileno()}\n    default_backend back\n"
            f"backend back\n    server all 127.0.0.1:{self._back.getsockname()[1]}\n"
        )
        command = [script, "-db", "-f", str(config)]
        haproxy = self._open.enter_context(
            subprocess.Popen(command, pass_fds=[self._front.fileno()], stderr=self._errors)
        )
        self._open.callback(haproxy.kill)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """A client's connection from an address."""
        front = self._front.getsockname()
        return self._open.enter_context(socket.create_connection(front, timeout=10, source_address=(source, 0)))

    def ask(self, path: str, source: str = "127.0.0.1") -> socket.socket:
        """A client's connection with a request."""
        client = self.connect(source)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        return client

    def refuses(self, source: str) -> bool:
        """Whether a new connection from an address is closed at once."""
        try:
            return self.connect(source).recv(4096) == b""
        except ConnectionResetError:  # sooner than it is seen to be there
            return True

    def heard(self, path: str = "/") -> socket.socket:
        """The server's end of the next request, which is for a path that begins so."""
        server = self._open.enter_context(self._back.accept()[0])
        server.settimeout(10)
        assert server.recv(4096).startswith(f"GET {path}".encode())
        return server


def test_idle_connections_end_and_answers_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a request is closed after REQUEST_S (1 s here), one with half a request, too.

    One that waits for its answer is not, nor one in the middle of a stream, though that takes longer than all limits.
    """
    monkeypatch.setattr("deployments.launch.haproxy.REQUEST_S", 1)
    with Limited(tmp_path, client_s=1) as haproxy:
        prompt = haproxy.ask("/wrappers/a-0/t0ken/v1/completions")
        server = haproxy.heard()
        idle, half = haproxy.connect(), haproxy.connect()
        half.sendall(b"GET / HTTP/1.1\r\n")
        assert [connection.recv(4096)[:12] for connection in (idle, half)] == [b"HTTP/1.1 408"] * 2
        chunk = b"1\r\na\r\n"
        server.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
        assert prompt.recv(4096).startswith(b"HTTP/1.1 200")
        assert haproxy.connect().recv(4096)  # its time is up, and so is that of a client in a stream
        server.sendall(chunk + b"0\r\n\r\n")
        assert _until_end(prompt).endswith(b"0\r\n\r\n")


def _until_end(client: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"0\r\n\r\n") and (more := client.recv(4096)):
        answer += more
    return answer


def test_polls_leave_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long polls at most MOST_POLLS are let in at once; others are let in beside them."""
    monkeypatch.setattr("deployments.launch.haproxy.MOST_POLLS", 2)
    with Limited(tmp_path) as haproxy:
        for path in ["/promptingservice/request/1?wait=60"] * 2 + ["/promptingservice/request/1", "/healthz"]:
            haproxy.ask(path)
            haproxy.heard()
        answer = haproxy.ask("/promptingservice/request/2?wait=60").recv(4096)
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "too_many_polls"


@pytest.mark.parametrize(
    "path",
    [
        "/promptingservice/request/2?seen=queued&wait=60",
        "/promptingservice/request/2?w%61it=60",
        "/prompting%73ervice/request/2?wait=60",
        "/%70romptingservice%2Frequest%2f2?seen=queued&%77ait=60",
    ],
)
def test_a_poll_is_one_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The ingress decodes paths and parameters, so the limit on long polls holds for all of their spellings."""
    monkeypatch.setattr("deployments.launch.haproxy.MOST_POLLS", 1)
    with Limited(tmp_path) as haproxy:
        haproxy.ask("/promptingservice/request/1?wait=60")
        haproxy.heard()
        haproxy.ask("/promptingservice/request/1?seen=wait")
        haproxy.heard()
        assert haproxy.ask(path).recv(4096).startswith(b"HTTP/1.1 429 ")


def test_a_burst_of_polls_is_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many polls that come at one moment POLLS_BURST reach the ingress at once: health and reads go past the rest.

    Those that don't get their turn in time are told to try again.
    """
    monkeypatch.setattr("deployments.launch.haproxy.POLLS_BURST", 2)
    monkeypatch.setattr("deployments.launch.haproxy.POLLS_PER_S", 0.001)
    monkeypatch.setattr("deployments.launch.haproxy.POLL_TURN_S", 1)
    with Limited(tmp_path) as haproxy:
        polls = [haproxy.ask("/promptingservice/request/1?wait=60") for _ in range(5)]
        for _ in range(2):
            haproxy.heard()
        for path in ["/healthz", "/promptingservice/request/1"]:
            haproxy.ask(path)
            haproxy.heard(path)
        answers: list[bytes] = []
        while len(answers) < 3:
            (answered, *_), _, _ = select.select(polls, [], [], 10)
            polls.remove(answered)
            answers.append(answered.recv(4096))
    assert {answer[:12] for answer in answers} == {b"HTTP/1.1 429"}
    assert {json.loads(answer.partition(b"\r\n\r\n")[2])["code"] for answer in answers} == {"too_many_polls"}


def test_a_burst_of_polls_is_served_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls that wait for their turn get it, while the rate allows it, and are then answered as any other."""
    monkeypatch.setattr("deployments.launch.haproxy.POLLS_BURST", 1)
    monkeypatch.setattr("deployments.launch.haproxy.POLLS_PER_S", 50)
    monkeypatch.setattr("deployments.launch.haproxy.POLL_TURN_S", 60)
    with Limited(tmp_path) as haproxy:
        polls = [haproxy.ask("/promptingservice/request/1?wait=60") for _ in range(6)]
        for _ in polls:
            haproxy.heard().sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert {poll.recv(4096)[:12] for poll in polls} == {b"HTTP/1.1 200"}


def test_hang_ups_before_their_turn_are_not_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that hang up while they wait for their turn don't reach the ingress, and no line is written for them."""
    monkeypatch.setattr("deployments.launch.haproxy.POLLS_BURST", 1)
    monkeypatch.setattr("deployments.launch.haproxy.POLLS_PER_S", 0.001)
    monkeypatch.setattr("deployments.launch.haproxy.POLL_TURN_S", 1)
    with (tmp_path / "haproxy.err").open("wb") as errors, Limited(tmp_path, errors=errors) as haproxy:
        held, *waiting = [haproxy.ask("/promptingservice/request/1?wait=60") for _ in range(20)]
        haproxy.heard()
        for poll in waiting:
            poll.close()
        last = haproxy.ask("/promptingservice/request/1?wait=60")
        assert last.recv(4096).startswith(b"HTTP/1.1 429 ")  # after those before it
        haproxy.ask("/healthz")
        haproxy.heard("/healthz")  # the next that the server hears of
        held.close()
    assert "yield" not in (tmp_path / "haproxy.err").read_text()


def test_one_source_leaves_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One address has at most MOST_PER_SOURCE connections: one more is closed at once, the others go on."""
    monkeypatch.setattr("deployments.launch.haproxy.MOST_PER_SOURCE", 3)
    with Limited(tmp_path) as haproxy:
        for _ in range(2):
            haproxy.ask("/")
            haproxy.heard()
        last = haproxy.ask("/")
        server = haproxy.heard()
        assert haproxy.refuses("127.0.0.1")
        server.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert last.recv(4096).startswith(b"HTTP/1.1 200")
        haproxy.ask("/", source="127.0.0.2")
        haproxy.heard()


def test_several_crowds_leave_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CROWDED connections in all, an address with FEW_PER_SOURCE gets no more, and one with fewer still does."""
    monkeypatch.setattr("deployments.launch.haproxy.CROWDED", 3)
    monkeypatch.setattr("deployments.launch.haproxy.FEW_PER_SOURCE", 1)
    with Limited(tmp_path) as haproxy:
        for source in ("127.0.0.2", "127.0.0.2", "127.0.0.3"):
            haproxy.ask("/", source=source)
            haproxy.heard()
        assert haproxy.refuses("127.0.0.3")
        haproxy.ask("/", source="127.0.0.4")
        haproxy.heard()
