"""What a measurement's report says: sums with their holes, leases of several processes, and where figures are from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from greenprompt_client.report.table import cost_cells
from registry.accounting.report import Hole, MeasurementReport
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow
from registry.core.records import Measurement, Request
from registry.wire.words import RequestStatus, WindowKind
from tests.support.energy_windows import (
    BEGUN_S,
    FULL_GRID,
    GPU,
    an_experiment,
    iso,
    kept,
    record,
    report_of,
    request,
    window,
)

MEASUREMENT = Measurement(7, 1, created_s=BEGUN_S, flags=("engine_restarted",), versions='{"vllm":"0.32.0"}')


TINY = (request("r-1", "org/tiny"),)


def reported(*windows: EnergyWindow, requests: tuple[Request, ...] = TINY) -> MeasurementReport:
    return report_of(MEASUREMENT, requests, kept(*windows), iso)


def lease(seconds: float, status: RequestStatus = RequestStatus.RELEASED) -> tuple[Request, ...]:
    """A request whose lease took so long."""
    ended_s = BEGUN_S + seconds if status.ended else None
    return (request("r-1", "org/tiny", deployed_s=BEGUN_S, ended_s=ended_s, status=status),)


# --- sums ---------------------------------------------------------------------------------------------------


def test_a_sum_with_a_hole_is_its_known_part() -> None:
    """Of three prompts of 100 J one has no figure: 200 J are known, and 1 window of 2 s is missing."""
    cost = reported(window(1), window(2, joules=None, flags=("too_short",)), window(3)).costs["active"]
    assert (cost.joules, cost.label, cost.missing, cost.missing_s, cost.missing_g) == (200.0, "measured", 1, 2.0, 1)
    assert cost.o_g == pytest.approx(200.0 / 3.6e6 * 329.7)
    assert cost.m_g == pytest.approx(3 * 37.5 * 2 / 3600)
    assert cost.reason == "1 of 3 windows lack joules or gCO2eq (too_short)"


def test_joules_without_a_grid() -> None:
    """Without a carbon intensity all joules are known, and no gram of them."""
    report = reported(window(1, grams=False, flags=("no_grid",)))
    cost = report.costs["active"]
    assert (cost.joules, cost.missing, cost.o_g, cost.missing_g) == (100.0, 0, None, 1)
    assert report.coefficients == report.coefficients[:1]


def test_embodied_carbon_that_one_machine_does_not_tell() -> None:
    """Of two prompts of 100 J and 2 s one is of a machine without an embodied figure: 37.5 g/h · 2 s are not all.

    9.16e-3 g of each are 18.3e-3 g, all of it; 20.8e-3 g are embodied in the first, and at least in both.
    """
    unknown = replace(window(2), m_g=None)
    cost = reported(window(1), unknown).costs["active"]
    assert (cost.missing, cost.missing_g, cost.missing_o, cost.missing_m) == (0, 1, 0, 1)
    assert cost_cells(cost) == ("200", "~0.0183", "≥ ~0.0208")


def test_nothing_yet() -> None:
    """A measurement without any window has a report in which nothing is known."""
    report = reported()
    (llm,) = report.llms
    assert llm.figures == ()
    assert (report.costs["lease"].joules, report.costs["lease"].label) == (None, "unavailable")
    assert report.costs["load"].reason == "there are no such windows"
    assert report.methods == dict.fromkeys("EIMR", "unavailable")
    assert report.machines == ("gpu-1",)
    assert report.coefficients == ()


def test_a_lease_is_its_prompts_and_its_idle_time() -> None:
    """Lease = active + idle; starts of the LLM are told apart from both."""
    small, large = an_experiment().llms
    costs = small.costs
    assert costs["lease"].joules == pytest.approx((costs["active"].joules or 0) + (costs["idle"].joules or 0))
    assert costs["load"].joules == 2500.0
    assert costs["wake"].windows == 0
    assert large.costs["lease"].missing == 1


def test_lease_windows_tell_label_and_bounds_of_the_same_joules() -> None:
    """Two shares of 50 ± 20 J are estimates; the lease window of the same 100 J is measured, and ± 2 J."""
    shares = [
        record(n, joules=50.0, resolution_j=20.0, label="modeled", counter_label="measured", reserved_s=1.0)
        for n in (1, 2)
    ]
    alone = reported(*shares).costs["lease"]
    assert (alone.label, alone.low_j, alone.high_j) == ("modeled", 60.0, 140.0)
    whole = reported(*shares, record(3, WindowKind.LEASE, joules=100.0)).costs["lease"]
    assert (whole.joules, whole.label, whole.low_j, whole.high_j) == (100.0, "measured", 98.0, 102.0)
    assert whole.windows == 2


def test_parts_of_a_lease_are_inside_its_bounds() -> None:
    """60 J (5 to 115) of a prompt and 40 J (0 to 140) idle are a lease of 100 ± 2 J: of 140 J idle 97 J are left.

    102 J less the 5 J that the prompt took at least; the prompt took at most 102 J. Without the lease nothing is known
    of that. In grams it is the same, at 280 to 380 gCO2eq/kWh.
    """
    idle_j = {"total_j": 40.0, "low_j": 0.0, "high_j": 140.0}
    parts = [
        record(1, joules=60.0, resolution_j=55.0, label="modeled"),
        record(2, WindowKind.IDLE, joules=40.0, resolution_j=100.0, energy=idle_j),
    ]
    alone = reported(*parts).costs
    assert (alone["idle"].low_j, alone["idle"].high_j, alone["active"].high_j) == (0.0, 140.0, 115.0)
    report = reported(*parts, record(3, WindowKind.LEASE, joules=100.0, seconds=4.0))
    active, idle = report.costs["active"], report.costs["idle"]
    assert (active.joules, active.low_j, active.high_j) == (60.0, 5.0, 102.0)
    assert (idle.joules, idle.low_j, idle.high_j) == (40.0, 0.0, 97.0)
    assert idle.o_high_g == pytest.approx((102 * 380 - 5 * 280) / 3.6e6)
    assert report.llms[0].costs["idle"] == idle


def test_time_is_counted_once() -> None:
    """Of two prompts at the same time each has its share of it; a wrapper that tells no share had all of it."""
    together = window(1, seconds=4, reserved_s=2.0), window(2, seconds=4, reserved_s=2.0)
    assert reported(*together, window(3, seconds=1, reserved_s=None)).costs["active"].seconds == 5.0


# --- what is lost -------------------------------------------------------------------------------------------


def test_a_lease_outlives_its_wrapper() -> None:
    """80.9 J in 20 s, then the wrapper dies, 5 s are lost, then 5.36 J in 2 s: 86.26 J, and a hole of 5 s.

    The lease window of the second process alone said 5.36 J, less than the prompts of the lease.
    """
    first: dict[str, Any] = {"begun_s": BEGUN_S, "seconds": 10}
    second: dict[str, Any] = {"begun_s": BEGUN_S + 25, "seconds": 1, "process": "process 2"}
    report = reported(
        record(1, joules=60.9, **first),
        record(2, WindowKind.IDLE, joules=20.0, **first),
        record(1, joules=4.0, **second),
        record(2, WindowKind.IDLE, joules=1.36, **second),
        record(3, WindowKind.LEASE, joules=5.36, **(second | {"seconds": 2})),
        requests=lease(27.0),
    )
    cost = report.costs["lease"]
    assert cost.joules == pytest.approx(86.26)
    assert report.holes == (Hole("r-1", 5.0, "wrapper_died"),)
    assert (cost.missing, cost.missing_s) == (0, 5.0)
    assert cost.reason == "5 s of r-1 are in no window (wrapper_died)"
    assert report.llms[0].costs["lease"] == cost


@pytest.mark.parametrize(
    ("windows", "status", "reason"),
    [
        ([record(1, seconds=4)], RequestStatus.RELEASED, "end_not_recorded"),
        ([record(1, seconds=4)], RequestStatus.FAILED, "wrapper_died"),
        ([], RequestStatus.FAILED, "wrapper_died"),
        ([record(1, seconds=4), record(2, WindowKind.LEASE, seconds=10)], RequestStatus.EXPIRED, "windows_missing"),
    ],
)
def test_what_is_in_no_window_is_a_hole(windows: list[EnergyWindow], status: RequestStatus, reason: str) -> None:
    """Of a lease of 10 s windows cover 4 s, or nothing: the rest is lost, for a reason."""
    (hole,) = reported(*windows, requests=lease(10.0, status)).holes
    assert hole == Hole("r-1", 6.0 if windows else 10.0, reason)


def test_a_lost_part_below_one_percent_is_told() -> None:
    """Of a lease of 1 h at 500 W, 30 s are lost with a process: 1,785,000 J are the known part of 1,800,000 J.

    These are 0.83 %, and the shares of both processes are measured; the sum is none the less no total. Of a lease of
    one process 0.3 s are lost as well, while 0.1 s and 1e-4 of the time are what two clocks may differ by.
    """
    first: dict[str, Any] = {"begun_s": BEGUN_S, "seconds": 1770, "joules": 885_000.0, "process": "one"}
    second: dict[str, Any] = {"begun_s": BEGUN_S + 1800, "seconds": 1800, "joules": 900_000.0, "process": "two"}
    report = reported(record(1, **first), record(1, **second), requests=lease(3600.0))
    cost = report.costs["lease"]
    assert (cost.joules, cost.lost, cost.missing_s) == (1_785_000.0, True, 30.0)
    assert report.holes == (Hole("r-1", 30.0, "wrapper_died"),)
    assert all(text.startswith("≥ ") for text in cost_cells(cost))
    short = reported(record(1, seconds=9.7), record(2, WindowKind.LEASE, seconds=10), requests=lease(10.0))
    assert [hole.seconds for hole in short.holes] == [pytest.approx(0.3)]
    drift = reported(record(1, seconds=3599.6), record(2, WindowKind.LEASE, seconds=3600), requests=lease(3600.0))
    assert (drift.holes, drift.costs["lease"].lost) == ((), False)


def test_a_lease_of_several_processes_is_never_a_total() -> None:
    """Windows cover all 3603 s of a lease of two processes: what the first used last is not known for all that.

    So it is when no window of the first has come: the lease window says that the lease began before it.
    """
    first: dict[str, Any] = {"begun_s": BEGUN_S, "seconds": 3, "joules": 1500.0, "process": "one"}
    second: dict[str, Any] = {"begun_s": BEGUN_S + 3, "seconds": 3600, "joules": 1.8e6, "process": "two"}
    both = reported(record(1, **first), record(1, **second), requests=lease(3603.0))
    assert both.holes == (Hole("r-1", 0.0, "wrapper_died"),)
    assert both.costs["lease"].reason == "some time of r-1 may be in no window (wrapper_died)"
    begun: dict[str, Any] = {"lease_begun": "2027-01-15T07:59:00.000000+00:00"}
    after = reported(record(1, **second), record(2, WindowKind.LEASE, **second, **begun), requests=lease(3600.0))
    assert (after.holes, after.costs["lease"].lost) == ((Hole("r-1", 0.0, "wrapper_died"),), True)


def test_bounds_of_a_lease_contain_its_sum() -> None:
    """A wrapper dies after 3 s and 1500 J of a lease; its next process measures 1,800,000 ± 0.5 J in an hour.

    The sum of 1,801,500 J is 0.08 % more than the lease window of the second process, whose bounds and label are of
    less: the sum has those of its own parts, 1500 ± 0.5 J and 1,800,000 ± 20 J.
    """
    first: dict[str, Any] = {"begun_s": BEGUN_S, "seconds": 3, "joules": 1500.0, "process": "one"}
    second: dict[str, Any] = {"begun_s": BEGUN_S + 3, "seconds": 3600, "joules": 1.8e6, "process": "two"}
    cost = reported(
        record(1, resolution_j=0.5, label="modeled", **first),
        record(1, resolution_j=20.0, label="modeled", **second),
        record(2, WindowKind.LEASE, resolution_j=0.5, **second),
        requests=lease(3603.0),
    ).costs["lease"]
    assert (cost.joules, cost.low_j, cost.high_j) == (1_801_500.0, 1_801_479.5, 1_801_520.5)
    assert (cost.label, cost.lost) == ("modeled", True)


def test_a_lease_that_expires_ends_when_its_wrapper_says() -> None:
    """The registry hears 0.8 s late that a lease of 10 s has expired: nothing is lost."""
    windows = record(1, seconds=10), record(2, WindowKind.LEASE, seconds=10)
    assert reported(*windows, requests=lease(10.8, RequestStatus.EXPIRED)).holes == ()


def test_a_lease_that_runs_has_no_end_to_lack() -> None:
    """It is told that it runs. A pause of 6 s after a prompt is no hole: its idle window comes when the stretch closes.

    What is missing before the end of the last idle window is a hole: of 16 s 4 + 1 + 5 are there, 6 s are lost, however
    many prompts came after. A start under the lease is no hole.
    """
    begun = record(1, seconds=4)
    assert reported(begun, requests=lease(0, RequestStatus.DEPLOYED)).running == ("r-1",)
    assert reported(begun, requests=lease(0, RequestStatus.DEPLOYED)).holes == ()
    load = record(2, WindowKind.LOAD, begun_s=BEGUN_S + 4, seconds=6)
    late = record(3, begun_s=BEGUN_S + 10, seconds=1)
    assert reported(begun, load, late, requests=lease(0, RequestStatus.DEPLOYED)).holes == ()
    assert reported(begun, late, requests=lease(0, RequestStatus.DEPLOYED)).holes == ()
    idle = record(4, WindowKind.IDLE, begun_s=BEGUN_S + 11, seconds=5)
    assert reported(begun, load, late, idle, requests=lease(0, RequestStatus.DEPLOYED)).holes == ()
    newer = record(5, begun_s=BEGUN_S + 16, seconds=9)
    lost = reported(begun, late, idle, newer, requests=lease(0, RequestStatus.DEPLOYED))
    assert lost.holes == (Hole("r-1", 6.0, "windows_missing"),)
    assert reported(requests=lease(0, RequestStatus.DEPLOYED)).holes == ()
    assert reported(begun).running == ()


def test_a_lease_whose_llm_is_started_again_runs() -> None:
    """An engine dies after 100 J of a lease: 100 J are not its last word, though it is not `deployed` until it is back.

    A request that still waits for its first LLM has no lease that could run.
    """
    again = reported(record(1, seconds=4), requests=lease(0, RequestStatus.DEPLOYING))
    assert (again.costs["lease"].joules, again.running) == (100.0, ("r-1",))
    assert reported(requests=(request("r-1", "org/tiny", status=RequestStatus.DEPLOYING),)).running == ()


def test_a_hole_beside_windows_without_a_figure() -> None:
    """Both reasons are told, and both times are missing."""
    report = reported(record(1, seconds=4, joules=None, flags=("too_short",)), requests=lease(10.0))
    cost = report.costs["lease"]
    assert (cost.missing, cost.missing_s) == (1, 10.0)
    assert cost.reason is not None
    assert cost.reason.startswith("1 of 1 windows lack joules or gCO2eq (too_short); 6 s of r-1")


# --- LLMs and how it was done -------------------------------------------------------------------------------


def test_llms_that_differ_in_arguments_are_told_apart() -> None:
    """Requests with one llmconfig are one LLM; another llmconfig is another, in the order asked."""
    again, other = request("r-2", "org/tiny", 2), replace(request("r-3", "org/tiny", 3), llmconfig='{"a":1}')
    first = request("r-1", "org/tiny", model_revision="abc")
    report = reported(window(1), window(2, request_id="r-2"), requests=(first, again, other))
    assert [(llm.requestIds, [of.prompts for of in llm.figures]) for llm in report.llms] == [
        (("r-1", "r-2"), [2]),
        (("r-3",), []),
    ]
    assert report.llms[0].modelRevisions == ("abc",)


def test_methods_are_the_worst_of_all() -> None:
    """E, I, M and R are as good as in the worst window; what a wrapper does not say is unavailable."""
    methods = {"E": "measured", "I": "sourced", "M": "sourced"}
    report = reported(window(1), window(2, label="modeled"), window(3, methods=methods))
    assert report.methods == {"E": "modeled", "I": "sourced", "M": "sourced", "R": "unavailable"}


def test_what_it_was_reckoned_with() -> None:
    """Coefficients come with unit, range and source; the boundary with what nothing covers."""
    report = reported(window(1, flags=("dram_not_covered",)), window(2), window(3, grid=None, pue=None))
    grid, pue, embodied = report.coefficients
    assert (grid.value, grid.unit, grid.source) == (329.7, "gCO2eq/kWh", "ecologits 0.11.1 DEU")
    assert (pue.value, pue.unit) == (1.2, "1")
    assert (embodied.value, embodied.low, embodied.high) == (37.5, 16.7, 49.0)
    assert report.boundary == (GPU, "package-0")
    assert report.not_covered == ("dram",)
    assert report.window_flags == {"dram_not_covered": 1}
    assert report.flags == ("engine_restarted",)
    assert report.versions == {"vllm": "0.32.0"}
    assert report.gpu_uuids == ("GPU-1",)


def test_the_grid_is_told_with_year_and_source() -> None:
    """A carbon intensity has its year, its source and its range."""
    grid = reported(record(1)).coefficients[0]
    assert grid.source == f"{FULL_GRID['source']} ecologits 0.11.1 DEU 2023"
    assert (grid.low, grid.high) == (280.0, 380.0)


def test_a_window_that_belongs_to_no_request_is_told() -> None:
    """A start of an LLM that nobody waited for, on a machine that is gone, is a row as well."""
    row = KeptWindow(window(1, WindowKind.LOAD, request_id=None), None, None)
    report = report_of(replace(MEASUREMENT, versions=None), (), [row], iso)
    (told,) = report.windows
    assert (told.llm, told.requestId, told.machine, told.kind) == (None, None, None, "load")
    assert report.versions is None


def test_it_crosses_the_wire() -> None:
    """The report comes back from its JSON as it was."""
    wire = TypeAdapter(MeasurementReport)
    report = an_experiment()
    assert wire.validate_json(wire.dump_json(report)) == report
