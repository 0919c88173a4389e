"""A local registry whose Ray dies is back without a person, and nothing of the old cluster stays.

What ends Ray here is a signal. What anybody could end it with: test_ray_tls.py.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.launch.restarts import PAUSES_S
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.cluster.conftest import UP_LIMIT_S, Ran, Registry, start, stop

pytestmark = [pytest.mark.cluster, pytest.mark.fault]


def until_back(registry: Registry, ran: Ran) -> None:
    """Return when the registry is ready on another cluster; fails if its process ends, or after UP_LIMIT_S."""
    deadline_s = time.monotonic() + UP_LIMIT_S
    while True:
        record = json.loads((registry.folder / "state" / "up.json").read_bytes())
        if "url" in record and record["folder"] != str(ran.folder):
            return
        assert registry.process.poll() is None
        assert time.monotonic() < deadline_s, record
        time.sleep(0.2)


def test_a_registry_outlives_the_death_of_its_gcs(
    registry: Registry, llm: Callable[..., dict[str, Any]], measurement_id: int
) -> None:
    """The GCS is killed: the registry comes back, the lease failed and says why, and who waited is served."""
    holder, waiting = registry.post(measurement_id, llm("a"), llm("a"))
    lost = registry.until(holder, "deployed")["url"]
    ran = Ran(registry, surviving={psutil.Process(registry.process.pid)})
    registry.process_named("gcs/gcs_server").kill()
    until_back(registry, ran)
    assert ran.left() == []
    assert "Ray's gcs_server was ended by SIGKILL. Starting again" in (registry.folder / "up.log").read_text(
        encoding="utf-8"
    )
    state = registry.get(holder)
    assert (state["status"], state["url"]) == ("failed", None)
    assert "was lost" in state["reason"]
    assert httpx.get(f"{lost}/get_status", timeout=60).status_code == 403
    url = registry.until(waiting, "deployed")["url"]
    answer = httpx.post(f"{url}/process_prompt", json={"question": "Are you there?"}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert registry.delete(waiting) == 204


@pytest.mark.long
def test_a_registry_that_dies_too_often_is_given_up(tmp_path: Path) -> None:
    """Raylet and GCS are ended in turn: each time the registry is back, until it says why it is not; nothing stays."""
    make_tiny_llm(tmp_path / "llms" / "a", seed=0)
    registry = start(tmp_path)
    ran: list[Ran] = []
    try:
        for number in range(len(PAUSES_S) + 1):
            ran.append(Ran(registry, surviving={psutil.Process(registry.process.pid)}))
            registry.process_named(("raylet/raylet", "gcs/gcs_server")[number % 2]).kill()
            if number < len(PAUSES_S):
                until_back(registry, ran[-1])
        assert registry.process.wait(UP_LIMIT_S) == 2
    finally:
        stop(registry)
    last = (tmp_path / "up.log").read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith(
        f"greenprompt: Ray's gcs_server was ended by SIGKILL; it was started again {len(PAUSES_S)} times within"
    )
    assert [left for each in ran for left in each.left()] == []
    assert not {"up.json", "ray-token"} & {path.name for path in (tmp_path / "state").iterdir()}
    socket.create_server(("127.0.0.1", int(registry.url.rsplit(":", 1)[1]))).close()
