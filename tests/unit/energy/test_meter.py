from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest

from deployments.energy import meter as meter_module
from deployments.energy.attribution import Parts
from deployments.energy.counters.probe import CounterLost, CPUModelSource, GPUPower, Source, Unreadable
from deployments.energy.figures import CPUModel
from deployments.energy.meter import Meter
from deployments.machine.gpus import ReadFailed
from registry.errors import BadSettings
from registry.wire.flags import Flag
from registry.wire.labels import Label
from tests.support.fake_counters import FakeCounter, FakeGPU, FakeNVML, ManualClock, install_nvml

HOLE = Unreadable("gpu:y", "no energy counter and no power reading", in_boundary=True)


def steady(watts: float, **more: object) -> FakeCounter:
    """A counter of a constant power."""
    return FakeCounter(lambda now_s: watts * now_s, **more)  # type: ignore[arg-type]


class CPUTime:
    """Half a CPU, all the time."""

    def read_s(self, now_s: float) -> float:
        return now_s / 2


def cpu_model() -> CPUModelSource:
    model = CPUModel(1.0, 5.0, 0.5, 2.0, 2.5, 10.0, "a test")
    return CPUModelSource(model, CPUTime(), cpus=4)  # type: ignore[arg-type]


Run = Callable[..., Meter]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def run(clock: ManualClock) -> Run:
    """Makes a meter and polls it every 50 ms for some seconds."""

    def go(*sources: Source | Unreadable, seconds: float = 5.0, allow_simulated: bool = False) -> Meter:
        meter = Meter(sources, clock=clock, allow_simulated=allow_simulated)
        poll(meter, clock, seconds)
        return meter

    return go


def poll(meter: Meter, clock: ManualClock, seconds: float) -> None:
    for _ in range(round(seconds / 0.05)):
        meter.poll_once()
        clock.now_s += 0.05


# --- windows ---------------------------------------------------------------------------------------------------


def test_mark_is_the_clock(clock: ManualClock) -> None:
    """A mark is a time of the meter's clock; taking one touches no source."""
    source = FakeCounter(lambda now_s: AssertionError("read"))
    assert Meter([source], clock=clock).mark() == clock.now_s


def test_window_of_a_steady_power(run: Run) -> None:
    """100 W for 2 s are 200 J, measured, with a resolution of less than a poll at either end."""
    energy = run(steady(100.0)).window(1001.01, 1003.01)
    assert energy.total_j == pytest.approx(200.0)
    assert energy.label is Label.MEASURED
    assert energy.resolution_j is not None
    assert 0 < energy.resolution_j <= 10.0
    assert energy.low_j is not None
    assert energy.high_j is not None
    assert 190.0 <= energy.low_j < 200.0 < energy.high_j <= 210.0
    assert energy.flags == ("dram_not_covered",)


def test_no_source(run: Run) -> None:
    """With nothing to read the energy is unavailable and None: no bare zero."""
    energy = run().window(1001.0, 1002.0)
    assert (energy.total_j, energy.label) == (None, Label.UNAVAILABLE)
    assert {"no_source", "cpu_not_covered", "dram_not_covered"} == set(energy.flags)


def test_too_short(run: Run) -> None:
    """A window in which the counter does not prove a single joule is unavailable, and flagged."""
    energy = run(steady(100.0)).window(1001.01, 1001.04)
    assert (energy.total_j, energy.label) == (None, Label.UNAVAILABLE)
    assert "too_short" in energy.flags


@pytest.mark.parametrize(("max_age_s", "flag"), [(None, "no_edge"), (0.0, "too_short")])
def test_counter_that_stands_still(run: Run, max_age_s: float | None, flag: str) -> None:
    """A counter that never moves means that nothing is known, not that nothing was used."""
    energy = run(FakeCounter(lambda now_s: 5.0, max_age_s=max_age_s)).window(1001.0, 1004.0)
    assert energy.total_j is None
    assert flag in energy.flags


