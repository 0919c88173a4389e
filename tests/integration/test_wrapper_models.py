"""A wrapper and the models that it is told to run: real downloads over HTTP, engines that are fakes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from deployments.engine.order import StopOutcome
from deployments.models.small_files import CONFIG_BYTES, INDEX_BYTES
from deployments.models.sources import ModelSources
from deployments.wrapper import llm_wrapper as wrapper_module
from deployments.wrapper.config import WrapperConfig
from registry.contract.messages import LeaseGrant
from registry.core.records import LLMSpec
from registry.errors import EngineStartFailed, StaleEpoch
from registry.settings import EnergySettings, ModelSettings, WrapperSettings
from tests.support.fake_cluster import UNTOLD
from tests.support.fake_hub import FILES, FakeHub
from tests.support.undying_wrapper import UndyingWrapper, started_wrapper

HUB_LLM = LLMSpec("org/tiny", "text-generation")
LLMCONFIG = json.dumps({"uses_chat_template": False, "args": {"prompting": {}, "deployment": {}}})


class RunningFake:
    unfinished = 0
    processes: tuple[int, ...] = ()
    served_model_name = "fake"
    failed = False

    def __init__(self) -> None:
        self.weights = None
        self.engine_args: dict[str, Any] = {}
        self.died = asyncio.Event()
        self.death_reason: str | None = None
        self.phases: dict[str, float] = {}

    async def forget_prompts(self) -> bool:
        return True

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class FakeHost:
    """Starts whatever it is given; ``started`` are the arguments of each start."""

    warm = False
    cold_reason = "it is a fake"
    asleep: tuple[str, ...] = ()

    def __init__(self, **_: object) -> None:
        self.running: RunningFake | None = None
        self.started: list[dict[str, Any]] = []

    async def prepare(self) -> None:
        pass

    async def start(self, model: str, **more: Any) -> None:
        self.started.append({"model": model, **more})
        self.running = RunningFake()

    async def stop(self) -> StopOutcome:
        self.running = None
        return StopOutcome()

    async def vacate(self, *, wanted_next: str) -> StopOutcome:
        return await self.stop()

    async def stop_asleep(self) -> None:
        pass

    def give_up(self, llm: RunningFake, reason: str) -> None:
        raise AssertionError(f"nothing of {llm} computes: {reason}")


Make = Callable[..., Awaitable[UndyingWrapper]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Makes the wrappers of one machine, which share a cache of models."""

    async def make(
        number: int = 0,
        *,
        max_mib: float | None = None,
        deploy_timeout_s: float = 60.0,
        allow_remote_code: tuple[str, ...] = (),
    ) -> UndyingWrapper:
        monkeypatch.setattr(wrapper_module, "EngineHost", FakeHost)
        limit_gib = None if max_mib is None else max_mib / 1024
        config = WrapperConfig(
            f"a-{number}",
            0,
            WrapperSettings(deploy_timeout_s=deploy_timeout_s),
            EnergySettings(),
            ModelSources(True, (tmp_path / "local",), tmp_path),
            tmp_path / "cache",
            ModelSettings(cache_dir=tmp_path / "models", cache_max_gib=limit_gib, allow_remote_code=allow_remote_code),
        )
        return await started_wrapper(config)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> LLMSpec:
    """A local LLM."""
    (tmp_path / "local" / "llm").mkdir(parents=True)
    return LLMSpec(str(tmp_path / "local" / "llm"), "text-generation")


