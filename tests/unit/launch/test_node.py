"""A machine's part in a cluster: started once, with its environment, and again only when something has changed."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deployments.launch import keeper, node, ray_commands, up_again
from deployments.launch.node import head_is_kept, node_environment, node_folder, start_ray
from deployments.launch.ray_commands import RayStart
from registry.errors import BadSettings, StartFailed

OPTIONS = ["--address=192.0.2.10:6390"]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[list[str]]]]:
    """A machine with a token and a ``ray`` that writes down how it was called: arguments, and some variables."""
    calls = tmp_path / "calls"
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    (tmp_path / "home" / ".ray" / "auth_token").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(node, "BASE", tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))  # for the state of Ray's launcher
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(ray_commands, "ray_processes", lambda: [["raylet", 1, 2.0]] if calls.exists() else [])
    monkeypatch.setattr(keeper, "launch", lambda folder, start: start.run(folder))  # see test_keeper.py
    program = tmp_path / "ray"
    program.write_text(
        f'#!/bin/sh\necho "$*|$RAY_AUTH_MODE|$OMP_NUM_THREADS|$(ulimit -n)|$TMPDIR|$HF_TOKEN" >> {calls}\n'
        '[ "$3" != fail ]\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda: [line.split("|") for line in calls.read_text().splitlines()]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_ray_is_started_anew_with_what_the_registry_needs(ran: Callable[[], list[list[str]]]) -> None:
    """What Ray ran here is stopped; it gets token mode, many files, and neither threads nor a log monitor."""
    assert start_ray(OPTIONS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    stop, start = ran()
    assert stop[0] == "stop"
    own = node.node_folder()
    started = f"start --include-log-monitor=false {OPTIONS[0]} --temp-dir={own}/r"
    assert start == [started, "token", "", str(most), f"{own}/t", ""]


def test_what_runs_already_is_left_alone(ran: Callable[[], list[list[str]]]) -> None:
    """The same options again change nothing; others, or another process in the first one's place, start it anew."""
    assert start_ray(OPTIONS)
    assert not start_ray(OPTIONS)
    assert len(ran()) == 2
    assert start_ray([*OPTIONS, "--num-gpus=2"])
    assert len(ran()) == 4


def test_one_at_a_time(ran: Callable[[], list[list[str]]]) -> None:
    """Of two that come at once, as after a lost connection, one starts Ray and the other finds it started."""
    with ThreadPoolExecutor() as threads:
        assert sorted(threads.map(start_ray, [OPTIONS, OPTIONS])) == [False, True]
    assert len(ran()) == 2


def test_a_head_gives_no_machine_up(ran: Callable[[], list[list[str]]], tmp_path: Path) -> None:
    """Its monitor gets the launcher's configuration with our provider of machines (deployments/launch/launcher.py)."""
    config = tmp_path / "bootstrap.yaml"
    config.write_text('{"cluster_name": "x", "provider": {"type": "local", "head_ip": "192.0.2.1", "worker_ips": []}}')
    assert start_ray(["--head", f"--autoscaling-config={config}"])
    _, start = ran()
    assert (
        start[0]
        == f"start --include-log-monitor=false --head --autoscaling-config={tmp_path / 'bootstrap.greenprompt.yaml'} "
        f"--temp-dir={node.node_folder()}/r"
    )


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to keepers: one that is ended, or one that starts Ray. One runs, unless the test says otherwise."""
    happened: list[str] = []

    def launch(folder: Path, start: RayStart) -> None:
        happened.append("launch")
        start.run(folder)

    monkeypatch.setattr(keeper, "end", lambda _: happened.append("end"))
    monkeypatch.setattr(keeper, "launch", launch)
    monkeypatch.setattr(keeper, "is_running", lambda _: "launch" in happened)
    return happened


def test_a_head_is_started_by_a_keeper(ran: Callable[[], list[list[str]]], kept: list[str]) -> None:
    """Other options replace the keeper together with Ray, and the old registry's command is forgotten."""
    assert start_ray(["--head"])
    up_again.remember(["greenprompt", "up"])
    assert not start_ray(["--head"])
    assert kept == ["end", "launch"]
    assert up_again.remembered() is not None
    assert start_ray(["--head", "--num-gpus=2"])
    assert kept == ["end", "launch"] * 2
    assert up_again.remembered() is None
    assert len(ran()) == 4