def test_unreadable_gpu_leaves_no_total(run: Run) -> None:
    """With one of the GPUs unreadable there is no total, whatever the others say; the reason is in its component."""
    energy = run(steady(300.0, name="gpu:x"), HOLE).window(1001.0, 1003.0)
    assert (energy.total_j, energy.label) == (None, Label.UNAVAILABLE)
    assert energy.boundary == ("gpu:x", "gpu:y")
    assert energy.components[0].joules == pytest.approx(600.0)
    assert "no energy counter" in energy.components[1].source


def test_gpus_alone_are_measured(run: Run) -> None:
    """Counted GPUs without any count of the CPU are measured, and what is not covered is flagged."""
    energy = run(steady(300.0, name="gpu:x"), Unreadable("powercap", "no")).window(1001.0, 1003.0)
    assert energy.label is Label.MEASURED
    assert energy.boundary == ("gpu:x",)
    assert energy.flags == ("cpu_not_covered", "dram_not_covered")


def test_measured_and_modelled(run: Run) -> None:
    """A measured GPU and a modelled CPU are a modelled total, whose range is around what was measured."""
    energy = run(steady(300.0, name="gpu:x"), cpu_model()).window(1001.0, 1003.0)
    cpu_j = 1.0 * 4 * 2 + (5.0 - 1.0) * 1
    assert energy.total_j == pytest.approx(600 + cpu_j)
    assert energy.label is Label.MODELED
    assert energy.low_j is not None
    assert energy.high_j is not None
    gpu, cpu = energy.components
    assert (energy.low_j, energy.high_j) == ((gpu.low_j or 0) + (cpu.low_j or 0), (gpu.high_j or 0) + (cpu.high_j or 0))
    assert (gpu.low_j or 0) < 600 < (gpu.high_j or 0)
    assert (cpu.low_j or 0) < 0.5 * cpu_j < 2 * cpu_j < (cpu.high_j or 0)
    assert energy.flags == ()
    assert [part.label for part in energy.components] == [Label.MEASURED, Label.MODELED]


def test_all_counted(run: Run) -> None:
    """With GPU, package and memory counters everything is measured and nothing is left out."""
    energy = run(steady(300.0, name="gpu:x"), steady(50.0), steady(5.0, name="dram-0")).window(1001.0, 1003.0)
    assert energy.total_j == pytest.approx(710.0)
    assert (energy.label, energy.flags) == (Label.MEASURED, ())


def test_window_before_the_history(run: Run) -> None:
    """A window that begins before the meter did is unavailable."""
    energy = run(steady(100.0)).window(999.0, 1002.0)
    assert energy.total_j is None
    assert "out_of_history" in energy.flags


def test_counter_that_falls_silent(run: Run, clock: ManualClock) -> None:
    """Half a second after the last reading a window's end is not extrapolated any more."""
    meter = run(steady(100.0))
    assert meter.window(1001.0, 1005.3).total_j == pytest.approx(430.0)
    energy = meter.window(1001.0, 1005.6)
    assert energy.total_j is None
    assert "stale" in energy.flags


def test_provisional_until_settled(run: Run, clock: ManualClock) -> None:
    """A window that ends now is told at once, provisionally; later it is sharper, and final after a look for others."""
    meter = run(steady(100.0, limit_w=400.0))
    end_s = meter.mark()
    now = meter.window(1001.0, end_s)
    assert not meter.is_final(end_s)
    assert "provisional" in now.flags
    poll(meter, clock, 0.2)
    later = meter.window(1001.0, end_s)
    poll(meter, clock, 1.0)
    assert meter.is_final(end_s)
    assert "provisional" not in later.flags
    assert now.total_j == pytest.approx(400.0)
    assert later.total_j == pytest.approx(400.0)
    assert (later.resolution_j or 0) < (now.resolution_j or 0)


