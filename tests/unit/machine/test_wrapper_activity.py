"""Wrappers of one machine see when another one works."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.machine.cpu_time import ProcessTable
from deployments.machine.wrapper_activity import WrapperActivity

WORKER = """
import sys
from pathlib import Path
from deployments.machine.wrapper_activity import WrapperActivity
WrapperActivity(Path(sys.argv[1]), "b-0").begin()
print("works", flush=True)
sys.stdin.read()
"""


def test_others_are_seen_at_work(tmp_path: Path) -> None:
    """Work is seen while it lasts, and once more if it began since the last look; one's own is not."""
    one, other = WrapperActivity(tmp_path, "a-0"), WrapperActivity(tmp_path, "a-1")
    one.others_worked()
    assert not one.others_worked()
    with other.busy():
        other.begin()
        assert one.others_worked()
        assert one.others_worked()
        assert not other.others_worked()
        other.end()
        assert one.others_worked()
    assert not one.others_worked()


def test_work_between_two_looks_is_seen(tmp_path: Path) -> None:
    """What is over before anybody looks was there all the same; what was before we came was not."""
    other = WrapperActivity(tmp_path, "a-1")
    with other.busy():
        pass
    one = WrapperActivity(tmp_path, "a-0")
    assert not one.others_worked()
    with other.busy():
        pass
    assert one.others_worked()
    assert not one.others_worked()


def test_work_ends_when_it_fails(tmp_path: Path) -> None:
    """A start that fails is over."""
    one, other = WrapperActivity(tmp_path, "a-0"), WrapperActivity(tmp_path, "a-1")
    with pytest.raises(ValueError), other.busy():
        raise ValueError
    one.others_worked()
    assert not one.others_worked()


def test_a_wrapper_that_is_killed_works_no_more(tmp_path: Path) -> None:
    """The kernel ends the work of a process with the process."""
    one = WrapperActivity(tmp_path, "a-0")
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "works\n"
        assert one.others_worked()
        assert one.others_worked()
        worker.kill()
        worker.wait()
    assert not one.others_worked()


def test_what_was_tidied_away_is_not_known(tmp_path: Path) -> None:
    """Without the files nobody can tell, and nothing breaks."""
    one = WrapperActivity(tmp_path / "wrappers", "a-0")
    shutil.rmtree(tmp_path / "wrappers")
    with one.busy():
        assert one.others_worked() is None


def test_wrappers_know_each_others_processes(tmp_path: Path) -> None:
    """A wrapper that lives is known by its process, one's own is not told; the file of one that is gone is nobody."""
    one = WrapperActivity(tmp_path, "a-0")
    assert one.processes() == {}
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "works\n"
        stat = ProcessTable().stat(worker.pid)
        assert stat is not None
        assert one.processes() == {worker.pid: stat.started}
        worker.kill()
        worker.wait()
    assert one.processes() == {}


def test_process_that_is_not_written_yet_is_not_known(tmp_path: Path) -> None:
    """A file that does not tell its process means that it can't be told, as long as its wrapper lives."""
    one, _other = WrapperActivity(tmp_path, "a-0"), WrapperActivity(tmp_path, "a-1")
    (tmp_path / "a-1").write_text("")
    assert one.processes() is None


def test_wrapper_that_replaces_one_that_still_ends(tmp_path: Path) -> None:
    """A wrapper of the same id takes over the file, though its old process still lives and works there."""
    one, old = WrapperActivity(tmp_path, "a-0"), WrapperActivity(tmp_path, "a-1", process=(7, 70))
    with old.busy():
        new = WrapperActivity(tmp_path, "a-1", process=(8, 80))
        with new.busy():
            assert one.others_worked()
        assert one.processes() == {8: 80}
