"""The fault table of registry/DESIGN.md, row by row, on a cluster of several hosts.

Before each fault two machines are leased to clients that go on prompting, and a third client waits. Afterwards
nothing that was accepted is lost, no machine has two leases, every lease is alive or its holder was told, and who
waited is served.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import psutil
import pytest

from tests.hosts.conftest import (
    DATABASE,
    REPOSITORY,
    Cluster,
    prompt,
    start_databases,
    until,
)
from tests.hosts.hosts import Host, alive

pytestmark = [pytest.mark.hosts, pytest.mark.fault, pytest.mark.timeout(900)]

FENCE_LIMIT_S = 60
"""Within this a wrapper that hears nothing has shut its gate: `wrappers.fence_s` is 30."""
SERVED_LIMIT_S = 180
"""Longest wait for service afterwards; how long it took is printed, and is a matter of the benches."""

PAUSE_S = 0.5
"""Between the prompts of a holder: all hosts share one machine's processors, which are not to be busy with them."""


@dataclass
class Holder:
    """A client with a lease, who prompts until it is told that the lease has ended."""

    cluster: Cluster
    request_id: str
    lease: dict[str, Any]
    answers: list[tuple[float, int]] = field(default_factory=list)
    """When (monotonic seconds), and the HTTP status; 0: no answer at all."""
    told_s: float | None = None
    reason: str | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def host(self) -> Host:
        """The machine that the lease is on."""
        return next(host for host in self.cluster.net.hosts.values() if host.address == self.lease["machine"])

    def begin(self) -> None:
        """Prompt in the background."""
        self._thread = threading.Thread(target=self._prompt, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop prompting."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(120)

    def _prompt(self) -> None:
        with httpx.Client(timeout=10) as http:
            while not self._over.wait(PAUSE_S):
                try:
                    status = http.post(f"{self.lease['url']}/process_prompt", json={"question": "?"}).status_code
                except httpx.TransportError:
                    status = 0
                self.answers.append((time.monotonic(), status))
                if status != 200:
                    self._ask_why(http)

    def _ask_why(self, http: httpx.Client) -> None:
        """What a client does whose prompt failed: look at its link."""
        try:
            answer = http.get(f"{self.cluster.url}/promptingservice/request/{self.request_id}")
        except httpx.TransportError:
            return
        if answer.status_code == 200 and answer.json()["endedAt"] is not None and self.told_s is None:
            self.told_s, self.reason = time.monotonic(), answer.json()["reason"]

    def served_since(self, at_s: float) -> bool:
        """Whether a prompt was answered after this moment."""
        return any(status == 200 and when > at_s for when, status in self.answers)


@dataclass
class Scene:
    """Two leases and one who waits; what a row does with them."""

    cluster: Cluster
    holder: Holder
    other: Holder
    waits: str
    gcs: set[int] = field(init=False)
    """The head's GCS when the scene began."""

    def __post_init__(self) -> None:
        self.gcs = set(self.head.pids("gcs/gcs_server"))

    @property
    def head(self) -> Host:
        """The head."""
        return self.cluster.head

    @property
    def database(self) -> Host:
        """The host of the databases."""
        return self.cluster.net.host("db")

    def kill(self, host: Host, part: str) -> None:
        """SIGKILL what has this part in its command line."""
        for process in host.running(part):
            process.kill()


# --- the rows: what is done, and whether the first lease lives on --------------------------------------------


def kill_registry(scene: Scene) -> None:
    scene.kill(scene.head, "ray::RegistryActor")


def kill_ingress(scene: Scene) -> None:
    scene.kill(scene.head, "ray::ServeReplica:registry:Ingress")


def kill_wrapper(scene: Scene) -> None:
    scene.kill(scene.holder.host, "ray::ServeReplica:wrapper")


def kill_engine(scene: Scene) -> None:
    host = scene.holder.host
    forkserver = psutil.Process(
        min(host.pids("multiprocessing.forkserver"))
    )  # engines are its children, and look like it
    (engine,) = forkserver.children()
    engine.kill()


def kill_controller(scene: Scene) -> None:
    scene.kill(scene.head, "ray::ServeController")


def kill_haproxy(scene: Scene) -> None:
    scene.kill(scene.head, "bin/haproxy")


def kill_raylet(scene: Scene) -> None:
    scene.kill(scene.holder.host, "raylet/raylet")


def power_off_machine(scene: Scene) -> None:
    host = scene.holder.host
    host.power_off()
    told(scene)
    host.boot()


def cut_machine(scene: Scene) -> None:
    host = scene.holder.host
    host.cut()
    told(scene)
    # Whoever sits on that machine still reaches the wrapper, which hears nothing from the registry any more.
    own = f"{scene.holder.lease['url'].replace(scene.head.address, host.address)}/get_status"
    ask = f""".venv/bin/python -c 'import httpx; print(httpx.get("{own}", timeout=30).text)'"""
    until(lambda: '"not ready"' in host.run(ask, check=False), FENCE_LIMIT_S, lambda: host.run(ask, check=False))
    host.heal()


def nothing_in(scene: Scene) -> None:
    one_way(scene, "input")


def nothing_out(scene: Scene) -> None:
    one_way(scene, "output")


def one_way(scene: Scene, hook: str) -> None:
    host = scene.holder.host
    host.deaf(hook)
    told(scene)
    host.heal()


def slow_network(scene: Scene) -> None:
    host = scene.holder.host
    host.throttle(512)
    time.sleep(15)
    host.heal()


def lossy_network(scene: Scene) -> None:
    host = scene.holder.host
    host.lose(10)
    time.sleep(15)
    host.heal()


def restart_postgresql(scene: Scene) -> None:
    scene.kill(scene.database, "bin/postgres -D")
    link = f"{scene.cluster.url}/promptingservice/request/{scene.holder.request_id}"
    assert httpx.post(f"{link}/keepalive", timeout=60).status_code == 503  # which can't be written down
    time.sleep(5)
    start_databases(scene.database)


def until_new_gcs(scene: Scene) -> None:
    """Return when the head's keeper has started Ray again; call it while the old GCS may still run."""
    until(lambda: not set(scene.head.pids("gcs/gcs_server")) & scene.gcs, 60)
    until(lambda: scene.head.pids("gcs/gcs_server"), SERVED_LIMIT_S)


def kill_gcs(scene: Scene) -> None:
    scene.kill(scene.head, "gcs/gcs_server")
    until_new_gcs(scene)


def restart_redis(scene: Scene) -> None:
    scene.kill(scene.database, "redis-server")
    start_databases(scene.database)
    until_new_gcs(scene)  # Ray's head does not connect to it again


def full_disk(scene: Scene) -> None:
    scene.database.run(f"dd if=/dev/zero of={DATABASE}/fill bs=64k status=none", check=False)
    time.sleep(15)
    scene.database.run(f"rm {DATABASE}/fill")
    start_databases(scene.database)


def restart_head(scene: Scene) -> None:
    scene.head.power_off()
    scene.head.boot()
    scene.cluster.ray("up -y ~/cluster.yaml --restart-only")


ALIVE, RESTARTED, TOLD = (
    "nothing else has changed",
    "its engine has restarted, which is told",
    "it has ended, which is told",
)
"""What may become of the first lease."""
ROWS: dict[str, tuple[Callable[[Scene], None], str]] = {
    "registry actor killed": (kill_registry, ALIVE),
    "ingress replica killed": (kill_ingress, ALIVE),
    "wrapper replica killed": (kill_wrapper, RESTARTED),
    "engine killed": (kill_engine, RESTARTED),
    "Serve controller killed": (kill_controller, ALIVE),
    "HAProxy of the head killed": (kill_haproxy, ALIVE),
    "raylet of a machine killed": (kill_raylet, TOLD),
    "machine without power": (power_off_machine, TOLD),
    "machine cut off": (cut_machine, TOLD),
    "nothing reaches a machine": (nothing_in, TOLD),
    "nothing comes from a machine": (nothing_out, TOLD),
    "slow network": (slow_network, ALIVE),
    "lossy network": (lossy_network, ALIVE),
    "PostgreSQL restarted": (restart_postgresql, ALIVE),
    "Redis restarted": (restart_redis, ALIVE),
    "GCS of the head killed": (kill_gcs, ALIVE),
    "disk full under PostgreSQL": (full_disk, ALIVE),
    "head restarted": (restart_head, ALIVE),
}
ELSEWHERE = {
    "GCS of the head killed, without Redis": (
        "tests/hosts/test_head.py",
        "test_a_head_without_redis_is_back_without_a_person",
    ),
    "main memory runs out": (
        "tests/cluster/test_memory.py",
        "test_memory_that_runs_out_ends_an_engine_and_nothing_else",
    ),
}
"""Rows that are tested in another way: the file and the name of the test."""


ALWAYS = ("registry actor killed", "Serve controller killed")
"""The rows that `make test` tries, too; `make test-cluster` tries all."""


def told(scene: Scene) -> None:
    """Return when the first holder, who looks at its link all the time, is told that its lease has ended."""
    holder = scene.holder
    until(lambda: holder.cluster.state(holder.request_id)["endedAt"] is not None, SERVED_LIMIT_S)
    if holder.told_s is None:
        holder.told_s, holder.reason = time.monotonic(), holder.cluster.state(holder.request_id)["reason"]


@pytest.fixture
def scene(cluster: Cluster) -> Iterator[Scene]:
    """Two machines leased, a third request waiting; everything released afterwards."""
    cluster.until_ready(*cluster.workers)
    holders = []
    for name in "ab":
        (request_id,) = cluster.post(time.time_ns(), name)
        holders.append(Holder(cluster, request_id, cluster.until(request_id, "deployed")))
    (waits,) = cluster.post(time.time_ns(), "a")
    for holder in holders:
        holder.begin()
    first, second = holders
    yield Scene(cluster, first, second, waits)
    for holder in holders:
        holder.end()
    for request_id in (waits, *(holder.request_id for holder in holders)):
        cluster.release(request_id)


def test_table_and_tests_have_the_same_rows() -> None:
    """What the design promises is tested, here or by the test that is named, and nothing else is promised."""
    text = (REPOSITORY / "registry/DESIGN.md").read_text(encoding="utf-8")
    table = text.partition("<!-- faults:begin -->")[2].partition("<!-- faults:end -->")[0]
    assert re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:] == [*ROWS, *ELSEWHERE]
    for path, test in ELSEWHERE.values():
        assert f"def {test}(" in (REPOSITORY / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", [row if row in ALWAYS else pytest.param(row, marks=pytest.mark.long) for row in ROWS])
def test_fault(scene: Scene, row: str) -> None:
    """Nothing accepted is lost, no lease is double, holders are served or told, and who waited is served."""
    act, outcome = ROWS[row]
    cluster, holder, other = scene.cluster, scene.holder, scene.other
    until(lambda: all(each.served_since(0) for each in (holder, other)), 60)
    wrapper = holder.host.running("ray::ServeReplica:wrapper")
    begun_s = time.monotonic()
    act(scene)
    healed_s = time.monotonic()
    if outcome is TOLD:
        told(scene)
        assert holder.told_s is not None
        print(f"{row}: holder told after {holder.told_s - begun_s:.1f} s: {holder.reason}")
    else:
        if outcome is RESTARTED:  # what was under way when its engine was killed may be answered yet
            until(lambda: engine_restarted(holder), SERVED_LIMIT_S, lambda: cluster.state(holder.request_id))
            healed_s = time.monotonic()
        until(lambda: holder.served_since(healed_s), SERVED_LIMIT_S, lambda: (holder.answers[-5:], holder.reason))
        assert holder.told_s is None, holder.reason
        print(f"{row}: longest time without an answer {longest_gap(holder, begun_s):.1f} s")
    if outcome is ALIVE:
        assert not engine_restarted(holder)
        assert all(alive(process) for process in wrapper)
    until(lambda: other.served_since(healed_s), SERVED_LIMIT_S, lambda: (other.answers[-5:], other.reason))
    assert other.told_s is None, other.reason
    ids = {holder.request_id, other.request_id, scene.waits}
    states = {request_id: cluster.state(request_id) for request_id in ids}  # none is lost
    held = [state["wrapper"] for state in states.values() if state["status"] == "deployed"]
    assert len(set(held)) == len(held), states
    freed_s = time.monotonic()
    cluster.release(other.request_id)
    served = cluster.until(scene.waits, "deployed", limit_s=SERVED_LIMIT_S)
    now_s = time.monotonic()
    print(f"{row}: next grant {now_s - freed_s:.1f} s after a release, {now_s - begun_s:.1f} s after the fault")
    assert prompt(served["url"]).status_code == 200
    if outcome is TOLD:
        assert httpx.get(f"{holder.lease['url']}/get_status", timeout=30).status_code in (403, 404, 410, 503)
        cluster.until_ready(*cluster.workers)
        print(f"{row}: both machines are there {time.monotonic() - begun_s:.1f} s after the fault")
    else:
        until(lambda: holder.served_since(freed_s), 30)


def engine_restarted(holder: Holder) -> bool:
    """Whether it is told that the engine of its lease is another one than before."""
    return "engine_restarted" in holder.cluster.state(holder.request_id)["flags"]


def longest_gap(holder: Holder, since_s: float) -> float:
    """Longest time between two prompts that were answered, seconds."""
    served = [when for when, status in list(holder.answers) if status == 200 and when > since_s - 1]
    return max((after - before for before, after in pairwise(served)), default=0.0)
