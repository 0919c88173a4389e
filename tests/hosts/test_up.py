"""From ``ray up cluster.yaml`` to a measurement on every machine, with what an operator does in between."""

from __future__ import annotations

import json
import re
import shlex
import time

import httpx
import pytest

from tests.hosts.conftest import READY_LIMIT_S, SSH_WAIT_S, Cluster, llmconfig, prompt, until
from tests.hosts.hosts import alive

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]

CHECK_LIMIT_S = 300
"""Three machines with 4,000 filtered ports each take about half a minute."""

LISTENING = "ss -Hltn | awk '{print $4}' | grep -v '^127\\.\\|^\\[::1\\]' | sed 's/.*://' | sort -un"
"""Prints the TCP ports of a host that are not on loopback."""

GONE_LIMIT_S = 10
"""The registry says that a lease has ended, and then tells the wrapper."""


def gone(address: str) -> bool:
    """Whether the wrapper refuses a lease's address since it has ended."""
    return httpx.get(f"{address}/get_status", timeout=30).status_code == 410


def test_every_machine_finishes_a_measurement(cluster: Cluster) -> None:
    """Two measurements of two LLMs each run side by side, each on one machine, and every LLM answers."""
    cluster.until_ready("w1", "w2")
    used = {}
    for measurement_id in (time.time_ns(), time.time_ns()):
        used[measurement_id] = cluster.post(measurement_id, "a", "b")
    machines = set()
    for first, second in zip(*used.values(), strict=True):
        leases = [cluster.until(first, "deployed"), cluster.until(second, "deployed")]
        machines.add(tuple(lease["machine"] for lease in leases))
        for lease in leases:
            assert prompt(lease["url"]).status_code == 200
            cluster.release(lease["requestId"])
            until(lambda: gone(lease["url"]), GONE_LIMIT_S)  # noqa: B023 - called in this round
    ((first, second),) = machines
    assert {first, second} == {cluster.net.host(name).address for name in cluster.workers}


def test_again_changes_nothing_and_other_settings_are_refused(cluster: Cluster) -> None:
    """``ray up`` a second time leaves machines, LLMs and leases as they are, with the same settings or with others.

    Where a setting is new, it says which, and how to change it.
    """
    cluster.until_ready("w1", "w2")
    (request_id,) = cluster.post(time.time_ns(), "a")
    lease = cluster.until(request_id, "deployed")
    hosts = [cluster.net.host(name) for name in ("head", *cluster.workers)]
    raylets = [raylet for host in hosts for raylet in host.running("raylet/raylet")]
    (registry,) = cluster.head.running("ray::RegistryActor")
    cluster.describe("w1", "w2", LEASES__IDLE_S="7")
    said = cluster.ray("up -y ~/cluster.yaml", check=False)
    cluster.describe("w1", "w2")
    assert "leases.idle_s" in said
    assert "greenprompt down --address auto" in said
    cluster.ray("up -y ~/cluster.yaml")
    assert prompt(lease["url"]).status_code == 200
    assert all(alive(process) for process in (registry, *raylets))
    assert cluster.state(request_id)["status"] == "deployed"
    cluster.release(request_id)


def test_the_operators_commands_work(cluster: Cluster) -> None:
    """``ray exec`` reaches the registry's command on the head, which shows every machine."""
    shown = cluster.ray("exec ~/cluster.yaml 'greenprompt status'")
    for name in cluster.workers:
        assert cluster.net.host(name).address in shown


