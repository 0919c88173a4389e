"""``greenprompt firewall --check``: what answers on real sockets, what is not known, and what the command says."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from deployments.launch import port_check
from deployments.launch.known_ports import known_port
from deployments.launch.local_ray import free_ports
from deployments.launch.port_check import (
    FILES_LEFT,
    MOST_AT_ONCE,
    Answer,
    MachineCheck,
    as_json,
    check_ports,
    lines,
    most_at_once,
    parse_ports,
    require_outside,
    shown,
)
from greenprompt_client.cli import main as cli
from registry.errors import BadSettings

HEAD, WORKER = IPv4Address("127.0.0.2"), IPv4Address("127.0.0.3")

Listen = Callable[..., int]


@pytest.fixture(autouse=True)
def ssh(monkeypatch: pytest.MonkeyPatch) -> int:
    """The port of ssh, which the machine of the tests does not use."""
    (port,) = free_ports(1)
    monkeypatch.setattr(port_check, "SSH", port)
    return port


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Listen on an address; returns the port. ``full``: no more connections are accepted, so it does not answer."""
    with ExitStack() as stack:

        def listen(address: object = "0.0.0.0", *, backlog: int = 1000, full: bool = False) -> int:
            kind = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
            listener = stack.enter_context(socket.socket(kind))
            listener.bind((str(address), 0))
            listener.listen(0 if full else backlog)
            port: int = listener.getsockname()[1]
            if full:
                reached = "127.0.0.1" if address == "0.0.0.0" else str(address)
                stack.enter_context(socket.create_connection((reached, port)))
            return port

        yield listen


async def check(
    *ports: int, http_port: int, machines: Sequence[IPv4Address] = (HEAD,), limit_s: float = 60, at_once: int = 100
) -> list[MachineCheck]:
    """The results of some ports."""
    return await check_ports(machines, ports, http_port=http_port, limit_s=limit_s, at_once=at_once)


# --- what answers ------------------------------------------------------------------------------------------


