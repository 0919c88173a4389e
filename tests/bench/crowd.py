"""A crowd of clients in a process of its own, at the lowest priority: it stands for other machines.

``python -m tests.bench.crowd hang-ups URL REQUEST_ID``, or ``idle`` or ``slow-too`` with ``URL SECONDS``; prints what
it did as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

HANG_UPS, AT_ONCE, IDLE = 11_500, 500, 4_100
MANY_IDLE, SLOW = 10_000, 200
SLOW_REQUEST = b"POST /promptingservice/request HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
"""What slow clients send, a byte in a second."""

HELD_S = 0.5
"""How long a client waits before it hangs up, seconds."""

SOURCES = "127.0.0.2", "127.0.0.3", "127.0.0.4"
MANY_SOURCES = tuple(f"127.0.0.{n}" for n in range(2, 8))
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


class Held:
    """Connections to a server, ``wanted`` of them, from these addresses."""

    def __init__(self, url: str, sources: Sequence[str], wanted: int) -> None:
        self._url = url
        self._sources = sources
        self._wanted = wanted
        self.clients: list[socket.socket] = []
        self.opened = 0

    def fill_up(self) -> None:
        """Open again each that the server has closed, and those that could not be opened before."""
        there = []
        for client in self.clients:
            if answered(client):
                client.close()
            else:
                there.append(client)
        self.clients = there
        for _ in range(self._wanted - len(there)):
            with suppress(OSError):
                self.clients.append(connected(self._url, self._sources[self.opened % len(self._sources)]))
            self.opened += 1

    def close(self) -> None:
        """Hang up."""
        for client in self.clients:
            client.close()


def idle(url: str, seconds: float) -> dict[str, float]:
    """Hold IDLE connections without a request; how many were opened."""
    end_s, held = time.monotonic() + seconds, Held(url, SOURCES, IDLE)
    while time.monotonic() < end_s:
        held.fill_up()
        time.sleep(1)
    held.close()
    return {"connections": IDLE, "opened": held.opened}


def slow_too(url: str, seconds: float) -> dict[str, float]:
    """Hold MANY_IDLE connections without a request, and SLOW that send theirs slowly.

    Says so once all were tried; how many were opened, and how many there were in the end.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    held = [Held(url, MANY_SOURCES, MANY_IDLE), Held(url, MANY_SOURCES, SLOW)]
    for some in held:
        some.fill_up()
    print("there", flush=True)
    end_s, second = time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        for client in held[1].clients:
            with suppress(OSError):
                client.send(SLOW_REQUEST[second % len(SLOW_REQUEST) :][:1])
        time.sleep(1)
        second += 1
        for some in held:
            some.fill_up()
    at_the_end = sum(len(some.clients) for some in held)
    for some in held:
        some.close()
    return {"connections": MANY_IDLE + SLOW, "opened": sum(some.opened for some in held), "at_the_end": at_the_end}


KINDS: Mapping[str, Callable[[str, str], dict[str, float]]] = {
    "hang-ups": hang_ups,
    "idle": lambda url, seconds: idle(url, float(seconds)),
    "slow-too": lambda url, seconds: slow_too(url, float(seconds)),
}


def main(kind: str, url: str, argument: str) -> int:
    """Be the crowd, and say what it cost."""
    os.nice(19)
    begun_s = time.perf_counter()
    done = KINDS[kind](url, argument)
    used = os.times()
    print(json.dumps(done | {"seconds": time.perf_counter() - begun_s, "cpu_s": used.user + used.system}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
