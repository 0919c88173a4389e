"""What should be on the machines against what is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.contract.messages import Observation, WrapperPlan
from registry.core.events import MachineJoined, MachineLost, WrapperAdded, WrapperRemoved
from registry.core.records import LLMSpec, Machine, Wrapper, WrapperStatus
from registry.service.reconcile import Steps, plan, wanted_wrappers, with_known_ids

HOME = LLMSpec("org/home", "text-generation")
OTHER_HOME = LLMSpec("org/other", "text-generation")
A = Machine("a", "node-a", "10.0.0.1", gpus=8)
B = Machine("b", "node-b", "10.0.0.2")


def wanted(
    *machines: Machine, per_machine: int = 1, gpus_per_wrapper: int | None = None, base_url: str = "http://x"
) -> dict[str, tuple[WrapperPlan, ...]]:
    return {
        machine.machine_id: wanted_wrappers(
            machine, per_machine=per_machine, gpus_per_wrapper=gpus_per_wrapper, base_url=base_url, homes={}
        )
        for machine in machines
    }


def known(want: WrapperPlan, status: WrapperStatus = WrapperStatus.IDLE) -> Wrapper:
    return Wrapper(want.wrapper_id, want.machine_id, want.url, want.gpus, status)


def added(want: WrapperPlan) -> WrapperAdded:
    return WrapperAdded(want.wrapper_id, want.machine_id, want.url, want.gpus, want.home)


# --- wanted_wrappers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "per_machine", "gpus_per_wrapper", "expected"),
    [
        (8, 1, None, [8]),
        (8, 2, None, [4, 4]),
        (7, 2, None, [3, 3]),
        (0, 1, None, [0]),
        (0, 3, None, [0, 0, 0]),
        (1, 2, None, [1]),
        (3, 8, None, [1, 1, 1]),
        (8, 1, 2, [2, 2, 2, 2]),
        (7, 1, 2, [2, 2, 2]),
        (1, 1, 2, []),
        (0, 2, 4, [0, 0]),
    ],
)
def test_gpus_are_divided_as_configured(
    gpus: int, per_machine: int, gpus_per_wrapper: int | None, expected: list[int]
) -> None:
    """GPUs are split evenly, or into wrappers of the size asked for; a machine without any carries plain wrappers."""
    machine = replace(A, gpus=gpus)
    plans = wanted_wrappers(
        machine, per_machine=per_machine, gpus_per_wrapper=gpus_per_wrapper, base_url="http://x", homes={}
    )
    assert [want.gpus for want in plans] == expected


@given(st.integers(0, 64), st.integers(1, 64), st.none() | st.integers(1, 64))
def test_no_machine_is_promised_more_gpus_than_it_has(
    gpus: int, per_machine: int, gpus_per_wrapper: int | None
) -> None:
    """However it is split, the wrappers of a machine never ask for more GPUs than it has, and their ids differ."""
    plans = wanted_wrappers(
        replace(A, gpus=gpus), per_machine=per_machine, gpus_per_wrapper=gpus_per_wrapper, base_url="", homes={}
    )
    assert sum(want.gpus for want in plans) <= gpus
    assert all(bool(want.gpus) == bool(gpus) and want.on_machine == len(plans) for want in plans)
    assert len({want.wrapper_id for want in plans}) == len(plans)


def test_wrappers_know_where_they_are() -> None:
    """A wrapper's id, node and base URL come from its machine, and don't change from one look to the next."""
    first, second = wanted(A, per_machine=2)["a"]
    assert (first.wrapper_id, first.node_id, first.url) == ("a-0", "node-a", "http://x/wrappers/a-0")
    assert (second.wrapper_id, second.machine_id, second.url) == ("a-1", "a", "http://x/wrappers/a-1")
    assert wanted(A, per_machine=2)["a"] == (first, second)


@pytest.mark.parametrize(
    ("homes", "expected"),
    [
        ({}, [None, None]),
        ({"*": HOME}, [HOME, None]),
        ({"a": OTHER_HOME, "*": HOME}, [OTHER_HOME, None]),
        ({"b": HOME}, [None, None]),
    ],
)
def test_home_is_for_the_first_wrapper(homes: dict[str, LLMSpec], expected: list[LLMSpec | None]) -> None:
    """The configured LLM goes to a machine's first wrapper; its own name goes before the star."""
    plans = wanted_wrappers(A, per_machine=2, gpus_per_wrapper=None, base_url="http://x", homes=homes)
    assert [want.home for want in plans] == expected


