"""A cluster as its operator makes it: ``ray up cluster.yaml`` from a desk, machines reached by ssh."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.hosts import hosts
from tests.hosts.hosts import HOME, INSTALLED, Host, Network

REPOSITORY = Path(__file__).resolve().parents[2]
POSTGRESQL_PROGRAMS = "/usr/lib/postgresql/*/bin"
LOGS = REPOSITORY / "build" / "hosts" / "logs"
DATABASE = HOME / "postgresql"
DATABASE_PORT, REDIS_PORT = 5433, 6380

UP_LIMIT_S = 480
READY_LIMIT_S = 300
DEPLOY_LIMIT_S = 120

SSH_WAIT_S = 45
"""How long the launcher on the head waits for the ssh of a machine until starting it has failed; Ray's own is 900."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where hosts can't be made their tests say what is missing."""
    lacks = hosts.missing()
    if not list(Path("/").glob(f"{POSTGRESQL_PROGRAMS}/initdb".lstrip("/"))):
        lacks.append("postgresql")
    if lacks:
        reason = f"hosts can't be made here: {', '.join(lacks)} missing"
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class Cluster:
    """The hosts, and the registry that runs on them."""

    net: Network
    workers: tuple[str, ...]
    http: httpx.Client

    @property
    def head(self) -> Host:
        """The host of the registry."""
        return self.net.host("head")

    @property
    def url(self) -> str:
        """The registry's base URL."""
        return f"http://{self.head.address}:8000"

    def ray(self, command: str, limit_s: float = UP_LIMIT_S, *, check: bool = True) -> str:
        """Run the launcher on the desk, as the README says; its output."""
        return self.net.host("desk").run(f"ray {command}", limit_s=limit_s, check=check)

    def describe(self, *workers: str, redis: bool = True, **settings: str) -> None:
        """Edit cluster.yaml on the desk: these are the machines now, and more settings of the registry."""
        text = yaml.safe_dump(cluster_yaml(self.net, workers, settings, redis=redis))
        (self.net.host("desk").home / "cluster.yaml").write_text(text, encoding="utf-8")

    # --- over HTTP ---------------------------------------------------------------------------------------

    def call(self, method: str, path: str, *, limit_s: float = 60, **more: Any) -> httpx.Response:
        """One HTTP request to the registry, sent again while it says that it can be."""
        deadline_s = time.monotonic() + limit_s
        while True:
            try:
                answer = self.http.request(method, f"{self.url}{path}", timeout=limit_s, **more)
            except httpx.TransportError:
                if time.monotonic() > deadline_s:
                    raise
            else:
                if answer.status_code not in (429, 503) or time.monotonic() > deadline_s:
                    return answer
            time.sleep(0.1)

    def post(self, measurement_id: int, *llms: str) -> list[str]:
        """Request LLMs (``a`` or ``b``); their ids."""
        body = {"measurementId": measurement_id, "llms": [llmconfig(name) for name in llms]}
        key = {"idempotency-key": f"{measurement_id}-{time.time_ns()}"}
        answer = self.call("POST", "/promptingservice/request", json=body, headers=key)
        assert answer.status_code == 201, answer.text
        return [entry["requestId"] for entry in answer.json()["requests"]]

    def state(self, request_id: str) -> dict[str, Any]:
        """The status of a request."""
        answer = self.call("GET", f"/promptingservice/request/{request_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def until(self, request_id: str, *statuses: str, limit_s: float = DEPLOY_LIMIT_S) -> dict[str, Any]:
        """The status of a request once it is one of these."""
        deadline_s = time.monotonic() + limit_s
        while (state := self.state(request_id))["status"] not in statuses:
            assert time.monotonic() < deadline_s, state
            assert state["endedAt"] is None, state
            time.sleep(0.1)
        return state

    def release(self, request_id: str) -> None:
        """Give an LLM back."""
        assert self.call("DELETE", f"/promptingservice/request/{request_id}").status_code == 204

    def machines(self) -> dict[str, dict[str, Any]]:
        """GET /machines, by id, which here is the address."""
        return {machine["machine"]: machine for machine in self.call("GET", "/machines").json()}

    def ready(self) -> set[str]:
        """Names of the hosts with a wrapper that can be leased or is."""
        machines = self.machines()
        usable = {"idle", "deploying", "ready", "leased"}
        return {
            host.name
            for host in self.net.hosts.values()
            if (machine := machines.get(host.address)) is not None and machine["alive"]
            if any(wrapper["status"] in usable for wrapper in machine["wrappers"])
        }

    def until_ready(self, *names: str, limit_s: float = READY_LIMIT_S) -> None:
        """Return when these hosts, and no others, can be leased."""
        until(lambda: self.ready() == set(names), limit_s, lambda: f"{self.ready()} of {names}: {self.machines()}")


def until(condition: Callable[[], object], limit_s: float, problem: Callable[[], object] = str) -> float:
    """Wait until it holds; seconds that took."""
    begun_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begun_s < limit_s, problem()
        time.sleep(0.1)
    return time.monotonic() - begun_s


def llmconfig(name: str, **prompting: Any) -> dict[str, Any]:
    """One of the two tiny LLMs that lie on every host."""
    return {
        "modeltyp": "text-generation",
        "model": str(HOME / "llms" / name),
        "uses_chat_template": False,
        "args": {
            "prompting": {"max_new_tokens": 8, "ignore_eos": True, **prompting},
            "deployment": {"torch_dtype": "torch.bfloat16", "enforce_eager": True},
        },
    }


def prompt(address: str, *, limit_s: float = 60) -> httpx.Response:
    """Ask the LLM of a lease something."""
    return httpx.post(f"{address}/process_prompt", json={"question": "What does it cost?"}, timeout=limit_s)


def cluster_yaml(
    net: Network, workers: tuple[str, ...], settings: Mapping[str, str], *, redis: bool = True
) -> dict[str, Any]:
    """``cluster.yaml`` as its operator would fill it in for these hosts."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))
    config["provider"] |= {
        "head_ip": net.host("head").address,
        "worker_ips": [net.host(name).address for name in workers],
    }
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/key"}
    config["setup_commands"] = [command.replace(" gpu ", " cpu ") for command in config["setup_commands"]]
    database = net.host("db").address
    registry = {
        "DATABASE_URL": f"postgresql+psycopg://postgres@{database}:{DATABASE_PORT}/postgres",
        "WRAPPERS__KV_CACHE_GIB": "1",
        "MODELS__LOCAL_ROOTS": json.dumps([str(HOME / "llms")]),
        "MODELS__HUGGINGFACE": "false",
        "ACCESS__TRUSTED_CLIENTS": json.dumps({net.gateway: "default"}),  # the tests' own calls have no key
        **settings,
    }
    exports = [f"export GREENPROMPT_{name}={shlex.quote(value)};" for name, value in registry.items()]
    if redis:
        exports.append(f"export RAY_REDIS_ADDRESS={database}:{REDIS_PORT};")
    exports.append(f"export AUTOSCALER_NODE_START_WAIT_S={SSH_WAIT_S};")
    config["head_start_ray_commands"] = [" ".join([*exports, command]) for command in config["head_start_ray_commands"]]
    return config


def start_databases(host: Host) -> None:
    """PostgreSQL and Redis of the tests' own, those that don't run. PostgreSQL's disk is a small one."""
    settings = f"-c listen_addresses={host.address} -c port={DATABASE_PORT} -c unix_socket_directories=/tmp"
    settings += " -c min_wal_size=32MB -c max_wal_size=64MB"
    host.run(
        f"""
        set -e; cd /; chmod 755 {HOME}; mkdir -p {DATABASE}
        mountpoint -q {DATABASE} || mount -t tmpfs -o size=640m,uid=postgres,mode=700 tmpfs {DATABASE}
        postgres() {{ program=$1; shift; setpriv --reuid=postgres --regid=postgres --clear-groups \
            $(echo {POSTGRESQL_PROGRAMS})/$program -D {DATABASE} "$@" > /dev/null; }}
        if [ ! -e {DATABASE}/PG_VERSION ]; then
            postgres initdb -A trust -E UTF8 --locale=C.UTF-8 -N
            echo 'host all all all trust' >> {DATABASE}/pg_hba.conf
        fi
        postgres pg_ctl status || postgres pg_ctl -o '{settings}' -l /tmp/postgresql.log -w start
        redis-cli -h {host.address} -p {REDIS_PORT} ping > /dev/null 2>&1 || redis-server --daemonize yes \
            --bind {host.address} --port {REDIS_PORT} --protected-mode no --dir {HOME} --save '' --appendonly yes \
            --appendfsync always --logfile {HOME}/redis.log > /dev/null
        """
    )


@pytest.fixture(scope="session")
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A head, three machines, a host for databases and an operator's desk, with the registry installed on all.

    Where a test failed, the hosts' logs of Ray are in LOGS afterwards.
    """
    shutil.rmtree(LOGS, ignore_errors=True)
    exclude = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))["rsync_exclude"]
    shared = REPOSITORY / "build" / "hosts" / INSTALLED.name
    hosts.install(REPOSITORY, shared, exclude)
    folder = tmp_path_factory.mktemp("hosts")
    try:
        with hosts.network(folder, ("head", "w1", "w2", "w3", "db", "desk"), shared) as net:
            for host in net.hosts.values():
                for seed, name in enumerate("ab"):
                    make_tiny_llm(host.home / "llms" / name, seed=seed)
            start_databases(net.host("db"))
            yield net
    finally:
        if request.session.testsfailed:
            for logs in folder.glob("*/logs"):
                shutil.copytree(logs, LOGS / logs.parent.name, symlinks=True)
            print(f"logs of the hosts: {LOGS}")


@pytest.fixture(scope="session")
def cluster(net: Network) -> Iterator[Cluster]:
    """The cluster of cluster.yaml, up, with two of the machines."""
    desk, workers = net.host("desk"), ("w1", "w2")
    # Hosts go and come back: every call has a connection of its own, as from a client that has just been started.
    with httpx.Client(limits=httpx.Limits(max_keepalive_connections=0)) as http:
        cluster = Cluster(net, workers, http)
        cluster.describe(*workers)
        # The desk has the launcher as any of the machines has it.
        desk.run("echo 'export PATH=$HOME/greenprompt/.venv/bin:$PATH' >> ~/.bashrc")
        desk.run("greenprompt ray-token")
        print(cluster.ray("up -y ~/cluster.yaml"))
        yield cluster
        print(cluster.ray("down -y ~/cluster.yaml"))
