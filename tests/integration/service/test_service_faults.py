"""The service when LLMs do not start, engines and wrappers die or hang, and machines come and go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from registry.core.events import WrapperFailed, WrapperStarted
from registry.core.records import WrapperStatus
from registry.errors import EngineStartFailed, InvalidField, WrapperUnheard, WrapperUnreachable
from registry.service import views
from registry.wire.words import RequestStatus as Status
from tests.support.service_world import OTHER, TINY, ServiceWorld

Make = Callable[..., ServiceWorld]


# --- starts that fail --------------------------------------------------------------------------------------


async def test_failed_start_is_tried_elsewhere(two: ServiceWorld) -> None:
    """An LLM that does not start on one wrapper is tried on another."""
    two.cluster.fail("a-0", "deploy", EngineStartFailed("org/tiny", "no memory"))
    (request_id,) = two.ask(1, TINY)
    await two.until_status(request_id, Status.DEPLOYED)
    assert two.request(request_id).failed_on == ("a-0",)
    assert two.request(request_id).machine_id == "b"


async def test_llm_that_fails_everywhere_fails(two: ServiceWorld) -> None:
    """An LLM that starts nowhere fails its request with the engine's reason, and holds up nobody."""
    two.cluster.unusable["org/tiny"] = EngineStartFailed("org/tiny", "no such layer")
    (bad,) = two.ask(1, TINY)
    await two.until_status(bad, Status.FAILED)
    await two.deployed(2, OTHER)
    state = views.request_state(two.service, two.request(bad))
    assert "no such layer" in (state.reason or "")
    assert "org/tiny" in (state.reason or "")
    assert state.url is None
    assert two.cluster.calls["a-0", "restart"] == two.cluster.calls["b-0", "restart"] == 0


async def test_permanent_failure_is_not_tried_again(two: ServiceWorld) -> None:
    """What fails everywhere in the same way is told after the first try."""
    two.cluster.unusable["org/tiny"] = EngineStartFailed("org/tiny", "unknown architecture", permanent=True)
    (request_id,) = two.ask(1, TINY)
    await two.until_status(request_id, Status.FAILED)
    assert sum(two.cluster.calls[wrapper, "deploy"] for wrapper in ("a-0", "b-0")) == 1


async def test_llm_that_is_not_allowed_on_its_machine(world: ServiceWorld) -> None:
    """A model that the machine's wrapper refuses (a link that leads elsewhere there) fails its request only."""
    world.cluster.fail("a-0", "deploy", InvalidField("model", "is not below an allowed folder"))
    (request_id,) = world.ask(1, TINY)
    await world.until_status(request_id, Status.FAILED)
    assert "allowed folder" in (world.request(request_id).reason or "")
    assert world.cluster.calls["a-0", "restart"] == 0


async def test_rest_of_a_measurement_goes_on(world: ServiceWorld) -> None:
    """When one LLM of a measurement fails, the next one has its turn."""
    world.cluster.unusable["org/tiny"] = EngineStartFailed("org/tiny", "no")
    bad, good = world.ask(1, TINY, OTHER)
    await world.until_status(good, Status.DEPLOYED)
    assert world.request(bad).status is Status.FAILED


# --- engines and wrappers that die -------------------------------------------------------------------------


async def test_a_lease_keeps_its_commit(world: ServiceWorld) -> None:
    """The commit of what was handed over is in the record; the same one comes back when the engine dies."""
    world.cluster.commits["org/tiny"] = "1" * 40
    request_id = await world.deployed(1)
    world.cluster.commits["org/tiny"] = "2" * 40  # the branch moves
    await world.restart()
    await world.until_status(request_id, Status.DEPLOYED)
    world.cluster.kill_engine("a-0", "out of memory")
    await world.until_status(request_id, Status.DEPLOYING)
    await world.until_status(request_id, Status.DEPLOYED)
    await world.looked()
    assert views.request_state(world.service, world.request(request_id)).modelRevision == "1" * 40
    assert [llm.revision for llm in views.llm_states(world.service)] == ["1" * 40]
    world.service.release(request_id)
    later = await world.deployed(2, OTHER)
    assert world.request(later).model_revision is None
    assert world.request(request_id).model_revision == "1" * 40