def test_a_neighbour_needs_a_key(cluster: Cluster) -> None:
    """Another host of the network gets nothing without a key, whatever it claims to be; with a client's key, an LLM.

    It gets nothing from the ports of replicas, which serve only the HAProxies of the cluster: that of each machine.
    """
    cluster.until_ready("w1", "w2")
    neighbour, path = cluster.net.host("db"), f"{cluster.url}/promptingservice/request"
    (request_id,) = cluster.post(time.time_ns(), "a")
    lease = cluster.until(request_id, "deployed")["url"]
    config = cluster.head.run("cat $(ls -t /tmp/gp-*/h/*/haproxy.cfg | head -1)")  # not of a Ray that has died
    places = set(re.findall(r"^ *server \S+ (\S+) check", config, re.MULTILINE))
    assert {place.rpartition(":")[0] for place in places} >= {"127.0.0.1", cluster.net.host("w1").address}
    for place in places:
        direct = f"http://{place.replace('127.0.0.1', cluster.head.address)}"
        header = "-H 'X-GreenPrompt-Proxy: 0'"
        # Each replica has one of these paths; for the others Serve itself answers that they do not exist.
        wrappers = [f"/wrappers/{cluster.net.host(name).address}-0/x/get_status" for name in cluster.workers]
        urls = " ".join(f"{direct}{own}" for own in ("/machines", *wrappers))
        assert "not_through_proxy" in neighbour.run(f"curl -s {header} {urls}"), place
    for name in ("head", "w1", "w2"):
        through = lease.replace(cluster.head.address, cluster.net.host(name).address)
        assert prompt(through).status_code == 200, name
    cluster.release(request_id)
    body = json.dumps({"measurementId": 5, "llms": [llmconfig("a")]})

    def post(*headers: str) -> str:
        told = " ".join(f"-H {shlex.quote(header)}" for header in ("Content-Type: application/json", *headers))
        return neighbour.run(f"curl -s -w '%{{http_code}}' {told} -d {shlex.quote(body)} {path}")

    trusted = cluster.net.gateway
    for claim in ("X-Other: 1", f"X-Forwarded-For: {trusted}", f"X-GreenPrompt-Source: {trusted}"):
        assert post(claim).endswith("401"), claim
    made = cluster.ray("exec ~/cluster.yaml 'greenprompt keys create --tenant lab'")
    (key,) = re.findall(r"gp_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", made)
    assert post(f"Authorization: Bearer {key}", "X-Tenant: default").endswith("403")
    accepted = post(f"Authorization: Bearer {key}")
    assert accepted.endswith("201")
    answer = accepted[accepted.index("{") :].removesuffix("201")  # a host may say something before it
    request_id = json.loads(answer)["requests"][0]["requestId"]
    assert cluster.call("GET", f"/promptingservice/request/{request_id}").status_code == 404, "another tenant's"
    released = (
        f"curl -s -o /dev/null -w '%{{http_code}}' -X DELETE -H 'Authorization: Bearer {key}' {path}/{request_id}"
    )
    assert neighbour.run(released).endswith("204")
    cluster.until_ready("w1", "w2")


def numbers(output: str) -> list[str]:
    """The lines of an output that are numbers."""
    return re.findall(r"^\d+$", output, re.MULTILINE)


def test_the_firewall_closes_all_but_the_registry(cluster: Cluster) -> None:
    """Without the rules a neighbour reaches many ports of the head; with them only the registry's. Leases work.

    The neighbour's own check finds the same: Ray's GCS before, and nothing with the rules. A machine refuses to check.
    """
    cluster.until_ready("w1", "w2")
    head, neighbour = cluster.head, cluster.net.host("db")
    ports = numbers(head.run(LISTENING))
    assert not {"8404", "9101"} & set(ports), "HAProxy's statistics and metrics"

    def reached() -> set[str]:
        tries = [
            f"timeout 2 bash -c 'exec 3<>/dev/tcp/{head.address}/{port}' 2>/dev/null && echo {port} &" for port in ports
        ]
        return set(numbers(neighbour.run("\n".join([*tries, "wait"]), check=False)))

    def checked(ports: str) -> tuple[str, str]:
        """Exit status and output of a check by the neighbour."""
        said = neighbour.run(f"{rules} --check --ports {ports}; echo status $?", limit_s=CHECK_LIMIT_S)
        return said.split()[-1], said

    before = reached()
    assert {"22", "8000", "6390"} <= before
    rules = "~/greenprompt/.venv/bin/greenprompt firewall ~/cluster.yaml"
    desk = cluster.net.host("desk")
    text = desk.run(rules)
    (neighbour.home / "cluster.yaml").write_bytes((desk.home / "cluster.yaml").read_bytes())
    status, said = checked("1024-65535")
    assert status == "1", said
    assert f"{head.address}:6390 is exposed: Ray's GCS" in said
    assert said.count("0 not tried") == 1 + len(cluster.workers), said
    (head.home / "checked.yaml").write_bytes((desk.home / "cluster.yaml").read_bytes())
    own = ".venv/bin/greenprompt firewall ~/checked.yaml --check"
    assert f"this host is {head.address}" in head.run(own, check=False)
    try:
        for name in ("head", *cluster.workers):
            cluster.net.host(name).run(f"nft -f - <<'RULES'\n{text}\nRULES")
        assert reached() == {"22", "8000"}
        status, said = checked("6000-9999")  # filtered ports take their time
        assert status == "0", said
        assert said.count(": 0 exposed, 2 allowed") == 1 + len(cluster.workers), said
        (request_id,) = cluster.post(time.time_ns(), "a")
        lease = cluster.until(request_id, "deployed")
        assert prompt(lease["url"]).status_code == 200
        cluster.release(request_id)
    finally:
        for name in ("head", *cluster.workers):
            cluster.net.host(name).run("nft delete table inet greenprompt", check=False)
    assert "6390" in reached()


