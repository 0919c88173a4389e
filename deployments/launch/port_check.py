"""Checks from a host outside of a cluster which TCP ports of its machines answer."""

# D137: ports are checked from outside

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import socket
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain, islice
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

FEW_AT_ONCE = 50
"""Most connections at once when the known ports are tried again. No router on the way is too small for these."""

PAUSE_S = 5.0
"""Time until a batch is tried again after packets were lost, seconds."""

# A firewall, or a router before it, refuses with such a message of ICMP. If connect fails with one at once, it is
# this host that has no route.
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}

_NO_TIME = "the time limit was reached; raise --time-limit, or try them with --ports"


class Answer(Enum):
    """What came back from a port. CLOSED: a refusal, so packets reach the machine. FILTERED: nothing in CONNECT_S."""

    OPEN = "open"
    CLOSED = "closed"
    FILTERED = "filtered"


@dataclass(eq=False)
class MachineCheck:
    """What is known of the ports of a machine."""

    machine: Address
    ports: Sequence[int]
    http_port: int
    answers: dict[int, Answer] = field(default_factory=dict)
    """By port. Ports without an entry were not tried, or this host could not try them."""
    problems: dict[int, str] = field(default_factory=dict)
    """By port without an answer: why this host could not try it."""

    @property
    def allowed(self) -> tuple[int, ...]:
        """The ports that may be open."""
        return tuple(sorted({SSH, self.http_port}))

    @property
    def control(self) -> int | None:
        """An allowed port that was open: while it answers, packets reach the machine.

        Not ssh if there is a choice: sshd may lock out a host that connects often without logging in.
        """
        return next((port for port in (self.http_port, SSH) if self.answers.get(port) is Answer.OPEN), None)

    def record(self, port: int, answer: Answer) -> None:
        """Keep the answer of a port."""
        self.answers[port] = answer
        self.problems.pop(port, None)

    def take_back(self, port: int, problem: str) -> None:
        """Count a port as not tried."""
        self.answers.pop(port, None)
        self.problems[port] = problem

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
        by_reason = defaultdict(list)
        for port in self.not_tried:
            by_reason[self.problems.get(port, _NO_TIME)].append(port)
        found += [f"not tried: {shown(ports)} ({reason})" for reason, ports in by_reason.items()]
        return found