async def test_engine_that_dies_under_a_lease_comes_back(world: ServiceWorld) -> None:
    """The LLM is started again for its lease, under the same address; the measurement says that it happened."""
    request_id = await world.deployed(1)
    address, token = world.url(request_id), world.wrapper().grant
    gate = world.cluster.hold("a-0", "deploy")
    world.cluster.kill_engine("a-0", "out of memory")
    await world.until_status(request_id, Status.DEPLOYING)
    await world.until(lambda: gate.arrived)
    assert world.request(request_id).reason == "out of memory"
    assert world.url(request_id) is None
    kept = world.wrapper().grant
    assert kept is not None
    assert token is not None
    assert kept.token == token.token  # its holder is told to try again, not that it is over
    gate.open()
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.url(request_id) == address
    assert views.request_state(world.service, world.request(request_id)).flags == ["engine_restarted"]


async def test_an_engine_that_the_kernel_ended_is_told_with_that_reason(world: ServiceWorld) -> None:
    """Status, events and flags say that memory ran out."""
    request_id = await world.deployed(1)
    gate = world.cluster.hold("a-0", "deploy")
    world.cluster.kill_engine("a-0", "main memory ran out", out_of_memory=True)
    await world.until_status(request_id, Status.DEPLOYING)
    state = views.request_state(world.service, world.request(request_id))
    assert (state.reason, state.flags) == ("main memory ran out", ["engine_out_of_memory", "engine_restarted"])
    events = views.event_states(world.service.history(request_id, after=0, limit=100))
    assert "main memory ran out" in [event.reason for event in events]
    gate.open()
    await world.until_status(request_id, Status.DEPLOYED)


async def test_engine_that_keeps_dying_fails_its_request(world: ServiceWorld) -> None:
    """An LLM that dies again and again under its lease fails the request; it never loops."""
    request_id = await world.deployed(1)
    world.cluster.kill_engine("a-0", "first")
    await world.until(lambda: world.wrapper().starts == 2)
    await world.until_status(request_id, Status.DEPLOYED)
    world.cluster.kill_engine("a-0", "second")
    await world.until_status(request_id, Status.FAILED)
    assert world.request(request_id).reason == "second"
    await world.until_wrapper(WrapperStatus.IDLE)
    await world.until(lambda: world.wrapper().grant is None)


async def test_free_engine_that_dies(world: ServiceWorld) -> None:
    """An LLM that nobody uses and that dies leaves an idle wrapper with the reason."""
    world.service.release(await world.deployed(1))
    await world.looked()
    world.cluster.kill_engine("a-0", "segmentation fault")
    await world.until_wrapper(WrapperStatus.IDLE)
    assert views.machine_states(world.service)[0].wrappers[0].reason == "segmentation fault"


async def test_wrapper_whose_process_is_replaced(world: ServiceWorld) -> None:
    """A wrapper that has forgotten everything gets its LLM and its lease back, under the same address."""
    request_id = await world.deployed(1)
    address = world.url(request_id)
    world.cluster.kill_process("a-0")
    await world.until(lambda: world.wrapper().grant is not None and world.wrapper().runs)
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.url(request_id) == address
    assert world.cluster.calls["a-0", "restart"] == 0


async def test_process_that_dies_during_a_start(world: ServiceWorld) -> None:
    """A wrapper that dies while it starts an LLM is restarted, and the LLM is started again."""
    gate = world.cluster.hold("a-0", "deploy")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: gate.arrived)
    world.cluster.kill_process("a-0")
    gate.open()
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.cluster.calls["a-0", "restart"] == 1


async def test_unreachable_wrapper_is_restarted(world: ServiceWorld) -> None:
    """A wrapper that misses some reports in a row is restarted; one missed report alone is nothing."""
    unreachable = WrapperUnreachable("a-0", "no answer to report")
    world.cluster.fail("a-0", "report", unreachable)
    await world.looked(times=4)
    assert world.cluster.calls["a-0", "restart"] == 0
    world.cluster.fail("a-0", "report", unreachable, unreachable)
    await world.until(lambda: world.cluster.calls["a-0", "restart"] == 1)
    await world.until_wrapper(WrapperStatus.IDLE)
    await world.deployed(1)


