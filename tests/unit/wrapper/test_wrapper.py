"""A wrapper over an engine host that is a fake: prompts of an expired lease, engines that die or leave something."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import structlog

from deployments.energy import settling
from deployments.engine import rest as engine_rest
from deployments.engine.order import StopOutcome
from deployments.machine.machine_cpu import MachineCPU
from deployments.machine.wrapper_activity import WrapperActivity
from deployments.models.cache import LocalModel
from deployments.models.sources import ModelSources
from deployments.models.weights import Weights, weights_of
from deployments.models.weights_hash import WeightsHash
from deployments.wrapper import llm_wrapper as wrapper_module
from deployments.wrapper import probe, swap
from deployments.wrapper.commands import WrapperCommands
from deployments.wrapper.config import WrapperConfig
from deployments.wrapper.llm_wrapper import LLMWrapper
from deployments.wrapper.provenance import versions_here
from registry.contract.messages import Belief, HandOver, LeaseGrant
from registry.core.records import LLMSpec
from registry.errors import EngineNotReady, InvalidField, StaleEpoch, WrapperUnreachable
from registry.settings import EnergySettings, WrapperSettings
from tests.support.fake_cluster import UNTOLD
from tests.support.fake_counters import FakeNVML, ManualClock, install_nvml
from tests.support.fake_engine import FakeEngine
from tests.support.undying_wrapper import started_wrapper

LLMCONFIG = json.dumps({"uses_chat_template": False, "args": {"prompting": {}, "deployment": {}}})
FIRST = LeaseGrant("request-1", 1, "token-1", LLMCONFIG, ends_in_s=60.0, idle_limit_s=60.0)
SECOND = LeaseGrant("request-2", 2, "token-2", LLMCONFIG, ends_in_s=60.0, idle_limit_s=60.0)
SPEC = LLMSpec("org/tiny", "text-generation")
OTHER_SPEC = LLMSpec("org/other", "text-generation")


class RunningFake(FakeEngine):
    """An LLM that runs, until it dies."""

    unfinished = 0
    weights: Weights | None = None
    engine_args = {"dtype": "float32"}  # noqa: RUF012
    death_reason: str | None = None
    out_of_memory = False
    processes: tuple[Any, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.warmed_up = 0
        self.forgot = 0
        self.forgets: bool | Exception = True

    def die(self, reason: str) -> None:
        self.death_reason = reason
        self.died.set()

    async def warm_up(self) -> None:
        """Holds, as an answer does, while ``go`` is cleared."""
        self.warmed_up += 1
        await self.go.wait()

    async def forget_prompts(self) -> bool:
        """As ``forgets`` says."""
        self.forgot += 1
        if isinstance(self.forgets, Exception):
            raise self.forgets
        return self.forgets


class FakeHost:
    """An engine host whose engines are fakes; ``stopped`` counts those that were ended, ``left`` is what they leave."""

    left = StopOutcome()

    warm = True
    cold_reason = None

    def __init__(self, **_: object) -> None:
        self.running: RunningFake | None = None
        self.stopped = 0
        self.asleep: list[str] = []
        self.vacated_for: list[str] = []

    async def prepare(self) -> None:
        pass

    async def start(self, model: str, **_: object) -> None:
        self.running = RunningFake()

    async def stop(self) -> StopOutcome:
        self.stopped += self.running is not None
        self.running = None
        return self.left

    async def vacate(self, *, wanted_next: str) -> StopOutcome:
        self.vacated_for.append(wanted_next)
        return await self.stop()

    async def stop_asleep(self) -> None:
        self.asleep.clear()

    def give_up(self, llm: RunningFake, reason: str) -> None:
        llm.die(reason)


class FakeModels:
    """Every model is on the machine."""

    def __init__(self, *_: object) -> None:
        pass

    async def fetch(self, model: str, **_: object) -> LocalModel:
        return LocalModel(model, "c" * 40)

    async def here(self, model: str, **_: object) -> str:
        return model


class Client:
    """Prompts one wrapper over its own ASGI app."""

    def __init__(self, wrapper: LLMWrapper) -> None:
        self.wrapper = wrapper
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=wrapper.__serve_build_asgi_app__()), base_url="http://wrapper"
        )

    @property
    def engine(self) -> RunningFake:
        engine: Any = self.wrapper._host.running
        assert isinstance(engine, RunningFake)
        return engine

    async def bind(self, epoch: int, grant: LeaseGrant) -> None:
        """As the registry does, having heard of this wrapper just now."""
        await self.wrapper.bind(epoch, replace(grant, as_of=self.wrapper._gate.moment))

    async def status(self, token: str) -> httpx.Response:
        return await self._http.get(f"/{token}/get_status")

    async def prompt(self, token: str) -> httpx.Response:
        return await self._http.post(f"/{token}/process_prompt", json={"question": "Why?"})

    async def begin(self, token: str) -> asyncio.Task[httpx.Response]:
        """A prompt that is in flight until ``engine.go`` is set."""
        self.engine.go.clear()
        self.engine.generating.clear()
        prompt = asyncio.create_task(self.prompt(token))
        await self.engine.generating.wait()
        return prompt

    async def replace_while_it_answers(self) -> tuple[asyncio.Task[httpx.Response], asyncio.Task[None]]:
        """A prompt of an expired lease, in flight, and the deployment of OTHER_SPEC, which waits for its end."""
        prompt = await self.begin("token-1")
        await self.wrapper.unbind(3, "request-1", "expired")
        deploy = asyncio.create_task(self.wrapper.deploy(4, OTHER_SPEC, None))
        while (await self.wrapper.report(UNTOLD)).phase != "finishing_prompts":
            await asyncio.wait({deploy}, timeout=0)
        return prompt, deploy


MEASURED = replace(SECOND, grade="measurement")

Make = Callable[..., Awaitable[Client]]


@pytest.fixture
def _vllm_and_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are installed, as far as metadata tells; `make test-pythons` has neither."""
    for name in ("vllm", "torch"):
        metadata = tmp_path / "packages" / f"{name}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")