# --- plan --------------------------------------------------------------------------------------------------


def test_first_look_creates_everything() -> None:
    """Machines that nobody knew join first, then their wrappers are added and created."""
    wants = wanted(A, B)
    steps = plan([], [], Observation((A, B), frozenset()), wants)
    assert steps.events == (MachineJoined(A), MachineJoined(B), added(wants["a"][0]), added(wants["b"][0]))
    assert steps.create == (wants["a"][0], wants["b"][0])
    assert steps.remove == ()


@pytest.mark.parametrize(
    "status",
    [
        WrapperStatus.STARTING,
        WrapperStatus.IDLE,
        WrapperStatus.DEPLOYING,
        WrapperStatus.READY,
        WrapperStatus.LEASED,
        WrapperStatus.STOPPING,
        WrapperStatus.FAILED,
        WrapperStatus.RESTARTING,
    ],
)
def test_nothing_to_do_when_all_is_as_it_should_be(status: WrapperStatus) -> None:
    """A wrapper that is there and known is left alone whatever it is doing, given up ones included."""
    wants = wanted(A)
    wrapper = known(wants["a"][0], status)
    assert plan([A], [wrapper], Observation((A,), frozenset({"a-0"})), wants) == Steps()


def test_restarted_registry_finds_its_wrappers() -> None:
    """A wrapper that is deployed but not known (the database is new) is added and not created again."""
    wants = wanted(A)
    steps = plan([A], [], Observation((A,), frozenset({"a-0"})), wants)
    assert steps == Steps(events=(added(wants["a"][0]),))


def test_wrapper_that_vanished_is_created_again() -> None:
    """A wrapper that somebody deleted in Serve is created anew, and what was known of it no longer holds."""
    wants = wanted(A)
    steps = plan([A], [known(wants["a"][0], WrapperStatus.LEASED)], Observation((A,), frozenset()), wants)
    assert steps == Steps(events=(added(wants["a"][0]),), create=wants["a"])


def test_machine_that_leaves_is_lost_once() -> None:
    """A machine that is gone is lost, its wrapper's deployment removed; the next look has nothing to add."""
    wrapper = known(wanted(A)["a"][0], WrapperStatus.LEASED)
    steps = plan([A], [wrapper], Observation((), frozenset({"a-0"})), {})
    assert steps.events == (MachineLost("a", "it left the Ray cluster"),)
    assert steps.remove == ("a-0",)
    lost = replace(wrapper, status=WrapperStatus.LOST)
    assert plan([replace(A, alive=False)], [lost], Observation((), frozenset()), {}) == Steps()


def test_machine_that_returns_gets_its_wrapper_back() -> None:
    """A machine that was gone joins again, and its wrapper is added and created."""
    wants = wanted(A)
    lost = known(wants["a"][0], WrapperStatus.LOST)
    steps = plan([replace(A, alive=False)], [lost], Observation((A,), frozenset()), wants)
    assert steps == Steps(events=(MachineJoined(A), added(wants["a"][0])), create=wants["a"])


def test_lost_wrapper_that_is_still_deployed_is_added_only() -> None:
    """A short cut of the network: the deployment outlived it, so the wrapper is taken on again and not made anew."""
    wants = wanted(A)
    lost = known(wants["a"][0], WrapperStatus.LOST)
    steps = plan([replace(A, alive=False)], [lost], Observation((A,), frozenset({"a-0"})), wants)
    assert steps == Steps(events=(MachineJoined(A), added(wants["a"][0])))


