"""``greenprompt up`` and ``down`` where the machine, the shell or the configuration is not as it should be.

Either the registry is ready, or the command ends within seconds with one line that says what to do. Never is another
registry touched.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deployments.launch.local_ray import FOLDER_PREFIX, TEMPORARY, free_ports
from tests.cluster.spoiled_shell import (
    CERTIFICATES,
    HOME,
    LOCALE,
    LOW_LIMIT,
    ODD_FOLDER,
    PROXIES,
    UMASK,
    Case,
    detached,
    greenprompt,
)

pytestmark = pytest.mark.cluster

REFUSED_LIMIT_S = 30
"""Longest time until a start is refused; 10 s on a machine with nothing else to do."""


REFUSED = {
    "state_dir in proc": Case("/proc/nope", {"GREENPROMPT_STATE_DIR": "/proc/nope"}),
    "state_dir is a file": Case("state_dir", {"GREENPROMPT_STATE_DIR": "@/file"}, before="touch @/file"),
    "state_dir below a file": Case("state_dir", {"GREENPROMPT_STATE_DIR": "@/file/x"}, before="touch @/file"),
    "cache_dir in proc": Case("cache_dir", {"GREENPROMPT_CACHE_DIR": "/proc/nope"}),
    "few open files": Case("ulimit -n: at most 4096 open files", before="ulimit -n 4096"),
    "two typos in variables": Case(
        "GREENPROMPT_HTTP__PROT: there is no field", {"GREENPROMPT_HTPP__PORT": "1", "GREENPROMPT_HTTP__PROT": "1"}
    ),
    "typo in a variable": Case("did you mean GREENPROMPT_STATE_DIR", {"GREENPROMPT_STATEDIR": "x"}),
    "one underscore": Case("did you mean GREENPROMPT_HTTP__PORT", {"GREENPROMPT_HTTP_PORT": "1"}),
    "empty variable": Case("GREENPROMPT_STATE_DIR: is empty", {"GREENPROMPT_STATE_DIR": ""}),
    "variable of the wrong type": Case(
        "GREENPROMPT_WRAPPERS__PER_MACHINE: wrappers.per_machine", {"GREENPROMPT_WRAPPERS__PER_MACHINE": "x"}
    ),
    "list that is no JSON": Case("given as JSON", {"GREENPROMPT_MODELS__LOCAL_ROOTS": "a:b"}),
    "key twice in a variable": Case("port' occurs twice", {"GREENPROMPT_HTTP": '{"port": 1, "port": 2}'}),
    "key twice": Case("port occurs twice", config="http: {port: 1, port: 2}"),
    "Norway": Case("NO can be read in two ways", config="energy: {grid: {zone: NO}}"),
    "octal": Case("010 can be read in two ways", config="http: {port: 010}"),
    "base 60": Case("1:30 can be read in two ways", config="leases: {max_s: 1:30}"),
    "no YAML": Case("is not YAML", config="a: b: c"),
    "unknown section": Case("there is no such section", config="htpp: {port: 1}"),
    "public_url without scheme": Case("needs a scheme", config="http: {public_url: 'head.example:8000'}"),
    "host of another machine": Case("http.port", config="{http: {host: 203.0.113.1}, access: {insecure: true}}"),
    "open to other machines": Case("access.keys must be true", config="http: {host: 0.0.0.0}"),
    "IPv6 and HAProxy": Case("use 127.0.0.1 or 0.0.0.0", config="http: {host: '::1'}"),
    "unknown zone": Case("zone", config="energy: {grid: {zone: DE}}"),
    "CPU model upside down": Case(
        "needs low <= value <= high",
        config="energy: {cpu_model: {idle_w_per_cpu: 5, idle_low_w_per_cpu: 9, idle_high_w_per_cpu: 4, "
        "busy_w_per_cpu: 20, busy_low_w_per_cpu: 10, busy_high_w_per_cpu: 30, source: x}}",
    ),
    "embodied upside down": Case(
        "needs low_g_per_hour <= g_per_hour",
        config="energy: {embodied: {g_per_hour: 5, low_g_per_hour: 9, high_g_per_hour: 4, per: machine, source: x}}",
    ),
    "forbidden LLM": Case(
        "deploy",
        config="deploy: [{llm: {modeltyp: text-generation, model: /etc, uses_chat_template: true, "
        "args: {prompting: {}, deployment: {}}}}]",
    ),
    "database URL": Case("database", {"GREENPROMPT_DATABASE_URL": "mysql://x/y"}),
    "full disk": Case(
        "is full",
        {"GREENPROMPT_STATE_DIR": "@/small"},
        before="mkdir -p @/small && mount -t tmpfs -o size=1M,mode=0700 tmpfs @/small",
    ),
}

BY_SETTINGS = (
    "one underscore",
    "empty variable",
    "variable of the wrong type",
    "list that is no JSON",
    "key twice in a variable",
    "key twice",
    "Norway",
    "octal",
    "base 60",
    "no YAML",
    "unknown section",
    "unknown zone",
    "CPU model upside down",
    "embodied upside down",
)
"""What the settings refuse like the rows before them; the unit tests of the settings have each of them."""

READY = {
    "proxies": Case("", PROXIES),
    "SOCKS proxy": Case("", {"ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"}),
    "certificates": Case("", CERTIFICATES),
    "percent and question mark": Case("", {"GREENPROMPT_STATE_DIR": f"@/{ODD_FOLDER}"}),
    "IPv6 loopback": Case("", config="http: {host: '::1', haproxy: false}"),
    "every interface": Case("", config="{http: {host: '0.0.0.0'}, access: {insecure: true}}"),
    "every interface, IPv6": Case("", config="{http: {host: '::', haproxy: false}, access: {insecure: true}}"),
    "low soft limit": Case("", before=LOW_LIMIT),
    "locale": Case("", LOCALE),
    "umask": Case("", before=UMASK),
    "empty home": Case("", HOME),
    "no home": Case("", before="unset HOME"),
    "another cluster's address": Case("", {"RAY_ADDRESS": "203.0.113.1:6379", "RAY_AUTH_TOKEN": "x"}),
    "temporary folder is long": Case("", {"TMPDIR": "@/" + "t" * 120}, before="mkdir @/" + "t" * 120),
    "narrow terminal": Case("", {"COLUMNS": "20", "TERM": "dumb", "NO_COLOR": "1"}),
    "leftovers": Case(
        "", before='mkdir -p @/state && echo \'{"pid": 1, "fol\' > @/state/up.json && touch @/state/up.lock'
    ),
    "dashboard's port is taken": Case("", before="true"),
    "no standard input": Case("", before="exec <&-"),
}
"""Each of these is a start of its own, so it is long. test_crash.py has most of them in one start."""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """The folder of another registry, whose process nobody may end."""
    state = tmp_path / "other"
    state.mkdir()
    code = (
        "import fcntl, json, os, pathlib, signal; lock = open('up.lock', 'a+'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "lock.write(str(os.getpid())); lock.flush(); "
        "pathlib.Path('up.json').write_text(json.dumps({'pid': os.getpid()})); print('up', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=state, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield state
        assert process.poll() is None, "another registry was ended"
        process.kill()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in BY_SETTINGS else name for name in REFUSED]
)
def test_refused_in_one_line(name: str, tmp_path: Path, other: Path) -> None:
    """What can't work is refused before Ray starts, by one line that names it; ``down`` then ends nothing else."""
    case = REFUSED[name]
    begun_s = time.monotonic()
    up = greenprompt(tmp_path, case, "up", limit_s=REFUSED_LIMIT_S)
    took_s = time.monotonic() - begun_s
    assert up.returncode == 2, up.stdout + up.stderr
    assert len(up.stderr.strip().splitlines()) == 1, up.stderr
    assert case.told in up.stderr
    assert "Starting" not in up.stdout, up.stdout
    print(f"refused after {took_s:.1f} s: {up.stderr.strip()}")
    down = greenprompt(tmp_path, case, "down", limit_s=REFUSED_LIMIT_S)
    assert down.returncode in (0, 2)
    assert len((down.stderr + down.stdout).strip().splitlines()) == 1, down.stderr


