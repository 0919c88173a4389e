"""A machine that could not be started is tried again: Ray's own autoscaler, over machines that are made up."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.autoscaler._private import updater
from ray.autoscaler._private.autoscaler import StandardAutoscaler
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler._private.load_metrics import LoadMetrics
from ray.autoscaler._private.local import node_provider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

from deployments.launch.launcher import Machines, with_machines
from registry.errors import BadSettings

# Ray leaves the files of its record and its configuration to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:ray.autoscaler")

ROOT = Path(__file__).resolve().parents[3]
HEAD, FIRST, SECOND = "192.0.2.10", "192.0.2.11", "192.0.2.12"
WORKERS = {TAG_RAY_NODE_KIND: "worker"}


class Ssh:
    """What the launcher runs ssh with: it counts starts of Ray by address, and fails where a machine is broken."""

    CalledProcessError, DEVNULL, PIPE = subprocess.CalledProcessError, subprocess.DEVNULL, subprocess.PIPE

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.tried: list[str] = []

    def check_call(self, command: list[str], **_: Any) -> int:
        if any("ray-start" in word for word in command):
            machine = next(address for address in (FIRST, SECOND) if any(address in word for word in command))
            self.tried.append(machine)
            if machine in self.broken:
                raise subprocess.CalledProcessError(255, command)
        return 0


class Monitor:
    """Ray's monitor on a head, as far as it is needed."""

    def __init__(self, config: Path) -> None:
        self.ssh = Ssh()
        gcs: Any = SimpleNamespace(drain_nodes=lambda *_, **__: [])
        self.autoscaler = StandardAutoscaler(
            str(config), LoadMetrics(), gcs, process_runner=self.ssh, update_interval_s=0
        )
        self.provider: Any = self.autoscaler.provider

    @property
    def workers(self) -> list[str]:
        """Ids of the nodes that the autoscaler has."""
        return sorted(self.provider.non_terminated_nodes(WORKERS))

    def look(self, times: int = 1) -> None:
        """What it does every 5 s, and all that comes of it."""
        for _ in range(times):
            self.autoscaler._update()
            for thread in self.autoscaler.updaters.values():
                thread.join(20)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration that ``ray up cluster.yaml`` leaves on the head; Ray's record of the machines is ours."""
    monkeypatch.setattr(node_provider, "get_state_path", lambda name: str(tmp_path / f"{name}.state"))
    monkeypatch.setattr(node_provider, "get_lock_path", lambda name: str(tmp_path / f"{name}.lock"))
    monkeypatch.setattr(SSHCommandRunner, "_ensure_ssh_control_path", lambda _: None)  # a folder in /tmp
    monkeypatch.setattr(updater, "READY_CHECK_INTERVAL", 0)
    (tmp_path / "key").touch()
    path = tmp_path / "bootstrap.yaml"
    write(path, FIRST, SECOND)
    return path