def test_new_node_of_a_machine_loses_what_ran_there() -> None:
    """A machine whose Ray node was replaced between two looks is lost and joins; its wrapper goes to the new one."""
    new = replace(A, node_id="node-new")
    wants = wanted(new)
    steps = plan([A], [known(wants["a"][0], WrapperStatus.LEASED)], Observation((new,), frozenset({"a-0"})), wants)
    assert steps.events == (MachineLost("a", "its Ray node was replaced"),)
    assert steps.created == (MachineJoined(new), added(wants["a"][0]))
    assert [want.node_id for want in steps.create] == ["node-new"]
    assert steps.remove == ()


def test_new_node_of_a_dead_machine_is_not_lost_twice() -> None:
    """A machine that was known to be gone joins on its new node without being lost again."""
    new = replace(A, node_id="node-new")
    lost = known(wanted(A)["a"][0], WrapperStatus.LOST)
    for deployed in (frozenset({"a-0"}), frozenset[str]()):
        steps = plan([replace(A, alive=False)], [lost], Observation((new,), deployed), wanted(new))
        assert steps == Steps(create=wanted(new)["a"], created=(MachineJoined(new), added(wanted(new)["a"][0])))


def test_machine_that_changed_joins_again() -> None:
    """What is newly known of a machine is told; its wrapper stays as it is."""
    more = replace(A, gpu_type="H100")
    steps = plan([A], [known(wanted(A)["a"][0])], Observation((more,), frozenset({"a-0"})), wanted(more))
    assert steps == Steps(events=(MachineJoined(more),))


def test_wrapper_that_is_no_longer_wanted_is_removed() -> None:
    """Fewer wrappers per machine than before: what is too much is removed, known or not."""
    first, second = wanted(A, per_machine=2)["a"]
    steps = plan([A], [known(first), known(second)], Observation((A,), frozenset({"a-0", "a-1", "a-9"})), wanted(A))
    assert WrapperRemoved("a-1") in steps.events
    assert WrapperRemoved("a-0") not in steps.events
    assert steps.remove == ("a-1", "a-9")


def test_wrapper_of_a_lost_machine_is_kept_in_mind() -> None:
    """A lost machine may return: its wrappers stay known, though nothing is wanted there for now."""
    lost = known(wanted(A)["a"][0], WrapperStatus.LOST)
    steps = plan([replace(A, alive=False), B], [lost], Observation((B,), frozenset({"b-0"})), wanted(B))
    assert WrapperRemoved("a-0") not in steps.events


@pytest.mark.parametrize("status", [WrapperStatus.IDLE, WrapperStatus.READY, WrapperStatus.FAILED, WrapperStatus.LOST])
def test_drained_machine_wants_no_wrapper(status: WrapperStatus) -> None:
    """What nobody holds is switched off, deployed or not; what Ray says of the machine does not end its draining."""
    drained = replace(A, draining=True)
    wrapper = known(wanted(A)["a"][0], status)
    for deployed in (frozenset({"a-0"}), frozenset[str]()):
        assert plan([drained], [wrapper], Observation((A,), deployed), wanted(A)) == Steps(switch_off=("a-0",))


def test_drained_machine_keeps_what_is_held() -> None:
    """A wrapper that is in use stays, and is made anew if it vanished."""
    drained, (want,) = replace(A, draining=True), wanted(A)["a"]
    wrapper = replace(known(want, WrapperStatus.LEASED), request_id="r", spec=HOME)
    assert plan([drained], [wrapper], Observation((A,), frozenset({"a-0"})), wanted(A)) == Steps()
    vanished = plan([drained], [wrapper], Observation((A,), frozenset()), wanted(A))
    assert vanished == Steps(events=(added(want),), create=(want,))


def test_drained_machine_that_is_off_is_left_alone() -> None:
    """Nothing is to be done once its wrappers are gone; one that is still deployed (a crash came between) goes."""
    drained, (want,) = replace(A, draining=True), wanted(A)["a"]
    off = known(want, WrapperStatus.OFF)
    assert plan([drained], [off], Observation((A,), frozenset()), wanted(A)) == Steps()
    assert plan([drained], [], Observation((A,), frozenset()), wanted(A)) == Steps()
    assert plan([drained], [off], Observation((A,), frozenset({"a-0"})), wanted(A)) == Steps(switch_off=("a-0",))


