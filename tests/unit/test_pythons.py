"""`make test-pythons`, with a uv that makes environments whose tests pass or fail."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UV = """#!/bin/sh
case "$1 $2" in
    "python find") for last; do :; done; [ "$last" != 3.99 ] && command -v sh ;;
    "venv "*)
        for last; do :; done
        mkdir -p "$last/bin"
        cp "tests$last" "$last/bin/pytest"
        cp tests.venv-1.1 "$last/bin/python"
        ;;
    "pip "*) echo made >> made; [ ! -e offline ] ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree whose tests pass on Python 1.1 and fail on 1.2; there is no 3.99."""
    programs = {".venv/bin/uv": UV, "tests.venv-1.1": "#!/bin/sh\n", "tests.venv-1.2": "#!/bin/sh\nexit 1\n"}
    for name, program in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    for name in ("tests/pythons.sh", "locks/cpu.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(tree: Path, *versions: str) -> tuple[int, list[str]]:
    """Run the script; return its exit status and its last lines, one for each version."""
    done = subprocess.run(
        [tree / "tests/pythons.sh", *versions], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout.splitlines()[-len(versions) :]


def test_each_python_has_a_line(tree: Path) -> None:
    """The last lines say which passed, failed or are missing. After a failure the others still run."""
    status, lines = run(tree, "1.2", "3.99", "1.1")
    assert status == 1
    assert lines == [
        "Python 1.2: failed",
        "Python 3.99: no interpreter found: skipped",
        "Python 1.1: passed",
    ]


def test_a_missing_python_is_no_failure(tree: Path) -> None:
    """Where nothing failed, the status is 0."""
    assert run(tree, "1.1", "3.99")[0] == 0


def test_an_environment_is_made_once(tree: Path) -> None:
    """An environment is used again until the lock changes. One that can't be made is a failure."""
    for _ in range(2):
        assert run(tree, "1.1") == (0, ["Python 1.1: passed"])
    assert (tree / "made").read_text() == "made\n" * 2
    (tree / "locks/cpu.txt").write_text("")
    (tree / "offline").touch()
    for _ in range(2):
        assert run(tree, "1.1") == (1, ["Python 1.1: failed"])
