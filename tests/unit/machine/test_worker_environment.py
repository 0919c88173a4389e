"""Which variables of the operator's shell reach Ray workers."""

from __future__ import annotations

import importlib
import json
import os
import stat
from pathlib import Path

import pytest
import structlog
from huggingface_hub import HfApi, constants, hf_hub_url

from deployments.machine.worker_environment import forwarded_environment, hide_secrets, load_secrets


def test_workers_get_what_loading_models_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables for model downloads and vLLM go to the workers, and nothing else of the operator's shell."""
    for name in os.environ:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", "/cache")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert forwarded_environment() == {"HF_HOME": "/cache", "VLLM_CPU_KVCACHE_SPACE": "1"}
    spellings = {"https_proxy": "http://p:1", "ALL_PROXY": "http://p:2", "no_proxy": "x", "SSL_CERT_FILE": "/ca.pem"}
    for name, value in spellings.items():
        monkeypatch.setenv(name, value)
    assert spellings.items() <= forwarded_environment().items()


SECRET = {
    "HF_TOKEN": "hf_x",
    "HUGGING_FACE_HUB_TOKEN": "hf_y",
    "VLLM_API_KEY": "k",
    "https_proxy": "http://me:pass@proxy:3128",
    "ALL_PROXY": "me:pass@proxy:3128",
    "HF_ENDPOINT": "https://me:pass@mirror",
}
NO_SECRET = {
    "HF_HOME": "/srv/me@work",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_TOKEN_PATH": "/etc/hf",
    "http_proxy": "http://proxy:3128",
    "NO_PROXY": "localhost",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "5",
}


def test_secrets_go_by_a_file_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tokens, keys and URLs with credentials are not forwarded; they leave the environment for a closed file."""
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in (SECRET | NO_SECRET).items():
        monkeypatch.setenv(name, value)
    assert forwarded_environment() == NO_SECRET
    environment = dict(os.environ) | {"GREENPROMPT_DATABASE_URL": "postgresql+psycopg://me:pass@db/x", "PATH": "/bin"}
    file = tmp_path / "new" / "secrets.json"
    hide_secrets(file, environment)
    assert environment == NO_SECRET | {"GREENPROMPT_SECRETS_FILE": str(file), "PATH": "/bin"}
    assert json.loads(file.read_text()) == SECRET
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_secrets_come_back_where_they_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part that loads them has them in its environment; where Ray was started otherwise nothing changes."""
    monkeypatch.delenv("GREENPROMPT_SECRETS_FILE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    load_secrets()
    assert "HF_TOKEN" not in os.environ
    hide_secrets(tmp_path / "secrets.json", {"HF_TOKEN": "hf_x"})
    monkeypatch.setenv("GREENPROMPT_SECRETS_FILE", str(tmp_path / "secrets.json"))
    monkeypatch.setenv("HF_TOKEN", "")
    load_secrets()
    assert os.environ["HF_TOKEN"] == "hf_x"


def test_without_secrets_there_is_no_file(tmp_path: Path) -> None:
    """Nothing is written, and the file and the variable of an earlier start go."""
    file = tmp_path / "none" / "secrets.json"
    hide_secrets(file, environment := dict(NO_SECRET))
    assert not file.parent.exists()
    assert environment == NO_SECRET
    hide_secrets(old := tmp_path / "secrets.json", {"HF_TOKEN": "hf_x"})
    hide_secrets(old, environment := {"GREENPROMPT_SECRETS_FILE": str(old)})
    assert not old.exists()
    assert environment == {}


def test_a_file_that_is_gone_stops_no_replica(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A replica that starts when the file was removed says so in its log, and starts without secrets."""
    monkeypatch.setenv("GREENPROMPT_SECRETS_FILE", str(tmp_path / "secrets.json"))
    with structlog.testing.capture_logs() as logs:
        load_secrets()
    assert [(line["log_level"], line["file"]) for line in logs] == [("error", str(tmp_path / "secrets.json"))]


def test_a_secret_mirror_is_used_if_the_hubs_client_was_imported_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its address is used for requests, downloads and the choice of hosts that get the token."""
    hide_secrets(tmp_path / "secrets.json", {"HF_ENDPOINT": "https://me:pass@mirror.example"})
    with monkeypatch.context() as patched:
        patched.setenv("GREENPROMPT_SECRETS_FILE", str(tmp_path / "secrets.json"))
        patched.setenv("HF_ENDPOINT", "https://huggingface.co")
        load_secrets()
        assert HfApi().endpoint == "https://me:pass@mirror.example"
        assert hf_hub_url("a/b", "c") == "https://me:pass@mirror.example/a/b/resolve/main/c"
        assert "mirror.example" in constants.HF_URL_HOSTS
    importlib.reload(constants)
