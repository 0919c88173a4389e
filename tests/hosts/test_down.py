"""The end of a cluster: nothing of it is left on any host, and what waited is there at the next start."""

from __future__ import annotations

import time

import pytest

from tests.hosts.conftest import Cluster, prompt, until

pytestmark = [pytest.mark.hosts, pytest.mark.long, pytest.mark.timeout(900)]

LEFT_LIMIT_S = 180
"""Machines notice after RAY_gcs_rpc_server_reconnect_timeout_s (120 s) that their head is gone for good."""


def test_down_leaves_nothing_but_what_waited(cluster: Cluster) -> None:
    """``greenprompt down`` ends leases and LLMs, ``ray down`` Ray; the next ``ray up`` serves who waited."""
    cluster.until_ready("w1", "w2")
    leases = [cluster.until(cluster.post(time.time_ns(), "a")[0], "deployed") for _ in cluster.workers]
    (waits,) = cluster.post(time.time_ns(), "b")
    assert cluster.state(waits)["status"] == "queued"
    cluster.ray("exec ~/cluster.yaml 'greenprompt down --address auto'")
    for name in cluster.workers:
        assert cluster.net.host(name).pids("ServeReplica") == []
        assert cluster.net.host(name).pids("forkserver") == []
    cluster.ray("down -y ~/cluster.yaml")
    for name in ("head", *cluster.workers):
        host = cluster.net.host(name)
        took_s = until(lambda: host.processes() == {}, LEFT_LIMIT_S, host.processes)  # noqa: B023 - called in this round
        print(f"ray down -> {name} empty: {took_s:.1f} s")
    cluster.ray("up -y ~/cluster.yaml")
    served = cluster.until(waits, "deployed", limit_s=180)
    assert prompt(served["url"]).status_code == 200
    for lease in leases:
        assert cluster.state(lease["requestId"])["status"] == "expired"
    cluster.release(waits)
