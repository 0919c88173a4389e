"""Energy windows on their way from wrappers into the database, and what requests and tenants are told of them."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from deployments.serve.energy_pages import place_of, report_json, windows_json, windows_page
from registry.accounting.report import Gathered
from registry.accounting.totals import spent_total
from registry.contract.messages import StartedFor
from registry.contract.windows import EnergyWindow
from registry.core.events import NewRequest
from registry.core.records import WrapperStatus
from registry.errors import StoreUnavailable, TenantBudgetUsed
from registry.service import views
from registry.settings import TenantBudget
from registry.store.store import Store
from registry.wire.schemas import EnergyState
from registry.wire.words import RequestStatus, WindowKind
from tests.integration.service.conftest import Make
from tests.support.energy_windows import window
from tests.support.service_world import TINY, ServiceWorld

ANN = {"max_joules_per_month": 1000.0}


async def told(world: ServiceWorld, *windows: EnergyWindow, wrapper_id: str = "a-0") -> None:
    """A wrapper has measured this; return when it has heard that it is written down."""
    wrapper = world.wrapper(wrapper_id)
    wrapper.windows += windows
    await world.until(lambda: not wrapper.windows)


def kept(world: ServiceWorld, measurement_id: int) -> list[str]:
    return [row.window.window_id for row in world.store.windows(("default", measurement_id))]


async def test_windows_are_written_down_once(world: ServiceWorld) -> None:
    """What a wrapper reports is kept with its machine and tenant, however often it is sent, and only then confirmed."""
    request_id = await world.deployed(7)
    windows = [window(n, request_id=request_id, begun_s=float(n)) for n in range(1, 9)]
    await told(world, *windows)
    await told(world, windows[7])
    assert [row.window for row in world.energy] == windows
    rows = world.store.windows(("default", 7))
    assert [row.window for row in rows] == windows
    assert {(row.machine_id, row.tenant) for row in rows} == {("a", "default")}


async def test_a_restarted_registry_takes_them_up(world: ServiceWorld) -> None:
    """After a restart a wrapper sends again what it has not heard to be kept; nothing is lost and nothing is twice."""
    request_id = await world.deployed(7)
    windows = [window(n, request_id=request_id, begun_s=world.clock() + n) for n in range(1, 7)]
    await told(world, *windows[:2])
    await world.crash()
    world.wrapper().windows += windows[1:]
    await world.start()
    await world.until(lambda: not world.wrapper().windows)
    assert kept(world, 7) == [f"process 1-{n}" for n in range(1, 7)]


async def test_a_new_process_counts_anew(world: ServiceWorld) -> None:
    """A wrapper that was restarted numbers from 1: none of its windows is taken for one that was kept before."""
    request_id = await world.deployed(7)
    await told(world, *(window(n, request_id=request_id, begun_s=float(n)) for n in range(1, 8)))
    world.cluster.kill_process("a-0")
    more = [window(n, request_id=request_id, begun_s=10.0 + n, process="process 2") for n in (1, 2, 3, 4)]
    await told(world, *more)
    assert kept(world, 7)[7:] == [each.window_id for each in more]


async def test_the_request_that_caused_a_start_pays_for_it(world: ServiceWorld) -> None:
    """Ann's start of 120 s and 60 kJ goes on after she has cancelled; Bob gets the wrapper: Ann pays, Bob does not.

    The deploy command names her request, and the wrapper's window says it back, so no clock is asked.
    """
    gate = world.cluster.hold("a-0", "deploy")
    (anns,) = world.ask(1, TINY, tenant="ann")
    await world.until_status(anns, RequestStatus.DEPLOYING)
    await world.until(lambda: world.wrapper().started_for is not None)
    started_for = world.wrapper().started_for
    assert started_for == StartedFor(anns, 1)
    world.clock.now_s += 120
    world.service.release(anns)
    (bobs,) = world.ask(2, TINY, tenant="bob")
    gate.open()
    await world.until_status(bobs, RequestStatus.DEPLOYED)
    assert world.wrapper().started_for == started_for  # Bob's request has adopted the start
    about: dict[str, Any] = {"begun_s": world.clock() - 120, "seconds": 120.5, "joules": 60e3}
    await told(world, window(1, WindowKind.LOAD, request_id=anns, measurement_id=1, **about))
    assert world.store.costs_of_tenant("ann", (WindowKind.LOAD,), 0)[WindowKind.LOAD].joules.value == 60e3
    assert world.store.costs_of_tenant("bob", (WindowKind.LOAD,), 0) == {}
    assert world.store.windows(("bob", 2)) == ()


async def test_a_start_for_no_request_is_charged_to_no_request(world: ServiceWorld) -> None:
    """A window of a start that names no request, a preload's or an older wrapper's, counts for no tenant.

    Its wrapper's clock may differ by seconds, and a request that was deployed at that time did not cause it.
    """
    request_id = await world.deployed(7)
    start = window(1, WindowKind.LOAD, request_id=None, measurement_id=None, begun_s=world.clock())
    await told(world, start)
    assert world.store.windows(("default", 7)) == ()
    assert world.store.costs_of_requests([request_id]) == {request_id: {}}


async def test_windows_of_what_was_forgotten_are_nobodys(world: ServiceWorld) -> None:
    """A window of a measurement that is not known any more is kept, and counts for no tenant."""
    await told(world, window(1, measurement_id=99, request_id="gone"))
    assert world.store.windows(("default", 99)) == ()
    assert world.store.costs_of_requests(["gone"])["gone"][WindowKind.PROMPT].joules.count == 1


async def test_a_lease_shows_its_cost_so_far(world: ServiceWorld) -> None:
    """A status tells what a lease has cost so far, idle time included, and once it has ended all of it."""
    request_id = await world.deployed(7)

    def energy() -> EnergyState | None:
        return views.request_state(world.service, world.request(request_id)).energy

    assert energy() is None
    await told(world, window(1, request_id=request_id, joules=30.0))
    await told(world, window(2, WindowKind.IDLE, request_id=request_id, joules=90.0, label="modeled"))
    state = energy()
    assert state is not None
    assert (state.joules, state.idle_j, state.idle_share, state.label) == (120.0, 90.0, 0.75, "modeled")
    await told(world, window(3, request_id=request_id, joules=None))
    state = energy()
    assert state is not None
    assert (state.joules, state.idle_share, state.label) == (None, None, "unavailable")
    assert (state.known_j, state.unknown_windows) == (120.0, 1)


async def test_a_lease_is_what_all_processes_of_its_wrapper_have_used(world: ServiceWorld) -> None:
    """80.9 J, then the wrapper dies, then 5.36 J: the lease cost 86.26 J, and its idle share is no more than 1."""
    request_id = await world.deployed(7)
    about: dict[str, Any] = {"request_id": request_id}
    await told(world, window(1, joules=60.9, **about), window(2, WindowKind.IDLE, joules=20.0, **about))
    world.cluster.kill_process("a-0")
    about["process"] = "process 2"
    await told(
        world,
        window(1, joules=4.0, **about),
        window(2, WindowKind.IDLE, joules=1.36, **about),
        window(3, WindowKind.LEASE, joules=5.36, **about),
    )
    state = views.request_state(world.service, world.request(request_id)).energy
    assert state is not None
    assert state.joules == pytest.approx(86.26)
    assert state.idle_share == pytest.approx(21.36 / 86.26)


async def test_a_request_that_waits_has_cost_nothing_known(world: ServiceWorld) -> None:
    """Before the hand-over there is no cost to tell, and the database is not asked."""
    await world.deployed(7)
    (waits,) = world.ask(8, TINY)
    assert views.request_state(world.service, world.request(waits)).energy is None


async def test_the_report_is_made_of_what_was_kept(world: ServiceWorld) -> None:
    """The report of a measurement has all its windows in its sums, and none of them in its body."""
    request_id = await world.deployed(7)
    await told(world, *(window(n, request_id=request_id) for n in (1, 2, 3)))
    seven = ("default", 7)
    requests = world.store.requests_of(seven)
    gathered = Gathered(requests, views.iso)
    gathered.add(world.service.accounts.page(seven, request_id=None, after=None, limit=1000))
    report = json.loads(report_json(world.service.allocator.measurement(seven), gathered))
    assert report["machines"] == ["a"]
    assert report["costs"]["active"]["windows"] == 3
    assert "windows" not in report
    assert report["llms"][0]["figures"][0]["joules_per_token"]["value"] > 0


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 1000])
async def test_windows_come_page_by_page(world: ServiceWorld, limit: int) -> None:
    """All pages together are all windows, once each, without their records; or those of one request."""
    first = await world.deployed(7)
    world.service.release(first)
    second = await world.deployed(7)
    windows = [window(n, request_id=(first, second)[n % 2], begun_s=float(n // 2)) for n in range(1, 6)]
    await told(world, *windows)

    key = ("default", 7)

    def pages(request_id: str | None) -> list[str]:
        found: list[str] = []
        after = None
        while True:
            page = world.service.accounts.page(
                ("default", 7), request_id=request_id, after=place_of(after), limit=limit
            )
            assert len(page) <= limit
            told = json.loads(windows_json(windows_page(world.store.requests_of(key), page, limit)))
            assert all("detail" not in each and each["llm"] == TINY.model for each in told["windows"])
            found += [each["window"] for each in told["windows"]]
            after = told["next"]
            if after is None:
                return found

    assert pages(None) == [each.window_id for each in windows]
    assert pages(second) == [each.window_id for each in windows[::2]]
    assert pages("nobody's") == []


async def test_the_last_windows_are_heard_at_shutdown(world: ServiceWorld) -> None:
    """What was measured until the very end is asked for before the wrapper is removed."""
    request_id = await world.deployed(7)
    wrapper, url = world.wrapper(), world._url
    gate = world.cluster.hold("a-0", "stop")
    ending = world.until_status(request_id, RequestStatus.EXPIRED)
    shutdown = asyncio.create_task(world.service.shutdown())
    await ending
    wrapper.windows.append(window(1, request_id=request_id))
    gate.open()
    await shutdown
    store = Store.open(url)
    assert [row.window.request_id for row in store.windows(("default", 7))] == [request_id]
    store.close()
    world.store = Store.open(url)  # for the fixture to close


async def test_a_database_that_fails_ends_the_registry(world: ServiceWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that can't be written down end the process, like every commit that fails; the wrapper keeps them."""
    world.expected_problems = ["could not be looked after", "a background task failed"]
    request_id = await world.deployed(7)

    def fail(rows: object) -> None:
        raise StoreUnavailable("no disk")

    monkeypatch.setattr(world.store, "keep_windows", fail)
    world.wrapper().windows.append(window(1, request_id=request_id))
    await world.until(lambda: world.fatal)
    assert len(world.wrapper().windows) == 1


