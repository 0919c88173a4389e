"""Commands in a shell with unusual variables, limits, locale or folders."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from deployments.launch.local_ray import free_ports
from tests.cluster.conftest import REPOSITORY, UP_LIMIT_S


class Case(NamedTuple):
    """``config`` is YAML, in which ``@`` is the test's own folder; so it is in ``environment`` and ``before``.

    ``before`` is shell code that runs in the shell of the command. ``told`` must be in the one line of the refusal.
    """

    told: str
    environment: Mapping[str, str] = {}
    config: str = ""
    before: str = ":"


def greenprompt(tmp_path: Path, case: Case, *words: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run the command in a shell that the case has spoiled, in a mount namespace of its own."""
    config = tmp_path / "config.yaml"
    config.write_text(case.config.replace("@", str(tmp_path)), encoding="utf-8")
    own = {"GREENPROMPT_STATE_DIR": str(tmp_path / "state"), "GREENPROMPT_CACHE_DIR": str(tmp_path / "cache")}
    spoiled = {name: value.replace("@", str(tmp_path)) for name, value in case.environment.items()}
    if "port" not in case.config:
        own["GREENPROMPT_HTTP__PORT"] = str(free_ports(1)[0])
    if "GREENPROMPT_STATEDIR" in spoiled:
        own.pop("GREENPROMPT_STATE_DIR")
    command = shlex.join([sys.executable, "-m", "greenprompt_client.cli.main", *words, "--config", str(config)])
    shell = f"cd {shlex.quote(str(REPOSITORY))}; {case.before.replace('@', str(tmp_path))}\nexec {command}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GREENPROMPT_")}
    return subprocess.run(
        ["unshare", "--mount", "bash", "-c", shell],
        env=inherited | {"HF_HUB_OFFLINE": "1", **own, **spoiled},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
    )


@contextmanager
def detached(tmp_path: Path, case: Case, port: int) -> Iterator[str]:
    """Run a registry in the background during the block; yields its URL.

    A second ``up`` is refused. ``down`` returns when the registry has ended, and a second one finds none.
    """
    url = f"http://{'[::1]' if '::' in case.config else '127.0.0.1'}:{port}"
    try:
        up = greenprompt(tmp_path, case, "up", "--detach", limit_s=UP_LIMIT_S)
        assert up.returncode == 0, up.stdout + up.stderr
        assert url in up.stdout
        assert httpx.get(f"{url}/healthz", trust_env=False).json()["status"] == "ok"
        second = greenprompt(tmp_path, case, "up", limit_s=UP_LIMIT_S)
        assert (second.returncode, len(second.stderr.strip().splitlines())) == (2, 1), second.stderr
        assert "a registry runs from" in second.stderr
        yield url
    finally:
        down = greenprompt(tmp_path, case, "down", limit_s=UP_LIMIT_S)
    assert down.returncode == 0, down.stdout + down.stderr
    socket.create_server(("127.0.0.1", port)).close()
    assert "No registry runs" in greenprompt(tmp_path, case, "down", limit_s=UP_LIMIT_S).stdout


PROXIES = dict.fromkeys(
    ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9"
)
CERTIFICATES = {"SSL_CERT_FILE": "/nowhere", "REQUESTS_CA_BUNDLE": "/nowhere"}
LOCALE = {"LC_ALL": "C", "LANG": "xx_YY.nonsense", "PYTHONIOENCODING": "ascii"}
HOME = {"HOME": ""}
LOW_LIMIT, UMASK = "ulimit -Sn 256", "umask 0777; umask 077"
ODD_FOLDER = "100%25 ?mode=ro #x"


def all_at_once(config: str) -> Case:
    """Proxies, certificates, locale, an empty HOME, a low limit and a strict umask, together."""
    return Case("", {**PROXIES, **CERTIFICATES, **LOCALE, **HOME}, config, f"{LOW_LIMIT}; {UMASK}")
