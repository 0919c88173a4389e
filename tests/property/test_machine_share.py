"""Several wrappers on one machine: what counters of the whole machine count is theirs together, once."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.energy.counters.base import Source, Unreadable
from deployments.energy.counters.probe import probe_sources
from deployments.energy.figures import CPUModel, SCISettings
from deployments.energy.meter import Meter
from deployments.machine.cpu_time import TICKS_PER_S
from deployments.machine.machine_cpu import MachineCPU
from registry.wire.labels import Label
from tests.support.fake_counters import ManualClock, set_energy, write_process, write_zone

START_S, POLL_S = 1000.0, 0.05
IDLE_W, BUSY_W = 100.0, 30.0
"""Of the machine, and of each busy core above that."""

loads = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(0, 4), min_size=4, max_size=4)), min_size=3, max_size=8
)
"""Stretches: how many polls, and how many cores each wrapper keeps busy."""


class Machine:
    """A machine with RAPL and a number of wrappers, whose power grows linearly with CPU time."""

    def __init__(self, folder: Path, wrappers: int) -> None:
        self.clock = ManualClock(START_S)
        self.zone = write_zone(folder / "powercap", "intel-rapl:0", "package-0")
        self.proc = folder / "proc"
        self.pids = [100 * number for number in range(1, wrappers + 1)]
        write_process(self.proc, 1, 0)
        for pid in self.pids:
            write_process(self.proc, pid, 1)
        (self.proc / "stat").write_text("")
        self.used_s = [0.0] * wrappers
        self.joules = 0.0
        model = CPUModel(0.5, 4.0, 0.25, 1.0, 2.0, 8.0, "a data sheet")
        formula = SCISettings(1.0, "output_token", allow_estimates=True, cpu_model=model)
        self.found = [
            probe_sources(
                (),
                pid=pid,
                settings=formula,
                powercap_root=folder / "powercap",
                machine=self.cpu(pid),
                on_machine=wrappers,
            )
            for pid in self.pids
        ]
        self.meters = [Meter(found, clock=self.clock) for found in self.found]
        whole = probe_sources((), pid=1, settings=formula, powercap_root=folder / "powercap", proc_root=self.proc)
        self.whole = Meter(whole, clock=self.clock)

    def cpu(self, pid: int) -> MachineCPU:
        others = {other: 100 for other in self.pids if other != pid}
        return MachineCPU(pid, others=lambda: others, proc_root=self.proc, processors=16)

    def run(self, polls: int, cores: list[int]) -> None:
        """Let wrappers keep so many cores busy, and all meters poll at the same times."""
        for _ in range(polls):
            for number, pid in enumerate(self.pids):
                self.used_s[number] += cores[number] * POLL_S
                write_process(self.proc, pid, 1, ticks=(round(self.used_s[number] * TICKS_PER_S), 0, 0, 0))
            self.joules += (IDLE_W + BUSY_W * sum(cores[: len(self.pids)])) * POLL_S
            set_energy(self.zone, 1_000_000 + round(self.joules * 1e6))
            self.clock.now_s += POLL_S
            for meter in (self.whole, *self.meters):
                meter.poll_once()

    def truth(self, number: int, seconds: float) -> float:
        """A wrapper's part: idle power by reservation, the rest by its own work."""
        return IDLE_W * seconds / len(self.pids) + BUSY_W * self.used_s[number]


@settings(deadline=None, max_examples=25)
@given(loads, st.integers(2, 4))
def test_shares_add_up_to_the_machine(steps: list[tuple[int, list[int]]], wrappers: int) -> None:
    """Over all wrappers the shares are the machine's figure, whoever works; each range holds the wrapper's true part.

    Two leases of 46,000 J on a machine that took 23,000 J were each charged all of it.
    """
    with TemporaryDirectory() as folder:
        machine = Machine(Path(folder), wrappers)
        machine.run(1, [0] * 4)
        begun_s, before_j = machine.clock.now_s, machine.joules
        for polls, cores in steps:
            machine.run(polls, cores)
        end_s = machine.clock.now_s
        machine.run(2, [0] * 4)
        after_j = machine.joules - 2 * IDLE_W * POLL_S
        energies = [meter.window(begun_s, end_s) for meter in machine.meters]
        whole_j = machine.whole.window(begun_s, end_s).total_j
        assert whole_j == pytest.approx(after_j - before_j, rel=0.02)
        assert sum(energy.total_j or 0 for energy in energies) == pytest.approx(whole_j, rel=1e-9)
        for number, energy in enumerate(energies):
            assert energy.low_j is not None
            assert energy.high_j is not None
            truth_j = machine.truth(number, end_s - begun_s)
            assert energy.low_j - 1e-6 <= truth_j <= energy.high_j + 1e-6
            assert (energy.label, energy.counter_label) == (Label.MODELED, Label.MEASURED)
            assert energy.boundary == ("package-0",)


def test_shares_by_hand(tmp_path: Path) -> None:
    """Two wrappers for 10 s at 100 W + 30 W for each busy core; the first keeps 2 cores busy, the other none.

    The machine takes 1,600 J. By reservation that is 800 J each, by CPU time 1,600 and 0; the mean is 1,200 and 400.
    True are 500 + 600 = 1,100 J and 500 J: inside 800 to 1,600, and 0 to 800. The sum is 1,600 J.
    """
    machine = Machine(tmp_path, 2)
    machine.run(201, [2, 0])
    machine.run(2, [2, 0])
    first, second = (meter.window(START_S + 0.1, START_S + 10.1) for meter in machine.meters)
    assert first.total_j == pytest.approx(1200, rel=0.01)
    assert second.total_j == pytest.approx(400, rel=0.01)
    assert first.low_j == pytest.approx(800, rel=0.03)
    assert first.high_j == pytest.approx(1600, rel=0.02)
    assert second.low_j == pytest.approx(0, abs=20)
    assert second.high_j == pytest.approx(800, rel=0.02)
    assert "one of 2 wrappers" in first.components[0].source


def test_one_wrapper_has_all_of_the_machine(tmp_path: Path) -> None:
    """Alone on its machine a wrapper's CPU energy is measured, as ever."""
    machine = Machine(tmp_path, 1)
    machine.run(203, [1])
    energy = machine.meters[0].window(START_S + 0.1, START_S + 10.1)
    assert energy.label is Label.MEASURED
    assert energy.total_j == pytest.approx(1300, rel=0.01)


def test_share_is_no_measurement_beside_gpus(tmp_path: Path) -> None:
    """Where GPUs are measured and estimates are not allowed, a share of the machine's CPU energy is left out."""
    write_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    formula = SCISettings(1.0, "output_token", allow_estimates=False)
    found = probe_sources(
        ["GPU-1"], pid=1, settings=formula, powercap_root=tmp_path / "powercap", proc_root=tmp_path, on_machine=2
    )
    assert not any(isinstance(source, Source) for source in found)
    assert any(isinstance(s, Unreadable) and s.name == "package-0" and "one of 2 wrappers" in s.why for s in found)
