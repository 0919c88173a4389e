"""The life of a registry that was started by hand: one at a time, leftovers removed, an end that is waited for."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest

import deployments.serve
from deployments.launch import lifecycle, up_again
from deployments.launch.lifecycle import end, ready_lines, run_detached, run_in_foreground, start_on_cluster
from deployments.launch.local_ray import FOLDER_PREFIX, free_ports
from deployments.launch.restarts import Life
from deployments.machine import process_tree
from registry.errors import BadSettings, StartFailed
from registry.settings import RaySettings, Settings

# An owner of a registry, without the registry: holds the lock and writes down that it is ready, or ends with a word.
OWNER = """
import fcntl, json, os, pathlib, signal, sys
state = pathlib.Path(sys.argv[1])
lock = open(state / "up.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write(str(os.getpid()))
lock.flush()
record = state / "up.json"
record.with_suffix(".tmp").write_text(json.dumps({"pid": os.getpid(), "url": "http://x", "dashboard": "http://d"}))
signal.signal(signal.SIGTERM, lambda *_: (record.unlink(), sys.exit(0)))
record.with_suffix(".tmp").replace(record)
print("up", flush=True)
signal.pause()
"""
ENDS = "import sys; print('first'); print('greenprompt: ' + sys.argv[2]); sys.exit(2)"


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short polls; environment and signal handlers as they were."""
    monkeypatch.setattr(lifecycle, "POLL_S", 0.005)
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local registry runs in the test's own process, and is not started again (see test_restarts.py)."""

    def keep_running(live: Callable[[Life], None], clean_up: Callable[[], None], _lock: object, **_: object) -> None:
        reports, report = Pipe(duplex=False)
        with reports, report:
            live(Life(report))
        clean_up()

    monkeypatch.setattr(lifecycle, "keep_running", keep_running)
    monkeypatch.setattr(Life, "watch", lambda _life: None)


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[Any]]]:
    """Every process that lifecycle starts; ended and waited for."""
    found: list[subprocess.Popen[Any]] = []
    real = subprocess.Popen

    def popen(*args: Any, **more: Any) -> subprocess.Popen[Any]:
        found.append(real(*args, **more))
        return found[-1]

    kinds = SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(lifecycle, "subprocess", kinds)
    yield found
    for process in found:
        process.kill()
        process.wait()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    port, dashboard_port = free_ports(2)
    return Settings.model_validate(
        {
            "state_dir": tmp_path / "state",
            "http": {"port": port, "haproxy": False},
            "ray": {"dashboard_port": dashboard_port},
        }
    )


class Ready(NamedTuple):
    """What a start returns."""

    url: str
    dashboard: str


class FakeApp:
    """Stands in for deployments.serve.app: notes what it was told; ``failure`` is raised in place of a start."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.calls: list[str] = []
        self.folder: Path | None = None
        self.during: Callable[[], None] = lambda: None

    def check(self, _settings: Settings) -> None:
        """Nothing is wrong."""

    def start(self, _settings: Settings, folder: Path | None, *, on_joined: Callable[[], None] = lambda: None) -> Ready:
        self.calls.append("start")
        self.folder = folder
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray replaces it
        on_joined()
        self.during()
        if self.failure is not None:
            raise self.failure
        return Ready("http://registry", "http://dashboard")

    def stop(self, _settings: Settings) -> None:
        self.calls.append("stop")

    def join_ray(self, _settings: Settings, folder: Path | None) -> str:
        self.calls.append("join")
        assert folder is None
        return "http://dashboard"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FakeApp:
    fake = FakeApp()
    monkeypatch.setitem(sys.modules, "deployments.serve.app", fake)
    monkeypatch.setattr(deployments.serve, "app", fake, raising=False)
    return fake


@pytest.fixture
def owner(settings: Settings) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts owners of the settings' folder; those that are left are ended."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", OWNER, str(settings.state_dir)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def record_of(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((settings.state_dir / "up.json").read_text())
    return found


class Says:
    """What a person was told; ``then`` is called at a line that begins so."""

    def __init__(self, at: str = "", then: Callable[[], None] | None = None) -> None:
        self.lines: list[str] = []
        self._at, self._then = at, then

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if self._then is not None and line.startswith(self._at):
            self._then()


# --- foreground --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_foreground_runs_until_a_signal(settings: Settings, app: FakeApp, number: int) -> None:
    """It starts, says where it is, writes that down, and on a signal shuts down and leaves nothing."""
    records: list[dict[str, Any]] = []
    app.during = lambda: records.append(record_of(settings))

    def ready() -> None:
        records.append(record_of(settings))
        os.kill(os.getpid(), number)

    says = Says("Ray dashboard", ready)
    run_in_foreground(settings, say=says)
    assert app.calls == ["start", "stop"]
    assert records[0] == {"pid": os.getpid(), "folder": str(app.folder)}
    assert records[1] == {**records[0], "url": "http://registry", "dashboard": "http://dashboard"}
    assert says.lines[-1] == "Everything is down."
    assert not (settings.state_dir / "up.json").exists()
    assert (settings.state_dir / "up.lock").read_text() == ""
    assert app.folder is not None
    assert not app.folder.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_start(settings: Settings, app: FakeApp, number: int) -> None:
    """Ctrl-C while things start ends the start at once, and whatever had started."""

    def hang() -> None:
        os.kill(os.getpid(), number)
        pytest.fail("the start went on")

    app.during = hang
    says = Says()
    run_in_foreground(settings, say=says)
    assert app.calls == ["start", "stop"]
    assert says.lines[-1] == "Everything is down."
    assert not (settings.state_dir / "up.json").exists()


def test_a_full_disk_is_told(settings: Settings, app: FakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while the registry runs is said once, and so is its end."""
    free = iter([2**40, 2**40, 2**40, 2**40, 0, 0, 2**40])

    def usage(_folder: object) -> SimpleNamespace:
        left = next(free, None)
        if left is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return SimpleNamespace(free=2**40 if left is None else left)

    monkeypatch.setattr(lifecycle, "DISK_POLL_S", 0)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    says = Says()
    run_in_foreground(settings, say=says)
    told = [line for line in says.lines if "he disk of" in line]
    assert len(told) == 2
    assert f"the disk of {settings.state_dir} is full (0 MiB are free)" in told[0]
    assert "has space again" in told[1]