@pytest.mark.usefixtures("_vllm_and_torch")
def test_versions_tell_what_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own version is among them; the driver's only where there is a GPU, and NVML tells."""
    install_nvml(monkeypatch, FakeNVML())
    assert {"greenprompt-llm-registry", "ray", "torch"} <= versions_here(0).keys()
    assert "nvidia-driver" not in versions_here(0)
    assert versions_here(1)["nvidia-driver"] == "610.43.02"
    install_nvml(monkeypatch, FakeNVML(init_error=9))
    assert versions_here(1) == versions_here(0)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Makes a wrapper that runs an LLM, and whose first lease is bound."""

    async def make(
        *,
        finish: bool,
        ends_in_s: float = 60.0,
        local_roots: tuple[Path, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        show_warm: Callable[[bool], None] = lambda _warm: None,
    ) -> Client:
        monkeypatch.setattr(wrapper_module, "time", SimpleNamespace(monotonic=clock))
        monkeypatch.setattr(wrapper_module, "EngineHost", FakeHost)
        monkeypatch.setattr(wrapper_module, "ModelCache", FakeModels)
        monkeypatch.setattr(MachineCPU, "strangers", lambda _, now_s: (False, now_s))  # other tests may run
        settings = WrapperSettings(prompt_max_s=5.0)
        sources = ModelSources(True, local_roots, tmp_path)
        config = WrapperConfig("a-0", 0, settings, EnergySettings(), sources, tmp_path, finish_prompts=finish)
        wrapper = await started_wrapper(config, show_warm)
        await wrapper.deploy(1, SPEC, None)
        lease = LeaseGrant("request-1", 1, "token-1", LLMCONFIG, ends_in_s=ends_in_s, idle_limit_s=60.0)
        client = Client(wrapper)
        await client.bind(2, lease)
        return client

    return make


async def test_metric_tells_whether_llms_start_warm(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric is true while LLMs start warm, false from the first report that says otherwise, and after the end."""
    shown: list[bool] = []

    async def close(_host: object) -> None:
        pass

    monkeypatch.setattr(FakeHost, "close", close, raising=False)
    client = await make(finish=False, show_warm=shown.append)
    assert shown == [True]
    await client.wrapper.report(UNTOLD)
    assert shown[-1:] == [True]
    monkeypatch.setattr(FakeHost, "warm", False)
    await client.wrapper.report(UNTOLD)
    assert shown[-1:] == [False]
    monkeypatch.setattr(FakeHost, "warm", True)
    await client.wrapper.report(UNTOLD)
    await LLMWrapper.__del__(client.wrapper)
    assert shown[-2:] == [True, False]


async def test_expired_prompts_are_cut(make: Make) -> None:
    """Unless they may finish, the deadline cuts them, and the next lease is bound at once."""
    client = await make(finish=False, ends_in_s=0.05)
    prompt = await client.begin("token-1")
    answer = await prompt
    assert (answer.status_code, answer.json()["code"]) == (410, "lease_ended")
    await client.bind(3, SECOND)
    client.engine.go.set()
    assert (await client.prompt("token-2")).status_code == 200


# --- the caches at a hand-over -------------------------------------------------------------------------------