async def test_lease_survives_a_restart_of_its_wrapper(world: ServiceWorld) -> None:
    """A lease on a wrapper that has to be restarted gets its LLM back at the same address."""
    request_id = await world.deployed(1)
    address = world.url(request_id)
    world.cluster.fail("a-0", "report", *[WrapperUnreachable("a-0", "hangs")] * 2)
    await world.until(lambda: world.cluster.calls["a-0", "restart"] == 1)
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.url(request_id) == address
    assert world.wrapper().grant is not None


async def test_wrapper_is_given_up_visibly(world: ServiceWorld) -> None:
    """A wrapper that no restart helps is given up, with its reason for all to see; its lease fails clearly."""
    request_id = await world.deployed(1)
    gate = world.cluster.hold("a-0", "report")
    gate.fail(WrapperUnreachable("a-0", "the disk is gone"))
    await world.until_wrapper(WrapperStatus.FAILED)
    assert world.cluster.calls["a-0", "restart"] == world.settings.queue.wrapper_attempts - 1
    shown = views.machine_states(world.service)[0].wrappers[0]
    assert (shown.status, shown.llm, shown.leased) == ("failed", None, False)
    assert "the disk is gone" in (shown.reason or "")
    assert world.request(request_id).status is Status.FAILED
    assert "was given up" in (world.request(request_id).reason or "")
    assert views.health_state(world.service).status == "degraded"


async def test_given_up_wrapper_may_come_back(world: ServiceWorld) -> None:
    """A wrapper that was given up is looked at again now and then; when it answers, it serves."""
    gate = world.cluster.hold("a-0", "report")
    gate.fail(WrapperUnreachable("a-0", "no answer"))
    await world.until_wrapper(WrapperStatus.FAILED)
    (request_id,) = world.ask(1, TINY)
    assert views.request_state(world.service, world.request(request_id)).reason == "no LLM Machine is ready yet"
    world.cluster.hold("a-0", "report").open()
    await world.until_status(request_id, Status.DEPLOYED)


async def test_wrapper_that_can_not_be_heard_is_not_blamed(world: ServiceWorld) -> None:
    """As long as the way to a wrapper is being mended no answer means nothing: it is not restarted, its lease stays."""
    request_id = await world.deployed(1)
    world.cluster.fail("a-0", "report", *[WrapperUnheard("a-0", "Serve is being restarted")] * 10)
    await world.looked(times=12)
    assert world.cluster.calls["a-0", "restart"] == 0
    assert world.request(request_id).status is Status.DEPLOYED


async def test_wrapper_that_hangs_holds_up_nobody(two: ServiceWorld) -> None:
    """A wrapper that answers to nothing does not keep others from being served, watched, or released."""
    for method in ("report", "deploy", "stop", "bind", "unbind"):
        two.cluster.hold("a-0", method)
    await two.until(lambda: two.cluster.calls["a-0", "report"] > 1)
    (stuck,) = two.ask(1, TINY)
    for measurement_id in range(2, 5):
        request_id = await two.deployed(measurement_id, OTHER)
        assert two.request(request_id).machine_id == "b"
        two.service.release(request_id)
    await two.looked("b-0")
    assert two.request(stuck).status is Status.DEPLOYING


async def test_restart_that_fails_counts(world: ServiceWorld) -> None:
    """A restart that does not succeed is a failure of the wrapper too: in the end it is given up."""
    world.cluster.fail("a-0", "restart", *[WrapperUnreachable("a-0", "Ray does not answer")] * 2)
    world.cluster.fail("a-0", "report", *[WrapperUnreachable("a-0", "no answer")] * 2)
    await world.until(lambda: WrapperStatus.FAILED in world.journal.statuses["a-0"])
    await world.until_wrapper(WrapperStatus.IDLE)