def test_a_neighbour_gets_answers_from_the_ports_of_security_md_only(cluster: Cluster) -> None:
    """Without a firewall, of all ports of the head those answer a GET without a key that SECURITY.md names."""
    cluster.until_ready("w1", "w2")
    ports = " ".join(numbers(cluster.head.run(LISTENING)))
    get = f"curl -s -o /dev/null -m 5 -w '%{{http_code}} '$port'\\n' http://{cluster.head.address}:$port$path"
    tries = f"for port in {ports}; do for path in / /metrics /machines /-/routes; do {get} & done; done; wait"
    said = cluster.net.host("db").run(tries, check=False)
    found = {int(port) for code, port in re.findall(r"^(\d+) (\d+)$", said, re.MULTILINE) if code.startswith("2")}
    replicas = {port for port in found if port in range(30_000, 31_001)}
    assert replicas
    assert found - replicas == {8000, 8500, 8090, 44217, 44227}


@pytest.mark.long
def test_a_machine_more_and_one_less(cluster: Cluster) -> None:
    """``ray up`` with another cluster.yaml takes in what is new there, and leaves all others and their leases alone."""
    cluster.until_ready("w1", "w2")
    (request_id,) = cluster.post(time.time_ns(), "a")
    lease = cluster.until(request_id, "deployed")
    hosts = [cluster.net.host(name) for name in ("head", "w1", "w2")]
    raylets = [raylet for host in hosts for raylet in host.running("raylet/raylet")]
    cluster.describe("w1", "w2", "w3")
    cluster.ray("up -y ~/cluster.yaml")
    cluster.until_ready("w1", "w2", "w3")
    cluster.describe("w1", "w2")
    cluster.ray("up -y ~/cluster.yaml")
    gone = cluster.net.host("w3")
    gone.run(".venv/bin/ray stop")
    cluster.until_ready("w1", "w2")
    assert prompt(lease["url"]).status_code == 200
    assert all(alive(raylet) for raylet in raylets)
    cluster.release(request_id)
    until(lambda: gone.processes() == {}, 60, gone.processes)


@pytest.mark.long
def test_a_machine_that_could_not_be_started_is_tried_again(cluster: Cluster) -> None:
    """One that was off until starting it had failed is back and leased, without help, when it is on again."""
    cluster.until_ready("w1", "w2")
    failures = "grep -c 'Terminating the node .*(launch failed)' /tmp/gp-*/r/session_latest/logs/monitor.log"
    machine, before = cluster.net.host("w1"), cluster.head.run(failures, check=False)
    machine.power_off()
    took_s = until(lambda: cluster.head.run(failures, check=False) != before, 2 * SSH_WAIT_S + READY_LIMIT_S)
    print(f"a machine is off -> starting it has failed: {took_s:.1f} s")
    machine.boot()
    took_s = until(lambda: cluster.ready() == {"w1", "w2"}, READY_LIMIT_S, cluster.machines)
    print(f"it is on again -> ready for leases: {took_s:.1f} s")
    leases = [cluster.until(cluster.post(time.time_ns(), "a")[0], "deployed") for _ in cluster.workers]
    assert machine.address in {lease["machine"] for lease in leases}
    for lease in leases:
        assert prompt(lease["url"]).status_code == 200
        cluster.release(lease["requestId"])


def test_a_machine_joins(cluster: Cluster) -> None:
    """A machine that is started by hand gets its wrapper, which takes its GPUs, without anyone asking."""
    cluster.until_ready("w1", "w2")
    joins = cluster.net.host("w3")
    joins.run("mkdir -p ~/.ray")
    (joins.home / ".ray/auth_token").write_bytes((cluster.head.home / ".ray/auth_token").read_bytes())
    joins.run(f".venv/bin/greenprompt ray-start --address={cluster.head.address}:6390 --num-gpus=2")
    took_s = until(lambda: "w3" in cluster.ready(), READY_LIMIT_S)
    print(f"a machine joined -> ready for leases: {took_s:.1f} s")
    (wrapper,) = cluster.machines()[joins.address]["wrappers"]
    assert wrapper["gpus"] == 2
    assert "2.0/2.0 GPU" in cluster.ray("exec ~/cluster.yaml 'RAY_AUTH_MODE=token ray status'")
    joins.run(".venv/bin/ray stop")
    gone_s = until(lambda: "w3" not in cluster.ready(), 30)
    print(f"it left -> known: {gone_s:.1f} s")
    assert not cluster.machines()[joins.address]["alive"]
    until(lambda: joins.processes() == {}, 60, joins.processes)