def test_counter_going_backwards(run: Run, clock: ManualClock) -> None:
    """Over a reset of the counter nothing is known; on either side of it windows are as good as ever."""
    source = FakeCounter(lambda now_s: 100.0 * (now_s if now_s < 1002.5 else now_s - 1002.0))
    meter = run(source)
    assert meter.window(1000.5, 1002.0).total_j == pytest.approx(150.0)
    energy = meter.window(1002.0, 1003.0)
    assert energy.total_j is None
    assert "counter_reset" in energy.flags
    assert meter.window(1003.0, 1004.0).total_j == pytest.approx(100.0)


def test_lost_counter_tells_why(run: Run, clock: ManualClock) -> None:
    """A source's own reason for a hole in its history is the flag of windows over it."""
    source = FakeCounter(lambda now_s: CounterLost(Flag.POLL_GAP) if 1001.98 < now_s < 1002.03 else 100.0 * now_s)
    meter = run(source)
    energy = meter.window(1001.0, 1003.0)
    assert energy.total_j is None
    assert "poll_gap" in energy.flags
    assert meter.window(1002.5, 1003.5).total_j == pytest.approx(100.0)


def test_failed_readings_cost_no_joule(run: Run) -> None:
    """While a counter can't be read it goes on counting, so the window is whole; the failure shows in describe()."""
    source = FakeCounter(lambda now_s: ReadFailed("GPU is busy") if 1001.9 < now_s < 1002.3 else 100.0 * now_s)
    meter = run(source)
    assert meter.window(1001.0, 1004.0).total_j == pytest.approx(300.0)
    described = meter.describe()["sources"]
    assert isinstance(described, list)
    assert described[0]["failures"] == 8
    assert described[0]["last_error"] == "GPU is busy"


def test_implausible_power(run: Run) -> None:
    """More than 1.2 times the power limit is no measurement; up to it, it is."""
    energy = run(steady(1000.0, limit_w=700.0)).window(1001.0, 1003.0)
    assert energy.total_j is None
    assert "implausible_power" in energy.flags


def test_power_a_little_above_its_limit(run: Run) -> None:
    """Hardware overshoots its limit for a while: that is believed."""
    assert run(steady(800.0, limit_w=700.0)).window(1001.0, 1003.0).total_j == pytest.approx(1600.0)


@pytest.mark.parametrize("end_s", [1001.0, 1000.0])
def test_window_must_have_a_length(run: Run, end_s: float) -> None:
    """A window that does not end after its start is a mistake of the caller's."""
    with pytest.raises(ValueError, match="can't end"):
        run(steady(1.0)).window(1001.0, end_s)


def test_simulated_is_refused() -> None:
    """A simulated source is refused, by name, unless it is allowed explicitly."""
    with pytest.raises(BadSettings, match="package-0 is simulated"):
        Meter([steady(1.0, label=Label.SIMULATED)])


def test_simulated_is_labelled(run: Run) -> None:
    """Where a simulated source is allowed its figures say so, sums included."""
    meter = run(steady(9.0, label=Label.SIMULATED), steady(9.0, name="dram-0"), cpu_model(), allow_simulated=True)
    assert meter.window(1001.0, 1003.0).label is Label.SIMULATED


@pytest.mark.parametrize("poll_s", [0.0, -1.0, 1.1])
def test_poll_period_in_range(poll_s: float) -> None:
    """Periods that make no sense are bad settings."""
    with pytest.raises(BadSettings, match="poll_s"):
        Meter([], poll_s=poll_s)


