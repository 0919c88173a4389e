from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
import stamina
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError

from deployments.serve import app
from deployments.serve.ray_folder import RAY_FOLDER
from registry.errors import BadSettings, StartFailed
from registry.service.keys import Keys
from registry.settings import Settings
from registry.store.store import Store
from registry.wire.words import Role
from tests.support import oidc


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


def test_a_start_needs_the_keys_of_the_issuer(tmp_path: Path) -> None:
    """A file of keys that is missing is an error before anything starts, not at the first JWT."""
    access = {"keys": True, "oidc": oidc.settings(jwks_file=str(tmp_path / "jwks.json"))}
    with pytest.raises(BadSettings, match=r"access\.oidc\.jwks_file: .*No such file"):
        app.check(Settings.model_validate({"access": access}))
    (tmp_path / "jwks.json").write_bytes(oidc.jwks())
    app.check(Settings.model_validate({"access": access}))


def test_a_registry_that_is_being_restarted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of the head the registry may come up while ``up`` asks for it."""
    cluster_with(monkeypatch, ActorUnavailableError("The actor is restarting.", None), Settings())
    with stamina.set_testing(True, attempts=2):
        app._start_registry(Settings())


def test_a_registry_that_does_not_come_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it does not answer is said, and it is not ended."""
    cluster_with(monkeypatch, *[ActorUnavailableError("The actor is restarting.", None)] * 2)
    with stamina.set_testing(True, attempts=2), pytest.raises(StartFailed, match=r"does not answer: .*restarting"):
        app._start_registry(Settings())
    cluster_with(monkeypatch, RayActorError(error_msg="it has died"))
    with pytest.raises(StartFailed, match=r"does not answer: .*it has died"):
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


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    """The keys of a registry."""
    store = Store.open(f"sqlite:///{tmp_path}/registry.db")
    yield Keys(store, lambda: 1000.0, nullcontext)
    store.close()


def operator_keys(keys: Keys) -> list[str]:
    return [key.key_id for key in keys if key.role is Role.OPERATOR and key.revoked_s is None]


def test_the_operators_key_is_made_once(keys: Keys, tmp_path: Path) -> None:
    """The first start makes it; later ones keep it. If the file is gone, another is made."""
    file = tmp_path / "operator.key"
    app._keep_operator_key(keys, file)
    first = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    app._keep_operator_key(keys, file)
    assert file.read_text() == first
    assert operator_keys(keys) == [first.split("_")[1]]
    file.unlink()
    app._keep_operator_key(keys, file)
    assert file.read_text() != first


def test_a_key_that_others_could_read_is_revoked(keys: Keys, tmp_path: Path) -> None:
    """An operator's key in an open file is refused from then on, and replaced."""
    file = tmp_path / "operator.key"
    app._keep_operator_key(keys, file)
    first = file.read_text()
    file.chmod(0o644)
    app._keep_operator_key(keys, file)
    assert file.read_text() != first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert operator_keys(keys) == [file.read_text().split("_")[1]]
    seen = [(row.row.method, row.row.path, row.row.subject) for row in keys._store.audit().rows]
    ids = [text.split("_")[1] for text in (first, first, file.read_text())]
    assert seen == [("start", "/keys", ids[0]), ("start", "/keys/{key_id}", ids[1]), ("start", "/keys", ids[2])]


def test_the_folder_of_the_operators_key_is_made(keys: Keys, tmp_path: Path) -> None:
    """With a database elsewhere nobody has made state_dir yet; where others can write to it, no key is made."""
    file = tmp_path / "state" / "operator.key"
    app._keep_operator_key(keys, file)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.unlink()
    file.parent.chmod(0o777)
    with pytest.raises(BadSettings, match=r"^state_dir: every user of this machine can write to"):
        app._keep_operator_key(keys, file)
    assert not file.exists()


@pytest.mark.parametrize("role", [Role.CLIENT, Role.VIEWER])
def test_another_key_is_no_operators_key(keys: Keys, tmp_path: Path, role: Role) -> None:
    """A key for another role in the file is replaced, as is a text that is no key, or a key of another database."""
    file = tmp_path / "operator.key"
    key, text = keys.new(role, tenant="lab" if role is Role.CLIENT else None, name="")
    keys.add(key)
    for wrong in (text, "no key", f"gp_{'0' * 8}_{'x' * 43}"):
        file.write_text(wrong)
        file.chmod(0o600)
        app._keep_operator_key(keys, file)
        assert file.read_text() != wrong


def test_an_operators_key_that_can_not_be_written_is_not_made(keys: Keys, tmp_path: Path) -> None:
    """The error names the setting, and no key is in force that nobody knows."""
    file = tmp_path / "folder" / "operator.key"
    file.parent.write_text("a file")
    with pytest.raises(BadSettings, match=r"^state_dir: .*operator\.key can't be used: NotADirectoryError"):
        app._keep_operator_key(keys, file)
    assert operator_keys(keys) == []


def test_a_registry_gets_a_key_for_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is an argument of the actor, which Ray gives again to each restart; each new actor has its own."""
    pickled: list[bytes] = []

    class Actor:
        ready = SimpleNamespace(remote=lambda: None)

        def options(self, **options: Any) -> Actor:
            assert options["max_restarts"] == -1
            return self

        def remote(self, *arguments: Any) -> Actor:
            pickled.append(ray.cloudpickle.dumps(arguments))
            return self

    monkeypatch.setattr(app, "_running_registry", lambda: None)
    monkeypatch.setattr(ray, "remote", lambda _: Actor())
    monkeypatch.setattr(ray, "get", lambda *_, **__: None)
    monkeypatch.setattr(app, "build_service", lambda _settings, _sources, key, _on_fatal: key)
    keys: list[bytes] = []
    for _ in range(2):
        app._start_registry(Settings())
        for _ in ("the first start", "a restart"):
            settings, build = ray.cloudpickle.loads(pickled[-1])
            keys.append(build(settings, None))
    assert [len(key) for key in keys] == [32] * 4
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_a_haproxy_with_another_secret_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a new token only a new start of Ray helps, so nothing is waited for."""
    refused = httpx.Response(403, json={"code": "not_through_proxy", "message": "only HAProxy may", "retryable": False})
    monkeypatch.setattr(httpx, "get", lambda *_, **__: refused)
    with pytest.raises(StartFailed, match=r"present token.*ray-start"):
        app._wait_until_ready(Settings(), usable=True)