def files_in(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def grant(revision: str | None = None) -> LeaseGrant:
    return LeaseGrant("r1", 1, "token", LLMCONFIG, ends_in_s=60.0, idle_limit_s=60.0, model_revision=revision)


async def test_a_download_is_a_phase(hub: FakeHub, make: Make) -> None:
    """While a model is downloaded the wrapper says so, and how much of it is there; then it runs that very commit."""
    repository = hub.add("org/tiny", FILES, commit="c" * 40)
    repository.hold.clear()
    wrapper = await make()
    deploy = asyncio.create_task(wrapper.deploy(1, HUB_LLM, None))
    await repository.until_held()
    report = await wrapper.report(UNTOLD)
    assert report.phase == "downloading"
    assert report.download is not None
    assert 0 <= report.download.share < 1
    assert report.download.total_bytes > len(FILES["model.safetensors"])
    assert report.running is None
    repository.hold.set()
    await deploy
    (started,) = wrapper.host.started
    assert files_in(started["model"])["config.json"] == FILES["config.json"]
    assert (started["revision"], started["served_model_name"]) == ("c" * 40, "org/tiny")
    report = await wrapper.report(UNTOLD)
    assert (report.phase, report.download, report.revision) == (None, None, "c" * 40)
    assert (report.warm, report.cold_reason) == (False, "it is a fake")
    assert (await wrapper.bind(2, grant())).model_revision == "c" * 40
    await wrapper.stop(3)
    assert (await wrapper.report(UNTOLD)).revision is None


async def test_a_hung_download_is_cut_at_the_deadline(hub: FakeHub, make: Make, folder: LLMSpec) -> None:
    """The deploy deadline holds for the download, too; the wrapper is usable at once, and the next attempt succeeds."""
    repository = hub.add("org/tiny", FILES)
    repository.hold.clear()
    wrapper = await make(deploy_timeout_s=2.0)
    with pytest.raises(EngineStartFailed, match=r"its download was not over after 2 s") as failed:
        await wrapper.deploy(1, HUB_LLM, None)
    assert not failed.value.permanent
    await wrapper.deploy(2, folder, None)
    repository.hold.set()
    patient = await make(1)
    await patient.deploy(3, HUB_LLM, None)
    await wrapper.stop(4)
    await patient.stop(4)


async def test_a_newer_command_ends_a_download(hub: FakeHub, make: Make, folder: LLMSpec) -> None:
    """Another LLM need not wait for a download that hangs; who waited for that is told."""
    repository = hub.add("org/tiny", FILES)
    repository.hold.clear()
    wrapper = await make()
    first = asyncio.create_task(wrapper.deploy(1, HUB_LLM, None))
    await repository.until_held()
    await wrapper.deploy(2, folder, None)
    with pytest.raises(StaleEpoch):
        await first
    assert [started["model"] for started in wrapper.host.started] == [folder.model]
    assert (await wrapper.bind(3, grant())).model_revision is None
    await wrapper.stop(4)


async def test_a_lease_keeps_its_commit(hub: FakeHub, make: Make) -> None:
    """An engine that is started again for a lease gets the commit that the lease began with, wherever its branch is."""
    hub.add("org/tiny", FILES, commit="1" * 40)
    wrapper = await make()
    await wrapper.deploy(1, HUB_LLM, None)
    await wrapper.stop(2)
    hub.add("org/tiny", FILES | {"config.json": b'{"new": 1}'}, commit="2" * 40)
    await wrapper.deploy(3, HUB_LLM, grant("1" * 40))
    assert (await wrapper.report(UNTOLD)).revision == "1" * 40
    await wrapper.stop(4)
    await wrapper.deploy(5, HUB_LLM, None)
    assert (await wrapper.report(UNTOLD)).revision == "2" * 40
    await wrapper.stop(6)


async def test_a_tokenizer_of_another_revision(hub: FakeHub, make: Make) -> None:
    """tokenizer_revision still means what it says, though the engine is given folders."""
    hub.add("org/tiny", FILES, commit="c" * 40)
    wrapper = await make()
    spec = LLMSpec("org/tiny", "text-generation", engine_args=json.dumps({"tokenizer_revision": "c" * 40}))
    await wrapper.deploy(1, spec, None)
    (started,) = wrapper.host.started
    assert set(started["engine_args"]) == {"tokenizer"}
    assert files_in(started["engine_args"]["tokenizer"])["tokenizer.json"] == FILES["tokenizer.json"]
    await wrapper.stop(2)


async def test_a_model_is_in_use_as_long_as_it_runs(hub: FakeHub, make: Make, folder: LLMSpec) -> None:
    """Another wrapper of the machine can't make room by what this one runs, until it runs something else."""
    hub.add("org/tiny", FILES, commit="c" * 40)
    hub.add("org/other", FILES, commit="d" * 40)
    one, two = await make(0, max_mib=5), await make(1, max_mib=5)
    await one.deploy(1, HUB_LLM, None)
    with pytest.raises(EngineStartFailed, match="are in use"):
        await two.deploy(1, LLMSpec("org/other", "text-generation"), None)
    await one.deploy(2, folder, None)
    await two.deploy(2, LLMSpec("org/other", "text-generation"), None)
    await two.stop(3)
    await one.stop(3)


COMMIT = "c" * 40
OWN_CODE = LLMSpec("org/tiny", "text-generation", revision=COMMIT, engine_args='{"trust_remote_code":true}')
ALLOWED = (f"org/tiny@{COMMIT}",)
AUTO_MAP = {"auto_map": {"AutoModel": "modeling_own.Own"}}
FOREIGN = {"auto_map": {"AutoModel": "other/repo--modeling_own.Own"}}


async def test_own_code_at_its_commit(hub: FakeHub, make: Make) -> None:
    """An LLM with code of its own starts at the commit that the operator allows."""
    hub.add("org/tiny", {**FILES, "config.json": json.dumps(AUTO_MAP).encode()}, commit=COMMIT)
    wrapper = await make(allow_remote_code=ALLOWED)
    await wrapper.deploy(1, OWN_CODE, None)
    (started,) = wrapper.host.started
    assert started["engine_args"]["trust_remote_code"] is True
    await wrapper.stop(2)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
async def test_code_of_another_repository_is_never_asked_for(hub: FakeHub, make: Make, name: str) -> None:
    """The start fails for good, before an engine or a tokenizer could download the other repository."""
    hub.add("org/tiny", {**FILES, name: json.dumps(FOREIGN).encode()}, commit=COMMIT)
    hub.add("other/repo", {"modeling_own.py": b"raise SystemExit"})
    wrapper = await make(allow_remote_code=ALLOWED)
    with pytest.raises(EngineStartFailed, match=f"auto_map in {name} names 'other/repo--modeling_own.Own'") as failed:
        await wrapper.deploy(1, OWN_CODE, None)
    assert failed.value.permanent
    assert wrapper.host.started == []
    assert not [line for line in hub.asked if "other/repo" in line]


@pytest.mark.parametrize("allowed", [(), ("/org/tiny",), (f"org/tiny@{'d' * 40}",), (f"org/other@{COMMIT}",)])
async def test_code_that_is_no_longer_allowed_does_not_run(hub: FakeHub, make: Make, allowed: tuple[str, ...]) -> None:
    """A request that waited while the operator changed the setting fails; nothing is downloaded."""
    hub.add("org/tiny", FILES, commit=COMMIT)
    wrapper = await make(allow_remote_code=allowed)
    with pytest.raises(EngineStartFailed, match="runs code that comes with the LLM") as failed:
        await wrapper.deploy(1, OWN_CODE, None)
    assert failed.value.permanent
    assert (wrapper.host.started, hub.asked) == ([], [])


@pytest.mark.parametrize("trusted", [False, True])
async def test_another_model_is_not_loaded_in_its_place(hub: FakeHub, make: Make, trusted: bool) -> None:
    """The engine would load what speculators_config names: other code, a folder, a model of a forbidden hub."""
    config = {"speculators_config": {"verifier": {"name_or_path": "other/repo"}}}
    hub.add("org/tiny", {**FILES, "config.json": json.dumps(config).encode()}, commit=COMMIT)
    wrapper = await make(allow_remote_code=ALLOWED)
    with pytest.raises(EngineStartFailed, match=r"speculators_config in config\.json") as failed:
        await wrapper.deploy(1, OWN_CODE if trusted else replace(OWN_CODE, engine_args="{}"), None)
    assert failed.value.permanent
    assert wrapper.host.started == []


async def test_own_code_of_a_folder(make: Make, folder: LLMSpec) -> None:
    """A folder that the operator names may run its own code, and no code of a repository of the hub."""
    config = Path(folder.model) / "config.json"
    wrapper = await make(allow_remote_code=(folder.model,))
    spec = LLMSpec(folder.model, "text-generation", engine_args='{"trust_remote_code":true}')
    config.write_text(json.dumps(AUTO_MAP))
    await wrapper.deploy(1, spec, None)
    await wrapper.stop(2)
    config.write_text(json.dumps(FOREIGN))
    with pytest.raises(EngineStartFailed, match=r"its code may not run: auto_map in config\.json"):
        await wrapper.deploy(3, spec, None)
    assert len(wrapper.host.started) == 1


@pytest.mark.parametrize(
    ("name", "most_bytes"),
    [
        ("config.json", CONFIG_BYTES),
        ("tokenizer_config.json", CONFIG_BYTES),
        ("generation_config.json", CONFIG_BYTES),
        ("model.safetensors.index.json", INDEX_BYTES),
    ],
)
async def test_a_huge_configuration_is_not_downloaded(hub: FakeHub, make: Make, name: str, most_bytes: int) -> None:
    """The start fails for good, and says which file is too large."""
    hub.add("org/tiny", {**FILES, name: b" " * (most_bytes + 1)})
    wrapper = await make()
    with pytest.raises(EngineStartFailed, match=f"its {name} has {most_bytes + 1:,} bytes") as failed:
        await wrapper.deploy(1, HUB_LLM, None)
    assert failed.value.permanent
    assert hub.loaded() == []
    assert wrapper.host.started == []


async def test_a_huge_configuration_of_a_folder(make: Make, folder: LLMSpec) -> None:
    """It is not read, neither here nor by the engine."""
    (Path(folder.model) / "config.json").write_bytes(b" " * (CONFIG_BYTES + 1))
    wrapper = await make()
    with pytest.raises(EngineStartFailed, match=r"its config\.json has") as failed:
        await wrapper.deploy(1, folder, None)
    assert failed.value.permanent
    assert wrapper.host.started == []


async def test_a_folder_that_is_not_there(make: Make, tmp_path: Path) -> None:
    """A local model that this machine does not have is told plainly."""
    wrapper = await make()
    with pytest.raises(EngineStartFailed, match="there is no folder"):
        await wrapper.deploy(1, LLMSpec(str(tmp_path / "local" / "gone"), "text-generation"), None)