async def test_open_closed_and_filtered_are_told_apart(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each machine by itself: what listens, what refuses, and what says nothing. The allowed port is tried, too."""
    monkeypatch.setattr(port_check, "CONNECT_S", 0.3)
    http_port, (closed,) = listen(), free_ports(1)
    exposed, filtered = listen(HEAD), listen(full=True)
    head, worker = await check(exposed, closed, filtered, http_port=http_port, machines=[HEAD, WORKER])
    assert head.answers[exposed] is Answer.OPEN
    assert head.answers[filtered] is worker.answers[filtered] is Answer.FILTERED
    assert head.answers[closed] is worker.answers[closed] is worker.answers[exposed] is Answer.CLOSED
    assert head.exposed == [exposed]
    assert worker.exposed == []
    assert [*head.doubts(), *worker.doubts()] == []


async def test_ipv6(listen: Listen) -> None:
    """A machine can have an IPv6 address."""
    try:
        exposed = listen("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    (found,) = await check_ports([ip_address("::1")], [exposed], http_port=listen("::1"), limit_s=60, at_once=9)
    assert found.exposed == [exposed]
    assert any(f"[::1]:{exposed} is exposed" in line for line in lines(found))


async def test_an_answer_counts_although_this_process_was_busy(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that has answered by the time that its limit is noticed is open, not filtered."""
    monkeypatch.setattr(port_check, "CONNECT_S", 0)
    exposed = listen(HEAD)
    (found,) = await check(exposed, http_port=listen())
    assert found.exposed == [exposed]


# --- what is not known -------------------------------------------------------------------------------------


async def test_a_time_limit_leaves_ports_untried(listen: Listen) -> None:
    """What was not tried is named, and counts neither as closed nor as filtered, although the port is open."""
    exposed, slow = listen(), listen(full=True)
    (found,) = await check(exposed, http_port=slow, limit_s=0.3, at_once=1)
    assert {exposed, slow} <= set(found.not_tried)
    assert found.having(Answer.FILTERED) == found.exposed == []
    assert any(f"{exposed}" in doubt and "--time-limit" in doubt for doubt in found.doubts())
    assert json.loads(as_json(found))["notTried"] == 2


def test_known_ports_are_tried_first(ssh: int) -> None:
    """If the time is short, the most dangerous ports have been tried. Each machine has its turn."""
    ports = range(1024, 9000)
    checks = [MachineCheck(machine, ports, 8000) for machine in (HEAD, WORKER)]
    order = [(each.machine, port) for each, port in port_check._in_order(checks, set(ports))]
    first = [*sorted([8000, ssh]), 6390]
    assert order[:6] == [(machine, port) for port in first for machine in (HEAD, WORKER)]
    assert len(order) == len(set(order)) == 2 * len({*ports, ssh})


async def test_a_machine_that_says_nothing_may_be_unreachable(listen: Listen) -> None:
    """If neither ssh nor the registry answers, closed ports prove nothing."""
    (closed, http_port) = free_ports(2)
    (found,) = await check(closed, http_port=http_port)
    assert found.exposed == []
    assert any("may not reach the machine" in doubt for doubt in found.doubts())


class Network:
    """Answers in place of a network: the registry and Ray's GCS listen, and the firewall drops all else.

    ``lost``: the calls, by their number, that get no answer in any case. ``room``: most calls at once that may get one.
    """

    HTTP, GCS = 8000, 6390

    def __init__(self, lost: range = range(0), room: int = 100) -> None:
        self.lost, self.room = lost, room
        self.calls = self.now = self.most = 0
        self.tried: Counter[int] = Counter()

    async def answer(self, _machine: port_check.Address, port: int) -> Answer:
        """The answer of a port."""
        number, self.calls, self.now = self.calls, self.calls + 1, self.now + 1
        self.most = max(self.most, self.now)
        self.tried[port] += 1
        arrives = number not in self.lost and self.now <= self.room
        await asyncio.sleep(0)
        self.now -= 1
        return Answer.OPEN if arrives and port in (self.HTTP, self.GCS) else Answer.FILTERED


async def check_in(network: Network, monkeypatch: pytest.MonkeyPatch, *, ports: range, at_once: int) -> MachineCheck:
    """The result of a machine in this network."""
    monkeypatch.setattr(port_check, "_answer", network.answer)
    monkeypatch.setattr(port_check, "PAUSE_S", 0)
    (found,) = await check(*ports, http_port=network.HTTP, at_once=at_once)
    assert network.most <= at_once
    return found


async def test_a_network_that_is_lost_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the registry's port answers no more during a batch, nor when it is tried again, the batch is not known."""
    network = Network(range(103, 303))
    found = await check_in(network, monkeypatch, ports=range(20000, 20500), at_once=100)
    # The two allowed ports, then batches of 99 ports and a control. The first is confirmed by a control after it.
    lost = range(20000 + 99, 20000 + 2 * 99)
    assert found.not_tried == list(lost)
    (doubt,) = found.doubts()
    assert doubt.startswith(f"not tried: {shown(lost)} (port 8000 did not answer meanwhile")
    assert "--time-limit" not in doubt


async def test_an_exposed_port_is_found_after_the_network_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second try finds what listens; nothing is in doubt then. Ports of other batches are tried once."""
    network = Network(range(2, 102))
    found = await check_in(network, monkeypatch, ports=range(6300, 6500), at_once=100)
    assert found.exposed == [network.GCS]
    assert found.doubts() == []
    assert network.tried[6300] == 2
    assert network.tried[6499] == 1


async def test_a_router_that_loses_the_last_of_many_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is the last of a batch, so it is lost with them although the port answers again afterwards."""
    network = Network(room=80)
    found = await check_in(network, monkeypatch, ports=range(20000, 20099), at_once=100)
    assert found.not_tried == list(range(20000, 20099))
    assert found.answers[network.HTTP] is Answer.OPEN


async def test_known_ports_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dangerous port whose packet alone was lost is found at the end."""
    network = Network(range(2, 3))
    found = await check_in(network, monkeypatch, ports=range(6390, 6500), at_once=100)
    assert network.tried[network.GCS] == 2
    assert found.exposed == [network.GCS]


async def test_a_time_limit_before_the_control_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports that seem filtered count as not tried until the control port confirms it."""

    async def answer(_machine: port_check.Address, port: int) -> Answer:
        if port == Network.HTTP and answered:
            await asyncio.sleep(60)
        answered.append(port)
        return Answer.OPEN if port == Network.HTTP else Answer.FILTERED

    answered: list[int] = []
    monkeypatch.setattr(port_check, "_answer", answer)
    monkeypatch.setattr(port_check, "SSH", Network.HTTP)
    (found,) = await check(20000, http_port=Network.HTTP, limit_s=0.3)
    assert found.not_tried == [20000]


@pytest.mark.parametrize("code", [errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN])
async def test_a_host_without_a_route(code: int, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before a packet is sent says nothing of the port. The same error as an answer is a firewall's."""
    http_port, (port,), own = listen(), free_ports(1), True

    class Socket(socket.socket):
        def connect_ex(self, address: Any) -> int:
            return code if own and address[1] == port else super().connect_ex(address)

        def connect(self, address: Any) -> None:
            if address[1] == port:
                raise OSError(code, os.strerror(code))
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Socket)
    monkeypatch.setattr(port_check, "PAUSE_S", 0)
    (found,) = await check(port, http_port=http_port)
    assert found.doubts() == [f"not tried: {port} (this host can't: {os.strerror(code)})"]
    own = False
    (found,) = await check(port, http_port=http_port)
    assert found.having(Answer.FILTERED) == [port]
    assert found.doubts() == []


async def test_what_this_host_can_not_try(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of this host says nothing of the port: it is not tried, with the reason."""
    http_port, (port,), connect = listen(), free_ports(1), port_check._answer

    async def fail(machine: port_check.Address, tried: int) -> Answer:
        if tried == port:
            raise PermissionError(1, "Operation not permitted")
        return await connect(machine, tried)

    monkeypatch.setattr(port_check, "_answer", fail)
    monkeypatch.setattr(port_check, "PAUSE_S", 0)
    (found,) = await check(port, http_port=http_port)
    assert found.doubts() == [f"not tried: {port} (this host can't: Operation not permitted)"]


# --- limits ------------------------------------------------------------------------------------------------


@pytest.fixture
def few_files() -> Iterator[int]:
    """A low limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = FILES_LEFT + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_the_limit_of_open_files_is_kept(few_files: int, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more slow ports than this process can have open files, all are tried."""
    monkeypatch.setattr(port_check, "CONNECT_S", 0.2)
    filtered, http_port = listen(full=True), listen()
    machines = [HEAD + n for n in range(few_files + 20)]
    found = await check(filtered, http_port=http_port, machines=machines, at_once=most_at_once())
    assert {each.answers.get(filtered) for each in found} == {Answer.FILTERED}
    assert [doubt for each in found for doubt in each.doubts()] == []


@pytest.mark.parametrize(
    ("files", "most"),
    [(resource.RLIM_INFINITY, MOST_AT_ONCE), (10**6, MOST_AT_ONCE), (FILES_LEFT + 7, 7), (FILES_LEFT, 1)],
)
def test_connections_at_once(files: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some open files are left to the process; there is always one connection."""
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (files, files))
    assert most_at_once() == most


# --- words -------------------------------------------------------------------------------------------------


def test_ports_as_text() -> None:
    """Ranges are short, and can be read back."""
    assert shown([22, 1024, 1025, 1026, 8000]) == "22, 1024-1026, 8000"
    assert parse_ports("1024-1026", "--ports") == range(1024, 1027)
    assert parse_ports("8000", "--ports") == range(8000, 8001)


@pytest.mark.parametrize("text", ["", "-", "0-9", "9-8", "1-65536", "1-x", "8000-", "1-2-3"])
def test_other_ports_are_refused(text: str) -> None:
    """The error names the option."""
    with pytest.raises(BadSettings, match=r"--ports.*is no range"):
        parse_ports(text, "--ports")


@pytest.mark.parametrize(
    ("port", "what"),
    [
        (6390, "GCS"),
        (8265, "dashboard"),
        (8500, "fallback"),
        (8404, "statistics"),
        (9101, "metrics"),
        (8090, "metrics"),
        (10500, "worker"),
        (44217, "metrics"),
        (30007, "replica"),
        (8443, "the API"),
        (45678, "ss -ltnp"),
    ],
)
def test_what_a_port_is(port: int, what: str) -> None:
    """Known numbers are named; for others it says how to find out."""
    known = known_port(port, http_port=8443)
    assert what in known.what
    assert known.risk


@pytest.mark.parametrize("own", ["127.0.0.9", "own"])
def test_a_machine_of_the_cluster_is_no_outside(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the address that this host has."""
    address = type("Address", (), {"family": socket.AF_INET, "address": "192.0.2.7"})
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [address]})
    mine = ip_address("192.0.2.7" if own == "own" else own)
    require_outside([ip_address("192.0.2.8")])
    with pytest.raises(BadSettings, match=f"this host is {mine}"):
        require_outside([ip_address("192.0.2.8"), mine])


# --- the command -------------------------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command for a cluster of HEAD and WORKER, as if this host were none of them."""
    monkeypatch.setattr(port_check, "require_outside", lambda _machines: None)
    file = tmp_path / "cluster.yaml"
    file.write_text(f"provider: {{type: local, head_ip: {HEAD}, worker_ips: [{WORKER}]}}\n")

    def run(*options: Any) -> Result:
        return CliRunner().invoke(cli.app, ["firewall", str(file), *map(str, options)])

    return run


def test_the_command_names_what_is_exposed(run: Run, listen: Listen) -> None:
    """Status 1, a line for each such port, and the command that closes them, with the same port."""
    exposed, http_port = listen(WORKER), listen()
    result = run("--check", "--port", http_port, "--ports", f"{exposed}-{exposed}")
    assert result.exit_code == 1
    assert f"{WORKER}:{exposed} is exposed: unknown: look with `ss -ltnp`" in result.output
    assert f"{HEAD}:{http_port} is open, and may be" in result.output
    assert f"{HEAD}: 0 exposed, 1 allowed, 0 filtered, 2 closed, 0 not tried" in result.output
    assert f"--port {http_port} | sudo nft -f -" in result.output


def test_the_command_finds_nothing(run: Run, listen: Listen) -> None:
    """Status 0 if only what may be open is."""
    result = run("--check", "--port", listen(), "--ports", *free_ports(1))
    assert result.exit_code == 0, result.output
    assert "nft" not in result.output


def test_the_command_does_not_know(run: Run, listen: Listen) -> None:
    """Status 2 if one machine can't be reached; but 1 if something is exposed on another."""
    http_port, (closed,), exposed = listen(HEAD), free_ports(1), listen(HEAD)
    result = run("--check", "--port", http_port, "--ports", closed)
    assert result.exit_code == 2
    assert f"{WORKER}: none of the ports" in result.output
    assert run("--check", "--port", http_port, "--ports", exposed).exit_code == 1


def test_the_time_limit_of_the_command(run: Run, listen: Listen) -> None:
    """Status 2, and the ports are named."""
    slow = listen(full=True)
    result = run("--check", "--port", slow, "--ports", slow, "--time-limit", 1)
    assert result.exit_code == 2
    assert f"{HEAD}: not tried: {slow} (the time limit was reached" in result.output


def test_json(run: Run, listen: Listen) -> None:
    """An object for each machine, a line each."""
    exposed, http_port = listen(HEAD), listen()
    result = run("--check", "--json", "--port", http_port, "--ports", exposed)
    head, worker = map(json.loads, result.stdout.splitlines())
    assert (head["machine"], worker["machine"]) == (str(HEAD), str(WORKER))
    assert {entry["port"]: entry["allowed"] for entry in head["open"]} == {exposed: False, http_port: True}
    assert (worker["closed"], worker["filtered"], worker["notTried"], worker["doubts"]) == (2, 0, 0, [])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--json"], "need --check"),
        (["--ports", "1-2"], "need --check"),
        (["--time-limit", "5"], "need --check"),
        (["--check", "--allow", "192.0.2.1"], "--allow"),
        (["--check", "--ports", "x"], "--ports"),
    ],
)
def test_options_that_do_not_go_together(run: Run, options: list[str], named: str) -> None:
    """They are refused, not ignored."""
    with pytest.raises(BadSettings, match=named):
        raise run(*options).exception or AssertionError