async def test_every_lease_begins_with_empty_caches(make: Make) -> None:
    """Leases of standard grade share nothing either: each hand-over empties the caches once, a repeated bind does not.

    One LLM, leases 1 and 2: 2 hand-overs, so it was emptied 2 times; lease 2 bound again: still 2.
    """
    client = await make(finish=False)
    assert client.engine.forgot == 1
    over = await client.wrapper.bind(3, SECOND)
    assert (client.engine.forgot, over.flags) == (2, ())
    await client.wrapper.bind(4, SECOND)
    assert client.engine.forgot == 2


@pytest.mark.parametrize("forgets", [False, RuntimeError("the engine core is dead")])
async def test_caches_that_stay_full_are_told(make: Make, forgets: bool | Exception) -> None:
    """Where the engine is not at rest in time, or fails, the lease is handed over with a flag."""
    client = await make(finish=False)
    client.engine.forgets = forgets
    over = await client.wrapper.bind(3, SECOND)
    assert over.flags == ("prefix_cache_kept",)


# --- measurement grade ------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in life takes a moment here."""
    for name in ("SLICE_S", "LAG_S", "LOOK_S"):
        monkeypatch.setattr(settling, name, 0.001)


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


async def test_an_unbind_ends_whatever_is_bound(make: Make) -> None:
    """The end of a lease that never came here ends the one before it, whose own end it has overtaken."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(5, "request-2", "released")
    answer = await prompt
    assert (answer.status_code, answer.json()["code"]) == (410, "lease_ended")
    assert (await client.prompt("token-1")).status_code == 410


async def test_next_lease_waits_for_the_last_prompt(make: Make) -> None:
    """A lease that is finished leaves its machine to nobody else before its last prompt is over."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    bind = asyncio.create_task(client.bind(4, SECOND))
    refused = await client.prompt("token-1")
    assert (refused.status_code, refused.json()["code"]) == (410, "lease_ended")
    assert (await client.prompt("token-2")).status_code == 403
    assert not bind.done()
    client.engine.go.set()
    assert (await prompt).status_code == 200
    await bind
    assert (await client.prompt("token-2")).status_code == 200


async def test_next_llm_waits_for_the_last_prompt(make: Make) -> None:
    """The engine is not stopped under a prompt that may finish; meanwhile the wrapper says what it waits for."""
    client = await make(finish=True)
    engine = client.engine
    prompt, deploy = await client.replace_while_it_answers()
    report = await client.wrapper.report(UNTOLD)
    assert (report.starting, report.phase) == (OTHER_SPEC.fingerprint, "finishing_prompts")
    assert client.engine is engine
    engine.go.set()
    assert (await prompt).status_code == 200
    await deploy
    assert client.engine is not engine


@pytest.mark.parametrize("how", ["released", "failed"])
async def test_only_expiry_lets_finish(make: Make, how: str) -> None:
    """A lease that ends for any other reason has its prompts cut, whatever is configured."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", how)
    answer = await prompt
    assert answer.status_code == 410
    assert how in answer.json()["message"]


async def test_release_of_an_expired_lease_cuts_its_prompts(make: Make) -> None:
    """Who gives back what has expired already need not wait for the prompts that may still finish."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    await client.wrapper.unbind(4, "request-1", "released")
    assert (await prompt).status_code == 410


async def test_shutdown_waits_for_nobody(make: Make) -> None:
    """Stopping the LLM cuts prompts that would otherwise be finished."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    await client.wrapper.stop(4)
    assert (await prompt).status_code == 410


async def test_a_newer_command_need_not_wait(make: Make) -> None:
    """While a lease waits for the last prompt of another it can be released; it is not bound afterwards."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    bind = asyncio.create_task(client.bind(4, SECOND))
    await asyncio.wait({bind}, timeout=0)
    await client.wrapper.unbind(5, "request-2", "released")
    assert not prompt.done()
    client.engine.go.set()
    assert (await prompt).status_code == 200
    with pytest.raises(StaleEpoch):
        await bind
    assert (await client.prompt("token-2")).status_code == 403


async def test_binding_again_leaves_prompts_alone(make: Make) -> None:
    """A registry that was restarted binds the lease that it knows: nothing of it is cut or waited for."""
    client = await make(finish=False)
    prompt = await client.begin("token-1")
    await client.bind(3, FIRST)
    client.engine.go.set()
    assert (await prompt).status_code == 200


