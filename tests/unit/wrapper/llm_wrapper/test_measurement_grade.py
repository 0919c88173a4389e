"""Leases of measurement grade: what they wait for, and what is told of the machine and of what runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.machine.wrapper_activity import WrapperActivity
from deployments.models.weights import weights_of
from deployments.models.weights_hash import WeightsHash
from deployments.wrapper.provenance import versions_here
from registry.contract.messages import HandOver, LeaseGrant
from registry.errors import StaleEpoch
from tests.support.fake_cluster import UNTOLD
from tests.support.fake_counters import FakeNVML, install_nvml
from tests.support.llm_wrapper import FIRST, MEASURED, OTHER_SPEC, SECOND, Client, Make


@pytest.mark.usefixtures("_vllm_and_torch")
def test_versions_tell_what_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own version is among them; the driver's only where there is a GPU, and NVML tells."""
    install_nvml(monkeypatch, FakeNVML())
    assert {"greenprompt-llm-registry", "ray", "torch"} <= versions_here(0).keys()
    assert "nvidia-driver" not in versions_here(0)
    assert versions_here(1)["nvidia-driver"] == "610.43.02"
    install_nvml(monkeypatch, FakeNVML(init_error=9))
    assert versions_here(1) == versions_here(0)


async def settling_for(client: Client, grant: LeaseGrant) -> asyncio.Task[HandOver]:
    """A bind that goes on until ``engine.go`` is set."""
    client.engine.go.clear()
    bind = asyncio.create_task(client.wrapper.bind(3, replace(grant, as_of=client.wrapper._gate.moment)))
    while (await client.wrapper.report(UNTOLD)).phase != "settling":
        await asyncio.wait({bind}, timeout=0)
    return bind


@pytest.mark.usefixtures("_vllm_and_torch")
async def test_a_standard_lease_does_not_wait(make: Make) -> None:
    """Only who asks for it waits for the machine; everybody is told what runs, but for the weights."""
    client = await make(finish=False)
    over = await client.wrapper.bind(3, SECOND)
    assert (client.engine.warmed_up, over.flags) == (0, ())
    assert over.model_revision == "c" * 40
    told: Any = over.provenance
    assert told["model"] == {"name": "org/tiny", "revision": "c" * 40, "weights_sha256": None}
    assert (told["gpus"], told["engine_args"]) == ([], {"dtype": "float32"})
    assert "vllm" in "".join(told["versions"])


@pytest.mark.usefixtures("at_once")
async def test_a_measured_lease_is_settled_first(make: Make) -> None:
    """Until the LLM has answered once and the machine is at rest the token is refused, and the wrapper says why."""
    client = await make(finish=False)
    bind = await settling_for(client, MEASURED)
    report = await client.wrapper.report(UNTOLD)
    assert (report.bound, report.idle_for_s, report.lease_flags) == ("request-2", 0.0, ())
    assert (await client.prompt("token-2")).status_code == 403
    assert (await client.prompt("token-1")).status_code == 410
    client.engine.go.set()
    over = await bind
    assert (client.engine.warmed_up, over.flags) == (1, ("steadiness_unknown",))
    assert (await client.prompt("token-2")).status_code == 200
    assert (await client.wrapper.report(UNTOLD)).phase is None


@pytest.mark.usefixtures("at_once")
async def test_a_newer_command_ends_the_settling(make: Make) -> None:
    """Whatever comes next does not wait for a machine to come to rest; the lease that did is never bound."""
    client = await make(finish=False)
    bind = await settling_for(client, MEASURED)
    await client.wrapper.unbind(4, "request-2", "released")
    with pytest.raises(StaleEpoch):
        await bind
    report = await client.wrapper.report(UNTOLD)
    assert (report.phase, report.bound) == (None, None)
    await client.bind(5, FIRST)
    with pytest.raises(StaleEpoch):
        await client.wrapper.bind(4, MEASURED)
    client.engine.go.set()
    assert (await client.prompt("token-1")).status_code == 200


@pytest.mark.usefixtures("at_once")
async def test_a_bind_that_is_sent_again_joins(make: Make) -> None:
    """The registry insists when it gets no answer: the LLM is settled once, and both are told the same."""
    client = await make(finish=False)
    first = await settling_for(client, MEASURED)
    first.cancel()
    again = asyncio.create_task(client.wrapper.bind(3, MEASURED))
    await asyncio.wait({first})
    assert not again.done()
    client.engine.go.set()
    over = await again
    assert client.engine.warmed_up == 1
    assert await client.wrapper.bind(3, MEASURED) == over


@pytest.mark.usefixtures("at_once")
async def test_a_dead_llm_is_handed_over_as_what_it_is(make: Make) -> None:
    """Nobody waits for it to settle: the registry hears of its death and starts it again, with a flag."""
    client = await make(finish=False)
    engine = client.engine
    bind = await settling_for(client, MEASURED)
    engine.die("killed")
    client.wrapper._commands._death_watch.cancel()  # type: ignore[union-attr]  # the registry has not asked yet
    engine.go.set()
    assert (await bind).flags == ("steadiness_unknown",)
    assert (await client.wrapper.bind(4, replace(MEASURED, request_id="r3", token="t3"))).flags == ("not_steady",)


@pytest.mark.usefixtures("at_once")
async def test_weights_are_told_of_for_a_measurement(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    """The hash is that of the files; where there was no time for it, it is pending, which is not the same as none."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"weights")
    client = await make(finish=False)
    client.engine.weights = weights_of(str(tmp_path / "llm"))
    told: Any = (await client.wrapper.bind(3, MEASURED)).provenance
    assert len(told["model"]["weights_sha256"]) == 64
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"other weights")
    client.engine.weights = weights_of(str(tmp_path / "llm"))

    async def not_in_time(*_: object, **__: object) -> None:
        pass

    monkeypatch.setattr(WeightsHash, "known", not_in_time)
    told = (await client.wrapper.bind(4, replace(MEASURED, request_id="r3", token="t3"))).provenance
    assert told["model"]["weights_sha256"] == "pending"


@pytest.mark.usefixtures("at_once")
async def test_a_measured_lease_is_watched(make: Make, tmp_path: Path) -> None:
    """Work of another wrapper of the machine is told while the lease lasts; for a standard lease nobody asks."""
    client = await make(finish=False)
    other = WrapperActivity(tmp_path / ".greenprompt" / "wrappers", "a-1")
    await client.bind(3, MEASURED)
    client.wrapper._meter.meter.poll_once()
    assert (await client.wrapper.report(UNTOLD)).lease_flags == ()
    with other.busy():
        client.wrapper._meter.meter._contention.look(client.wrapper._meter.meter.mark())
    assert (await client.wrapper.report(UNTOLD)).lease_flags == ("contended",)
    await client.bind(4, FIRST)
    assert (await client.wrapper.report(UNTOLD)).lease_flags == ()


async def test_prompts_and_starts_are_work(make: Make, tmp_path: Path) -> None:
    """Whoever measures on the same machine sees them."""
    client = await make(finish=False)
    other = WrapperActivity(tmp_path / ".greenprompt" / "wrappers", "a-1")
    other.others_worked()
    assert not other.others_worked()
    prompt = await client.begin("token-1")
    assert other.others_worked()
    client.engine.go.set()
    await prompt
    other.others_worked()
    assert not other.others_worked()
    await client.wrapper.deploy(3, OTHER_SPEC, None)
    assert other.others_worked()
