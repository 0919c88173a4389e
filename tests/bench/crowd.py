"""A crowd of clients in a process of its own, at the lowest priority: it stands for other machines.

``python -m tests.bench.crowd hang-ups URL REQUEST_ID | idle URL SECONDS``; prints what it did as JSON.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from contextlib import suppress
from urllib.parse import urlsplit

HANG_UPS, AT_ONCE, IDLE = 11_500, 500, 4_100
HELD_S = 0.5
"""How long a client waits before it hangs up, seconds."""

SOURCES = "127.0.0.2", "127.0.0.3", "127.0.0.4"
"""Where the crowd comes from: not the address of those beside it."""


def connected(url: str, source: str) -> socket.socket:
    """A connection to the server of ``url`` from an address."""
    parts = urlsplit(url)
    server = parts.hostname or "127.0.0.1", parts.port or 80
    return socket.create_connection(server, timeout=5, source_address=(source, 0))


def answered(client: socket.socket) -> bool:
    """Whether the server has sent something, or has closed the connection."""
    ready = select.poll()
    ready.register(client, select.POLLIN)
    return bool(ready.poll(0))


def hang_ups(url: str, request_id: str) -> dict[str, float]:
    """Poll HANG_UPS times, AT_ONCE at a time, and hang up each time; how many were answered (429) before."""
    head = f"GET /promptingservice/request/{request_id}?wait=60 HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    answers, sending_s = 0, 0.0
    for _ in range(HANG_UPS // AT_ONCE):
        begun_s = time.perf_counter()
        clients = [connected(url, SOURCES[0]) for _ in range(AT_ONCE)]
        for client in clients:
            client.sendall(head)
        sending_s += time.perf_counter() - begun_s
        time.sleep(HELD_S)
        answers += sum(map(answered, clients))
        for client in clients:
            client.close()
    return {"polls": HANG_UPS, "answered": answers, "sending_s": sending_s}


def idle(url: str, seconds: float) -> dict[str, float]:
    """Hold IDLE connections without a request, and open again each that the server closes; how many were opened."""
    end_s = time.monotonic() + seconds
    clients: list[socket.socket] = []
    opened = 0
    while time.monotonic() < end_s:
        there = []
        for client in clients:
            if answered(client):
                client.close()
            else:
                there.append(client)
        clients = there
        for _ in range(IDLE - len(clients)):
            with suppress(OSError):
                clients.append(connected(url, SOURCES[opened % len(SOURCES)]))
            opened += 1
        time.sleep(1)
    for client in clients:
        client.close()
    return {"connections": IDLE, "opened": opened}


def main(kind: str, url: str, argument: str) -> int:
    """Be the crowd, and say what it cost."""
    os.nice(19)
    begun_s = time.perf_counter()
    done = hang_ups(url, argument) if kind == "hang-ups" else idle(url, float(argument))
    used = os.times()
    print(json.dumps(done | {"seconds": time.perf_counter() - begun_s, "cpu_s": used.user + used.system}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