async def test_another_lease_cuts_one_that_was_not_ended(make: Make) -> None:
    """If the end of a lease was lost, the next one's binding ends it, prompts and all."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.bind(3, SECOND)
    assert (await prompt).status_code == 410
    client.engine.go.set()
    assert (await client.prompt("token-2")).status_code == 200


# --- the fence ---------------------------------------------------------------------------------------------


async def test_a_wrapper_that_hears_nothing_takes_no_new_prompts(make: Make) -> None:
    """Its registry may have ended the lease: new prompts answer 503 until it is heard, those in flight go on."""
    clock = ManualClock()
    client = await make(finish=False, clock=clock)
    heard = client.wrapper._gate.moment
    running = await client.begin("token-1")
    clock.now_s += 30.0
    refused, status = await client.prompt("token-1"), await client.status("token-1")
    assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (503, "registry_unheard", True)
    assert refused.headers["retry-after"] == "1"
    assert "has not heard from the registry for 30 s" in refused.json()["message"]
    assert (status.json()["message"], status.json()["detail"]) == ("not ready", refused.json()["message"])
    client.engine.go.set()
    assert (await running).status_code == 200
    await client.wrapper.report(Belief(2, "request-1", heard))  # it has been on its way for long
    assert (await client.prompt("token-1")).status_code == 503
    await client.wrapper.report(Belief(2, "request-1", client.wrapper._gate.moment))
    assert (await client.prompt("token-1")).status_code == 200
    assert (await client.status("token-1")).json()["message"] == "ready"


@pytest.mark.parametrize("believed", [None, "request-2"])
async def test_a_lease_that_the_registry_does_not_know_ends(make: Make, believed: str | None) -> None:
    """A machine that was given up and is heard of again serves its old lease to nobody, whatever comes afterwards."""
    client = await make(finish=True)
    before = client.wrapper._gate.moment
    prompt = await client.begin("token-1")
    report = await client.wrapper.report(Belief(2, believed, before))
    assert report.bound is None
    for answer in (await prompt, await client.prompt("token-1")):
        assert (answer.status_code, answer.json()["code"]) == (410, "lease_ended")
        assert "withdrawn" in answer.json()["message"]
    await client.wrapper.report(Belief(2, "request-1", client.wrapper._gate.moment))
    assert (await client.prompt("token-1")).status_code == 410


async def test_the_end_of_a_lease_is_its_commands_to_tell(make: Make) -> None:
    """A report that overtakes the command which ends a lease shuts the gate; how it ended the command says."""
    client = await make(finish=True)
    prompt = await client.begin("token-1")
    await client.wrapper.report(Belief(3, None, client.wrapper._gate.moment))
    assert (await client.prompt("token-1")).json()["code"] == "registry_unheard"
    await client.wrapper.unbind(3, "request-1", "expired")
    assert "expired" in (await client.prompt("token-1")).json()["message"]
    client.engine.go.set()
    assert (await prompt).status_code == 200


async def test_an_older_word_counts_for_nothing(make: Make) -> None:
    """A report that was asked for before a command, and comes after it, neither ends a lease nor vouches for one."""
    clock = ManualClock()
    client = await make(finish=False, clock=clock)
    clock.now_s += 29.0
    await client.wrapper.report(Belief(1, None, client.wrapper._gate.moment))
    assert (await client.prompt("token-1")).status_code == 200
    await client.wrapper.report(Belief(1, "request-1", client.wrapper._gate.moment))
    clock.now_s += 1.0
    assert (await client.prompt("token-1")).json()["code"] == "registry_unheard"


async def test_a_lease_that_waits_to_be_bound_is_heard_of(make: Make) -> None:
    """The next lease may wait for the last prompt of the one before for longer than the fence: it is open at once."""
    clock = ManualClock()
    client = await make(finish=True, clock=clock)
    prompt = await client.begin("token-1")
    await client.wrapper.unbind(3, "request-1", "expired")
    bind = asyncio.create_task(client.bind(4, SECOND))
    await asyncio.wait({bind}, timeout=0)
    clock.now_s += 31.0
    report = await client.wrapper.report(Belief(4, "request-2", client.wrapper._gate.moment))
    assert report.epoch == 4
    client.engine.go.set()
    assert (await prompt).status_code == 200
    await bind
    assert (await client.prompt("token-2")).status_code == 200


# --- engines that die, and what they leave -----------------------------------------------------------------


@pytest.mark.parametrize("left", [StopOutcome(), StopOutcome(leftover=(7,))], ids=["nothing", "a process"])
async def test_death_of_the_engine_is_reported(make: Make, left: StopOutcome) -> None:
    """An engine that dies or hangs ends its prompts with the reason, and the next report says it, too."""
    client = await make(finish=False)
    host: Any = client.wrapper._host
    host.left = left
    assert (await client.wrapper.report(UNTOLD)).unfinished == 0
    prompt = await client.begin("token-1")
    client.engine.die("it has not answered for 6 s")
    answer = await prompt
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_not_ready")
    assert "it has not answered for 6 s" in answer.json()["message"]
    assert client.wrapper._commands._death_watch is not None
    await asyncio.wait({client.wrapper._commands._death_watch})
    report = await client.wrapper.report(UNTOLD)
    assert report.died == "; ".join(filter(None, ["it has not answered for 6 s", left.problem]))
    assert (report.running, report.unfinished, report.bound) == (None, None, "request-1")
    late = await client.prompt("token-1")
    assert report.died in late.json()["message"]


async def test_an_llm_whose_death_watch_fails_is_not_trusted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported as dead, so that the registry restarts it; the report says why."""
    client = await make(finish=False)

    async def fails(*_: object) -> None:
        raise AttributeError("no died")

    monkeypatch.setattr(WrapperCommands, "_notice_death", fails)
    await client.wrapper.deploy(3, OTHER_SPEC, None)
    await asyncio.sleep(0.01)
    report = await client.wrapper.report(UNTOLD)
    assert (report.running, report.died) == (None, "its death watch failed: AttributeError: no died")


