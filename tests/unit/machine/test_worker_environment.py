"""Which variables of the operator's shell reach Ray workers."""

from __future__ import annotations

import os

import pytest

from deployments.machine.worker_environment import forwarded_environment


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
