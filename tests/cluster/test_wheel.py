"""The wheel: a client in an empty environment, and a whole registry in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY, Registry

MOST_PACKAGES = 24
MOST_BYTES = 25e6
"""What an installed client may take, with pip's own packages left out and without bytecode."""

SERVER_ONLY = {"alembic", "fastapi", "matplotlib", "numpy", "psutil", "ray", "sqlalchemy", "starlette", "vllm"}

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree, so that nothing is left in it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("greenprompt_client", "registry", "deployments"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it depends on without extras, in the locked versions."""
    folder = tmp_path_factory.mktemp("client")
    pins = re.findall(r"^[\w.-]+==[\w.+!-]+", (REPOSITORY / "locks/cpu.txt").read_text(), re.MULTILINE)
    (folder / "pins.txt").write_text("\n".join(pins))
    venv.create(folder / "venv")
    uv = Path(sys.executable).parent / "uv"
    python = folder / "venv/bin/python"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, "--constraint", folder / "pins.txt", wheel],
        check=True,
        timeout=300,
    )
    return folder / "venv"


def run(environment: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of an environment in a folder. It finds no package of a developer's shell (PYTHONPATH)."""
    return subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_client_is_small(client: Path, tmp_path: Path) -> None:
    """Without extras at most 24 packages and 25 MB are installed; importing the client loads nothing of a server."""
    (packages,) = client.glob("lib/python3*/site-packages")
    assert len(list(packages.glob("*.dist-info"))) <= MOST_PACKAGES
    assert sum(path.stat().st_size for path in packages.rglob("*") if path.is_file()) <= MOST_BYTES
    code = "import sys, greenprompt_client, greenprompt_client.client, json; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run(client, "python", "-c", code, cwd=tmp_path).stdout))
    assert loaded & SERVER_ONLY == set()


def test_a_client_asks_and_measures(client: Path, registry: Registry, workspace: Path, tmp_path: Path) -> None:
    """`status`, `measure` and `report` work without extras; `report --html` names the one that it needs."""
    shown = run(client, "greenprompt", "status", "--url", registry.url, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "idle" in shown.stdout or "ready" in shown.stdout
    (tmp_path / "prompts.jsonl").write_text('{"question": "one"}\n{"question": "two"}\n')
    done = run(
        client,
        *("greenprompt", "measure", "--llm", str(workspace / "llms" / "a"), "--prompts", "prompts.jsonl"),
        *("--arg", "max_new_tokens=4", "--deployment-arg", "enforce_eager=true", "--output", "results"),
        *("--measurement-id", "4711", "--url", registry.url),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 answers" in done.stdout
    report = ("greenprompt", "report", "4711", "--url", registry.url)
    written = run(client, *report, "--csv", "windows.csv", cwd=tmp_path)
    assert (written.returncode, written.stderr) == (0, "")
    assert (tmp_path / "windows.csv").stat().st_size > 0
    refused = run(client, *report, "--html", "page.html", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.endswith("pip install 'greenprompt-llm-registry[report]'\n")


@pytest.mark.parametrize(
    ("word", "extra"), [("up", "server"), ("down", "server"), ("ray-start", "server"), ("demo", "server,cpu")]
)
def test_a_missing_extra_is_named(client: Path, tmp_path: Path, word: str, extra: str) -> None:
    """A command whose extra is not installed says in one line what to type, and fails as a wrong usage does."""
    refused = run(client, "greenprompt", word, cwd=tmp_path)
    assert refused.returncode == 2
    assert re.fullmatch(
        rf"greenprompt: this command needs \w+: pip install 'greenprompt-llm-registry\[{extra}\]'\n", refused.stderr
    )


def test_a_registry_needs_no_clone(wheel: Path, tmp_path: Path) -> None:
    """`greenprompt demo` from an installed wheel works in an empty folder, and leaves no process."""
    environment, folder = tmp_path / "venv", tmp_path / "empty"
    venv.create(environment)
    uv = Path(sys.executable).parent / "uv"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--no-deps", "--python", environment / "bin/python", wheel],
        check=True,
        timeout=120,
    )
    # Its dependencies are those of this environment. A path file is not read for paths of paths: the tree is not there.
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    folder.mkdir()
    where = run(environment, "python", "-c", "import deployments; print(deployments.__file__)", cwd=folder)
    assert where.stdout.startswith(str(environment))
    shown = run(environment, "greenprompt", "demo", cwd=folder)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "Everything that was started has ended." in shown.stdout