def test_drained_machine_with_a_new_node_gets_nothing() -> None:
    """What was held there is lost with the old node, so nothing is made anew."""
    drained, new, (want,) = replace(A, draining=True), replace(A, node_id="node-new"), wanted(A)["a"]
    wrapper = replace(known(want, WrapperStatus.LEASED), request_id="r", spec=HOME)
    steps = plan([drained], [wrapper], Observation((new,), frozenset({"a-0"})), wanted(new))
    joined = MachineJoined(replace(new, draining=True))
    lost = MachineLost("a", "its Ray node was replaced")
    assert steps == Steps(events=(lost,), created=(joined,), switch_off=("a-0",))


def test_undrained_machine_gets_its_wrapper_back() -> None:
    """A wrapper that was switched off is created; one that was not gone yet is taken on again as it is."""
    (want,) = wanted(A)["a"]
    off = known(want, WrapperStatus.OFF)
    assert plan([A], [off], Observation((A,), frozenset()), wanted(A)) == Steps(events=(added(want),), create=(want,))
    assert plan([A], [off], Observation((A,), frozenset({"a-0"})), wanted(A)) == Steps(events=(added(want),))


@pytest.mark.parametrize("machine", [A, replace(A, draining=True)])
def test_wrapper_that_is_leaving_is_left_alone(machine: Machine) -> None:
    """Neither taken on nor made anew while its old deployment is on its way out, whatever is wanted."""
    off = known(wanted(A)["a"][0], WrapperStatus.OFF)
    assert plan([machine], [off], Observation((A,), frozenset(), frozenset({"a-0"})), wanted(A)) == Steps()


def test_new_base_url_is_told() -> None:
    """Another public URL than before: the wrapper stays and its new address is told."""
    old = known(wanted(A, base_url="http://old")["a"][0])
    wants = wanted(A, base_url="http://new")
    steps = plan([A], [old], Observation((A,), frozenset({"a-0"})), wants)
    assert steps == Steps(events=(added(wants["a"][0]),))


def test_wrapper_of_another_size_is_made_anew() -> None:
    """A configuration that splits a machine's GPUs differently takes hold of wrappers that are still deployed."""
    old = known(wanted(A)["a"][0], WrapperStatus.READY)
    wants = wanted(A, per_machine=2)
    steps = plan([A], [old], Observation((A,), frozenset({"a-0"})), wants)
    resized, new = map(added, wants["a"])
    assert steps == Steps(events=(new,), create=wants["a"], created=(resized,))


def test_memory_that_wrappers_told_is_kept() -> None:
    """Ray does not know it: that it says nothing is no news, and what it does say goes on with what was told."""
    told = replace(A, memory_bytes=2**40, gpu_memory_bytes=2**36)
    wrapper = known(wanted(A)["a"][0])
    assert plan([told], [wrapper], Observation((A,), frozenset({"a-0"})), wanted(A)) == Steps()
    elsewhere = replace(A, address="10.0.0.9")
    steps = plan([told], [wrapper], Observation((elsewhere,), frozenset({"a-0"})), wanted(A))
    assert steps.events == (MachineJoined(replace(told, address="10.0.0.9")),)


# --- with_known_ids ----------------------------------------------------------------------------------------


def test_a_node_keeps_the_id_under_which_it_is_known() -> None:
    """Its name may change; a new node with the name of another gets an id of its own, and not the other's leases."""
    renamed = replace(A, machine_id="other")
    twin = Machine("a", "node-of-the-twin", "10.0.0.3")
    assert with_known_ids([renamed, twin, B], [A]) == (A, replace(twin, machine_id="a-node-o"), B)


def test_a_lost_machine_gives_its_id_to_a_new_node() -> None:
    """A machine that comes back is another Ray node with the same name."""
    again = replace(A, node_id="another-node")
    assert with_known_ids([again], [replace(A, alive=False)]) == (again,)
