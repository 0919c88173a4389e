"""The death of a head whose state is not in Redis: the cluster is back without a person."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.hosts.conftest import Cluster, prompt, until
from tests.hosts.hosts import alive

pytestmark = [pytest.mark.hosts, pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(1200)]

BACK_LIMIT_S = 480
"""Longest wait for all machines: Ray on them ends up to 120 s after their head, then the launcher starts it again."""


@pytest.fixture
def without_redis(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, started again without Redis; as it was afterwards."""
    cluster.describe(*cluster.workers, redis=False)
    cluster.ray("up -y ~/cluster.yaml")
    cluster.until_ready(*cluster.workers, limit_s=BACK_LIMIT_S)
    yield cluster
    cluster.describe(*cluster.workers)
    cluster.ray("up -y ~/cluster.yaml")
    cluster.until_ready(*cluster.workers, limit_s=BACK_LIMIT_S)


def test_a_head_without_redis_is_back_without_a_person(without_redis: Cluster) -> None:
    """Leases are failed with the reason, who waited is served, all machines are back; `ray-start` changes nothing."""
    cluster = without_redis
    leases = [cluster.until(cluster.post(time.time_ns(), name)[0], "deployed") for name in "ab"]
    (waits,) = cluster.post(time.time_ns(), "a")
    begun_s = time.monotonic()
    (gcs,) = cluster.head.running("gcs/gcs_server")
    gcs.kill()
    until(lambda: not alive(gcs), 30)

    def ended(request_id: str) -> bool:
        # Nothing listens until the registry is back, which may take more than a minute.
        answer = cluster.call("GET", f"/promptingservice/request/{request_id}", limit_s=BACK_LIMIT_S)
        return answer.json()["endedAt"] is not None

    for lease in leases:
        until(partial(ended, lease["requestId"]), BACK_LIMIT_S)
        state = cluster.state(lease["requestId"])
        assert (state["status"], state["url"]) == ("failed", None)
        assert "was lost" in state["reason"]
    print(f"GCS of the head killed, without Redis: the registry is back after {time.monotonic() - begun_s:.1f} s")
    served = cluster.until(waits, "deployed", limit_s=BACK_LIMIT_S)
    assert prompt(served["url"]).status_code == 200
    cluster.release(waits)
    cluster.until_ready(*cluster.workers, limit_s=BACK_LIMIT_S)
    print(f"GCS of the head killed, without Redis: both machines are there after {time.monotonic() - begun_s:.1f} s")
    (again,) = cluster.head.running("gcs/gcs_server")
    cluster.ray("up -y ~/cluster.yaml")
    assert alive(again)
