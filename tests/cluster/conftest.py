"""A registry as its users get it: ``greenprompt up`` as a process of its own, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import yaml

from deployments.launch.local_ray import ACCESS_FILE, HAPROXY_FOLDER, TLS_FOLDER, free_ports
from deployments.machine import process_tree
from deployments.machine.cluster_token import proxy_secret
from deployments.machine.worker_environment import FILE_NAME
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from registry.settings import OPERATOR_KEY
from registry.wire.lease_token import LEASE_TOKEN as TOKEN_PREFIX
from registry.wire.lease_token import split_url
from tests.support.secret_search import API_KEY, LEASE_TOKEN, SecretSearch

TITLE_LIMIT_S = 10
UP_LIMIT_S = 240
DOWN_LIMIT_S = 150
DEPLOY_LIMIT_S = 120
MAX_IN_FLIGHT = 8

SECRETS = {"HF_TOKEN": f"hf_{secrets.token_hex(16)}", "HTTPS_PROXY": f"http://me:{secrets.token_hex(16)}@127.0.0.1:9"}
"""Secret variables of the operator's shell, with which the registry of the session is started."""

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Registry:
    """A running registry: its process, where it is, and the folder it keeps its state in."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    posted: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    """The ids of all requests whose status was read."""
    secrets: dict[str, set[str]] = field(default_factory=dict)
    """The secrets of this registry that the tests know, by kind. See `search_for_secrets`."""

    def note_secret(self, kind: str, value: str) -> None:
        """Remember a secret that must be seen nowhere."""
        self.secrets.setdefault(kind, set()).add(value)

    def note_lease(self, url: str) -> None:
        """Remember the token of a lease."""
        token = split_url(url)[1]
        assert token is not None
        self.note_secret(LEASE_TOKEN, token.removeprefix(TOKEN_PREFIX))

    def note_key(self, key: str) -> None:
        """Remember an API key, of which all but the id is secret."""
        self.note_secret(API_KEY, key.split("_", 2)[2])

    def post(
        self, measurement_id: int, *llms: dict[str, Any], tenant: str = "default", priority: str = "normal"
    ) -> list[str]:
        """Request LLMs; their ids."""
        body = {"measurementId": measurement_id, "llms": list(llms), "priority": priority}
        url, headers = f"{self.url}/promptingservice/request", {"X-Tenant": tenant}
        answer = httpx.post(url, json=body, headers=headers, timeout=60)
        assert answer.status_code == 201, answer.text
        ids = [entry["requestId"] for entry in answer.json()["requests"]]
        self.posted += ids
        return ids

    def get(self, request_id: str, **query: Any) -> dict[str, Any]:
        """The status of a request; ``wait`` and ``seen`` as in the API."""
        answer = httpx.get(f"{self.url}/promptingservice/request/{request_id}", params=query, timeout=120)
        assert answer.status_code == 200, answer.text
        state: dict[str, Any] = answer.json()
        self.asked.add(request_id)
        if state["url"] is not None:
            self.note_lease(state["url"])
        return state

    def until(self, request_id: str, *statuses: str, limit_s: float = DEPLOY_LIMIT_S) -> dict[str, Any]:
        """The status of a request once it is one of these; fails when it can't be, or after ``limit_s`` seconds."""
        deadline_s = time.monotonic() + limit_s
        state = self.get(request_id)
        while state["status"] not in statuses:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"still {state}"
            assert state["endedAt"] is None, (state["status"], state["reason"])
            state = self.get(request_id, wait=min(left_s, 10), seen=state["status"])
        return state

    def delete(self, request_id: str) -> int:
        """Release a request; the HTTP status."""
        return httpx.delete(f"{self.url}/promptingservice/request/{request_id}", timeout=60).status_code

    def machines(self) -> list[dict[str, Any]]:
        """GET /machines."""
        answer: list[dict[str, Any]] = httpx.get(f"{self.url}/machines", timeout=30).json()
        return answer

    def wrapper(self) -> dict[str, Any]:
        """The only wrapper of the only machine."""
        (machine,) = self.machines()
        (wrapper,) = machine["wrappers"]
        return dict(wrapper)

    def processes(self) -> list[psutil.Process]:
        """Everything below the registry's process, itself first."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def process_named(self, part: str) -> psutil.Process:
        """The one process whose command line has this part.

        Ray changes a worker's command line for each task. If it is read at that moment, it may be empty.
        """
        deadline_s = time.monotonic() + TITLE_LIMIT_S
        while True:
            found = [process for process in self.processes() if part in " ".join(_cmdline(process))]
            if len(found) == 1:
                return found[0]
            assert time.monotonic() < deadline_s, f"{part}: {found}"
            time.sleep(0.01)

    def replica(self) -> psutil.Process:
        """The wrapper's process."""
        return self.process_named("ray::ServeReplica:wrapper")

    def engines(self) -> list[psutil.Process]:
        """The processes of the engine, the engine core first: forks of the wrapper's forkserver."""
        forkservers = [child for child in self.replica().children() if "forkserver" in " ".join(_cmdline(child))]
        return [engine for forkserver in forkservers for engine in forkserver.children(recursive=True)]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


