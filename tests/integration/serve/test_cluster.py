"""What the cluster asks of Ray and Serve, and how often."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from deployments.models.sources import ModelSources
from deployments.serve import cluster as cluster_module
from deployments.serve import cluster_calls
from deployments.serve.cluster import RayCluster
from deployments.serve.cluster_calls import APPS_BELIEVED_S
from registry.contract.messages import LeaseGrant
from registry.core.records import LLMSpec, Machine
from registry.errors import EngineStartFailed, WrapperUnheard, WrapperUnreachable
from registry.service.reconcile import wanted_wrappers
from registry.settings import Settings
from tests.support.fake_cluster import UNTOLD
from tests.support.fake_counters import ManualClock

RUNNING = SimpleNamespace(status=ApplicationStatus.RUNNING)
DELETING = SimpleNamespace(status=ApplicationStatus.DELETING)


class FakeServe:
    """Serve's side: which applications there are. ``asked`` counts how often that was asked.

    What is deleted is shown as that once, and is gone then.
    """

    def __init__(self) -> None:
        self.applications = {"registry": RUNNING, "wrapper-a-0": RUNNING}
        self.asked = 0
        self.deleted: list[str] = []

    def status(self) -> Any:
        self.asked += 1
        self.applications = {name: app for name, app in self.applications.items() if app is not DELETING}
        self.applications |= dict.fromkeys(self.deleted, DELETING)
        self.deleted.clear()
        return SimpleNamespace(applications=dict(self.applications))

    def delete(self, name: str, *, _blocking: bool) -> None:
        assert not _blocking
        self.deleted.append(name)

    def get_app_handle(self, name: str) -> Any:
        raise RayServeException(f"there is no application {name}")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    """Serve, and a Ray without nodes."""
    fake = FakeServe()
    monkeypatch.setattr("ray.serve.status", fake.status)
    monkeypatch.setattr("ray.serve.delete", fake.delete)
    monkeypatch.setattr("ray.serve.get_app_handle", fake.get_app_handle)
    monkeypatch.setattr("ray.nodes", list)
    return fake


@pytest.fixture
def clock() -> ManualClock:
    """The clock that the cluster looks at."""
    return ManualClock(100.0)


@pytest.fixture
def cluster(clock: ManualClock) -> RayCluster:
    """The cluster of a registry."""
    return RayCluster(Settings(), ModelSources(True, (), Path("/")), clock=clock)


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
    serve.applications["wrapper-b-0"] = RUNNING
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
        await cluster.report("a-0", UNTOLD)
    assert (await cluster.observe()).wrapper_ids == frozenset()


@pytest.mark.parametrize("permanent", [True, False])
async def test_an_error_of_a_wrapper_arrives_as_itself(
    cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, permanent: bool
) -> None:
    """Ray delivers it in a class of its own and with its traceback as text; what we raise is the wrapper's error."""
    failed = EngineStartFailed("org/a", "no such model", permanent)

    class Method:
        async def remote(self, *_: object) -> object:
            raise RayTaskError("deploy", "a traceback", failed).as_instanceof_cause()

    monkeypatch.setattr("ray.serve.get_app_handle", lambda _name: SimpleNamespace(deploy=Method()))
    with pytest.raises(EngineStartFailed) as raised:
        await cluster.deploy("a-0", 1, LLMSpec("org/a", "text-generation"), None, None)
    assert type(raised.value) is EngineStartFailed
    assert (raised.value.permanent, str(raised.value)) == (permanent, str(failed))