Place = tuple[MachineCheck, int]
"""A port of a machine."""


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
    answer. ``at_once``: most connections at a time. ``on_progress`` gets the number of ports tried, and of all, after
    each batch.
    """
    wanted = list(ports)
    checks = [MachineCheck(machine, wanted, http_port) for machine in machines]
    done, total = 0, sum(len({*check.ports, *check.allowed}) for check in checks)
    try:
        async with asyncio.timeout(limit_s):
            for batch in _batches(checks, set(wanted), at_once):
                await _try_twice(batch, at_once)
                done += len(batch)
                on_progress(done, total)
            # A router on the way may have lost some packets of many.
            known = [(check, port) for port in FIRST for check in checks]
            silent = [(check, port) for check, port in known if check.answers.get(port) is Answer.FILTERED]
            few = min(FEW_AT_ONCE, at_once)
            for batch in _in_parts(iter(silent), few):
                await _try_twice(batch, few)
    except TimeoutError:
        pass  # the results say what was not tried
    return checks


async def _try_twice(batch: Sequence[Place], at_once: int) -> None:
    """Try ports, and those of which this host learned nothing once more."""
    if again := await _try_ports(batch, at_once):
        await asyncio.sleep(PAUSE_S)
        await _try_ports(again, at_once)


async def _try_ports(batch: Sequence[Place], at_once: int) -> list[Place]:
    """Try ports; return those of which this host learned nothing, although it had reached their machines before.

    Ports of a machine count as filtered only if its control port answers at the same time, and again after them.
    """
    silent: defaultdict[MachineCheck, list[int]] = defaultdict(list)
    lost: set[MachineCheck] = set()

    async def try_port(check: MachineCheck, port: int) -> None:
        try:
            answer = await _answer(check.machine, port)
        except OSError as error:  # e.g. too many open files
            check.take_back(port, _this_host(error))
            return
        if answer is Answer.FILTERED:
            silent[check].append(port)
        else:
            check.record(port, answer)

    async def try_control(check: MachineCheck, port: int) -> None:
        try:
            answer = await _answer(check.machine, port)
        except OSError:
            answer = Answer.FILTERED
        if answer is Answer.FILTERED:
            lost.add(check)

    controls = {check: check.control for check, _ in batch}
    # The controls last: a router that is too small for the batch loses the last packets.
    await _side_by_side(
        [
            *(try_port(check, port) for check, port in batch),
            *(try_control(check, port) for check, port in controls.items() if port is not None),
        ],
        at_once,
    )
    await _side_by_side(
        [try_control(check, port) for check in silent if check not in lost and (port := controls[check]) is not None],
        at_once,
    )
    for check, ports in silent.items():
        for port in ports:
            if check in lost:
                check.take_back(port, _packets_lost(controls[check]))
            else:
                check.record(port, Answer.FILTERED)
    return [(check, port) for check, port in batch if controls[check] is not None and port not in check.answers]


def _this_host(error: OSError) -> str:
    return f"this host can't: {error.strerror}"


def _packets_lost(control: int | None) -> str:
    return (
        f"port {control} did not answer meanwhile, so packets were lost on the way; try them with --ports, "
        "or fewer at once with a lower `ulimit -n`"
    )


async def _side_by_side(works: Sequence[Coroutine[Any, Any, None]], at_once: int) -> None:
    bound = asyncio.Semaphore(at_once)

    async def bounded(work: Coroutine[Any, Any, None]) -> None:
        async with bound:
            await work

    tasks = [spawn_awaited("try ports", bounded(work)) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for work in works:
            work.close()  # those that did not start


def _batches(checks: Sequence[MachineCheck], wanted: set[int], at_once: int) -> Iterator[Sequence[Place]]:
    """Yield all ports in batches that, with a control port for each machine, are tried at once.

    So if the network is lost during a batch for as long as it takes to lose a port, the control port is lost, too.
    """
    places = _in_order(checks, wanted)
    size = max(1, at_once - min(len(checks), at_once // 2))
    # Before the others, as the control port is one of them.
    yield from _in_parts(islice(places, sum(len(check.allowed) for check in checks)), size)
    yield from _in_parts(places, size)


def _in_parts(places: Iterator[Place], size: int) -> Iterator[Sequence[Place]]:
    return iter(lambda: tuple(islice(places, size)), ())


def _in_order(checks: Sequence[MachineCheck], wanted: set[int]) -> Iterator[Place]:
    """Yield each port of each machine once: those that are known first, and the machines in turn."""
    allowed = checks[0].allowed if checks else ()
    known = [port for port in FIRST if port in wanted]
    for port in dict.fromkeys(chain(allowed, known, sorted(wanted))):
        for check in checks:
            yield check, port


async def _answer(machine: Address, port: int) -> Answer:
    """Return the answer of a port within CONNECT_S. Raises OSError if this host can't try it."""
    kind = socket.AF_INET if machine.version == 4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        place = (str(machine), port)
        failed = connection.connect_ex(place)
        if failed in _UNREACHABLE:
            raise OSError(failed, os.strerror(failed))
        try:
            async with asyncio.timeout(CONNECT_S):
                if failed:  # mostly EINPROGRESS; sock_connect may be called again then
                    await asyncio.get_running_loop().sock_connect(connection, place)
        except TimeoutError:
            # If this process was busy, the answer may have come in time.
            return Answer.OPEN if _is_connected(connection) else Answer.FILTERED
        except (ConnectionRefusedError, ConnectionResetError):
            return Answer.CLOSED
        except OSError as error:
            if error.errno in _UNREACHABLE:
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
