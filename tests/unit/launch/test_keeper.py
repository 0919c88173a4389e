"""A head whose Ray dies is started again with its registry, a bounded number of times; one that was stopped is not."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from deployments.launch import keeper, restarts, up_again
from deployments.launch.keeper import Keeper
from deployments.launch.ray_commands import RECORD, RayStart
from deployments.launch.restarts import StopWanted, heed_signals
from deployments.serve.logs import configure_logging
from registry.errors import StartFailed

# A keeper of most tests is a fork of the process that runs the tests, which may have threads (Python 3.12).
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

LIMIT_S = 100.0

# What the n-th `ray start` does is line n of `deeds`: fail, or start Ray and let something happen to it once it has
# been recorded. Ray's processes are called like the real ones, and lose their parent as those do.
RAY = """#!/bin/sh
cd {folder}
echo "$*" >> calls
if [ "$1" = stop ]; then
    kill -9 $(cat pids 2> /dev/null) 2> /dev/null
    exit 0
fi
deed=$(sed -n "$(grep -c ^start calls)p" deeds)
echo "starting, $MARK"
if [ "$deed" = fail ]; then exit 1; fi
for name in gcs_server raylet; do
    ./$name 600 > /dev/null 2>&1 & echo $! > $name.pid
    echo $! >> pids
    until [ "$(cat /proc/$!/comm)" = $name ]; do sleep 0.01; done  # as the real one, which waits for both
done
gcs=$(cat gcs_server.pid) raylet=$(cat raylet.pid)
(
    until grep -q "$gcs" node.json 2> /dev/null; do [ -e /proc/$gcs ] || exit; sleep 0.01; done
    case "$deed" in
        kill) kill -9 $gcs ;;
        abort) kill -ABRT $raylet ;;
        exit) kill -TERM $raylet ;;
        unknown) until grep -q "is not known" keeper.jsonl; do sleep 0.01; done
            touch stop-runs; kill -TERM $raylet ;;
        stop) touch stop-runs; kill -TERM $raylet ;;
        force) touch stop-runs; kill -9 $raylet ;;
        orphan) sh -c 'sleep 0.01 & echo $! > orphan.pid'
            while [ -e /proc/$(cat orphan.pid) ]; do sleep 0.01; done
            touch stop-runs; kill -TERM $raylet ;;
    esac
) > /dev/null 2>&1 &
"""


class Head:
    """A head, with a ``ray`` of its own, on which things happen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in restarts.VITAL:
            (folder / name).symlink_to("/bin/sleep")
        program = folder / "ray"
        program.write_text(RAY.format(folder=folder))
        program.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "MARK": "mine"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.start = RayStart(str(program), ["--head"], environment, "wanted")
        self._process: ForkProcess | None = None

    def deeds(self, *deeds: str) -> None:
        """Say what happens to the first, second, … Ray; nothing to those after them."""
        (self.folder / "deeds").write_text("\n".join(deeds))

    def keep(self) -> None:
        """Run a keeper until it ends."""
        self._process = get_context("fork").Process(target=self._in_child)
        self._process.start()
        self._process.join(LIMIT_S)
        assert self._process.exitcode == 0

    def _in_child(self) -> None:
        configure_logging(self.folder / keeper.LOG)
        kept = Keeper(self.start, self.folder)
        with suppress(StopWanted):
            heed_signals()
            assert kept.begin()["problem"] is None
            kept.keep()

    def close(self) -> None:
        """End all that was started."""
        if self._process is not None:
            self._process.kill()
        keeper.end(self.folder)
        with suppress(FileNotFoundError):
            for pid in (self.folder / "pids").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    @property
    def calls(self) -> list[str]:
        """The calls of ``ray``."""
        return (self.folder / "calls").read_text().splitlines()

    @property
    def rounds(self) -> int:
        """How often Ray was started. A stop may follow: if the keeper still watches for one, it stops Ray again."""
        calls = self.calls[: len(self.calls) // len(ROUND) * len(ROUND)]
        assert self.calls in (calls, [*calls, "stop"])
        assert calls == ROUND * (len(calls) // len(ROUND))
        return len(calls) // len(ROUND)

    def logged(self) -> list[dict[str, Any]]:
        """What the keeper logged."""
        return [json.loads(line) for line in (self.folder / keeper.LOG).read_text().splitlines()]

    def remember(self, script: str) -> None:
        """Let this be the command that starts the registry."""
        up_again.remember(["sh", "-c", script])

    def process(self, name: str) -> psutil.Process:
        """Ray's process of this name that was started last."""
        return psutil.Process(int((self.folder / f"{name}.pid").read_text()))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[Any]]]:
    """Every process that a keeper is launched as; waited for."""
    found: list[subprocess.Popen[Any]] = []
    real = subprocess.Popen

    def remember(*arguments: Any, **more: Any) -> subprocess.Popen[Any]:
        found.append(real(*arguments, **more))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    yield found
    for process in found:
        process.wait(LIMIT_S)


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[Any]]) -> Iterator[Head]:
    """A head; without pauses; only its own ``ray stop`` is seen, not those of tests that run at the same time."""
    monkeypatch.setattr(restarts, "PAUSES_S", (0.0, 0.001, 0.002))
    monkeypatch.setattr(keeper, "PAUSES_S", restarts.PAUSES_S)
    monkeypatch.setattr(keeper, "STOP_POLL_S", 0.01)
    monkeypatch.setattr(keeper, "ADOPTION_POLL_S", 0.01)
    monkeypatch.setattr(keeper, "ADOPTION_LIMIT_S", 1.0)
    monkeypatch.setattr(keeper, "_ray_stop_runs", (tmp_path / "stop-runs").exists)
    monkeypatch.setenv("HOME", str(tmp_path))
    head = Head(tmp_path)
    head.deeds()
    yield head
    head.close()