def test_a_second_one_leaves_the_first_alone(tmp_path: Path, other: Path) -> None:
    """``up`` and ``up --detach`` beside a running registry are refused, and its log stays."""
    (other / "up.log").write_text("what it said\n")
    for words in (["up"], ["up", "--detach"]):
        up = greenprompt(tmp_path, Case("", {"GREENPROMPT_STATE_DIR": str(other)}), *words, limit_s=REFUSED_LIMIT_S)
        assert up.returncode == 2
        assert "a registry runs from" in up.stderr
        assert len(up.stderr.strip().splitlines()) == 1
    assert (other / "up.log").read_text() == "what it said\n"


def test_processes_of_a_killed_registry_go_first(tmp_path: Path, other: Path) -> None:
    """What a registry left that was killed, a process and its folder, goes before anything is started or refused."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
    (folder / TEMPORARY).mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "up.json").write_text(json.dumps({"pid": 2**22 + 1, "folder": str(folder)}))
    with subprocess.Popen(["sleep", "infinity"], env={**os.environ, "TMPDIR": str(folder / TEMPORARY)}) as left:
        try:
            up = greenprompt(tmp_path, REFUSED["few open files"], "up", limit_s=REFUSED_LIMIT_S)
            assert up.returncode == 2
            assert REFUSED["few open files"].told in up.stderr
            assert left.poll() == -signal.SIGKILL
            assert not folder.exists()
        finally:
            left.kill()


@pytest.mark.long
@pytest.mark.parametrize("name", READY)
def test_ready_in_spite_of(name: str, tmp_path: Path, other: Path) -> None:
    """``up --detach`` is ready, and ``down`` leaves nothing."""
    port = free_ports(1)[0]
    case = READY[name]._replace(environment={**READY[name].environment, "GREENPROMPT_HTTP__PORT": str(port)})
    with socket.socket() as taken:
        if name == "dashboard's port is taken":
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):  # whoever has it will do
                taken.bind(("127.0.0.1", 8265))
                taken.listen()
        with detached(tmp_path, case, port):
            pass