# --- budgets ------------------------------------------------------------------------------------------------


async def test_what_a_lease_may_use_reaches_its_wrapper(world: ServiceWorld) -> None:
    """A lease's own limits are kept with its request, told in its status, and given to its wrapper."""
    llm = NewRequest("r-limited", TINY, "{}", max_j=50.0, max_g=0.5)
    world.service.request(7, [llm])
    await world.until_status("r-limited", RequestStatus.DEPLOYED)
    await world.restart()
    await world.until_wrapper(WrapperStatus.LEASED)
    grant, state = world.wrapper().grant, views.request_state(world.service, world.request("r-limited"))
    assert grant is not None
    assert (grant.max_j, grant.max_g) == (state.maxJoules, state.maxGco2eq) == (50.0, 0.5)


async def test_what_a_lease_has_used_reaches_a_new_process(world: ServiceWorld) -> None:
    """A wrapper that is started anew under a lease is told what is known of it: prompts and idle time, each once."""
    world.service.request(7, [NewRequest("r-limited", TINY, "{}", max_j=50.0)])
    await world.until_status("r-limited", RequestStatus.DEPLOYED)
    first = world.wrapper().grant
    assert first is not None
    assert (first.used_j, first.used_g) == (0.0, 0.0)
    about: dict[str, Any] = {"request_id": "r-limited", "begun_s": world.clock()}
    await told(world, window(1, WindowKind.IDLE, joules=10.0, **about), window(2, joules=20.0, **about))
    world.cluster.kill_process("a-0")
    await world.until(lambda: (grant := world.wrapper().grant) is not None and grant.used_j == 30.0)