ROUND = ["stop", "start --include-log-monitor=false --head"]
"""The calls of one start."""


def test_a_head_that_dies_is_started_again(head: Head) -> None:
    """After the death of the GCS, then of the raylet, Ray is started as before; after a stop it is not."""
    head.deeds("kill", "abort", "exit", "stop")
    head.keep()
    assert head.rounds == 4
    died = [line["problem"] for line in head.logged() if "problem" in line]
    assert len(died) == 3  # the last one as after the death of an agent
    assert "gcs_server" in died[0]
    assert "raylet" in died[1]
    assert head.logged()[-1]["event"].startswith("Ray was stopped")
    recorded = json.loads((head.folder / RECORD).read_text())
    assert int((head.folder / "gcs_server.pid").read_text()) in [pid for _, pid, _ in recorded["running"]]


def test_a_forced_stop_is_a_stop(head: Head) -> None:
    """Processes that are killed while `ray stop` runs are not started again."""
    head.deeds("force")
    head.keep()
    assert head.calls == ROUND


def test_a_stop_during_a_pause(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `ray stop` between death and restart is heeded, although it may find nothing to stop."""
    monkeypatch.setattr(restarts, "PAUSES_S", (3600.0,))
    first = True

    def stops() -> bool:
        nonlocal first
        was_first, first = first, False
        return not was_first  # not at the death, but when it is looked for again

    monkeypatch.setattr(keeper, "_ray_stop_runs", stops)
    head.deeds("kill")
    head.keep()
    assert head.calls == ROUND


def test_a_stop_during_a_restart(head: Head) -> None:
    """A `ray stop` while Ray is being started again is repeated, because it may have come too early to stop it."""
    head.deeds("kill")
    text = (head.folder / "ray").read_text()
    wait = 'if [ "$(grep -c ^start calls)" = 2 ]; then touch stop-runs; sleep 0.2; fi\necho "starting'
    (head.folder / "ray").write_text(text.replace('echo "starting', wait))
    head.keep()
    assert head.calls == [*ROUND * 2, "stop"]
    assert not head.process("raylet").is_running() or head.process("raylet").status() == psutil.STATUS_ZOMBIE


def test_a_start_that_fails_is_tried_again(head: Head) -> None:
    """It counts as a restart, and what Ray printed is in the log."""
    head.deeds("kill", "fail", "stop")
    head.keep()
    assert head.rounds == 3
    (failed,) = (line for line in head.logged() if line["event"] == "Ray does not start")
    assert (failed["problem"], failed["output"]) == ("ray start ended with 1", "starting, mine\n")


def test_restarts_are_bounded(head: Head) -> None:
    """A head that dies time and again is given up, and the log says why and what to do."""
    head.deeds(*["kill"] * 9)
    head.keep()
    assert head.calls == [*ROUND * (1 + len(restarts.PAUSES_S)), "stop"]
    last = head.logged()[-1]
    assert "run `ray up --restart-only`" in last["event"]
    assert "gcs_server" in last["problem"]


def test_the_registry_is_started_again(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command is repeated with its folder and environment, until it succeeds, and forgotten after a stop."""
    monkeypatch.setenv("GREENPROMPT_HTTP__PORT", "8001")
    monkeypatch.chdir("/")
    head.remember(f'echo "$PWD $GREENPROMPT_HTTP__PORT" >> {head.folder}/up; [ $(wc -l < {head.folder}/up) = 2 ]')
    monkeypatch.delenv("GREENPROMPT_HTTP__PORT")
    monkeypatch.chdir(head.folder)
    head.deeds("kill")
    stops_after_up(head)
    head.keep()
    assert (head.folder / "up").read_text().splitlines() == ["/ 8001"] * 2
    events = [line["event"] for line in head.logged()]
    assert events[1:] == ["the registry does not start", "the registry was started again", "Ray was stopped"]
    assert up_again.remembered() is None


def stops_after_up(head: Head) -> None:
    """Let the second Ray be stopped once the registry's command has run twice."""
    text = (head.folder / "ray").read_text()
    until = 'until [ "$(cat up | wc -l)" = 2 ]; do sleep 0.01; done; sleep 1'
    wait = f'"") {until}; touch stop-runs; kill -TERM $raylet ;;\n        kill)'
    (head.folder / "ray").write_text(text.replace("kill)", wait, 1))


def test_no_registry_is_started_after_down(head: Head) -> None:
    """Without a remembered command only Ray is started again."""
    head.remember("touch wrong")
    up_again.forget()
    head.deeds("kill", "stop")
    head.keep()
    assert not (head.folder / "wrong").exists()
    assert "the registry was started again" not in [line["event"] for line in head.logged()]


@pytest.mark.parametrize("text", ["", "{}", '["one field"]'], ids=["empty", "an object", "too short"])
def test_a_spoiled_record_of_the_registry_is_logged(head: Head, text: str) -> None:
    """Ray is started again, and watched further."""
    head.remember("true")
    up_again.command_file().write_text(text)
    head.deeds("kill", "unknown")
    head.keep()
    assert head.rounds == 2
    assert "the command that starts the registry is not known" in [line["event"] for line in head.logged()]


@pytest.mark.parametrize("end", ["kill -9 $(cat raylet.pid)", "rm .greenprompt/up-*.json"], ids=["death", "down"])
def test_a_start_of_the_registry_ends_with_its_reason(head: Head, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """It is ended when Ray dies again, or the registry is not wanted any more; it may hang for minutes."""
    monkeypatch.chdir(head.folder)
    head.remember(f"{end}; exec sleep 600")
    head.deeds("kill", "", "stop")
    if "rm" in end:  # after that nothing ends Ray
        head.deeds("kill", "stop-later")
        text = (head.folder / "ray").read_text()
        later = "stop-later) while ls .greenprompt/up-*; do sleep 0.01; done; sleep 0.1; touch stop-runs; "
        (head.folder / "ray").write_text(text.replace("exit)", f"{later} kill -TERM $raylet ;;\n        exit)", 1))
    head.keep()
    problem = "`greenprompt down` has ended the registry" if "rm" in end else "Ray died again"
    assert problem in [line["problem"] for line in head.logged() if line["event"] == "the registry does not start"]


def test_orphans_are_reaped(head: Head) -> None:
    """A process of Ray whose parent has ended, and that ends itself, does not stay as a zombie."""
    head.deeds("orphan")
    head.keep()
    assert head.calls == ROUND


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["python", "/bin/ray", "stop"], True),
        (["python", "/bin/ray", "stop", "--force"], True),
        (["python", "-m", "ray.scripts.scripts", "stop"], True),
        (["bash", "-c", "ray stop"], False),
        (["python", "/bin/ray", "start"], False),
        (["python", "/bin/ray", "--logging-level=debug", "stop"], True),
        (["/bin/ray", "stop"], True),
        (["ssh", "w1", "ray", "stop"], False),
        (["watch", "ray", "stop"], False),
        (["grep", "-rn", "ray", "stop"], False),
        (["python"], False),
        (["vi", "array", "stop"], False),
        ([], False),
    ],
)
def test_what_is_a_ray_stop(words: list[str], found: bool) -> None:
    """The command itself counts, however it is called; not a shell that will run it, nor other programs."""
    assert keeper._is_ray_stop(words) is found