def test_a_machine_needs_no_keeper(ran: Callable[[], list[list[str]]], kept: list[str]) -> None:
    """The launcher starts Ray again there; a keeper of an earlier head is ended."""
    assert start_ray(OPTIONS)
    assert kept == ["end"]
    assert len(ran()) == 2


def test_a_head_whose_keeper_was_killed_is_left_alone(
    ran: Callable[[], list[list[str]]], kept: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its leases are worth more; that it is not started again if it dies is said."""
    assert start_ray(["--head"])
    kept.clear()
    assert not start_ray(["--head"])
    assert "is not started again if it dies" in capsys.readouterr().out
    assert len(ran()) == 2


def test_a_new_raylet_is_not_ours(ran: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A raylet that somebody else has started since is no reason to do nothing."""
    assert start_ray(OPTIONS)
    monkeypatch.setattr(ray_commands, "ray_processes", lambda: [["raylet", 7, 2.0]])
    assert start_ray(OPTIONS)


def test_new_code_is_a_reason(ran: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update of the registry its wrappers are started anew."""
    assert start_ray(OPTIONS)
    monkeypatch.setattr(node, "_code", lambda: "another")
    assert start_ray(OPTIONS)


@pytest.mark.parametrize("name", ["RAY_REDIS_ADDRESS", "RAY_TLS_LATER", "HF_TOKEN", "VLLM_ATTENTION_BACKEND"])
def test_what_the_operator_sets_is_a_reason(
    ran: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A Redis for the head, or a variable that models are loaded with: without a start nothing would see it."""
    assert start_ray(OPTIONS)
    monkeypatch.setenv(name, "x")
    assert start_ray(OPTIONS)
    assert not start_ray(OPTIONS)


def test_a_new_token_is_a_reason(ran: Callable[[], list[list[str]]]) -> None:
    """Ray's processes have the old one, and so have the replicas, which would refuse what HAProxy sends."""
    assert start_ray(OPTIONS)
    (Path.home() / ".ray" / "auth_token").write_text("y")
    assert start_ray(OPTIONS)
    assert not start_ray(OPTIONS)


def test_what_the_launcher_sets_is_none(ran: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes never get it."""
    assert start_ray(OPTIONS)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert not start_ray(OPTIONS)


def test_a_record_that_was_cut_short_is_none(ran: Callable[[], list[list[str]]]) -> None:
    """A crash while it was written costs a start, no more."""
    assert start_ray(OPTIONS)
    record = node.node_folder() / ray_commands.RECORD
    record.write_text('{"wan')
    assert start_ray(OPTIONS)
    assert json.loads(record.read_text())["running"] == [["raylet", 1, 2.0]]


def test_a_ray_that_does_not_start_is_said(ran: Callable[[], list[list[str]]]) -> None:
    """The error tells which of Ray's commands failed; the next attempt tries again."""
    with pytest.raises(StartFailed, match="ray start ended with 1"):
        start_ray(["fail"])
    assert not (node.node_folder() / ray_commands.RECORD).exists()


def test_a_missing_token_is_said(ran: Callable[[], list[list[str]]], tmp_path: Path) -> None:
    """Without a token nothing is started, and the error says how to make one."""
    (Path(os.environ["HOME"]) / ".ray" / "auth_token").unlink()
    with pytest.raises(BadSettings, match="greenprompt ray-token"):
        node_environment(tmp_path)


@pytest.mark.parametrize(
    ("given", "place"),
    [({}, None), ({"TMPDIR": "/t"}, "/t"), ({"TMPDIR": "/t", "RAY_TMPDIR": "/r"}, "/r"), ({"RAY_TMPDIR": "/r"}, "/r")],
)
def test_the_monitor_finds_the_launchers_list(
    ran: Callable[[], list[list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    place: str | None,
) -> None:
    """Ray's monitor looks for the list of machines where `ray up` and `ray-start` keep it, whatever TMPDIR it has."""
    monkeypatch.delenv("RAY_TMPDIR")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert node_environment(tmp_path)["RAY_TMPDIR"] == (place or str(node.BASE))


def test_an_open_token_is_closed(ran: Callable[[], list[list[str]]]) -> None:
    """A token that Ray's own command made for all to read is its owner's alone when Ray has been started."""
    token = Path(os.environ["HOME"]) / ".ray" / "auth_token"
    token.chmod(0o644)
    assert start_ray(OPTIONS)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_folder_that_somebody_prepared_is_refused(ran: Callable[[], list[list[str]]], tmp_path: Path) -> None:
    """Its name is known: whoever makes it first, open or as a link, stops the start, and nothing of theirs runs."""
    folder = tmp_path / f"gp-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(BadSettings, match=rf"{folder}: is open to other users \(mode 0777\)"):
        start_ray(OPTIONS)
    folder.rmdir()
    folder.symlink_to(tmp_path / "home")
    with pytest.raises(BadSettings, match="is a link"):
        start_ray(OPTIONS)
    assert not (tmp_path / "calls").exists()


def test_all_of_a_node_is_in_its_own_folder(ran: Callable[[], list[list[str]]], tmp_path: Path) -> None:
    """HAProxy's files, Ray's and the record; a place that the operator chooses for Ray's is kept."""
    assert start_ray(OPTIONS)
    own = node.node_folder()
    assert {path.name for path in own.iterdir()} == {"h", "t", "node.json", "node.lock"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in own.rglob("*")} == {0o600, 0o700}
    assert start_ray([*OPTIONS, "--temp-dir=/srv/ray"])
    assert ran()[-1][0].endswith("--temp-dir=/srv/ray")


def test_paths_are_short_enough_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the longest user id, HAProxy's sockets, Ray's and those of engines have room."""
    own = Path("/tmp/gp-4294967295")
    monkeypatch.setattr(os, "geteuid", lambda: 2**32 - 1)
    monkeypatch.setattr(node, "private_folder", lambda folder: folder)
    assert node.node_folder() == own
    assert len(str(own / "h" / "admin.sock")) + 1 + 56 <= 97
    assert len(str(own / "r" / "session_2026-11-29_13-28-05_123456_1234567/sockets/plasma_store.12345")) <= 107
    assert len(str(own / "t")) < 49  # else engines would take /tmp


def test_secrets_are_in_no_environment_of_ray(
    ran: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub token goes to a file that only its owner can read, and a new one is a reason to start Ray anew."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert start_ray(OPTIONS)
    assert ran()[-1][-1] == ""
    (file,) = (Path(os.environ["HOME"]) / ".greenprompt").iterdir()
    assert file == node.secrets_file()
    assert json.loads(file.read_text()) == {"HF_TOKEN": "hf_secret"}
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o600, 0o700]


def test_secrets_need_a_home(ran: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A home in which nothing can be written stops the start, if there are secrets; the error names the file."""
    (Path(os.environ["HOME"]) / ".greenprompt").write_text("a file, not a folder")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(BadSettings, match=r"\.greenprompt/secrets-.*secrets can't be written"):
        start_ray(OPTIONS)


def test_whether_a_head_is_kept_is_only_looked_at(ran: Callable[[], list[list[str]]]) -> None:
    """No folder is made where none is; a keeper holds a lock in the node's folder."""
    assert not head_is_kept()
    assert not node._node_folder().exists()
    with (node_folder() / keeper.LOCK).open("w") as lock:
        lock.write("1")
        lock.flush()
        assert not head_is_kept()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert head_is_kept()


def test_our_code_has_a_hash() -> None:
    """It is the same as long as nothing changes."""
    assert node._code() == node._code()
    assert len(node._code()) == 64


def test_a_zombie_does_not_run(tmp_path: Path) -> None:
    """A raylet that has ended and is not reaped, as in a container without an init, is not taken for a running one."""
    (tmp_path / "raylet").symlink_to("/bin/sleep")
    with subprocess.Popen([tmp_path / "raylet", "600"]) as process:

        def is_listed() -> bool:
            return process.pid in [pid for _, pid, _ in ray_commands.ray_processes()]

        assert is_listed()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_listed()
