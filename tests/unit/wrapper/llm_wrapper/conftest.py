"""For the tests of the LLMWrapper: one whose first lease is bound, and what it finds on its machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments.energy import settling
from deployments.machine.machine_cpu import MachineCPU
from deployments.models.sources import ModelSources
from deployments.wrapper import llm_wrapper as wrapper_module
from deployments.wrapper.config import WrapperConfig
from registry.contract.messages import LeaseGrant
from registry.settings import EnergySettings, WrapperSettings
from tests.support.llm_wrapper import LLMCONFIG, SPEC, Client, FakeHost, FakeModels, Make
from tests.support.undying_wrapper import started_wrapper


@pytest.fixture
def _vllm_and_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are installed, as far as metadata tells; `make test-pythons` has neither."""
    for name in ("vllm", "torch"):
        metadata = tmp_path / "packages" / f"{name}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")


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
        monkeypatch.setattr(wrapper._rest, "_is_working_here", lambda: False)  # threads of other tests may work
        await wrapper.deploy(1, SPEC, None)
        lease = LeaseGrant("request-1", 1, "token-1", LLMCONFIG, ends_in_s=ends_in_s, idle_limit_s=60.0)
        client = Client(wrapper)
        await client.bind(2, lease)
        return client

    return make


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in life takes a moment here."""
    for name in ("SLICE_S", "LAG_S", "LOOK_S"):
        monkeypatch.setattr(settling, name, 0.001)