def write(path: Path, *workers: str) -> None:
    """What ``ray up`` writes there, of a cluster.yaml with these machines."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    # Without threads of the monitor's own, which no test could wait for.
    config["provider"] |= {"head_ip": HEAD, "worker_ips": list(workers), "foreground_node_launch": True}
    config["auth"]["ssh_private_key"] = str(path.with_name("key"))
    path.write_text(json.dumps({**prepare_config(config), "file_mounts": {}}), encoding="utf-8")


def ours(path: Path) -> Path:
    """What the monitor gets in its place."""
    (option,) = with_machines([f"--autoscaling-config={path}"])
    return Path(option.partition("=")[2])


def test_ray_alone_tries_a_machine_once(config: Path) -> None:
    """Why this is needed; where Ray does otherwise some day, deployments/launch/launcher.py can go."""
    monitor = Monitor(config)
    monitor.ssh.broken = {FIRST}
    monitor.look(4)
    assert monitor.ssh.tried.count(FIRST) == 1
    monitor.ssh.broken = set()
    monitor.look(4)
    assert monitor.ssh.tried.count(FIRST) == 1


def test_a_machine_is_tried_until_it_works(config: Path) -> None:
    """However often it has failed, the next attempt comes, and none after the one that worked; others are let alone."""
    monitor = Monitor(ours(config))
    monitor.ssh.broken = {FIRST}
    until(monitor, lambda: monitor.ssh.tried.count(FIRST) >= 5)
    monitor.ssh.broken = set()
    failed = monitor.ssh.tried.count(FIRST)
    until(monitor, lambda: monitor.ssh.tried.count(FIRST) > failed)
    monitor.look(4)
    assert monitor.ssh.tried.count(FIRST) == failed + 1
    assert monitor.ssh.tried.count(SECOND) == 1
    assert [monitor.provider.internal_ip(node) for node in monitor.workers] == [FIRST, SECOND]
    assert {monitor.provider.node_tags(node)[TAG_RAY_NODE_STATUS] for node in monitor.workers} == {"up-to-date"}


def test_machines_come_and_go_while_the_monitor_runs(config: Path) -> None:
    """``ray up`` with a machine more starts that one, with one less forgets that one, and touches no other."""
    write(config, FIRST)
    monitor = Monitor(ours(config))
    until(monitor, lambda: monitor.ssh.tried == [FIRST])
    write(config, FIRST, SECOND)
    ours(config)
    monitor.autoscaler.reset()
    until(monitor, lambda: monitor.ssh.tried == [FIRST, SECOND])
    write(config, SECOND)
    ours(config)
    monitor.autoscaler.reset()
    monitor.look(4)
    assert monitor.workers == [SECOND]
    assert monitor.ssh.tried == [FIRST, SECOND]


def test_a_node_that_is_no_more_changes_nothing(config: Path) -> None:
    """An attempt that ends late neither ends nor marks the next one, and finds out that it is over."""
    ours(config)
    provider = Machines(json.loads(config.read_bytes())["provider"], "greenprompt")
    provider.create_node({}, {**WORKERS, "attempt": "first"}, 1)
    assert provider.non_terminated_nodes(WORKERS) == [FIRST]
    assert provider.is_running(FIRST)
    provider.terminate_node(FIRST)
    assert provider.is_terminated(FIRST)
    provider.create_node({}, {**WORKERS, "attempt": "second"}, 1)
    (again,) = provider.non_terminated_nodes(WORKERS)
    assert again != FIRST
    assert provider.external_ip(again) == provider.internal_ip(again) == FIRST
    provider.set_node_tags(FIRST, {"attempt": "first"})
    provider.terminate_node(FIRST)
    assert provider.is_terminated(FIRST)
    assert provider.is_running(again)
    assert provider.node_tags(again)["attempt"] == "second"


def test_what_the_monitor_reads_is_nobody_elses(config: Path) -> None:
    """The start commands in it may hold the database's password."""
    assert stat.S_IMODE(ours(config).stat().st_mode) == 0o600


def test_other_options_and_other_machines_stay(tmp_path: Path) -> None:
    """A cloud's provider is not touched, nor is a node without autoscaling; the option may be written as two words."""
    options = ["--head", "--port=6390"]
    assert with_machines(options) == options
    cloud = [*options, "--autoscaling-config", str(ROOT / "configs/clusters/aws.yaml")]
    assert with_machines(cloud) == cloud


def test_a_configuration_that_is_missing_is_said(tmp_path: Path) -> None:
    """The error names the option."""
    with pytest.raises(BadSettings, match=r"--autoscaling-config: .*nothing\.yaml"):
        with_machines([f"--autoscaling-config={tmp_path / 'nothing.yaml'}"])


def until(monitor: Monitor, condition: Any) -> None:
    """Let the monitor look until it holds."""
    for _ in range(20):
        if condition():
            return
        monitor.look()
    raise AssertionError(monitor.ssh.tried)