@pytest.fixture
async def ann(make: Make) -> ServiceWorld:
    """A registry in which tenant ann may use 1000 J a month; it is the 20th of the month."""
    world = make(budgets={"tenants": {"ann": ANN}})
    world.clock.now_s = datetime(2027, 1, 20, tzinfo=UTC).timestamp()
    world.cluster.join("a")
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE)
    return world


async def test_a_tenant_is_warned_and_then_refused(ann: ServiceWorld) -> None:
    """Above 80 % answers carry a note, above 100 % nothing new is taken; what was accepted is served all the same."""
    assert ann.settings.budgets.tenants["ann"] == TenantBudget(max_joules_per_month=1000.0)
    (first, second) = ann.ask(7, TINY, TINY, tenant="ann")
    await ann.until_status(first, RequestStatus.DEPLOYED)
    assert ann.request(first).notes == ()
    about: dict[str, Any] = {"request_id": first, "begun_s": ann.clock()}
    await told(ann, window(1, WindowKind.LOAD, joules=300.0, **about), window(2, joules=400.0, **about))
    assert ann.request(ann.ask(8, TINY, tenant="ann")[0]).notes == ()
    await told(ann, window(5, WindowKind.IDLE, joules=200.0, **about))
    await told(ann, window(3, WindowKind.LEASE, joules=600.0, **about))  # both once more
    (warned,) = ann.ask(9, TINY, tenant="ann")
    assert ann.request(warned).notes == ("tenant 'ann' has used 900 J of the 1000 J that it may use in this month",)
    await told(ann, window(6, WindowKind.IDLE, joules=100.0, **about))
    with pytest.raises(TenantBudgetUsed, match="2027-02-01"):
        ann.ask(10, TINY, tenant="ann")
    (bobs,) = ann.ask(7, TINY, tenant="bob")  # his own measurement, though it has the same id
    ann.service.release(bobs)
    ann.service.release(first)
    await ann.until_status(second, RequestStatus.DEPLOYED)
    known = [NewRequest(warned, TINY, "{}")]
    assert ann.service.request(9, known, tenant="ann")[0].request_id == warned  # asked again, not asked anew


