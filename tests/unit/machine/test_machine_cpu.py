"""Who uses the CPUs of a machine: this wrapper, other wrappers, strangers; and how many CPUs there are for us."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.energy.counters.machine_share import CPUPart, MachineShare
from deployments.energy.meter import Meter
from deployments.machine.cpu_quota import cpus_here
from deployments.machine.cpu_time import TICKS_PER_S
from deployments.machine.machine_cpu import MachineCPU
from tests.support.fake_counters import FakeCounter, ManualClock, end_process, write_busy, write_process

ME, OTHER, STRANGER = 100, 200, 300
Use = Callable[..., None]


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write_process(tmp_path, 1, 0)
    for pid in (ME, OTHER, STRANGER):
        write_process(tmp_path, pid, 1)
    write_busy(tmp_path, 10_000)
    return tmp_path


@pytest.fixture
def use(proc: Path) -> Use:
    """Has processes use CPU-seconds, which the machine shows, too."""
    used = {ME: 0, OTHER: 0, STRANGER: 0}

    def go(me_s: float = 0.0, other_s: float = 0.0, stranger_s: float = 0.0) -> None:
        for pid, seconds in ((ME, me_s), (OTHER, other_s), (STRANGER, stranger_s)):
            used[pid] += round(seconds * TICKS_PER_S)
            write_process(proc, pid, 1, ticks=(used[pid], 0, 0, 0))
        write_busy(proc, 10_000 + sum(used.values()))

    return go


def looks(cpu: MachineCPU, use: Use, **used_s: float) -> bool | None:
    """What is seen of strangers after a second in which this was used."""
    cpu.strangers(1000.0)
    use(**used_s)
    answer, since_s = cpu.strangers(1001.0)
    assert since_s == 1000.0
    return answer


@pytest.mark.parametrize(
    ("used_s", "strangers"),
    [
        ({"me_s": 1.9}, False),
        ({"other_s": 1.9}, False),
        ({"me_s": 0.8, "other_s": 0.8, "stranger_s": 0.3}, False),
        ({"stranger_s": 0.6}, True),
        ({"me_s": 0.9, "stranger_s": 1.0}, True),
    ],
)
def test_strangers_are_seen_by_what_they_use(proc: Path, use: Use, used_s: dict[str, float], strangers: bool) -> None:
    """More than half a core that neither this wrapper nor another one used in a second was used by strangers.

    Of 1.9 CPU-seconds that are ours, or another wrapper's, nothing is left. Of 0.8 + 0.8 + 0.3 s the 0.3 s left are
    less than 0.5; 0.6 s, and 1.0 s of 0.9 + 1.0 s, are more.
    """
    cpu = MachineCPU(ME, others=lambda: {OTHER: 100}, proc_root=proc)
    assert looks(cpu, use, **used_s) is strangers


def test_new_processes_of_a_wrapper_are_no_strangers(proc: Path, use: Use) -> None:
    """An engine that was started since the last look is a wrapper's own, from its birth on."""
    cpu = MachineCPU(ME, proc_root=proc)
    cpu.strangers(1000.0)
    use(stranger_s=1.0)
    write_process(proc, STRANGER, ME, ticks=(TICKS_PER_S, 0, 0, 0))
    assert cpu.strangers(1001.0)[0] is False


def test_load_of_others_flags_the_windows_in_it(proc: Path, use: Use) -> None:
    """A load of 72 on 2 cores was never seen. Windows in the seconds of a stranger's work are contended, others not.

    Each 50 ms we use 50 ms of CPU time, and a stranger as much from 1004 to 1006 s: of 2 CPU-seconds in each of these
    seconds 1 is ours and 1 is left, more than half a core. In any other second nothing is left.
    The first look has nothing to compare with, so it does not know what was before; the second knows what was since.
    """
    clock = ManualClock()
    source = FakeCounter(lambda now_s: 100 * now_s)
    meter = Meter([source], clock=clock, strangers=MachineCPU(ME, proc_root=proc).strangers)
    for tick in range(200):
        clock.now_s = 1000 + tick / 20
        use(me_s=0.05, stranger_s=0.05 if 1004 <= clock.now_s < 1006 else 0)
        meter.poll_once()
    assert "contended" in meter.window(1004.5, 1004.8).flags
    assert "contended" in meter.window(1002.0, 1009.0).flags
    assert "contended" not in meter.window(1001.5, 1003.0).flags
    assert "contended" not in meter.window(1007.5, 1009.0).flags
    assert "contention_unknown" in meter.window(1000.0, 1000.9).flags
    assert "contention_unknown" not in meter.window(1000.1, 1000.9).flags
    assert "contention_unknown" not in meter.window(1002.5, 1009.0).flags