def test_failed_start_is_cleaned_up(settings: Settings, app: FakeApp) -> None:
    """A start that fails stops what had started, and leaves no record and no folder."""
    app.failure = StartFailed("no wrapper was ready")
    with pytest.raises(StartFailed, match="no wrapper"):
        run_in_foreground(settings, say=Says())
    assert app.calls == ["start", "stop"]
    assert not (settings.state_dir / "up.json").exists()
    assert app.folder is not None
    assert not app.folder.exists()


def test_on_a_cluster_the_registry_stays(settings: Settings, app: FakeApp) -> None:
    """Started on a cluster it is left there, and the operator is told where; this machine keeps no record."""
    said: list[str] = []
    on_cluster = settings.model_copy(update={"ray": RaySettings(address="auto")})
    start_on_cluster(on_cluster, ["greenprompt", "up"], say=said.append)
    assert up_again.remembered() is None
    assert app.calls == ["start"]
    assert app.folder is None
    assert "http://registry" in said[0]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not (settings.state_dir / "up.json").exists()


def test_the_head_remembers_how_its_registry_was_started(
    settings: Settings, app: FakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper of a head gets the command of a registry that is ready, until `down` ends it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(lifecycle, "head_is_kept", lambda: True)
    on_cluster = settings.model_copy(update={"ray": RaySettings(address="auto")})
    app.failure = StartFailed("no database")
    with pytest.raises(StartFailed):
        start_on_cluster(on_cluster, ["greenprompt", "up"], say=Says())
    assert up_again.remembered() is None
    app.failure = None
    start_on_cluster(on_cluster, ["greenprompt", "up"], say=Says())
    remembered = up_again.remembered()
    assert remembered is not None
    assert remembered.command == ["greenprompt", "up"]
    end(on_cluster, say=Says())
    assert up_again.remembered() is None


def test_a_command_that_cannot_be_remembered_is_told(
    settings: Settings, app: FakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a place for it, the registry would not be back after a death; the error names the file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(lifecycle, "head_is_kept", lambda: True)
    (tmp_path / ".greenprompt").write_text("a file, not a folder")
    on_cluster = settings.model_copy(update={"ray": RaySettings(address="auto")})
    with pytest.raises(BadSettings, match=r"\.greenprompt/up-.*can't be written"):
        start_on_cluster(on_cluster, ["greenprompt", "up"], say=Says())


def test_joining_a_cluster_makes_no_folder(settings: Settings, app: FakeApp) -> None:
    """With a cluster that runs there is no folder of our own and no token, and ports are not looked at."""
    joined = settings.model_copy(update={"ray": settings.ray.model_copy(update={"address": "auto"})})
    run_in_foreground(joined, say=Says("Ray dashboard", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert app.folder is None
    assert not (settings.state_dir / "ray-token").exists()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_taken_port_is_told_before_anything_starts(settings: Settings, app: FakeApp) -> None:
    """A port in use ends the start at once, with the setting's name."""
    import socket

    with (
        socket.create_server(("127.0.0.1", settings.http.port)),
        pytest.raises(BadSettings, match=r"http\.port"),
    ):
        run_in_foreground(settings, say=Says())
    assert app.calls == []


def test_only_one_at_a_time(settings: Settings, app: FakeApp, owner: Callable[[], subprocess.Popen[str]]) -> None:
    """A second registry of the same folder is refused, with the process that runs the first."""
    process = owner()
    with pytest.raises(BadSettings, match=rf"a registry runs from .* \(process {process.pid}\)"):
        run_in_foreground(settings, say=Says())
    assert record_of(settings)["pid"] == process.pid
    assert app.calls == []


def test_a_spoiled_record_does_not_hide_a_registry(
    settings: Settings, owner: Callable[[], subprocess.Popen[str]]
) -> None:
    """The lock says which process holds it: ``down`` ends that one, though up.json is cut short."""
    process = owner()
    (settings.state_dir / "up.lock").write_text(str(process.pid))
    (settings.state_dir / "up.json").write_text('{"pid": 1, "fol')
    said: list[str] = []
    end(settings, say=said.append)
    assert process.wait(5) == 0
    assert said == ["Everything is down."]
    end(settings, say=said.append)
    assert said[1:] == [f"No registry runs from {settings.state_dir}."]


def test_folder_that_can_not_be_written_is_named(settings: Settings, app: FakeApp) -> None:
    """A state_dir that can't be made is an error with its name and the reason."""
    settings.state_dir.parent.mkdir(exist_ok=True)
    settings.state_dir.write_text("a file is in the way")
    with pytest.raises(BadSettings, match="state_dir"):
        run_in_foreground(settings, say=Says())


def test_a_log_that_can_not_be_written_is_named(settings: Settings) -> None:
    """A folder in the place of up.log is an error of one line; nothing is started."""
    (settings.state_dir / "up.log").mkdir(parents=True)
    with pytest.raises(BadSettings, match=r"state_dir: .*up\.log can't be written \(Is a directory\)"):
        run_detached(settings, ["/nowhere/to/be/found"], say=Says())


def test_the_log_of_an_open_folder_is_left_alone(settings: Settings) -> None:
    """A state_dir that every user can write to is refused before any file in it is opened."""
    settings.state_dir.mkdir(parents=True)
    (settings.state_dir / "up.log").write_text("precious")
    settings.state_dir.chmod(0o777)
    with pytest.raises(BadSettings, match="every user of this machine can write"):
        run_detached(settings, ["/nowhere/to/be/found"], say=Says())
    assert (settings.state_dir / "up.log").read_text() == "precious"


def test_a_folder_in_the_place_of_the_record_is_named(settings: Settings, app: FakeApp) -> None:
    """A folder in the place of up.json is an error of one line for a start, and no registry for an end."""
    (settings.state_dir / "up.json").mkdir(parents=True)
    with pytest.raises(BadSettings, match=r"state_dir: .*up\.json can't be written"):
        run_in_foreground(settings, say=Says())
    assert app.calls == []
    said: list[str] = []
    end(settings, say=said.append)
    assert said == [f"No registry runs from {settings.state_dir}."]


@pytest.mark.parametrize(
    "text", ['{"pid": 1, "folder": "@"}', '{"pid": 1, "folder": null}', "{}", '{"pid": 1', "", "[]"]
)
def test_stale_record_is_no_obstacle(settings: Settings, app: FakeApp, tmp_path: Path, text: str) -> None:
    """What a killed owner left is removed: its folder, and its record even when it is only half written."""
    folder = tmp_path / f"{FOLDER_PREFIX}left"
    (folder / "session").mkdir(parents=True)
    settings.state_dir.mkdir()
    (settings.state_dir / "up.json").write_text(text.replace("@", str(folder)))
    run_in_foreground(settings, say=Says("Ray dashboard", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert app.calls == ["start", "stop"]
    assert folder.exists() == ("@" not in text)


def test_what_a_killed_owner_left_running_is_ended(
    settings: Settings, app: FakeApp, tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    """Processes of the old cluster end before the new one starts, though only their folder is known; nothing stays."""
    folder = tmp_path / f"{FOLDER_PREFIX}left"
    engine, shared = folder / "t" / "gp-engine-1", tmp_path / "psm_1"
    engine.mkdir(parents=True)
    shared.touch()
    (engine / "shared_memory").write_text(f"{shared}\n")
    for temporary in (str(folder / "t"), "/tmp"):
        waits = [sys.executable, "-IS", "-c", "import signal; signal.pause()"]
        started.append(subprocess.Popen(waits, env={"TMPDIR": temporary}))
    settings.state_dir.mkdir()
    (settings.state_dir / "up.json").write_text(json.dumps({"pid": 1, "folder": str(folder)}))
    before: list[int | None] = []
    app.during = lambda: before.extend(process.poll() for process in started)
    run_in_foreground(settings, say=Says("Ray dashboard", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert before == [-signal.SIGKILL, None]
    assert not folder.exists()
    assert not shared.exists()


def test_what_can_not_be_ended_is_named(settings: Settings, app: FakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of the old cluster that does not end is an error with its number, and its folder stays."""
    me = psutil.Process()
    monkeypatch.setattr(lifecycle, "LEFTOVERS_LIMIT_S", -1.0)
    monkeypatch.setattr(process_tree, "users_of", lambda _folder: {me})
    settings.state_dir.mkdir()
    folder = settings.state_dir / f"{FOLDER_PREFIX}left"
    folder.mkdir()
    (settings.state_dir / "up.json").write_text(json.dumps({"pid": 1, "folder": str(folder)}))
    with pytest.raises(StartFailed, match=f"do not end: {me.pid}"):
        run_in_foreground(settings, say=Says())
    assert app.calls == []
    assert folder.exists()


def test_no_other_folder_is_removed(settings: Settings, app: FakeApp, tmp_path: Path) -> None:
    """A record that names a folder which is not a cluster's removes nothing."""
    precious = tmp_path / "precious"
    precious.mkdir()
    settings.state_dir.mkdir()
    (settings.state_dir / "up.json").write_text(json.dumps({"folder": str(precious)}))
    run_in_foreground(settings, say=Says("Ray dashboard", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert precious.exists()


def test_people_are_told_where_it_is(settings: Settings) -> None:
    """The addresses are told, and where the dashboard's token lies if the cluster is ours."""
    ready = {"url": "http://x", "dashboard": "http://d"}
    text = "\n".join(ready_lines(settings, ready))
    assert "http://x/openapi.json" in text
    assert "http://d" in text
    assert str(settings.state_dir / "ray-token") in text
    joined = settings.model_copy(update={"ray": settings.ray.model_copy(update={"address": "auto"})})
    assert "ray-token" not in "\n".join(ready_lines(joined, ready))
    assert "operator.key" not in text


def test_people_are_told_where_the_operators_key_is(settings: Settings) -> None:
    """With keys, the last line names the file of the operator's key."""
    keyed = settings.model_copy(update={"access": settings.access.model_copy(update={"keys": True})})
    line = ready_lines(keyed, {"url": "http://x", "dashboard": "http://d"})[-1]
    assert line.endswith(f" {settings.state_dir / 'operator.key'}")


@pytest.mark.parametrize(
    ("address", "host", "told"), [("auto", "0.0.0.0", True), ("auto", "127.0.0.1", False), (None, "0.0.0.0", False)]
)
def test_people_are_told_how_to_check_open_ports(
    settings: Settings, address: str | None, host: str, told: bool
) -> None:
    """On a cluster that others can reach, a line has the command, with the port of these settings."""
    changed = {"ray": RaySettings(address=address), "http": settings.http.model_copy(update={"host": host})}
    text = "\n".join(ready_lines(settings.model_copy(update=changed), {"url": "http://x", "dashboard": "http://d"}))
    assert (f"greenprompt firewall cluster.yaml --check --port {settings.http.port}" in text) is told


# --- detached ----------------------------------------------------------------------------------------------


def test_detached_returns_when_it_is_ready(settings: Settings, started: list[subprocess.Popen[bytes]]) -> None:
    """The command runs on in the background; we return when it is ready, and ``end`` ends it."""
    says = Says()
    run_detached(settings, [sys.executable, "-S", "-c", OWNER, str(settings.state_dir)], say=says)
    assert "http://x" in says.lines[0]
    assert str(settings.state_dir / "up.log") in says.lines[-1]
    end(settings, say=says)
    assert says.lines[-1] == "Everything is down."
    assert started[0].wait() == 0


def test_detached_tells_why_it_failed(settings: Settings) -> None:
    """A command that ends is a failure in its own last words; all of them are in the log."""
    with pytest.raises(StartFailed) as caught:
        run_detached(settings, [sys.executable, "-c", ENDS, "", "port 1 is taken"], say=Says())
    assert str(caught.value) == "port 1 is taken"
    assert (settings.state_dir / "up.log").read_text() == "first\ngreenprompt: port 1 is taken\n"


def test_detached_that_says_nothing(settings: Settings) -> None:
    """A command that ends without a word is a failure that says so."""
    with pytest.raises(StartFailed, match="no output"):
        run_detached(settings, [sys.executable, "-S", "-c", ""], say=Says())


def test_detached_is_not_waited_for_for_ever(
    settings: Settings, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is never ready is ended after its time, and the log is named."""
    now_s = iter([0.0, 0.0, 1e9])
    clock = SimpleNamespace(monotonic=lambda: next(now_s), sleep=lambda _s: None)
    monkeypatch.setattr(lifecycle, "time", clock)
    with pytest.raises(StartFailed, match=r"not ready in time; see .*up\.log"):
        run_detached(settings, [sys.executable, "-S", "-c", "import signal; signal.pause()"], say=Says())
    assert started[0].wait() == -signal.SIGTERM


# --- down --------------------------------------------------------------------------------------------------


def test_end_waits_until_it_is_gone(settings: Settings, owner: Callable[[], subprocess.Popen[str]]) -> None:
    """The owner is told to end, and ``end`` returns when it has."""
    process, says = owner(), Says()
    end(settings, say=says)
    assert process.wait() == 0
    assert says.lines == ["Everything is down."]


def test_end_of_an_owner_that_has_removed_its_record(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner removes its record before it lets the lock go: it is waited for, whatever the lock says by then."""

    def forget(_pid: int, _number: int) -> None:
        (settings.state_dir / "up.json").unlink()
        lock.truncate(0)

    settings.state_dir.mkdir()
    (settings.state_dir / "up.json").write_text(json.dumps({"pid": 1}))
    monkeypatch.setattr(lifecycle, "os", SimpleNamespace(kill=forget))
    with (settings.state_dir / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _s: fcntl.flock(lock, fcntl.LOCK_UN))
        monkeypatch.setattr(lifecycle, "time", clock)
        says = Says()
        end(settings, say=says)
    assert says.lines == ["Everything is down."]


def test_end_of_an_owner_that_has_just_taken_the_lock(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner writes its number just after it took the lock: the number is waited for, and that process is told."""
    told: list[int] = []

    def sleep(_s: float) -> None:
        if told:
            fcntl.flock(lock, fcntl.LOCK_UN)
        else:
            lock.write("4711")
            lock.flush()

    settings.state_dir.mkdir()
    monkeypatch.setattr(lifecycle, "os", SimpleNamespace(kill=lambda pid, _number: told.append(pid)))
    monkeypatch.setattr(lifecycle, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep))
    with (settings.state_dir / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end(settings, say=Says())
    assert told == [4711]


@pytest.mark.parametrize("left", ["nothing", "a lock", "a record"])
def test_end_of_nothing(settings: Settings, left: str) -> None:
    """Where none runs nobody is ended: not even a process that has got the number of a dead owner."""
    settings.state_dir.mkdir()
    if left != "nothing":
        (settings.state_dir / "up.lock").touch()
    if left == "a record":
        (settings.state_dir / "up.json").write_text(json.dumps({"pid": os.getpid()}))
    says = Says()
    end(settings, say=says)
    assert says.lines == [f"No registry runs from {settings.state_dir}."]


def test_end_of_an_owner_that_ends_by_itself(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that ends just when it is told to is down: that is no error."""

    def kill(_pid: int, _number: int) -> None:
        raise ProcessLookupError

    settings.state_dir.mkdir()
    (settings.state_dir / "up.json").write_text(json.dumps({"pid": 1}))
    monkeypatch.setattr(lifecycle, "os", SimpleNamespace(kill=kill))
    with (settings.state_dir / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _s: fcntl.flock(lock, fcntl.LOCK_UN))
        monkeypatch.setattr(lifecycle, "time", clock)
        says = Says()
        end(settings, say=says)
    assert says.lines == ["Everything is down."]


def test_end_has_a_limit(
    settings: Settings, owner: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner that does not end is an error that names its process."""
    process = owner()
    monkeypatch.setattr(lifecycle, "DOWN_LIMIT_S", -1.0)
    monkeypatch.setattr(lifecycle, "os", SimpleNamespace(kill=lambda _pid, _number: None))
    with pytest.raises(StartFailed, match=f"process {process.pid} has not ended"):
        end(settings, say=Says())


def test_end_of_a_joined_cluster(settings: Settings, app: FakeApp) -> None:
    """In a cluster that was joined the registry is ended from any node, without an owner."""
    joined = settings.model_copy(update={"ray": settings.ray.model_copy(update={"address": "auto"})})
    says = Says()
    end(joined, say=says)
    assert app.calls == ["join", "stop"]
    assert says.lines == ["The registry of the cluster is down."]