async def test_a_tenant_is_charged_for_all_processes_of_a_wrapper(ann: ServiceWorld) -> None:
    """A wrapper dies twice under a lease: ann is charged for all three processes, and not for the last one alone.

    609 + 200 J, then 40 + 13.6 J, then 5 + 5 J and the lease window of these 10 J: 872.6 J of the 1000 J.
    """
    (first,) = ann.ask(7, TINY, tenant="ann")
    await ann.until_status(first, RequestStatus.DEPLOYED)
    about: dict[str, Any] = {"request_id": first, "begun_s": ann.clock()}
    for number, (prompt_j, idle_j) in enumerate([(609.0, 200.0), (40.0, 13.6), (5.0, 5.0)], 1):
        about["process"] = f"process {number}"
        await told(ann, window(1, joules=prompt_j, **about), window(2, WindowKind.IDLE, joules=idle_j, **about))
        if number < 3:
            ann.cluster.kill_process("a-0")
    await told(ann, window(3, WindowKind.LEASE, joules=10.0, **about))
    state = views.request_state(ann.service, ann.request(first)).energy
    assert state is not None
    assert state.joules == pytest.approx(872.6)
    assert state.idle_share == pytest.approx(218.6 / 872.6)
    (warned,) = ann.ask(8, TINY, tenant="ann")
    assert ann.request(warned).notes == ("tenant 'ann' has used 872.6 J of the 1000 J that it may use in this month",)


async def test_a_lease_over_the_end_of_a_month_is_charged_to_both(ann: ServiceWorld) -> None:
    """What ended before midnight counts for January, the rest for February, and the lease window of both for neither.

    900 J until 23:59:58, 120 J of a prompt from then to 00:00:03, 30 J idle: 150 J of February's 1000 J. The lease
    window of 1,090 J, which ends in February, adds nothing: it would be more than the 1000 J. Neither do 41 J
    of January that come late.
    """
    midnight_s = datetime(2027, 2, 1, tzinfo=UTC).timestamp()
    ann.clock.now_s = midnight_s - 60
    (first,) = ann.ask(7, TINY, tenant="ann")
    await ann.until_status(first, RequestStatus.DEPLOYED)
    await told(ann, window(1, joules=900.0, request_id=first, begun_s=midnight_s - 12, seconds=10.0))
    assert spent_total(ann.service.accounts.used_in_month("ann")).joules.value == 900.0
    ann.clock.now_s = midnight_s + 10
    await told(
        ann,
        window(2, joules=120.0, request_id=first, begun_s=midnight_s - 2, seconds=5.0),
        window(3, WindowKind.IDLE, joules=30.0, request_id=first, begun_s=midnight_s + 3, seconds=2.0),
        window(4, WindowKind.LEASE, joules=1090.0, request_id=first, begun_s=midnight_s - 20, seconds=25.0),
        window(5, WindowKind.IDLE, joules=40.0, request_id=first, begun_s=midnight_s - 20, seconds=8.0),
    )
    assert spent_total(ann.service.accounts.used_in_month("ann")).joules.value == 150.0
    await told(ann, window(6, WindowKind.IDLE, joules=1.0, request_id=first, begun_s=midnight_s - 22, seconds=1.0))
    assert spent_total(ann.service.accounts.used_in_month("ann")).joules.value == 150.0
    (more,) = ann.ask(8, TINY, tenant="ann")
    assert ann.request(more).notes == ()


async def test_a_budget_begins_anew_with_the_month(ann: ServiceWorld) -> None:
    """What was used in the month before counts no more; another tenant's measurement of the same id is its own."""
    (first,) = ann.ask(7, TINY, tenant="ann")
    await ann.until_status(first, RequestStatus.DEPLOYED)
    await told(ann, window(1, WindowKind.IDLE, joules=5000.0, request_id=first, begun_s=ann.clock()))
    ann.service.release(first)
    ann.ask(7, TINY, tenant="bob")
    with pytest.raises(TenantBudgetUsed):
        ann.ask(8, TINY, tenant="ann")
    ann.clock.now_s = datetime(2027, 2, 1, tzinfo=UTC).timestamp()
    ann.ask(8, TINY, tenant="ann")
