"""The environment and the folder of a local Ray cluster."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from deployments.launch import local_ray
from deployments.launch.haproxy import SERVE_ENVIRONMENT
from deployments.launch.local_ray import (
    FOLDER_PREFIX,
    RAY_ENVIRONMENT,
    TLS_FOLDER,
    free_ports,
    local_ray_environment,
    require_free_port,
)
from deployments.launch.ray_tls import FILES, KEY, SWITCH, VERBOSITY, make_tls_files
from deployments.machine.cluster_token import proxy_secret, token_path
from deployments.serve.ray_folder import RAY_FOLDER
from registry.errors import BadSettings
from registry.settings import Settings


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test does to the environment is undone."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def settings_of(tmp_path: Path, **http: object) -> Settings:
    return Settings.model_validate({"state_dir": tmp_path, "http": http, "access": {"insecure": True}})


# --- folder and token --------------------------------------------------------------------------------------


def test_folder_is_there_and_goes(tmp_path: Path) -> None:
    """The cluster has a folder of its own for as long as it lives, with all that was put in it."""
    with local_ray_environment(settings_of(tmp_path)) as folder:
        assert folder.name.startswith(FOLDER_PREFIX)
        assert Path(os.environ["TMPDIR"]).is_relative_to(folder)
        (folder / "session/logs").mkdir(parents=True)
        (folder / "session/logs/raylet.out").write_text("x")
    assert not folder.exists()


def test_nobody_else_gets_into_the_folder(tmp_path: Path) -> None:
    """Ray opens the folder that it is given to everybody: that one lies in one that is ours alone, on a short path."""
    with local_ray_environment(settings_of(tmp_path)) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        session = "session_2026-11-29_13-28-05_123456_1234567"
        longest = folder / RAY_FOLDER / session / "sockets" / "plasma_store.12345"
        assert len(str(longest)) < 108  # of a Unix socket


def test_folder_goes_on_an_error_too(tmp_path: Path) -> None:
    """A start that fails leaves no folder behind."""
    seen: list[Path] = []

    def start() -> None:
        with local_ray_environment(settings_of(tmp_path)) as folder:
            seen.append(folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start()
    assert not seen[0].exists()


def test_paths_are_short_enough_for_sockets(tmp_path: Path) -> None:
    """The path of HAProxy's socket leaves room for a node's id below the 97 characters that it may have."""
    with local_ray_environment(settings_of(tmp_path)):
        path = os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]
    assert len(path) + 1 + 56 <= 97


def test_token_is_new_and_for_its_owner_only(tmp_path: Path) -> None:
    """Every cluster has an access token of its own that nobody else can read, whatever was there before."""
    path = tmp_path / "ray-token"
    path.write_text("old")
    path.chmod(0o644)
    tokens = []
    os.environ["RAY_AUTH_TOKEN"] = "of somebody else"
    for _ in range(2):
        with local_ray_environment(settings_of(tmp_path, haproxy=False)):
            assert os.environ["RAY_AUTH_MODE"] == "token"
            assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(path)
            assert "RAY_AUTH_TOKEN" not in os.environ
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            tokens.append(path.read_text())
        assert not path.exists()
    assert len({*tokens, "old"}) == 3
    assert all(len(token) == 64 for token in tokens)


def test_token_is_not_written_through_a_link(tmp_path: Path) -> None:
    """A link in the token's place is replaced, not followed."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "ray-token").symlink_to(tmp_path / "victim")
    with local_ray_environment(settings_of(tmp_path)):
        assert not (tmp_path / "ray-token").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


def test_secrets_outlive_a_clean_tmp_and_go_with_the_cluster(tmp_path: Path) -> None:
    """Replicas that start after days still need them, so they are in ``state_dir``; a local cluster leaves none."""
    os.environ["HF_TOKEN"] = "hf_x"
    with local_ray_environment(settings_of(tmp_path, haproxy=False)):
        assert os.environ["GREENPROMPT_SECRETS_FILE"] == str(tmp_path / "secrets.json")
        assert "hf_x" in (tmp_path / "secrets.json").read_text()
    assert not (tmp_path / "secrets.json").exists()


def test_nothing_is_reported_to_anybody(tmp_path: Path) -> None:
    """Usage statistics of Ray and vLLM are off, in the environment that the parts inherit."""
    with local_ray_environment(settings_of(tmp_path)):
        assert RAY_ENVIRONMENT.items() <= os.environ.items()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"


# --- TLS ---------------------------------------------------------------------------------------------------


def test_each_cluster_has_certificates_of_its_own(tmp_path: Path) -> None:
    """Ray's processes recognise each other by files in the cluster's folder, which go with it."""
    keys = []
    for _ in range(2):
        with local_ray_environment(settings_of(tmp_path, haproxy=False)):
            assert os.environ[SWITCH] == "1"
            assert os.environ[VERBOSITY] == "NONE"
            key = Path(os.environ[KEY])
            assert key.parent == tmp_path / TLS_FOLDER
            assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
            keys.append(key.read_text())
        assert not os.environ.keys() & {SWITCH, *FILES}
        assert not (tmp_path / TLS_FOLDER).exists()
    assert len(set(keys)) == 2


