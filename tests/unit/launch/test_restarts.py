"""A registry whose cluster dies is started again, a bounded number of times; a signal ends it for good."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from deployments.launch import restarts
from deployments.launch.restarts import VITAL, Life, StopWanted, keep_running
from deployments.machine.child_processes import die_with_parent
from registry.errors import BadSettings, StartFailed

# A child is a fork of the process that runs the tests, which has threads if tests run in parallel (Python 3.12).
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

LIMIT_S = 10.0


class Lives:
    """Registries that live one after the other in processes of their own, and what the operator is told.

    ``deeds`` are what the first, second, … one does once it is ready; the last one is repeated.
    """

    def __init__(self, folder: Path, *deeds: Callable[[Life], None]) -> None:
        self.lines: list[str] = []
        self.cleaned = 0
        self.say: Callable[[str], object] = self.lines.append
        self._deeds = deeds
        self._begun = folder / "begun"

    @property
    def begun(self) -> int:
        """How many lives there were."""
        return len(self._begun.read_text()) if self._begun.exists() else 0

    def live(self, life: Life) -> None:
        number = self.begun
        with self._begun.open("a") as file:
            file.write(".")
        self._deeds[min(number, len(self._deeds) - 1)](life)

    def clean_up(self) -> None:
        self.cleaned += 1

    def keep(self, *, stop_limit_s: float = LIMIT_S) -> None:
        with (self._begun.parent / "lock").open("w") as lock:
            keep_running(self.live, self.clean_up, lock, say=self.say, stop_limit_s=stop_limit_s)
            assert not lock.closed


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pauses; signal handlers as they were."""
    monkeypatch.setattr(restarts, "PAUSES_S", (0.0, 0.001, 0.001))
    handlers = {number: signal.getsignal(number) for number in restarts.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def returns(_life: Life) -> None:
    """Ends as after a signal."""


def dies(life: Life) -> None:
    """Is ready, and is killed."""
    life.ready()
    os.kill(os.getpid(), signal.SIGKILL)


def fails(_life: Life) -> None:
    """Does not get ready."""
    raise BadSettings("http.port", "is taken")


def is_ready_and_fails(life: Life) -> None:
    """Is ready, and ends with an error."""
    life.ready()
    raise StartFailed("the cluster is gone")


def waits(life: Life) -> None:
    """Is ready, tells its parent's parent to stop, and waits for that."""
    life.ready()
    os.kill(os.getppid(), signal.SIGTERM)
    threading.Event().wait()


def test_an_end_is_no_death(tmp_path: Path) -> None:
    """A registry that was ended by a signal of its own is not started again; what it left is removed."""
    lives = Lives(tmp_path, returns)
    lives.keep()
    assert (lives.begun, lives.cleaned, lives.lines) == (1, 1, [])


def test_a_first_start_that_fails_is_an_error(tmp_path: Path) -> None:
    """What can't be started is not tried again: its own error is raised, after what it left was removed."""
    lives = Lives(tmp_path, fails)
    with pytest.raises(BadSettings, match=r"http\.port: is taken"):
        lives.keep()
    assert (lives.begun, lives.cleaned, lives.lines) == (1, 1, [])


def test_a_registry_that_dies_is_started_again(tmp_path: Path) -> None:
    """It is started again after it died, after an error, and after a start that failed; each time the cause is told."""
    lives = Lives(tmp_path, dies, is_ready_and_fails, fails, returns)
    lives.keep()
    assert (lives.begun, lives.cleaned) == (4, 4)
    assert lives.lines == [
        "the process that runs Ray was ended by SIGKILL. Starting again …",
        "the cluster is gone. Starting again in 0.001 s …",
        "http.port: is taken. Starting again in 0.001 s …",
    ]


def test_restarts_are_bounded(tmp_path: Path) -> None:
    """A registry that dies time and again is given up; the error has the last cause and the number of starts."""
    lives = Lives(tmp_path, dies)
    with pytest.raises(StartFailed, match=r"ended by SIGKILL; it was started again 3 times within 10 minutes"):
        lives.keep()
    assert (lives.begun, lives.cleaned) == (4, 4)


def test_old_restarts_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that dies now and then is started again each time."""
    monkeypatch.setattr(restarts, "WINDOW_S", 0.0)
    lives = Lives(tmp_path, *[dies] * 5, returns)
    lives.keep()
    assert lives.begun == 6
    assert {line.partition(". ")[2] for line in lives.lines} == {"Starting again …"}


def test_a_signal_ends_the_registry(tmp_path: Path) -> None:
    """SIGTERM reaches the process that runs the registry, which ends; nothing is started again."""
    lives = Lives(tmp_path, dies, waits)
    lives.keep()
    assert (lives.begun, lives.cleaned) == (2, 2)
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_a_signal_during_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal between two lives ends the wait, and nothing is started again."""
    monkeypatch.setattr(restarts, "PAUSES_S", (3600.0,))
    lives = Lives(tmp_path, dies)

    def say(line: str) -> None:
        lives.lines.append(line)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

    lives.say = say
    lives.keep()
    assert lives.begun == 1
    assert lives.lines == ["the process that runs Ray was ended by SIGKILL. Starting again in 3600 s …"]


def test_a_registry_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """A registry that hangs at its end is killed after its time, and what it left is removed."""

    def hangs(life: Life) -> None:
        try:
            waits(life)
        except StopWanted:
            threading.Event().wait()

    lives = Lives(tmp_path, hangs)
    lives.keep(stop_limit_s=0.1)
    assert (lives.begun, lives.cleaned) == (1, 1)


def ray(folder: Path) -> dict[str, subprocess.Popen[bytes]]:
    """Children with the names of Ray's processes, which die with their parent as Ray's do."""
    for name in VITAL:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/bin/sleep")
    bound = partial(die_with_parent, os.getpid())
    return {name: subprocess.Popen([folder / name, "600"], preexec_fn=bound) for name in VITAL}  # noqa: PLW1509


@pytest.mark.parametrize("victim", sorted(VITAL))
def test_a_dead_process_of_ray_ends_the_registry(tmp_path: Path, victim: str) -> None:
    """When the GCS or the raylet is killed, the registry's process ends at once, and the operator is told which."""

    def loses(life: Life) -> None:
        processes = ray(tmp_path)
        life.watch()
        life.ready()
        processes[victim].kill()
        threading.Event().wait(LIMIT_S)
        (tmp_path / "unnoticed").touch()

    lives = Lives(tmp_path, loses, returns)
    lives.keep()
    assert lives.lines == [f"Ray's {victim} was ended by SIGKILL. Starting again …"]
    assert not (tmp_path / "unnoticed").exists()


def test_a_process_of_ray_that_is_missing_already(tmp_path: Path) -> None:
    """A process that ended before it could be watched is noticed, too: here the first start fails with that."""

    def lost(life: Life) -> None:
        victim = ray(tmp_path)["raylet"]
        victim.kill()
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        life.watch()
        threading.Event().wait(LIMIT_S)

    with pytest.raises(StartFailed, match="Ray's raylet ended during the start"):
        Lives(tmp_path, lost).keep()


def test_an_end_that_is_wanted_is_no_death(tmp_path: Path) -> None:
    """Once a shutdown has begun, the end of Ray's processes does not cut it short."""

    def shuts_down(life: Life) -> None:
        processes = ray(tmp_path)
        life.watch()
        life.stopping()
        for process in processes.values():
            process.kill()
            process.wait()
        for thread in threading.enumerate():
            if thread.name == "cluster-watch":
                thread.join(LIMIT_S)
        (tmp_path / "done").touch()

    lives = Lives(tmp_path, shuts_down)
    lives.keep()
    assert (tmp_path / "done").exists()
    assert lives.begun == 1


def test_a_watch_that_fails_is_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its watch a registry does not go on: its process ends, and the operator is told why."""

    def breaks(_pid: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    def lives_on(life: Life) -> None:
        ray(tmp_path)
        monkeypatch.setattr(os, "pidfd_open", breaks)
        life.watch()
        threading.Event().wait(LIMIT_S)

    with pytest.raises(StartFailed, match=r"the watch of Ray's processes failed: OSError: .*too many open files"):
        Lives(tmp_path, lives_on).keep()


def test_only_the_parent_holds_the_lock(tmp_path: Path) -> None:
    """A registry's process does not keep its parent's lock: another start can have it once the parent is gone."""

    def looks(_life: Life) -> None:
        (tmp_path / "open").write_text("\n".join(file.path for file in psutil.Process().open_files()))

    Lives(tmp_path, looks).keep()
    assert str(tmp_path / "lock") not in (tmp_path / "open").read_text().splitlines()


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine has no room for a process, that is the error, and signals are heeded again."""

    def fork() -> int:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(StartFailed, match=r"no process can be started: OSError: .*no memory"):
        Lives(tmp_path, returns).keep()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(restarts.STOP_SIGNALS)