class Ran:
    """What a registry runs on its machine: processes, its cluster's folder, the shared memory of its engine."""

    def __init__(self, registry: Registry, *, surviving: Collection[psutil.Process] = ()) -> None:
        """``surviving``: processes of the registry that are to go on."""
        self.processes = [process for process in registry.processes() if process not in surviving]
        self.folder = Path(json.loads((registry.folder / "state" / "up.json").read_text(encoding="utf-8"))["folder"])
        self._shared = process_tree.shared_memory(self.processes)

    def left(self) -> list[object]:
        """What is there of it now."""
        files = [path for path in (self.folder, *self._shared) if path.exists()]
        return [*process_tree.alive(self.processes), *process_tree.users_of(self.folder), *files]


def start(folder: Path, environment: dict[str, str] | None = None, /, **overrides: Any) -> Registry:
    """``greenprompt up`` with the local configuration and these sections changed; returns when it is ready.

    Where one was started before, the next has the same ports.
    """
    path = folder / "config.yaml"
    if path.exists():
        last = yaml.safe_load(path.read_text(encoding="utf-8"))
        port, dashboard_port = last["http"]["port"], last["ray"]["dashboard_port"]
    else:
        port, dashboard_port = free_ports(2)
    config = yaml.safe_load((REPOSITORY / "configs" / "local.yaml").read_text(encoding="utf-8"))
    config["state_dir"] = str(folder / "state")
    config["cache_dir"] = str(folder / "cache")
    config["models"]["local_roots"] = [str(folder / "llms")]
    config["http"]["port"] = port
    config["ray"] = {"dashboard_port": dashboard_port}
    for section, values in overrides.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "greenprompt_client.cli.main", "up", "--config", str(path)]
    return run(folder, command, f"http://127.0.0.1:{port}", environment or {})


def run(folder: Path, command: list[str], url: str, environment: dict[str, str]) -> Registry:
    """Run an ``up`` command and wait until it says that it is ready."""
    log = folder / "up.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
    record = folder / "state" / "up.json"
    deadline_s = time.monotonic() + UP_LIMIT_S
    while not (record.exists() and {"pid": process.pid, "url": url}.items() <= json.loads(record.read_bytes()).items()):
        if process.poll() is not None or time.monotonic() > deadline_s:
            process.kill()
            pytest.fail(f"greenprompt up did not get ready:\n{log.read_text(encoding='utf-8')}")
        time.sleep(0.2)
    return Registry(process, url, folder)