@pytest.mark.parametrize(("out_of_memory", "flags"), [(True, ("engine_out_of_memory",)), (False, ())])
async def test_an_engine_that_the_kernel_ended_for_memory_is_flagged(
    make: Make, out_of_memory: bool, flags: tuple[str, ...]
) -> None:
    """The report says what the measurement is flagged with, and no more of it once an LLM runs again."""
    client = await make(finish=False)
    client.engine.out_of_memory = out_of_memory
    client.engine.die("main memory ran out")
    assert client.wrapper._commands._death_watch is not None
    await asyncio.wait({client.wrapper._commands._death_watch})
    assert (await client.wrapper.report(UNTOLD)).death_flags == flags
    await client.wrapper.deploy(3, SPEC, FIRST)
    assert (await client.wrapper.report(UNTOLD)).death_flags == ()


async def test_an_engine_that_a_lease_leaves_at_work_is_ended_before_the_next_has_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next lease is not handed over, with the reason; after a new start it is."""
    monkeypatch.setattr(engine_rest, "REST_LIMIT_S", 0.01)
    client = await make(finish=False)
    engine = client.engine
    working = {engine}
    monkeypatch.setattr(client.wrapper._rest, "_is_working", lambda _: client.engine in working)
    monkeypatch.setattr(client.wrapper._rest, "_tells", True)
    await client.wrapper.unbind(3, "request-1", "released")
    with pytest.raises(EngineNotReady, match=r"it still worked 0\.01 s after the end of a lease"):
        await client.bind(4, SECOND)
    assert client.wrapper._gate.grant is None
    assert engine.forgot == 1  # for the first lease
    assert client.wrapper._commands._death_watch is not None
    await asyncio.wait({client.wrapper._commands._death_watch})
    assert "still worked" in str((await client.wrapper.report(UNTOLD)).died)
    await client.wrapper.deploy(5, SPEC, None)
    await client.bind(6, SECOND)
    assert (await client.prompt("token-2")).status_code == 200


async def test_an_engine_that_a_lease_leaves_at_work_does_not_sleep(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asleep it would go on working beside the leases of others, and be handed over like that when it wakes."""
    monkeypatch.setattr(engine_rest, "REST_LIMIT_S", 0.01)
    client = await make(finish=False)
    engine, host = client.engine, client.wrapper._host
    vacate, ended = host.vacate, list[bool]()

    async def vacate_seen(*, wanted_next: str) -> StopOutcome:
        ended.append(engine.died.is_set())
        return await vacate(wanted_next=wanted_next)

    monkeypatch.setattr(host, "vacate", vacate_seen)
    monkeypatch.setattr(client.wrapper._rest, "_is_working", lambda _: client.engine is engine)
    monkeypatch.setattr(client.wrapper._rest, "_tells", True)
    await client.wrapper.unbind(3, "request-1", "released")
    await client.wrapper.deploy(4, OTHER_SPEC, None)
    assert ended == [True]
    report = await client.wrapper.report(UNTOLD)
    assert (report.running, report.died) == (OTHER_SPEC.fingerprint, None)


async def test_death_of_an_llm_that_is_being_replaced(make: Make) -> None:
    """An LLM that dies while it finishes its prompts for the next one is none of the next one's business."""
    client = await make(finish=True)
    prompt, deploy = await client.replace_while_it_answers()
    client.engine.die("killed")
    assert (await prompt).status_code == 410
    await deploy
    report = await client.wrapper.report(UNTOLD)
    assert (report.running, report.died) == (OTHER_SPEC.fingerprint, None)