async def test_wrapper_that_never_starts_is_given_up(make: Make) -> None:
    """A wrapper that does not come up in its time is restarted and, if that does not help, given up."""
    world = make(wrappers={"start_timeout_s": 0.01})
    world.cluster.join("a")
    world.cluster.hold("a-0", "report").fail(WrapperUnreachable("a-0", "still importing"))
    await world.start()
    await world.until_wrapper(WrapperStatus.FAILED)
    known = world.service.allocator.wrapper("a-0")
    assert known is not None
    assert known.reason == "did not start: still importing"


async def test_restart_that_is_superseded_holds_up_nobody(world: ServiceWorld) -> None:
    """A wrapper that has to be restarted while an earlier restart waits for it comes back: none waits for the other."""
    for reason in ("it hangs", "it hangs again"):
        world.service._loop.apply(WrapperFailed("a-0", reason))
    await world.until_wrapper(WrapperStatus.IDLE)
    await world.deployed(1)


async def test_wrapper_that_is_commanded_is_not_said_not_to_start(world: ServiceWorld) -> None:
    """Whoever looks for a wrapper when it is commanded leaves it to that command whether it fails, in its time."""
    await world.crash()
    first = world.cluster.hold("a-0", "report")
    await world.start()
    await world.until(lambda: first.arrived)
    deploy = world.cluster.hold("a-0", "deploy")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: deploy.arrived)
    looks = round(2 * world.settings.wrappers.start_timeout_s / world.settings.watch.period_s)
    world.cluster.hold("a-0", "report").fail(WrapperUnreachable("a-0", "busy"))
    first.open()
    await world.looked(times=looks)
    world.cluster.hold("a-0", "report").open()
    deploy.open()
    await world.until_status(request_id, Status.DEPLOYED)
    assert [event for event in world.journal.events if isinstance(event, WrapperFailed)] == []


async def test_late_report_disturbs_no_lease(world: ServiceWorld) -> None:
    """A report that was made before a command, and comes after its outcome, changes nothing."""
    await world.looked()
    late = world.cluster.hold("a-0", "report")
    await world.until(lambda: late.arrived)  # it says: epoch 0, nothing runs
    request_id = await world.deployed(1)
    seen = len(world.journal.events)
    world.cluster.hold("a-0", "report").open()
    late.open()
    await world.looked(times=4)
    assert [event for event in world.journal.events[seen:] if isinstance(event, WrapperStarted)] == []
    assert world.request(request_id).status is Status.DEPLOYED
    assert world.wrapper().starts == 1
    assert views.request_state(world.service, world.request(request_id)).flags == []


# --- machines ----------------------------------------------------------------------------------------------


async def test_machine_that_joins_serves(make: Make) -> None:
    """A request that no machine can serve yet is served as soon as one joins, without anybody asking."""
    world = make()
    await world.start()
    (request_id,) = world.ask(1, TINY)
    assert views.health_state(world.service).status == "starting"
    assert views.request_state(world.service, world.request(request_id)).reason == "no LLM Machine is ready yet"
    world.cluster.join("a")
    await world.until_status(request_id, Status.DEPLOYED)
    assert views.health_state(world.service).status == "ok"


async def test_machine_that_leaves_is_told(two: ServiceWorld) -> None:
    """The holder of a lease on a machine that is gone is told; what waits goes to another machine."""
    request_id = await two.deployed(1)
    gone = two.request(request_id).machine_id
    assert gone is not None
    (waits,) = two.ask(1, OTHER)
    two.cluster.leave(gone)
    await two.until_status(request_id, Status.FAILED)
    assert f"machine {gone} was lost" in (two.request(request_id).reason or "")
    await two.until_status(waits, Status.DEPLOYED)
    assert two.request(waits).machine_id != gone
    assert views.request_state(two.service, two.request(waits)).flags == ["machine_changed"]
    await two.until(lambda: f"{gone}-0" in two.cluster.removed)
    shown = {machine.machine: machine for machine in views.machine_states(two.service)}
    assert (shown[gone].alive, shown[gone].wrappers[0].status) == (False, "lost")