def test_a_ray_stop_of_another_process_is_found(tmp_path: Path) -> None:
    """It is found while it runs, if this process did not start it itself."""
    program = tmp_path / "ray"
    program.write_text(f"#!{sys.executable}\nprint('up', flush=True)\ninput()\n")
    program.chmod(0o755)
    between = ["sh", "-c", f"{program} stop; true"]
    with subprocess.Popen(between, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert keeper._ray_stop_runs()


def test_a_keeper_stays_in_the_background(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    """It has a session and a lock of its own and Ray as its children; its end does not end Ray."""
    keeper.launch(head.folder, head.start)
    assert capsys.readouterr().out == "starting, mine\n"
    assert keeper.is_running(head.folder)
    lock = head.folder / keeper.LOCK
    process = psutil.Process(int(lock.read_text()))
    assert os.getsid(process.pid) == process.pid
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    raylet = head.process("raylet")
    assert raylet.ppid() == process.pid
    keeper.end(head.folder)
    assert not keeper.is_running(head.folder)
    assert raylet.is_running()
    assert head.calls == ROUND


def test_a_keeper_that_is_killed_does_no_harm(head: Head, started: list[subprocess.Popen[Any]]) -> None:
    """Ray keeps running; its lock and pid mislead nobody."""
    keeper.launch(head.folder, head.start)
    started[0].kill()
    started[0].wait()
    assert not keeper.is_running(head.folder)
    keeper.end(head.folder)
    assert head.process("gcs_server").is_running()
    keeper.launch(head.folder, head.start)
    assert keeper.is_running(head.folder)


def test_a_ray_that_does_not_start_is_an_error(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    """What it printed is printed, and the keeper has ended."""
    head.deeds("fail")
    with pytest.raises(StartFailed, match="ray start ended with 1"):
        keeper.launch(head.folder, head.start)
    assert capsys.readouterr().out == "starting, mine\n"
    assert not keeper.is_running(head.folder)


def test_a_head_whose_caller_is_lost_is_kept(head: Head) -> None:
    """The connection by ssh may break during the start; who repeats the command finds a Ray that is kept."""
    text = (head.folder / "ray").read_text()
    (head.folder / "ray").write_text(text.replace('echo "starting', 'sleep 0.3; echo "starting'))
    caller = get_context("fork").Process(target=keeper.launch, args=(head.folder, head.start))
    caller.start()
    until(lambda: keeper.is_running(head.folder))
    caller.kill()
    caller.join()
    assert not (head.folder / RECORD).exists()
    until((head.folder / RECORD).exists)
    time.sleep(0.2)  # it has written its answer
    assert keeper.is_running(head.folder)


def until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fail after LIMIT_S."""
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_start_that_can_not_be_recorded_is_none(head: Head) -> None:
    """The next call would start a second Ray beside it, so this one is stopped."""
    (head.folder / RECORD).mkdir()
    with pytest.raises(StartFailed, match="its start can't be recorded"):
        keeper.launch(head.folder, head.start)
    assert head.calls == [*ROUND, "stop"]


def test_a_keeper_that_dies_at_its_start(head: Head) -> None:
    """Its end is noticed, and not waited for until the time limit."""
    broken = replace(head.start, environment={"PYTHONHOME": "/nowhere"})
    with pytest.raises(StartFailed, match="its process ended"):
        keeper.launch(head.folder, broken)


def test_a_stale_pid_is_not_signalled(head: Head) -> None:
    """A pid in a lock file that no process holds belongs to somebody else by now."""
    with subprocess.Popen(["sleep", "600"]) as stranger:
        (head.folder / keeper.LOCK).write_text(str(stranger.pid))
        keeper.end(head.folder)
        assert stranger.poll() is None
        stranger.kill()


def test_a_reused_pid_is_not_signalled(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that ends just before its end is asked for, and whose pid another process gets, is left alone."""
    path = head.folder / keeper.LOCK
    real: Callable[[int], int] = os.pidfd_open
    with subprocess.Popen(["sleep", "600"]) as stranger, path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(stranger.pid))
        lock.flush()

        def opened(pid: int) -> int:
            fcntl.flock(lock, fcntl.LOCK_UN)
            return real(pid)

        monkeypatch.setattr(os, "pidfd_open", opened)
        keeper.end(head.folder)
        assert stranger.poll() is None
        stranger.kill()