def test_sampled_gpus_need_ten_samples_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A period longer than 0.1 s is refused where power is sampled."""
    install_nvml(monkeypatch, nvml := FakeNVML(FakeGPU()))
    nvml.nvmlInit()
    source = GPUPower("x", FakeGPU(), CPUTime())  # type: ignore[arg-type]
    Meter([source], poll_s=0.1)
    with pytest.raises(BadSettings, match="poll_s"):
        Meter([source], poll_s=0.2)


def test_contended(run: Run, clock: ManualClock) -> None:
    """Windows in which a stranger was seen on the GPU are flagged, others are not."""
    source = steady(100.0, name="gpu:x")
    meter = run(source, seconds=2.0)
    source.others = True
    poll(meter, clock, 2.0)
    source.others = False
    poll(meter, clock, 3.0)
    assert "contended" in meter.window(1001.0, 1004.5).flags
    assert "contended" in meter.window(1003.4, 1003.9).flags
    assert "contended" not in meter.window(1000.1, 1000.9).flags
    assert "contended" not in meter.window(1005.5, 1006.5).flags


def test_final_windows_know_of_others_at_work(run: Run, clock: ManualClock) -> None:
    """While others work all the time every final window says so: it is final only after a look for others.

    They are looked for each second, and the counter moves on with each poll.
    """
    source = steady(100.0, name="gpu:x")
    meter = run(source, seconds=0.5)
    poll(meter, clock, 1.0)
    source.others = True
    waiting: list[float] = []
    final = 0
    for _ in range(60):
        waiting.append(clock.now_s)
        poll(meter, clock, 0.1)
        while waiting and meter.is_final(waiting[0]):
            end_s = waiting.pop(0)
            assert "contended" in meter.window(end_s - 0.04, end_s, final=True).flags
            final += 1
    assert final > 40


def test_look_that_fails_is_not_known(clock: ManualClock) -> None:
    """No file descriptors left for a look at others: then it can't be told, and counters are read on."""

    def no_files() -> bool:
        raise OSError(24, "Too many open files")

    meter = Meter([steady(100.0)], clock=clock, others_worked=no_files)
    poll(meter, clock, 3.0)
    energy = meter.window(1000.5, 2.0 + 1000.0)
    assert energy.total_j == pytest.approx(150.0, rel=0.1)
    assert "contention_unknown" in energy.flags


def test_source_that_raises_anything_stops_no_other(clock: ManualClock) -> None:
    """A driver's own exception, in a reading or in a power limit, costs that source an edge; others are read on."""

    class Broken(FakeCounter):
        def read_limit(self) -> None:
            raise ZeroDivisionError

    broken, whole = Broken(lambda _: ZeroDivisionError("of a driver"), name="gpu:x"), steady(100.0)
    meter = Meter([broken, whole], clock=clock)
    poll(meter, clock, 12.0)
    told = meter.describe()["sources"]
    assert told[0]["failures"] > 200  # type: ignore[index]
    assert "ZeroDivisionError" in told[0]["last_error"]  # type: ignore[index]
    assert told[1]["failures"] == 0  # type: ignore[index]


def test_poller_that_died_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A health check passes before the start, while it polls and after a stop; not when the poller has died."""
    meter = Meter([FakeCounter(lambda now_s: now_s)], poll_s=0.001)
    meter.check()
    monkeypatch.setattr(meter, "_run", lambda: None)
    meter.start()
    assert meter._thread is not None
    meter._thread.join()
    with pytest.raises(RuntimeError, match="has died"):
        meter.check()
    meter.stop()
    meter.check()


def test_contention_unknown(run: Run) -> None:
    """Where strangers can't be told from our own processes the windows say that."""
    source = steady(100.0, name="gpu:x")
    source.others = None
    assert "contention_unknown" in run(source).window(1001.0, 1003.0).flags


def test_window_too_short_for_the_counter(run: Run) -> None:
    """Where it may be estimated, a window between two edges is so within the counter's bounds, never 0."""
    meter = run(steady(100.0))
    energy = meter.window(1001.01, 1001.04, estimate_short=True)
    assert energy.total_j == pytest.approx(3.0)
    assert (energy.label, energy.low_j) == (Label.MODELED, 0.0)
    assert energy.high_j is not None
    assert energy.high_j >= 3.0
    assert "too_short" in energy.flags
    assert meter.window(1001.01, 1001.04).total_j is None