async def test_what_an_engine_leaves_makes_its_wrapper_unusable(make: Make) -> None:
    """As long as something of an engine is left, commands fail as if the wrapper were gone: it has to be replaced."""
    client = await make(finish=False)
    host: Any = client.wrapper._host
    host.left = StopOutcome(gpu_excess_bytes={"GPU-1": 2**30})
    with pytest.raises(WrapperUnreachable, match="GPU-1 holds 1024 MiB too much"):
        await client.wrapper.stop(3)
    with pytest.raises(WrapperUnreachable, match="GPU-1 holds 1024 MiB too much"):
        await client.wrapper.deploy(4, SPEC, None)
    host.left = StopOutcome()
    await client.wrapper.deploy(5, SPEC, None)
    assert (await client.wrapper.report(UNTOLD)).running == SPEC.fingerprint


# --- starts, and those that fail or are given up ----------------------------------------------------------


async def test_a_start_tells_its_phases(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says how long each phase of a start took."""
    client = await make(finish=False)

    async def start(model: str, **_: object) -> None:
        host: Any = client.wrapper._host
        host.running = RunningFake()
        host.running.phases = {"configuring": 0.5, "loading": 1.234}

    monkeypatch.setattr(client.wrapper._host, "start", start)
    with structlog.testing.capture_logs() as logs:
        await client.wrapper.deploy(3, OTHER_SPEC, None)
    (ready,) = [line for line in logs if line["event"] == "the LLM is ready"]
    assert (ready["log_level"], ready["model"]) == ("info", OTHER_SPEC.model)
    assert ready["took_s"] == {"configuring": 0.5, "loading": 1.23}


async def test_a_model_that_leads_elsewhere(make: Make, tmp_path: Path) -> None:
    """A link out of the allowed folder fails the start with that reason; the LLM before never passes for that one."""
    for name in ("models", "models/good", "elsewhere"):
        (tmp_path / name).mkdir()
    link = tmp_path / "models" / "llm"
    link.symlink_to(tmp_path / "elsewhere")
    client = await make(finish=False, local_roots=(tmp_path / "models",))
    spec = LLMSpec(str(link), "text-generation")
    for epoch in (3, 4):
        with pytest.raises(InvalidField, match="neither a Hugging Face id nor below"):
            await client.wrapper.deploy(epoch, spec, None)
        assert client.wrapper._host.running is None
    link.unlink()
    link.symlink_to(tmp_path / "models" / "good")
    await client.wrapper.deploy(5, spec, None)
    assert (await client.wrapper.report(UNTOLD)).running == spec.fingerprint


async def test_a_start_that_fails_before_its_predecessor_is_gone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason, the LLM that still runs answers nobody, and the next deployment starts the right one."""
    client = await make(finish=False)
    before = client.engine

    async def fails(*, wanted_next: str) -> StopOutcome:
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(client.wrapper._host, "vacate", fails)
        with pytest.raises(OSError, match="disk"):
            await client.wrapper.deploy(3, OTHER_SPEC, SECOND)
    assert client.engine is before
    report = await client.wrapper.report(UNTOLD)
    assert (report.running, report.starting, report.bound) == (None, None, "request-2")
    await client.wrapper.report(Belief(3, "request-2", client.wrapper._gate.moment))
    assert (await client.prompt("token-2")).json()["code"] == "engine_not_ready"
    await client.wrapper.deploy(4, OTHER_SPEC, SECOND)
    assert client.engine is not before
    assert (await client.prompt("token-2")).status_code == 200


async def test_a_start_is_given_up_for_a_command_that_goes_away(make: Make) -> None:
    """The registry may lose a command after that has cancelled a start: the LLM before does not pass for either."""
    client = await make(finish=True)
    before = client.engine
    prompt, first = await client.replace_while_it_answers()
    assert (await client.wrapper.report(UNTOLD)).running is None
    third = asyncio.create_task(client.wrapper.deploy(5, LLMSpec("org/third", "text-generation"), None))
    await asyncio.sleep(0)
    assert not client.wrapper._commands.is_starting
    third.cancel()
    with pytest.raises(StaleEpoch):
        await first
    client.engine.go.set()
    assert (await prompt).status_code == 200
    await client.wrapper.deploy(6, OTHER_SPEC, None)
    assert client.engine is not before


async def test_a_start_that_ends_late_leaves_the_next_one_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that was given up may take a while to end; by then another LLM is meant, and that one counts."""
    client = await make(finish=False)
    starting, over = asyncio.Event(), asyncio.Event()

    async def slow(model: str, **_: object) -> None:
        starting.set()
        try:
            await asyncio.Event().wait()
        finally:
            await over.wait()

    with monkeypatch.context() as patch:
        patch.setattr(client.wrapper._host, "start", slow)
        first = asyncio.create_task(client.wrapper.deploy(3, OTHER_SPEC, None))
        await starting.wait()
    second = asyncio.create_task(client.wrapper.deploy(4, LLMSpec("org/third", "text-generation"), None))
    await asyncio.sleep(0)
    assert not client.wrapper._commands.is_starting
    second.cancel()
    third = asyncio.create_task(client.wrapper.deploy(5, SPEC, None))
    while (await client.wrapper.report(UNTOLD)).starting is None:
        await asyncio.wait({third}, timeout=0)
    over.set()
    await third
    with pytest.raises(StaleEpoch):
        await first
    assert (await client.wrapper.report(UNTOLD)).running == SPEC.fingerprint


# --- LLMs that sleep, and weights that are read ahead --------------------------------------------------------


async def test_llms_sleep_when_they_are_swapped(make: Make) -> None:
    """An LLM that another one replaces may sleep on; at a stop everything ends."""
    client = await make(finish=False)
    host: Any = client.wrapper._host
    await client.wrapper.deploy(3, OTHER_SPEC, None)
    assert host.vacated_for == [SPEC.model, OTHER_SPEC.model]
    host.asleep.append(SPEC.model)
    await client.wrapper.stop(4)
    assert (host.asleep, host.running) == ([], None)


@pytest.mark.parametrize("asleep", [False, True])
async def test_weights_are_read_ahead(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asleep: bool
) -> None:
    """From when the LLM before is stopped until the new one runs, its weights are read ahead, unless it sleeps."""
    read: list[object] = []
    reading = False

    @contextmanager
    def read_ahead(weights: object) -> Iterator[None]:
        nonlocal reading
        read.append(weights)
        reading = True
        yield
        reading = False

    model = tmp_path / "models" / "local"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"12345")
    client = await make(finish=False, local_roots=(tmp_path / "models",))
    host: Any = client.wrapper._host
    monkeypatch.setattr(swap, "read_ahead", read_ahead)
    during: list[bool] = []
    vacate = host.vacate

    async def vacate_seen(*, wanted_next: str) -> StopOutcome:
        during.append(reading)
        return await vacate(wanted_next=wanted_next)  # type: ignore[no-any-return]

    monkeypatch.setattr(host, "vacate", vacate_seen)
    spec = LLMSpec(str(model), "text-generation")
    if asleep:
        host.asleep.append(spec.model)
    await client.wrapper.deploy(3, spec, None)
    assert read == [None if asleep else weights_of(str(model))]
    assert (during, reading) == ([True], False)


async def test_reports_bring_energy_windows(make: Make) -> None:
    """A report brings the windows of starts, prompts and leases, again until the registry has written them down."""
    client = await make(finish=False)
    await client.prompt("token-1")
    status = (await client.status("token-1")).json()
    assert status["energy"].keys() >= {"total_j", "idle_j", "label", "o_g", "m_g", "max_j", "max_g", "flags"}
    await client.wrapper.unbind(3, "request-1", "released")
    moment = client.wrapper._gate.moment
    meter = client.wrapper._meter.meter
    meter._contention.look(meter.mark())  # the poller is stopped here: what is written has to have been looked at
    report = await client.wrapper.report(Belief(3, None, moment))
    assert {window.wrapper_id for window in report.windows} == {"a-0"}
    assert [window.number for window in report.windows] == [*range(1, len(report.windows) + 1)]
    assert all(window.window_id.startswith(f"{moment.process}-") for window in report.windows)
    by_kind = {window.kind.value: window for window in report.windows}
    assert by_kind.keys() == {"load", "prompt", "idle", "lease"}
    assert json.loads(by_kind["load"].detail)["model"] == "org/tiny"
    assert (by_kind["lease"].request_id, by_kind["lease"].measurement_id) == ("request-1", 1)
    assert json.loads(by_kind["prompt"].detail)["tokens"] == {"prompt": 7, "cached": None, "output": 3}
    again = await client.wrapper.report(Belief(3, None, moment, windows_kept=len(report.windows)))
    assert again.windows == ()


async def test_budget_of_a_lease_reaches_its_prompts(make: Make) -> None:
    """A budget comes with the bind; where nothing is measured it can't hold, and the answer says so."""
    client = await make(finish=False)
    await client.bind(3, replace(SECOND, max_j=10.0))
    answer = await client.prompt("token-2")
    assert answer.status_code == 200
    assert "budget_not_enforced" in answer.json()["flags"]
    assert (await client.status("token-2")).json()["energy"]["max_j"] == 10.0


# --- the first prompt ---------------------------------------------------------------------------------------

REFUSED = {"error": {"message": "top_p must be in (0, 1], got 7; see --max-model-len", "type": "BadRequestError"}}


def asking(grant: LeaseGrant, **prompting: object) -> LeaseGrant:
    """The lease of a request with these prompting arguments."""
    args = {"prompting": prompting, "deployment": {}}
    return replace(grant, llmconfig=json.dumps({"uses_chat_template": True, "args": args}))


async def test_llm_that_refuses_every_prompt_is_not_handed_over(make: Make) -> None:
    """Its request is told why, in our words, and its token opens nothing; the next request is asked by its own."""
    client = await make(finish=False)
    client.engine.error = 400, REFUSED
    over = await client.wrapper.bind(3, asking(SECOND, top_k=7))
    assert over.refusal == (
        "it refuses every prompt of this request: top_p must be in (0, 1], got 7; see args.deployment.max_model_len"
    )
    client.engine.error = None
    assert (await client.prompt("token-2")).status_code == 403
    third = replace(SECOND, request_id="request-3", token="token-3", as_of=client.wrapper._gate.moment)
    assert (await client.wrapper.bind(4, asking(third, top_k=8))).refusal is None
    assert (await client.prompt("token-3")).status_code == 200


async def test_first_prompt_is_asked_once_per_start_and_arguments(make: Make) -> None:
    """A short one with the request's own arguments, by its own path; a known answer costs the hand-over nothing.

    Bound first without arguments: 1. With top_k 7: 2. With top_k 7 and more tokens, which decide nothing: 2. On
    another start: 3.
    """
    client = await make(finish=False)
    assert [path for path, _ in client.engine.bodies] == ["/v1/completions"]
    await client.bind(3, asking(SECOND, top_k=7, max_new_tokens=500, min_new_tokens=20))
    path, body = client.engine.bodies[-1]
    assert (path, body["top_k"], body["max_tokens"]) == ("/v1/chat/completions", 7, 1)
    assert "min_tokens" not in body
    await client.bind(4, replace(asking(SECOND, top_k=7, max_new_tokens=9), request_id="request-3"))
    assert len(client.engine.bodies) == 2
    await client.wrapper.deploy(5, OTHER_SPEC, None)
    await client.bind(6, replace(asking(SECOND, top_k=7), request_id="request-4"))
    assert len(client.engine.bodies) == 1


async def test_no_first_prompt_where_there_is_none(make: Make) -> None:
    """An LLM that writes no text has no process_prompt, and one that was handed over before has been prompted."""
    client = await make(finish=False)
    client.engine.bodies.clear()
    embeds = {"modeltyp": "embedding", "uses_chat_template": False, "args": {"prompting": {}, "deployment": {}}}
    await client.bind(3, replace(SECOND, llmconfig=json.dumps(embeds)))
    await client.bind(4, replace(asking(FIRST, top_k=3), handed_over_s=1.0))
    assert client.engine.bodies == []


async def test_llm_that_is_slow_or_dead_is_not_called_refusing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer in time, or from a dead engine, nothing is known: it is handed over, and asked next time."""
    client = await make(finish=False)
    monkeypatch.setattr(probe, "PROBE_MAX_S", 0.0)
    client.engine.go.clear()
    assert (await client.wrapper.bind(3, asking(SECOND, top_k=7))).refusal is None
    client.engine.go.set()
    monkeypatch.setattr(probe, "PROBE_MAX_S", 30.0)
    client.engine.error = 500, {"error": "the engine core is dead"}
    monkeypatch.setattr(RunningFake, "failed", True)
    assert (await client.wrapper.bind(4, asking(FIRST, top_k=7))).refusal is None
    monkeypatch.setattr(RunningFake, "failed", False)
    client.engine.error = RuntimeError("the template failed")
    over = await client.wrapper.bind(5, asking(SECOND, top_k=7))
    assert over.refusal == "its first prompt failed with status 500: Internal Server Error"


async def test_a_fault_of_the_engine_at_the_first_prompt_is_not_remembered(make: Make) -> None:
    """A 500 ends one request; the next one with the same arguments is asked again, and served if the fault is over."""
    client = await make(finish=False)
    client.engine.error = 500, {"error": "a fault that passes"}
    assert "a fault that passes" in ((await client.wrapper.bind(3, asking(SECOND, top_k=7))).refusal or "")
    client.engine.error = None
    third = replace(SECOND, request_id="request-3", token="token-3", as_of=client.wrapper._gate.moment)
    assert (await client.wrapper.bind(4, asking(third, top_k=7))).refusal is None
    assert (await client.prompt("token-3")).status_code == 200


async def test_a_prompt_to_an_llm_that_writes_no_text(make: Make) -> None:
    """process_prompt says where to go instead."""
    client = await make(finish=False)
    embeds = {"modeltyp": "sentence-similarity", "uses_chat_template": False, "args": {"prompting": {}}}
    await client.bind(3, replace(SECOND, llmconfig=json.dumps(embeds)))
    answer = await client.prompt("token-2")
    assert (answer.status_code, answer.json()["code"]) == (422, "writes_no_text")
    assert answer.json()["message"].endswith("writes no text; POST to /v1/embeddings of its url")
