"""A machine that an operator drains and undrains with the command: real Serve, a real wrapper that really goes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deployments.machine import process_tree
from tests.cluster.conftest import Registry

pytestmark = pytest.mark.cluster

LLM = Callable[..., dict[str, Any]]
OFF_LIMIT_S = 90


def greenprompt(registry: Registry, *words: str) -> subprocess.Popen[str]:
    """The command, spoken to this registry."""
    command = [sys.executable, "-m", "greenprompt_client.cli.main", *words, "--url", registry.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_machine_is_drained_and_comes_back(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """The lease goes on until it is given back; then no process of the wrapper is left, until the undrain."""
    first, second = registry.post(measurement_id, llm("a"), llm("b"))
    address = registry.until(first, "deployed")["url"]
    replica, engines = registry.replica(), registry.engines()
    (machine,) = registry.machines()
    assert machine["healthy"]
    assert "greenprompt-llm-registry" in machine["wrappers"][0]["versions"]

    draining = greenprompt(registry, "drain", machine["machine"], "--wait", "--timeout", str(OFF_LIMIT_S))
    state = httpx.get(f"{registry.url}/machines/{machine['machine']}", timeout=30)
    while state.json()["drain"] is None:
        assert draining.poll() is None, draining.communicate()
        state = httpx.get(f"{registry.url}/machines/{machine['machine']}", timeout=30)
    assert (state.json()["drain"], state.json()["leases"]) == ("draining", 1)
    assert httpx.post(f"{address}/process_prompt", json={"question": "Still?"}, timeout=60).status_code == 200

    assert registry.delete(first) == 204
    said, _ = draining.communicate(timeout=OFF_LIMIT_S)
    assert (draining.returncode, said.strip().splitlines()[-1]) == (0, f"{machine['machine']}: drained")
    assert process_tree.alive([replica, *engines]) == set()
    waits = registry.get(second)
    assert (waits["status"], waits["reason"]) == (
        "queued",
        f"every LLM Machine that it fits on is drained: {machine['machine']}",
    )

    undrain = greenprompt(registry, "undrain", machine["machine"])
    said, _ = undrain.communicate(timeout=60)
    assert (undrain.returncode, said.strip()) == (0, f"{machine['machine']} is used again")
    address = registry.until(second, "deployed", limit_s=240)["url"]
    assert httpx.post(f"{address}/process_prompt", json={"question": "Again?"}, timeout=60).status_code == 200
    assert registry.delete(second) == 204
    said, _ = greenprompt(registry, "status").communicate(timeout=60)
    assert "1 machine: 1 healthy" in said