async def test_machine_that_returns_serves_again(world: ServiceWorld) -> None:
    """A machine that was gone and is back gets its wrapper back."""
    world.cluster.leave("a")
    await world.until_wrapper(WrapperStatus.LOST)
    await world.until(lambda: "a-0" in world.cluster.removed)
    (request_id,) = world.ask(1, TINY)
    world.cluster.join("a")
    await world.until_status(request_id, Status.DEPLOYED)


async def test_machine_that_returns_is_not_held_up_by_what_was_commanded_before(world: ServiceWorld) -> None:
    """A command that was on its way when a machine was lost neither delays its new wrapper nor says that it has failed.

    Serve keeps a call until there is a replica to take it, or until its time is up.
    """
    before = world.cluster.hold("a-0", "bind")
    (request_id,) = world.ask(1, TINY)
    await world.until(lambda: before.arrived)
    world.cluster.hold("a-0", "bind").open()
    world.cluster.leave("a")
    await world.until_wrapper(WrapperStatus.LOST)
    world.cluster.join("a")
    world.cluster.machines["a"] = replace(world.cluster.machines["a"], node_id="node-new")
    await world.until_status(request_id, Status.DEPLOYED)
    before.fail(WrapperUnreachable("a-0", "no answer to bind"))
    await world.looked()
    assert [event for event in world.journal.events if isinstance(event, WrapperFailed)] == []
    assert world.request(request_id).status is Status.DEPLOYED


async def test_fewer_wrappers_after_a_restart(make: Make) -> None:
    """A configuration with fewer wrappers takes those that are too many away, and no longer watches them."""
    world = make(wrappers={"per_machine": 2})
    world.cluster.join("a")
    await world.start()
    await world.until_wrapper(WrapperStatus.IDLE, "a-1")
    await world.crash()
    world.settings = world.settings.model_copy(
        update={"wrappers": world.settings.wrappers.model_copy(update={"per_machine": 1})}
    )
    await world.start()
    await world.until(lambda: "a-1" in world.cluster.removed)
    await world.until(lambda: "a-1" not in world.service._watches._watches)
    assert world.status_of("a-1") is None
    await world.deployed(1)


async def test_new_process_that_is_told_of_a_lease(world: ServiceWorld) -> None:
    """A lease that is told, once more, to a wrapper's new process gets its LLM there, too."""
    world.service.release(await world.deployed(1))
    await world.until(lambda: world.wrapper().grant is None)
    gate = world.cluster.hold("a-0", "bind")
    (request_id,) = world.ask(2, TINY)
    await world.until(lambda: gate.arrived)
    world.cluster.kill_process("a-0")
    gate.open()
    await world.until(lambda: world.wrapper().runs)
    await world.until_status(request_id, Status.DEPLOYED)
    assert world.wrapper().grant is not None


async def test_new_process_that_is_told_of_the_end_of_a_lease(world: ServiceWorld) -> None:
    """A wrapper whose process was replaced just when its lease ended is known to be empty."""
    request_id = await world.deployed(1)
    gate = world.cluster.hold("a-0", "unbind")
    world.service.release(request_id)
    await world.until(lambda: gate.arrived)
    world.cluster.kill_process("a-0")
    gate.open()
    await world.until_wrapper(WrapperStatus.IDLE)
    await world.deployed(2)
    assert world.wrapper().runs


async def test_wrapper_of_a_new_node_is_created_though_serve_did_not_answer(world: ServiceWorld) -> None:
    """A machine whose Ray node was replaced gets its wrapper anew, also when creating it failed at first.

    Serve goes on listing the old one, which is pinned to a node that is gone.
    """
    failures = [WrapperUnreachable("cluster", "Serve does not answer")] * 2
    world.cluster.fail("cluster", "create", *failures)
    world.cluster.machines["a"] = replace(world.cluster.machines["a"], node_id="node-new")
    await world.until(lambda: world.cluster.calls["cluster", "create"] == 1 + len(failures) + 1)
    await world.deployed(1)
    assert views.machine_state(world.service, "a").alive
