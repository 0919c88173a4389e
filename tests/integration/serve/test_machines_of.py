"""Ray's nodes as LLM Machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.serve.cluster import machines_of
from registry.core.records import Machine
from registry.service.reconcile import with_known_ids


def node(node_id: str, **more: Any) -> dict[str, Any]:
    """One entry of ``ray.nodes()``."""
    resources = {"CPU": 8.0, "memory": 1024.0, "node:10.0.0.1": 1.0, **more.pop("resources", {})}
    return {
        "NodeID": node_id,
        "Alive": True,
        "NodeManagerAddress": "10.0.0.1",
        "NodeName": "10.0.0.1",
        "Resources": resources,
        **more,
    }


HEAD = {"node:__internal_head__": 1.0}


def test_node_is_a_machine() -> None:
    """A node's name, address and GPUs are the machine's; its memory is not Ray's to tell."""
    found = machines_of([node("n1", NodeName="gpu-1", resources={"GPU": 4.0, "accelerator_type:H100": 1.0})])
    assert found == (Machine("gpu-1", "n1", "10.0.0.1", gpus=4, gpu_type="H100"),)


def test_machine_without_gpu() -> None:
    """A node without GPUs has none, of no type; memory is not known, not 0."""
    (machine,) = machines_of([node("n1")])
    assert (machine.gpus, machine.gpu_type, machine.memory_bytes, machine.gpu_memory_bytes) == (0, None, None, None)
    assert machine.alive


def test_labels_tell_where_a_machine_stands() -> None:
    """Zone and region are the labels that Ray's launchers set; the GPU type is the label's before the resource's."""
    labels = {
        "ray.io/node-id": "n1",
        "ray.io/availability-zone": "eu-central-1a",
        "ray.io/availability-region": "eu-central-1",
        "ray.io/accelerator-type": "H100",
    }
    (machine,) = machines_of([node("n1", Labels=labels, resources={"GPU": 1.0, "accelerator_type:G": 1.0})])
    assert (machine.zone, machine.region, machine.gpu_type) == ("eu-central-1a", "eu-central-1", "H100")


@pytest.mark.parametrize("labels", [None, {}, {"ray.io/node-id": "n1"}, {"ray.io/availability-zone": ""}])
def test_what_labels_do_not_tell_is_not_known(labels: dict[str, str] | None) -> None:
    """A node without labels is nowhere in particular, and its GPU type is the resource's."""
    (machine,) = machines_of([node("n1", Labels=labels, resources={"GPU": 1.0, "accelerator_type:A100": 1.0})])
    assert (machine.zone, machine.region, machine.gpu_type) == (None, None, "A100")


def test_dead_nodes_are_no_machines() -> None:
    """Ray lists dead nodes, with empty resources: they are passed over."""
    assert machines_of([node("n1", Alive=False, Resources={})]) == ()
    assert machines_of([]) == ()


@pytest.mark.parametrize("name", ["", None])
def test_nameless_node_is_called_by_its_address(name: str | None) -> None:
    """A node without a name is called by its address."""
    (machine,) = machines_of([node("n1", NodeName=name)])
    assert machine.machine_id == "10.0.0.1"


def test_new_node_of_the_same_name_is_the_same_machine() -> None:
    """A machine keeps its id when its raylet is started again: the old node is dead by then."""
    (before,) = machines_of([node("old")])
    (after,) = machines_of([node("old", Alive=False, Resources={}), node("new")])
    assert before.machine_id == after.machine_id
    assert (before.node_id, after.node_id) == ("old", "new")


def test_nodes_of_one_host_are_told_apart() -> None:
    """Several nodes of one name have ids of their own; the head keeps the plain one, whatever the node ids are."""
    found = machines_of([node("aaaaaaaa"), node("zzzzzzzz", resources=HEAD), node("bbbbbbbb")])
    assert [machine.machine_id for machine in found] == ["10.0.0.1", "10.0.0.1-aaaaaa", "10.0.0.1-bbbbbb"]
    assert found[0].node_id == "zzzzzzzz"


@given(
    st.lists(
        st.tuples(st.text("abcdef0123456789", min_size=12, max_size=12), st.sampled_from(["a", "b"]), st.booleans()),
        unique_by=lambda each: each[0][:6],
        max_size=8,
    )
)
def test_every_living_node_is_one_machine(nodes: list[tuple[str, str, bool]]) -> None:
    """However nodes are named, each that lives is one machine with an id of its own, in whatever order Ray tells."""
    listed = [node(node_id, NodeName=name, Alive=alive) for node_id, name, alive in nodes]
    found = machines_of(listed)
    assert sorted(machine.node_id for machine in found) == sorted(node_id for node_id, _, alive in nodes if alive)
    assert len({machine.machine_id for machine in found}) == len(found)
    assert machines_of(list(reversed(listed))) == found


def test_a_running_machine_keeps_its_name() -> None:
    """A node that joins under a running machine's name is another machine, whatever the ids are: both are shown."""
    running = machines_of([node("nnnnnnnnnnnn", NodeName="gpu-1")])
    for newcomer in ("aaaaaaaaaaaa", "zzzzzzzzzzzz"):  # before and behind it in the order of node ids
        both = machines_of([node("nnnnnnnnnnnn", NodeName="gpu-1"), node(newcomer, NodeName="gpu-1")])
        ids = {machine.node_id: machine.machine_id for machine in with_known_ids(both, running)}
        assert ids == {"nnnnnnnnnnnn": "gpu-1", newcomer: f"gpu-1-{newcomer[:6]}"}


def test_a_machine_keeps_its_id_when_its_namesake_leaves() -> None:
    """The later one of two nodes of a name keeps the id under which it has leases when the first one is gone."""
    both = machines_of([node("aaaaaaaaaaaa", NodeName="gpu-1"), node("bbbbbbbbbbbb", NodeName="gpu-1")])
    (left,) = with_known_ids(machines_of([node("bbbbbbbbbbbb", NodeName="gpu-1")]), both)
    assert left.machine_id == "gpu-1-bbbbbb"


def test_a_machine_that_comes_back_has_its_id() -> None:
    """A new node of a machine that is gone takes its id: its raylet was started again."""
    (gone,) = machines_of([node("aaaaaaaaaaaa", NodeName="gpu-1")])
    back = machines_of([node("bbbbbbbbbbbb", NodeName="gpu-1")])
    assert with_known_ids(back, [replace(gone, alive=False)]) == back
    assert with_known_ids(back, [gone]) == back  # its end was not seen


@given(
    st.lists(st.text("ab", min_size=12, max_size=12), unique_by=lambda each: each[:6], max_size=8),
    st.sets(st.integers(0, 7)),
)
def test_known_nodes_keep_their_ids(node_ids: list[str], known: set[int]) -> None:
    """However nodes of one name come and go, those that stay keep their ids, and no two have the same."""
    before = machines_of([node(each) for n, each in enumerate(node_ids) if n in known])
    after = with_known_ids(machines_of([node(each) for each in node_ids]), before)
    ids = {machine.node_id: machine.machine_id for machine in after}
    assert {machine.node_id: machine.machine_id for machine in before}.items() <= ids.items()
    assert len(set(ids.values())) == len(node_ids)