async def test_removed_is_what_is_gone(cluster: RayCluster, serve: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing ends when Serve has none of the wrappers any more; what else there is stays."""
    monkeypatch.setattr(cluster_module, "REMOVE_POLL_S", 0.0)
    serve.applications["wrapper-b-0"] = RUNNING
    await cluster.remove(["a-0", "b-0"])
    assert serve.applications == {"registry": RUNNING}


async def test_what_is_being_deleted_is_leaving(cluster: RayCluster, serve: FakeServe, clock: ManualClock) -> None:
    """An application that Serve deletes counts as deployed no more, and Serve is asked each time until it is gone."""
    serve.deleted.append("wrapper-a-0")
    observed = await cluster.observe()
    assert observed.wrapper_ids == frozenset()
    assert observed.leaving == {"a-0"}
    assert (await cluster.observe()).leaving == frozenset()
    await cluster.observe()
    assert serve.asked == 2


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


@pytest.mark.parametrize(("on_head", "machines"), [(True, ["head", "worker"]), (False, ["worker"])])
async def test_the_head_is_a_machine_if_it_shall_be(
    serve: FakeServe, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, on_head: bool, machines: list[str]
) -> None:
    """Where the head is there to decide only, no wrapper is put on it."""
    nodes = [
        {"Alive": True, "NodeID": "1", "NodeName": "head", "Resources": {"node:__internal_head__": 1}},
        {"Alive": True, "NodeID": "2", "NodeName": "worker", "Resources": {}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeManagerAddress": node["NodeName"], **node} for node in nodes])
    settings = Settings.model_validate({"wrappers": {"on_head": on_head}})
    observed = await RayCluster(settings, ModelSources(True, (), Path("/"))).observe()
    assert [machine.machine_id for machine in observed.machines] == machines


class Silent:
    """A handle of a wrapper that gives no answer."""

    class report:  # noqa: N801 - the name of a wrapper's method
        """One of its methods."""

        @staticmethod
        async def remote(*_: object) -> None:
            await asyncio.Event().wait()

    bind = report


@pytest.mark.parametrize(
    ("states", "raised"),
    [({"RECOVERING": 1}, WrapperUnheard), ({"RUNNING": 1}, WrapperUnreachable), ({"STARTING": 1}, WrapperUnreachable)],
)
async def test_a_wrapper_that_serve_itself_looks_for_is_not_blamed(
    serve: FakeServe, monkeypatch: pytest.MonkeyPatch, states: dict[str, int], raised: type[Exception]
) -> None:
    """While a new controller of Serve's finds its replicas, no answer means nothing; at any other time it does."""
    deployment = SimpleNamespace(replica_states=states)
    serve.applications["wrapper-a-0"] = SimpleNamespace(deployments={"LLMWrapper": deployment})
    monkeypatch.setattr("ray.serve.get_app_handle", lambda _name: Silent())
    settings = Settings.model_validate({"watch": {"report_timeout_s": 0.01}})
    with pytest.raises(WrapperUnreachable) as caught:
        await RayCluster(settings, ModelSources(True, (), Path("/"))).report("a-0", UNTOLD)
    assert type(caught.value) is raised


async def test_while_serve_is_away_no_wrapper_is_blamed(serve: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that does not answer is asked by one thread, however many wrappers give no answer."""
    asked, back = [], threading.Event()

    def status() -> None:
        asked.append(1)
        back.wait(10)

    monkeypatch.setattr("ray.serve.status", status)
    monkeypatch.setattr("ray.serve.get_app_handle", lambda _name: Silent())
    monkeypatch.setattr(cluster_module, "SERVE_TIMEOUT_S", 0.01)
    cluster = RayCluster(
        Settings.model_validate({"watch": {"report_timeout_s": 0.01}}), ModelSources(True, (), Path("/"))
    )
    for wrapper_id in ("a-0", "b-0", "a-0"):
        with pytest.raises(WrapperUnheard):
            await cluster.report(wrapper_id, UNTOLD)
    assert len(asked) == 1
    back.set()


async def test_settling_is_waited_for(serve: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease of measurement grade may take as long as its machine may need to come to rest, others may not."""
    serve.applications["wrapper-a-0"] = SimpleNamespace(deployments={})
    monkeypatch.setattr("ray.serve.get_app_handle", lambda _name: Silent())
    monkeypatch.setattr(cluster_calls, "COMMAND_TIMEOUT_S", 0.01)
    monkeypatch.setattr(cluster_calls, "REST_LIMIT_S", 0.0)
    monkeypatch.setattr(cluster_calls, "PROBE_MAX_S", 0.0)
    settings = Settings.model_validate({"energy": {"settle_max_s": 0.05}})
    cluster = RayCluster(settings, ModelSources(True, (), Path("/")))
    grant = LeaseGrant("r1", 1, "token", "{}", ends_in_s=60.0, idle_limit_s=60.0)
    with pytest.raises(WrapperUnreachable, match=r"no answer to bind within 0\.01 s"):
        await cluster.bind("a-0", 1, grant)
    with pytest.raises(WrapperUnreachable, match=r"no answer to bind within 0\.06 s"):
        await cluster.bind("a-0", 1, replace(grant, grade="measurement"))


async def test_a_wrapper_gets_the_energy_settings_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine, GPU type and zone choose them, and embodied carbon is that of the wrapper: 2 GPUs of 10 g/h are 20."""
    embodied = {"per": "gpu", "g_per_hour": 10.0, "low_g_per_hour": 5.0, "high_g_per_hour": 15.0, "source": "a test"}
    match = {"machine": "gpu-*", "gpu_type": "NVIDIA H100*", "zone": "eu-1?"}
    energy = {"machines": [{"match": match, "pue": 1.4, "embodied": embodied}]}
    targets: list[Any] = []
    monkeypatch.setattr("ray.serve.run_many", lambda some, **_: targets.extend(some))
    monkeypatch.setattr("deployments.serve.wrapper_app.deployment", lambda config, **_: config)
    monkeypatch.setattr("ray.serve.RunTarget", lambda config, **_: config)
    machine = Machine("gpu-1", "n", "10.0.0.1", gpus=4, gpu_type="NVIDIA H100 80GB", zone="eu-1a")
    plans = wanted_wrappers(machine, per_machine=2, gpus_per_wrapper=None, base_url="http://x", homes={})
    settings = Settings.model_validate({"energy": energy})
    await RayCluster(settings, ModelSources(True, (), Path("/x"))).create(plans)
    assert [each.energy.pue for each in targets] == [1.4, 1.4]
    assert [each.energy.embodied.g_per_hour for each in targets] == [20.0, 20.0]
