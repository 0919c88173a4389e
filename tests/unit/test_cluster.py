"""What the cluster asks of Ray and Serve, and how often."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from deployments import cluster as cluster_module
from deployments.cluster import APPS_BELIEVED_S, RayCluster
from deployments.models import ModelSources
from registry.errors import WrapperUnreachable
from registry.settings import Settings
from tests.fake_counters import ManualClock


class FakeServe:
    """Serve's side: which applications there are. ``asked`` counts how often that was asked."""

    def __init__(self) -> None:
        self.applications = {"registry": None, "wrapper-a-0": None}
        self.asked = 0

    def status(self) -> Any:
        self.asked += 1
        return SimpleNamespace(applications=dict(self.applications))

    def get_app_handle(self, name: str) -> Any:
        raise RayServeException(f"there is no application {name}")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    """Serve, and a Ray without nodes."""
    fake = FakeServe()
    monkeypatch.setattr("ray.serve.status", fake.status)
    monkeypatch.setattr("ray.serve.get_app_handle", fake.get_app_handle)
    monkeypatch.setattr("ray.nodes", list)
    return fake


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The clock that the cluster looks at."""
    clock = ManualClock(100.0)
    monkeypatch.setattr(cluster_module, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def cluster() -> RayCluster:
    """The cluster of a registry."""
    return RayCluster(Settings(), ModelSources(True, (), Path("/")))


async def test_applications_of_wrappers_are_observed(cluster: RayCluster, serve: FakeServe, clock: ManualClock) -> None:
    """Serve's applications that are wrappers are seen under the wrappers' ids, all others are not."""
    assert (await cluster.observe()).wrapper_ids == {"a-0"}


async def test_serve_is_asked_rarely_while_all_is_well(
    cluster: RayCluster, serve: FakeServe, clock: ManualClock
) -> None:
    """Looking again costs Serve nothing for a while; then it is asked anew, and what has changed is seen."""
    for _ in range(3):
        await cluster.observe()
    assert serve.asked == 1
    serve.applications["wrapper-b-0"] = None
    clock.now_s += APPS_BELIEVED_S
    assert (await cluster.observe()).wrapper_ids == {"a-0", "b-0"}
    assert serve.asked == 2


async def test_serve_is_asked_at_once_when_a_wrapper_does_not_answer(
    cluster: RayCluster, serve: FakeServe, clock: ManualClock
) -> None:
    """A wrapper whose application was deleted behind the registry's back is missed as soon as it is spoken to."""
    await cluster.observe()
    del serve.applications["wrapper-a-0"]
    with pytest.raises(WrapperUnreachable, match="there is no application"):
        await cluster.report("a-0")
    assert (await cluster.observe()).wrapper_ids == frozenset()


async def test_serve_that_did_not_answer_is_asked_again(
    cluster: RayCluster, serve: FakeServe, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be learnt is not taken for known."""

    def away() -> Any:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr("ray.serve.status", away)
        with pytest.raises(WrapperUnreachable, match="away"):
            await cluster.observe()
    assert (await cluster.observe()).wrapper_ids == {"a-0"}
