"""A PromptMeter with a manual clock and a simulated counter, for tests of the windows that it records."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from deployments.energy import meter as meter_module
from deployments.energy import prompt_meter
from deployments.energy.counters.probe import Source, Unreadable
from deployments.energy.meter import Meter
from deployments.energy.prompt_meter import MeteredPrompt, PromptMeter
from deployments.machine.machine_cpu import MachineCPU
from registry.contract.messages import Belief, LeaseGrant, Moment
from registry.contract.windows import EnergyWindow
from registry.settings import EnergySettings
from registry.wire.labels import Label
from registry.wire.words import WindowKind
from tests.support.fake_counters import FakeCounter, ManualClock

GRID = {"gco2eq_per_kwh": 360.0, "source": "a test", "date": "2026-01-01"}
EMBODIED = {"g_per_hour": 3.6, "low_g_per_hour": 1.8, "high_g_per_hour": 7.2, "source": "a test"}
WATTS = 100.0
UTC_S = 1_800_000_000.0
LEASE = LeaseGrant("request-1", 7, "token-1", "{}", ends_in_s=600.0, idle_limit_s=60.0)
OTHER = LeaseGrant("request-2", 8, "token-2", "{}", ends_in_s=600.0, idle_limit_s=60.0)


class Bench:
    """A PromptMeter with a manual clock and a simulated counter of 100 W that rises in steps of 50 J."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *sources: Source | Unreadable, **energy: Any) -> None:
        self.clock = ManualClock()
        self.stepped_s = 0.0
        """Change of the wall clock since the start, seconds."""
        self.stranger_works = False
        """Whether another program than a wrapper uses the CPUs."""
        found = sources or (FakeCounter(lambda now_s: WATTS * now_s, name="gpu:GPU-x", label=Label.SIMULATED),)
        monkeypatch.setattr(meter_module, "PERIOD_S", 0.0)  # check for other programs at each poll
        # Does not check the real machine: if it is busy, every window would be `contended`.
        monkeypatch.setattr(MachineCPU, "strangers", lambda _machine, now_s: (self.stranger_works, now_s - 0.05))
        monkeypatch.setattr(prompt_meter, "sources_of", lambda *_: list(found))
        monkeypatch.setattr(prompt_meter, "Meter", partial(Meter, clock=self.clock, allow_simulated=True))
        chosen = {"allow_estimates": True, "grid": GRID, "embodied": EMBODIED, **energy}
        self.meter = PromptMeter(
            EnergySettings.model_validate(chosen),
            gpus=1,
            wrapper_id="a-0",
            process="p",
            utc_s=lambda: UTC_S + self.clock.now_s - 1000.0 + self.stepped_s,
        )
        self.meter._meter.poll_once()

    def passes(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            self.clock.now_s += 0.05
            self.meter._meter.poll_once()

    def bind(self, grant: LeaseGrant | None) -> None:
        self.meter.hand_over(grant, self.clock.now_s)

    def end(self, metered: MeteredPrompt, tokens: tuple[int, int] | None = (6, 4)) -> None:
        metered.end()
        if tokens is not None:
            usage: dict[str, Any] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
            usage["prompt_tokens_details"] = {"cached_tokens": 0}
            metered.account(usage=usage, answer="four words and no")

    def prompt(self, seconds: float, tokens: tuple[int, int] | None = (6, 4), *, warmup: bool = False) -> None:
        metered = self.meter.prompt(warmup=warmup)
        self.passes(seconds)
        self.end(metered, tokens)

    async def windows(self, kept: int = 0, *, process: str = "p") -> tuple[EnergyWindow, ...]:
        self.passes(0.2)
        return await self.meter.windows(Belief(1, None, Moment(process, 0.0), windows_kept=kept))


Make = Callable[..., Bench]


def of_kind(windows: tuple[EnergyWindow, ...], kind: WindowKind) -> list[EnergyWindow]:
    return [window for window in windows if window.kind is kind]


def detail(window: EnergyWindow) -> Any:
    return json.loads(window.detail)