def test_an_empty_switch_is_none(tmp_path: Path) -> None:
    """Compose files often set a variable to nothing; a word that Ray would take for off is refused."""
    os.environ[SWITCH] = ""
    with local_ray_environment(settings_of(tmp_path, haproxy=False)):
        assert os.environ[SWITCH] == "1"
    os.environ[SWITCH] = "yes"
    with pytest.raises(BadSettings, match="RAY_USE_TLS: 'yes' is no answer; set 1 or 0"):
        local_ray_environment(settings_of(tmp_path, haproxy=False)).__enter__()


def test_who_sets_rays_tls_decides(tmp_path: Path) -> None:
    """RAY_USE_TLS=0 switches it off; files of the operator stay as they are."""
    os.environ[SWITCH] = "0"
    with local_ray_environment(settings_of(tmp_path, haproxy=False)):
        assert os.environ[SWITCH] == "0"
        assert not os.environ.keys() & set(FILES)
    own = make_tls_files(tmp_path)
    os.environ.update(own)
    with local_ray_environment(settings_of(tmp_path, haproxy=False)):
        assert own.items() <= os.environ.items()
    assert own.items() <= os.environ.items()


# --- HAProxy -----------------------------------------------------------------------------------------------


def test_haproxy_is_a_choice(tmp_path: Path) -> None:
    """Serve uses HAProxy exactly when the settings say so."""
    with local_ray_environment(settings_of(tmp_path, haproxy=False)):
        assert not [name for name in os.environ if "HAPROXY" in name or "HA_PROXY" in name]
    with local_ray_environment(settings_of(tmp_path, haproxy=True)) as folder:
        assert SERVE_ENVIRONMENT.items() <= os.environ.items()
        assert Path(os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).is_relative_to(folder)


def test_haproxy_has_its_own_ports_and_the_clusters_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HAProxy's other ports are different ones. Its secret is the one that replicas make from the cluster's token."""
    asked: dict[str, Any] = {}

    def haproxy_environment(home: Path, secret: str, **how: Any) -> dict[str, str]:
        asked.update(how, home=home, secret=secret)
        return {}

    monkeypatch.setattr(local_ray, "haproxy_environment", haproxy_environment)
    secrets = set()
    for _ in range(2):
        with local_ray_environment(settings_of(tmp_path)) as folder:
            assert asked["home"].parent == folder
            assert asked["secret"] == proxy_secret(token_path())
            secrets.add(asked["secret"])
    assert len(secrets) == 2
    assert len(set(asked["ports"])) == 3


# --- ports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lowest", "below"), [(45_000, 45_000), (32_768, 32_768), (21_000, 21_000), (20_500, 40_000)])
def test_free_ports_are_given_out_by_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lowest: int, below: int
) -> None:
    """The ports are none of Ray's workers' and none of those that outgoing connections get, where there is room.

    32768 is Linux's default.
    """
    ranges = tmp_path / "ip_local_port_range"
    ranges.write_text(f"{lowest}\t60999\n", encoding="ascii")
    monkeypatch.setattr(local_ray, "_EPHEMERAL", ranges)
    assert all(20_000 <= port < below for port in free_ports(200))


def test_a_folder_that_is_still_written_to_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process writes while the folder is being removed does not stay behind."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    rmtree, late = shutil.rmtree, ["a session's log", "another"]

    def written_to_meanwhile(path: Path, **options: Any) -> None:
        rmtree(path, **options)
        if late:
            path.mkdir()
            (path / late.pop()).touch()

    monkeypatch.setattr(shutil, "rmtree", written_to_meanwhile)
    local_ray.remove_folder(folder)
    assert not folder.exists()
    assert not late


def test_a_folder_that_stays_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that can't be removed holds nothing up for ever, and is no secret."""
    monkeypatch.setattr(local_ray, "REMOVE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_args, **_more: None)
    with structlog.testing.capture_logs() as logs:
        local_ray.remove_folder(tmp_path)
    assert [entry["event"] for entry in logs] == ["the folder of the local cluster could not be removed"]


def test_free_ports_are_free_and_differ() -> None:
    """The ports are all different, and somebody can listen on each."""
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_taken_port_names_its_setting() -> None:
    """A port that somebody listens on is an error that names the setting and says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(BadSettings, match=rf"http\.port: port {port} of 127\.0\.0\.1.*choose another"):
            require_free_port("127.0.0.1", port, "http.port")
    require_free_port("127.0.0.1", port, "http.port")


def test_host_that_is_none_names_its_setting() -> None:
    """A host that this machine does not have is the same error."""
    with pytest.raises(BadSettings, match=r"http\.port"):
        require_free_port("192.0.2.1", 80, "http.port")