# --- shares ----------------------------------------------------------------------------------------------------


LARGE, SMALL = Parts((1001.0, 1003.0), (0.75,), (0.5,), (0.75,)), Parts((1001.0, 1003.0), (0.25,), (0.25,), (0.5,))


def test_share_is_by_tokens(run: Run) -> None:
    """200 J, 3/4 (1/2 to 3/4) and 1/4 (1/4 to 1/2) of them: 150 and 50 J, modelled shares of what was measured.

    The bounds are 100 to 150 and 50 to 100 J; at both ends the counter, read every 50 ms, may be wrong by 5 J, which
    is added by the part.
    """
    meter = run(steady(100.0))
    large, small = meter.share(LARGE), meter.share(SMALL)
    assert [share.total_j for share in (large, small)] == pytest.approx([150.0, 50.0])
    assert [share.low_j for share in (large, small)] == pytest.approx([100.0 - 5.0, 50.0 - 2.5])
    assert [share.high_j for share in (large, small)] == pytest.approx([150.0 + 7.5, 100.0 + 5.0])
    assert [share.resolution_j for share in (large, small)] == pytest.approx([7.5, 2.5])
    assert [share.systematic_j for share in (large, small)] == pytest.approx([50.0, 50.0])
    for share in (large, small):
        assert (share.label, share.counter_label) == (Label.MODELED, Label.MEASURED)
        assert "shared" in share.flags


def test_share_of_a_part_of_the_time(run: Run) -> None:
    """Where a prompt was alone it has all that flowed, where another was in flight its part.

    50 J alone, and 0.2 (0.2 to 0.5) of 50 J: 60 J, 60 to 75 J without the counter's resolution. Its error counts with
    the change of the part: at the begin 1, in the middle 0.8 (or 0.5), at the end 0.2 (or 0.5), up to 5 J each.
    """
    share = run(steady(100.0)).share(Parts((1001.0, 1001.5, 1002.0), (1.0, 0.2), (1.0, 0.2), (1.0, 0.5)))
    assert share.total_j == pytest.approx(60.0)
    assert share.low_j == pytest.approx(60.0 - 2 * 5.0)
    assert share.high_j == pytest.approx(75.0 + 2 * 5.0)


def test_cpu_share_has_its_own_range_too(run: Run) -> None:
    """A modelled CPU is divided like a counter, its own range included: its idle power by the time reserved.

    12 J (half to twice): 9 J are 6 to 9 J by the parts, so 3 to 18 J, and a little more by the counter's steps.
    """
    meter = run(cpu_model())
    large, small = meter.share(LARGE), meter.share(SMALL)
    assert [share.total_j for share in (large, small)] == pytest.approx([9.0, 3.0])
    assert [share.low_j for share in (large, small)] == pytest.approx([3.0, 1.5], rel=0.03)
    assert [share.high_j for share in (large, small)] == pytest.approx([18.0, 12.0], rel=0.03)


def test_share_of_what_is_not_known(run: Run) -> None:
    """What is not known of the time is not known of a share of it either, for the same reasons."""
    for sources, flag in (
        ((), "no_source"),
        ((steady(300.0, name="gpu:x"), HOLE), "unreadable"),
        ((steady(1000.0, limit_w=700.0),), "implausible_power"),
        ((steady(0.0),), "too_short"),
    ):
        meter = run(*sources)
        start_s = meter.mark() - 4.5
        share = meter.share(Parts((start_s, start_s + 2), (0.5,), (0.5,), (0.5,)))
        assert share.total_j is None
        assert flag in share.flags


# --- life ------------------------------------------------------------------------------------------------------