def greenprompt(
    *words: str, environment: Mapping[str, str] = MappingProxyType({}), limit_s: float = UP_LIMIT_S
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. ``environment``: variables in addition to those of the tests."""
    return subprocess.run(
        [sys.executable, "-m", "greenprompt_client.cli.main", *words],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def stop(registry: Registry) -> None:
    """SIGTERM, and wait for the documented shutdown."""
    if registry.process.poll() is None:
        registry.process.send_signal(signal.SIGTERM)
    try:
        registry.process.wait(DOWN_LIMIT_S)
    except subprocess.TimeoutExpired:
        registry.process.kill()
        raise


STATE_API = ("actors", "jobs", "nodes", "objects", "placement_groups", "runtime_envs", "tasks", "workers")
"""What Ray's state API lists."""

PAGES = ("/", "/healthz", "/machines", "/llms", "/audit", "/openapi.json")
"""What the registry shows, besides the events of requests."""


PROXY_SECRET = "secret of HAProxy"
"""The kind of secret with which replicas know the cluster's HAProxy."""

TLS_KEY = "key of Ray's TLS"
"""The kind of secret with which Ray's processes know each other."""

HAPROXY_FILES = ("changes.sed", "haproxy.cfg")
"""Files of HAProxy that have it."""


def files_with_secrets(registry: Registry) -> dict[Path, set[str]]:
    """The only files with secrets, and the kinds that each has; only their owner can read them."""
    state = registry.folder / "state"
    return {
        state / ACCESS_FILE: {ACCESS_FILE},  # Ray's processes read its token there
        state / FILE_NAME: set(SECRETS),  # wrappers and the ingress load them from there
        state / OPERATOR_KEY: {API_KEY},  # the operator takes the first key from there
    }


def search_for_secrets(registry: Registry, headers: dict[str, str] | None = None) -> SecretSearch:
    """Look for each secret of a running registry wherever others may see it; see "Local users" in SECURITY.md.

    ``headers``: with a key, if the registry asks for one.
    """
    record = json.loads((registry.folder / "state" / "up.json").read_text())
    token = (registry.folder / "state" / ACCESS_FILE).read_text()
    proxy = proxy_secret(registry.folder / "state" / ACCESS_FILE)
    folder = Path(record["folder"])
    key = registry.folder / "state" / TLS_FOLDER / "key.pem"
    lines = {line for line in key.read_text().splitlines() if not line.startswith("-")}
    known = {ACCESS_FILE: {token}, PROXY_SECRET: {proxy}, TLS_KEY: lines}
    search = SecretSearch({**registry.secrets, **known})
    search.look_at_files(registry.folder, {key: {TLS_KEY}, **files_with_secrets(registry)})
    of_haproxy = [path for path in (folder / HAPROXY_FOLDER).rglob("*") if path.name in HAPROXY_FILES]
    search.look_at_files(folder, {path: {PROXY_SECRET} for path in of_haproxy})
    processes = registry.processes()
    # The operator's shell gave them to `up` and its fork, which starts Ray; engines inherit them from the wrapper.
    (fork,) = processes[0].children()
    with_secrets = [processes[0], fork, *registry.replica().children(recursive=True)]
    search.look_at_processes(processes, {each.pid: set(SECRETS) for each in with_secrets})
    search.look_as_other_user()
    named = ("ray::DashboardAgent", "dashboard.py", "haproxy")
    search.look_at_metrics(each for each in processes if any(name in " ".join(_cmdline(each)) for name in named))
    with httpx.Client(base_url=registry.url, headers=headers, timeout=60) as client:
        events = (f"/promptingservice/request/{request_id}/events" for request_id in sorted(registry.asked))
        search.look_at_answers(client, [*PAGES, *events])
    dashboard = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=record["dashboard"], headers=dashboard, timeout=60, trust_env=False) as client:
        lists = (f"/api/v0/{name}?detail=1" for name in STATE_API)
        search.look_at_answers(client, [*lists, "/api/serve/applications/"])
    assert {"gcs_server", "raylet", "haproxy"} <= {process.name() for process in processes}
    assert {"file", "environ", "other user", "metrics", "answer"} <= search.looked_at.keys()
    return search


def stop_and_search(registry: Registry, headers: dict[str, str] | None = None) -> None:
    """Stop a registry, and fail if a secret of it was seen before, or is in a file that is left."""
    try:
        search = search_for_secrets(registry, headers)
    finally:
        stop(registry)
    assert_no_secret_left(registry, search)


def assert_no_secret_left(registry: Registry, search: SecretSearch) -> None:
    """Fail if a search has seen a secret of a registry that has ended, or one is in a file that is left."""
    search.look_at_files(registry.folder, files_with_secrets(registry))
    assert search.found == []


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny LLMs in ``llms/a`` and ``llms/b``."""
    folder = tmp_path_factory.mktemp("registry")
    for seed, name in enumerate("ab"):
        make_tiny_llm(folder / "llms" / name, seed=seed)
    return folder


@pytest.fixture(scope="session")
def running(workspace: Path) -> Iterator[Registry]:
    """One registry for all tests of the session."""
    registry = start(
        workspace,
        SECRETS,
        wrappers={"max_prompts_in_flight": MAX_IN_FLIGHT},
        watch={"period_s": 0.25},
        energy={"settle_max_s": 20},  # the machine of a test is hardly ever at rest; to see rest takes 5.5 s
    )
    for name, value in SECRETS.items():
        registry.note_secret(name, urlsplit(value).password or value)
    yield registry
    stop_and_search(registry)


@pytest.fixture
def registry(running: Registry) -> Iterator[Registry]:
    """The registry, on which a test leaves no request behind, also when it fails."""
    yield running
    for request_id in running.posted:
        running.delete(request_id)
    running.posted.clear()


@pytest.fixture
def llm(workspace: Path) -> Callable[..., dict[str, Any]]:
    """Makes llmconfigs of the tiny LLMs: ``llm("a", temperature=0.5)``."""

    def make(
        name: str, *, chat: bool = True, deployment: dict[str, Any] | None = None, **prompting: Any
    ) -> dict[str, Any]:
        return {
            "modeltyp": "text-generation",
            "model": str(workspace / "llms" / name),
            "uses_chat_template": chat,
            "args": {
                "prompting": {"max_new_tokens": 16, "ignore_eos": True, **prompting},
                "deployment": {"torch_dtype": "torch.bfloat16", "enforce_eager": True, **(deployment or {})},
            },
        }

    return make


@pytest.fixture
def measurement_id() -> int:
    """An id that no other test uses."""
    return time.time_ns()
