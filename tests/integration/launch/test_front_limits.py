"""The limits of the proxies for TLS in configs/front: of time, of bodies, and of connections."""

from __future__ import annotations

import re
import socket
import ssl
import time
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest

from deployments.launch.local_ray import free_ports
from registry.wire.schemas import ErrorAnswer
from tests.support.tls_front import CHANGES, FRONTS, LEASE, LONGEST, Front, changed_copy, made_certificates, running


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


def test_several_crowds_leave_room(tmp_path: Path) -> None:
    """While there are many connections, an address with a few gets no more, and a new one gets some."""
    made_certificates(tmp_path)
    port, back = free_ports(2)
    config = changed_copy("haproxy.cfg", tmp_path, short=False, port=port, back=back)
    text = config.read_text()
    for figure, small in (("sc0_conn_cur gt 500", 8), ("fe_conn gt 1500", 16), ("sc0_conn_cur gt 50 ", 2)):
        assert text.count(figure) == 1
        text = text.replace(figure, f"{figure.rpartition('gt')[0]}gt {small} ")
    text = text.replace(f"bind 127.0.0.1:{port} ", f"bind :::{port} v4v6 ")
    config.write_text(text)
    with running("haproxy.cfg", config), ExitStack() as stack:
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