def test_describe(run: Run) -> None:
    """What is counted, how well, and what is not and why, is told as plain JSON."""
    told = run(steady(300.0, name="gpu:x", limit_w=700.0), HOLE, Unreadable("powercap", "no such folder")).describe()
    assert json.loads(json.dumps(told)) == told
    assert told["polling"] is False
    assert told["label"] == "unavailable"
    assert told["not_found"] == [
        {"name": "gpu:y", "why": "no energy counter and no power reading"},
        {"name": "powercap", "why": "no such folder"},
    ]
    assert told["not_covered"] == ["cpu_not_covered", "dram_not_covered"]
    [source] = told["sources"] if isinstance(told["sources"], list) else []
    assert source["name"] == "gpu:x"
    assert source["power_limit_w"] == 700.0
    assert source["readings"] == 100


def test_thread_polls_and_ends() -> None:
    """A started meter polls by itself; stopping it ends the thread and gives the sources back, once."""
    polled = threading.Semaphore(0)

    def value(now_s: float) -> float:
        polled.release()
        return now_s

    source = FakeCounter(value)
    meter = Meter([source], poll_s=0.001)
    meter.start()
    with pytest.raises(RuntimeError, match="started before"):
        meter.start()
    for _ in range(5):
        assert polled.acquire(timeout=10)
    assert meter.describe()["polling"] is True
    assert meter.stop() is True
    assert meter.stop() is True
    assert source.closed == 1
    assert meter.describe()["polling"] is False
    assert "energy-meter" not in {thread.name for thread in threading.enumerate()}


def test_history_begins_with_the_start(clock: ManualClock) -> None:
    """A window may begin as soon as the meter was started."""
    meter = Meter([steady(100.0)], clock=clock, poll_s=1.0)
    meter.start()
    start_s = meter.mark()
    assert meter.stop()
    clock.now_s += 0.05
    poll(meter, clock, 2.0)
    assert meter.window(start_s, start_s + 1.0).total_j == pytest.approx(100.0)


def test_stop_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that hangs does not hang the wrapper's end: stop gives up, says so, and leaves the source alone."""
    monkeypatch.setattr(meter_module, "_JOIN_TIMEOUT_S", 0.05)
    hanging, released = threading.Event(), threading.Event()
    first = iter([1.0])

    def value(now_s: float) -> float:
        for reading in first:
            return reading
        hanging.set()
        released.wait(30)
        return now_s

    source = FakeCounter(value)
    meter = Meter([source], poll_s=0.001)
    meter.start()
    assert hanging.wait(10)
    assert meter.stop() is False
    assert source.closed == 0
    released.set()
    monkeypatch.setattr(meter_module, "_JOIN_TIMEOUT_S", 10.0)
    assert meter.stop() is True
    assert source.closed == 1


def test_stop_without_start() -> None:
    """A meter that was never started gives its sources back all the same."""
    source = steady(1.0)
    assert Meter([source]).stop() is True
    assert source.closed == 1


def test_start_waits_for_the_first_step_of_every_counter() -> None:
    """A window may begin as soon as the meter was started, even where a counter tells something at its steps only.

    It shows 0 for four readings, then 1, 2, 3 J for four each: until its first step, the fifth reading, it is not
    known of any time. The start waits for that, and what follows has no unknown begin.
    """
    reads = iter(range(10_000))
    counter = FakeCounter(lambda now_s: float(next(reads) // 4), name="gpu:x", max_age_s=None)
    meter = Meter([counter], poll_s=0.001)
    meter.start()
    start_s = meter.mark()
    assert meter.stop()
    for _ in range(12):
        meter.poll_once()
    assert "out_of_history" not in meter.window(start_s, meter.mark()).flags


def test_start_does_not_wait_for_a_counter_that_stands_still(clock: ManualClock) -> None:
    """A counter that never moves holds nothing up for longer than a second's polls."""
    counter = FakeCounter(lambda now_s: 5.0, max_age_s=None)
    meter = Meter([counter], clock=clock, poll_s=1.0)
    meter.start()
    assert meter.stop()
    told = meter.describe()["sources"]
    assert isinstance(told, list)
    assert told[0]["readings"] >= 1