@pytest.mark.parametrize("shown", ["", "cpu  0 0 0 0 0 0 0 0 0 0\n", "cpu  1 2 3\n"])
def test_machine_that_does_not_tell_is_not_known(proc: Path, use: Use, shown: str) -> None:
    """Where /proc/stat is missing, all zeros (a sandbox) or something else, it is not known who works: never nobody."""
    cpu = MachineCPU(ME, proc_root=proc)
    (proc / "stat").write_text(shown)
    assert cpu.strangers(1000.0)[0] is None
    assert cpu.strangers(1001.0)[0] is None


def test_machine_that_worked_less_than_its_wrappers_is_not_known(proc: Path) -> None:
    """A /proc/stat that grows by less than our own CPU time is not that of this machine."""
    cpu = MachineCPU(ME, proc_root=proc)
    cpu.strangers(1000.0)
    write_process(proc, ME, 1, ticks=(TICKS_PER_S, 0, 0, 0))
    assert cpu.strangers(1001.0)[0] is None


def test_wrapper_that_can_not_be_seen_is_not_known(proc: Path, use: Use) -> None:
    """Another wrapper whose process is in another pid namespace, or unknown, may be who works: that is not known."""
    for others in ({987: 100}, {OTHER: 55}, None):
        cpu = MachineCPU(ME, others=lambda others=others: others, proc_root=proc)  # type: ignore[misc]
        assert looks(cpu, use, stranger_s=1.0) is None


def test_wrapper_that_ended_keeps_its_time(proc: Path, use: Use) -> None:
    """What another wrapper used before it ended is counted on; one that comes later is found within a second."""
    others = {OTHER: 100}
    cpu = MachineCPU(ME, others=lambda: others, proc_root=proc)
    assert cpu.wrappers_s(1000.0) == (0.0, 0.0)
    use(me_s=0.5, other_s=1.0)
    assert cpu.wrappers_s(1001.0) == (0.5, 1.0)
    others.clear()
    end_process(proc, OTHER)
    assert cpu.wrappers_s(1002.0) == (0.5, 1.0)
    write_process(proc, 400, 1, started=900)
    others[400] = 900
    assert cpu.wrappers_s(1003.0) == (0.5, 1.0)
    write_process(proc, 400, 1, ticks=(TICKS_PER_S, 0, 0, 0), started=900)
    assert cpu.wrappers_s(1004.0) == (0.5, 2.0)


def test_on_this_machine() -> None:
    """On the real /proc our own CPU time is seen, and the comparison gives an answer or says that it can't."""
    cpu = MachineCPU(os.getpid())
    assert cpu.wrappers_s(0.0) == (0.0, 0.0)
    assert cpu.strangers(1.0)[0] is None
    assert cpu.strangers(2.0)[0] in {True, False, None}


# --- how many CPUs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8.0),
        ({"cpu.max": "max 100000\n"}, 8.0),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "1600000 100000\n"}, 8.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8.0),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.max": "nonsense"}, 8.0),
    ],
)
def test_quota_of_a_container_counts(tmp_path: Path, files: dict[str, str], cpus: float) -> None:
    """8 processors under a quota of 250 ms each 100 ms are 2.5 CPUs; no quota, or a larger one, is none."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpus_here(tmp_path, affinity=8) == cpus


def test_cpus_of_this_process() -> None:
    """Without a quota it is what the process may run on; there is always some."""
    assert 0 < cpus_here() <= len(os.sched_getaffinity(0))


# --- shares ------------------------------------------------------------------------------------------------


def test_all_counters_of_a_poll_are_divided_alike(proc: Path, use: Use) -> None:
    """Two zones of 100 J a poll are read 20 ms apart, and CPU time goes on in between: both are divided alike.

    We use 3 of 4 CPU-seconds, so by reservation (1/2) and CPU time (3/4) our share is 62.5 J of each.
    """
    part = CPUPart(MachineCPU(ME, others=lambda: {OTHER: 100}, proc_root=proc), on_machine=2)
    zones = [MachineShare(FakeCounter(lambda now_s: 100 * now_s), part, "mean") for _ in range(2)]
    for zone in zones:
        zone.read(1000.0)
    use(me_s=3.0, other_s=1.0)
    first = zones[0].read(1001.0)
    use(other_s=9.0)
    second = zones[1].read(1001.02)
    assert (first, second) == pytest.approx((62.5, 62.5 * 1.02))
