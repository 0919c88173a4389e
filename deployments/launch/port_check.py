"""Checks from a host outside of a cluster which TCP ports of its machines answer."""

# D137: ports are checked from outside

from __future__ import annotations

import asyncio
import errno
import json
import resource
import socket
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain
from typing import Any

import psutil

from deployments.launch.firewall import SSH
from deployments.launch.known_ports import FIRST, known_port
from registry.background import spawn_awaited
from registry.errors import BadSettings

Address = IPv4Address | IPv6Address

PORTS = "1024-65535"
"""The ports that the firewall's rules close."""

LAST_PORT = 65535

CONNECT_S = 2.0
"""Longest wait for the answer of a port, seconds. The kernel sends a lost packet again after 1 s."""

MOST_AT_ONCE = 1000
"""Most connections that are tried at once."""

FILES_LEFT = 64
"""Open files of the process that the check does not use."""

PROGRESS_EVERY = 500
"""Number of tried ports after which the progress is shown."""

# A firewall, or a router before it, refuses with such a message of ICMP.
_REFUSED_BY_NETWORK = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}


class Answer(Enum):
    """What came back from a port. CLOSED: a refusal, so packets reach the machine. FILTERED: nothing in CONNECT_S."""

    OPEN = "open"
    CLOSED = "closed"
    FILTERED = "filtered"


@dataclass
class MachineCheck:
    """What is known of the ports of a machine."""

    machine: Address
    ports: Sequence[int]
    http_port: int
    answers: dict[int, Answer] = field(default_factory=dict)
    """By port. Ports without an entry were not tried, or this host could not try them."""
    problem: str | None = None
    """Why this host could not try a port."""
    answers_last: bool = False
    """Whether an allowed port answered again after all others were tried."""

    @property
    def allowed(self) -> tuple[int, ...]:
        """The ports that may be open."""
        return tuple(sorted({SSH, self.http_port}))

    def having(self, answer: Answer) -> list[int]:
        """Return the ports with this answer, sorted."""
        return sorted(port for port, found in self.answers.items() if found is answer)

    @property
    def exposed(self) -> list[int]:
        """The ports that answer and should not."""
        return [port for port in self.having(Answer.OPEN) if port not in self.allowed]

    @property
    def not_tried(self) -> list[int]:
        """The ports of which nothing is known."""
        return sorted({*self.ports, *self.allowed} - self.answers.keys())

    def doubts(self) -> list[str]:
        """Return why a port could be open although it is not found to be."""
        found = []
        allowed = " and ".join(map(str, self.allowed))
        if not any(self.answers.get(port) is Answer.OPEN for port in self.allowed):
            found.append(f"none of the ports {allowed} answers, so this host may not reach the machine at all")
        elif not self.not_tried and not self.answers_last:
            found.append(f"the ports {allowed} answer no more, so the others may have been unreachable, too")
        if self.not_tried:
            reason = self.problem or "the time limit was reached; raise --time-limit, or try them with --ports"
            found.append(f"not tried: {shown(self.not_tried)} ({reason})")
        return found


async def check_ports(
    machines: Iterable[Address],
    ports: Iterable[int],
    *,
    http_port: int,
    limit_s: float,
    at_once: int,
    on_progress: Callable[[int, int], object] = lambda _done, _of: None,
) -> list[MachineCheck]:
    """Try to connect to TCP ports of machines; return a result for each machine. Sends no data.

    ``http_port`` and ssh are tried in any case. Ends after ``limit_s`` seconds; what was not tried by then has no
    answer. ``at_once``: most connections at a time. ``on_progress`` gets the number of ports tried, and of all.
    """
    wanted = list(ports)
    checks = [MachineCheck(machine, wanted, http_port) for machine in machines]
    places = _in_order(checks, set(wanted))
    done, total = 0, sum(len({*check.ports, *check.allowed}) for check in checks)

    async def work() -> None:
        nonlocal done
        for check, port in places:
            await _try_port(check, port)
            done += 1
            if done % PROGRESS_EVERY == 0:
                on_progress(done, total)

    tried = iter(checks)

    async def work_again() -> None:
        for check in tried:
            check.answers_last = await _still_answers(check)

    try:
        async with asyncio.timeout(limit_s):
            await _side_by_side(work, min(at_once, total))
            # If this host lost its network in between, all ports since then look filtered.
            await _side_by_side(work_again, min(at_once, len(checks)))
    except TimeoutError:
        pass  # the results say what was not tried
    return checks


