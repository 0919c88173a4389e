"""The descriptions of clusters: what Ray's launcher takes, and what they have in common."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from registry.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = (ROOT / "cluster.yaml", ROOT / "configs/clusters/aws.yaml")
KUBERAY = ROOT / "configs/clusters/kuberay.yaml"


def read(path: Path) -> dict[str, Any]:
    """One of them."""
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_the_launcher_takes_it(path: Path) -> None:
    """Ray's own schema has no objection to it, once the launcher has filled in what it fills in."""
    validate_config(prepare_config(read(path)))


@pytest.mark.parametrize(
    "part",
    ["file_mounts", "rsync_exclude", "idle_timeout_minutes", "head_start_ray_commands", "worker_start_ray_commands"],
)
def test_a_cloud_differs_in_its_machines_only(part: str) -> None:
    """What runs on the machines is the same wherever they are from."""
    own, cloud = map(read, LAUNCHED)
    assert own[part] == cloud[part]


def test_kubernetes_runs_the_same_ray() -> None:
    """The manifest names the Ray that is locked."""
    assert read(KUBERAY)["spec"]["rayVersion"] == version("ray")


def test_kubernetes_starts_nodes_as_the_launcher_does() -> None:
    """Head and machines are started by `greenprompt ray-start`, the registry with the production configuration."""
    spec = read(KUBERAY)["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    starts = [group["template"]["spec"]["containers"][0]["args"][0] for group in groups]
    assert all("greenprompt ray-start" in start for start in starts)
    assert "greenprompt up --address auto --detach --config configs/production.yaml" in starts[0]


def test_kubernetes_finds_ray_without_our_command() -> None:
    """KubeRay runs a command of its own in a worker's container first, which has its environment alone."""
    spec = read(KUBERAY)["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environment["PATH"].startswith(f"{container['workingDir']}/.venv/bin:")
        assert environment["RAY_AUTH_MODE"] == "token"


def test_the_registry_serves_where_kubernetes_looks() -> None:
    """The ports of the manifest are those of the production configuration."""
    settings = load_settings(ROOT / "configs/production.yaml")
    container = read(KUBERAY)["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["serve"] == settings.http.port == container["readinessProbe"]["httpGet"]["port"]
