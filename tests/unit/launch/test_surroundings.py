"""What a local start needs of its machine, and how it says what is missing."""

from __future__ import annotations

import resource
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments.launch import surroundings
from deployments.launch.surroundings import (
    dashboard_port,
    require_open_files,
    require_writable,
    without_proxies,
)
from deployments.machine.disk import disk_problem
from registry.errors import BadSettings
from registry.settings import RaySettings, Settings, WrapperSettings


def test_too_few_open_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard limit below what HAProxy takes is an error with both numbers; a soft one is raised without a word."""
    limits = {"soft": 1024, "hard": 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _which, both: limits.update(soft=both[0]))
    with pytest.raises(BadSettings, match="at most 4096 open files are allowed, HAProxy needs 10276"):
        require_open_files()
    limits["hard"] = 20_000
    require_open_files()
    assert limits["soft"] == 20_000
    limits["hard"] = resource.RLIM_INFINITY
    require_open_files()


@pytest.mark.parametrize("place", ["/proc/nope", "/dev/null", "/sys/x"])
def test_a_folder_that_can_not_be_written(place: str) -> None:
    """A place where nothing can be written is an error of one line, with the setting's name."""
    with pytest.raises(BadSettings) as caught:
        require_writable(Path(place), "state_dir")
    assert caught.value.source == "state_dir"
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without space is told before anything starts, with what is free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=3 * 2**20))
    with pytest.raises(BadSettings, match=r"is full \(3 MiB are free\)"):
        require_writable(tmp_path, "state_dir")
    monkeypatch.undo()
    assert disk_problem(tmp_path) is None
    assert disk_problem(tmp_path / "nowhere") is not None


def test_a_second_user_is_checked_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that engines can't run as is an error that names the setting; nothing is started."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    settings = Settings(state_dir=tmp_path, cache_dir=tmp_path, wrappers=WrapperSettings(run_as="no-such-user"))
    with pytest.raises(BadSettings, match=r"wrappers\.run_as: this machine has no user 'no-such-user': create it"):
        surroundings.check(settings)


def test_the_dashboards_port() -> None:
    """The configured port is used or refused; without one, one that is free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadSettings, match=r"ray\.dashboard_port"):
            dashboard_port(Settings(ray=RaySettings(dashboard_port=port)))
    assert dashboard_port(Settings(ray=RaySettings(dashboard_port=port))) == port
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as taken:
        patch.setattr(surroundings, "DASHBOARD_PORT", taken.getsockname()[1])
        found = dashboard_port(Settings())
        assert found != taken.getsockname()[1]
        socket.create_server(("127.0.0.1", found)).close()


def test_no_proxy_lies_between_a_machine_and_itself() -> None:
    """Loopback and the named hosts are added to both spellings, once, to what the operator has said."""
    environment = {"HTTP_PROXY": "http://p:1", "no_proxy": "example.org, localhost", "NO_PROXY": "other"}
    without_proxies(environment, "10.0.0.7", "::1")
    names = environment["no_proxy"].split(",")
    assert environment["NO_PROXY"] == environment["no_proxy"]
    assert {"example.org", "other", "127.0.0.1", "localhost", "::1", "[::1]", "10.0.0.7"} <= set(names)
    assert len(names) == len(set(names))
    without_proxies(environment, "10.0.0.7")
    assert environment["no_proxy"].split(",") == names
    empty = dict[str, str]()
    without_proxies(empty)
    assert empty["NO_PROXY"].startswith("127.0.0.1,localhost,::1")
    assert socket.gethostname() in empty["NO_PROXY"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))  # sends nothing: the kernel chooses the address to send from
        assert route.getsockname()[0] in empty["NO_PROXY"].split(",")