async def _side_by_side(work: Callable[[], Coroutine[Any, Any, None]], number: int) -> None:
    tasks = [spawn_awaited("try ports", work()) for _ in range(number)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _in_order(checks: Sequence[MachineCheck], wanted: set[int]) -> Iterator[tuple[MachineCheck, int]]:
    """Yield each port of each machine once: those that are known first, and the machines in turn."""
    allowed = checks[0].allowed if checks else ()
    known = [port for port in FIRST if port in wanted]
    for port in dict.fromkeys(chain(allowed, known, sorted(wanted))):
        for check in checks:
            yield check, port


async def _still_answers(check: MachineCheck) -> bool:
    """Whether an allowed port that has answered does so again."""
    for port in check.allowed:
        if check.answers.get(port) is Answer.OPEN:
            with suppress(OSError):
                if await _answer(check.machine, port) is Answer.OPEN:
                    return True
    return False


async def _try_port(check: MachineCheck, port: int) -> None:
    """Record the answer of a port, or what keeps this host from trying it."""
    try:
        check.answers[port] = await _answer(check.machine, port)
    except OSError as error:  # e.g. too many open files
        check.problem = f"this host can't: {error.strerror}"


async def _answer(machine: Address, port: int) -> Answer:
    """Return the answer of a port within CONNECT_S. Raises OSError if this host can't try it."""
    kind = socket.AF_INET if machine.version == 4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().sock_connect(connection, (str(machine), port))
        except TimeoutError:
            # If this process was busy, the answer may have come in time.
            return Answer.OPEN if _is_connected(connection) else Answer.FILTERED
        except (ConnectionRefusedError, ConnectionResetError):
            return Answer.CLOSED
        except OSError as error:
            if error.errno in _REFUSED_BY_NETWORK:
                return Answer.FILTERED
            raise
    return Answer.OPEN


def _is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


def most_at_once() -> int:
    """Return how many connections this process may try at once: by its limit of open files, at most MOST_AT_ONCE."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_AT_ONCE if files == resource.RLIM_INFINITY else max(1, min(MOST_AT_ONCE, files - FILES_LEFT))


def require_outside(machines: Iterable[Address]) -> None:
    """Raise BadSettings if this host is one of the machines: the firewall lets it reach all ports."""
    own = {
        ip_address(address.address.partition("%")[0])
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    for machine in machines:
        if machine.is_loopback or machine in own:
            raise BadSettings(
                "--check", f"this host is {machine}, a machine of the cluster; run it on a host that is none of them"
            )


def parse_ports(text: str, option: str) -> range:
    """Return the ports of ``FROM-TO``, or of one number. Raises BadSettings, naming ``option``."""
    first, dash, last = text.partition("-")
    if first.isdecimal() and (last.isdecimal() or not dash):
        ports = range(int(first), int(last or first) + 1)
        if ports and ports[0] >= 1 and ports[-1] <= LAST_PORT:
            return ports
    raise BadSettings(option, f"{text!r} is no range of ports such as {PORTS}")


def shown(ports: Sequence[int]) -> str:
    """Return sorted ports as text, with ranges: ``22, 1024-2000``."""
    ranges: list[list[int]] = []
    for port in ports:
        if ranges and port == ranges[-1][1] + 1:
            ranges[-1][1] = port
        else:
            ranges.append([port, port])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def lines(check: MachineCheck) -> Iterator[str]:
    """Yield the result of a machine as text: a line for each open port, then the numbers of ports, then the doubts."""
    host = f"[{check.machine}]" if check.machine.version == 6 else str(check.machine)
    for port in check.having(Answer.OPEN):
        what, risk = known_port(port, http_port=check.http_port)
        if port in check.allowed:
            yield f"{host}:{port} is open, and may be: {what}"
        else:
            yield f"{host}:{port} is exposed: {what}. Whoever reaches it {risk}."
    closed, filtered = (len(check.having(answer)) for answer in (Answer.CLOSED, Answer.FILTERED))
    allowed = len(check.having(Answer.OPEN)) - len(check.exposed)
    yield (
        f"{host}: {len(check.exposed)} exposed, {allowed} allowed, {filtered} filtered, {closed} closed, "
        f"{len(check.not_tried)} not tried"
    )
    for doubt in check.doubts():
        yield f"{host}: {doubt}"


def as_json(check: MachineCheck) -> str:
    """Return the result of a machine as one line of JSON."""
    answering = [
        {"port": port, "allowed": port in check.allowed, **known_port(port, http_port=check.http_port)._asdict()}
        for port in check.having(Answer.OPEN)
    ]
    return json.dumps(
        {
            "machine": str(check.machine),
            "open": answering,
            "closed": len(check.having(Answer.CLOSED)),
            "filtered": len(check.having(Answer.FILTERED)),
            "notTried": len(check.not_tried),
            "doubts": check.doubts(),
        }
    )
