from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import stamina
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError

from deployments.serve import app
from deployments.serve.ray_folder import RAY_FOLDER
from registry.errors import BadSettings, StartFailed
from registry.settings import Settings


def cluster_with(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
    """A cluster with a registry, which answers so, one after the other, when it is asked for its settings."""
    left = list(answers)

    def get(_: object, **__: object) -> Any:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer, None]

    method = SimpleNamespace(remote=lambda: None)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "get_actor", lambda *_: SimpleNamespace(settings=method, ready=method))


def test_a_registry_that_is_being_restarted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of the head the registry may come up while ``up`` asks for it."""
    cluster_with(monkeypatch, ActorUnavailableError("The actor is restarting.", None), Settings())
    with stamina.set_testing(True, attempts=2):
        app._start_registry(Settings())


def test_a_registry_that_does_not_come_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it does not answer is said, and it is not ended."""
    cluster_with(monkeypatch, *[ActorUnavailableError("The actor is restarting.", None)] * 2)
    with stamina.set_testing(True, attempts=2), pytest.raises(StartFailed, match=r"continues to try.*restarting"):
        app._start_registry(Settings())
    cluster_with(monkeypatch, RayActorError(error_msg="it has died"))
    with pytest.raises(StartFailed, match=r"continues to try.*it has died"):
        app._start_registry(Settings())


def test_a_registry_with_other_settings_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that differ are named, with what to do."""
    cluster_with(monkeypatch, Settings())
    with pytest.raises(BadSettings, match=r"http.port.*greenprompt down"):
        app._start_registry(Settings.model_validate({"http": {"port": 8001}}))


@pytest.mark.parametrize(
    ("part", "module", "name"),
    [
        ("Ray", ray, "init"),
        ("Serve", serve, "start"),
        ("The ingress", serve, "status"),
        ("The ingress", serve, "run_many"),
    ],
)
def test_what_does_not_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str, module: Any, name: str
) -> None:
    """An error of Ray's or Serve's is a sentence of one line with the place of the logs, which are kept there."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the port is taken\n  Traceback: 60 lines")

    logs = tmp_path / "ray" / RAY_FOLDER / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.err").write_text("the whole story")
    monkeypatch.setattr(app, "check", lambda _: None)
    monkeypatch.setattr(app, "_start_registry", lambda _: None)
    monkeypatch.setattr(ray, "init", lambda **_: SimpleNamespace(dashboard_url="127.0.0.1:8265"))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(StartFailed) as caught:
        app.start(Settings(state_dir=tmp_path / "state"), tmp_path / "ray")
    kept = tmp_path / "state" / "ray-logs"
    assert str(caught.value) == f"{part} does not start: RuntimeError: the port is taken; logs: {kept}"
    assert next(kept.glob("session_*/raylet.err")).read_text() == "the whole story"
