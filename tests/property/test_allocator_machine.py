"""The allocator against a cluster that answers late, twice, wrongly or never. What must hold is judged from outside."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from registry.core.allocator import Allocator
from registry.core.events import (
    LeaseReleased,
    LeaseRequested,
    LeaseTokenLost,
    LeaseUsed,
    MachineDrained,
    MachineJoined,
    MachineLost,
    MachineUndrained,
    NewRequest,
    ShutdownBegun,
    TimePassed,
    WrapperAdded,
    WrapperFailed,
    WrapperRemoved,
    WrapperSwitchedOff,
)
from registry.core.fit import GIB
from registry.core.records import LLMMemory, Machine, Request, WrapperStatus
from registry.errors import InvalidField, LLMNeverFits, UnknownMachine, UnknownRequest
from registry.wire.words import Priority, RequestStatus
from tests.support.allocator_scene import llm, next_deadline_s
from tests.support.watched_allocator import GPU_TYPES, LIMITS, WatchedAllocator, usable

R, W = RequestStatus, WrapperStatus
LLMS = {"A": llm("A"), "B": llm("B"), "C": llm("C", 1), "D": llm("D", 2), "E": llm("E"), "F": llm("F")}
GIB_OF = {"B": 16, "D": 20, "E": 60, "F": 100}
MEMORY = {name: LLMMemory(gib * GIB, gpus=LLMS[name].gpus or None) for name, gib in GIB_OF.items()}
"""What is known of the memory that some of them take."""
MACHINES = {
    "a": (Machine("a", "node-a", "10.0.0.1", gpus=2, gpu_type="H100", gpu_memory_bytes=80 * GIB), ("a-0",), 2),
    "b": (Machine("b", "node-b", "10.0.0.2", gpus=2, gpu_type="H100", gpu_memory_bytes=80 * GIB), ("b-0", "b-1"), 1),
    "c": (Machine("c", "node-c", "10.0.0.3", memory_bytes=32 * GIB), ("c-0",), 0),
    "d": (Machine("d", "node-d", "10.0.0.4", gpus=2, gpu_type="A100", gpu_memory_bytes=40 * GIB), ("d-0",), 2),
}
"""Machine, its wrappers, and how many GPUs each of those has."""

BREAKAGES = (
    "engine dies",
    "wrapper crashes",
    "wrapper hangs",
    "wrapper is removed",
    "wrapper is created anew",
    "machine is lost",
    "registry restarts",
    "registry restarts without its key",
    "registry is shut down",
    "registry is shut down and restarts",
)

some = st.integers(0, 11)
"""Which of those that are there, counted round and round."""


class AllocatorMachine(WatchedAllocator, RuleBasedStateMachine):
    """Clients, a clock and a cluster, all of them free to do anything in any order."""

    @initialize(machines=st.sets(st.sampled_from(sorted(MACHINES))))
    def begin(self, machines: set[str]) -> None:
        for machine_id in sorted(machines):
            self.machine_joins(machine_id)
            for wrapper_id in MACHINES[machine_id][1]:
                self.watch_looks_at(wrapper_id)

    @rule(
        measurement_id=st.integers(1, 5),
        llms=st.lists(st.sampled_from("ABCDEF"), min_size=1, max_size=3),
        tenant=st.sampled_from(["lab", "lab", "lab", "guest", "new-1", "new-2"]),
        priority=st.sampled_from([None] * 4 + [Priority.NORMAL, Priority.LOW, Priority.HIGH]),
        gpu_type=st.sampled_from([None] * 6 + sorted(GPU_TYPES)),
        like=st.none() | some,
    )
    def client_asks(
        self,
        measurement_id: int,
        llms: list[str],
        tenant: str,
        priority: Priority | None,
        gpu_type: str | None,
        like: int | None,
    ) -> None:
        if self.shutting_down or sum(not r.status.ended for r in self.requests()) > 12:
            return
        new = tuple(NewRequest(f"r{next(self.ids)}", LLMS[name], "{}", memory=MEMORY.get(name)) for name in llms)
        before = self.allocator.snapshot()
        key = tenant, measurement_id
        known = self.allocator.measurement(key) if key in self.served() else None
        unfinished = [] if known is None else self.unfinished(key)
        there = [w for w in self.allocator.wrappers() if w.status is not W.LOST]
        if like is not None:
            self.ask_for_the_same(LeaseRequested(measurement_id, new, tenant, priority, gpu_type), like)
            return
        try:
            self.tell(LeaseRequested(measurement_id, new, tenant, priority, gpu_type))
        except LLMNeverFits:
            assert self.allocator.snapshot() == before
            pin = None if known is None else known.machine_id
            asked_type = known.gpu_type if known is not None and unfinished else gpu_type
            alike = [w for w in there if self.is_of_type(asked_type, w)]
            on_pin = [w for w in there if w.machine_id == pin and usable(w) and not self.is_draining(w.machine_id)]
            together: list[Request | NewRequest] = [*unfinished, *new]
            assert not any(all(self.fits(each, w) for each in together) for w in alike) or (
                on_pin and not all(any(self.fits(each, w) for w in on_pin) for each in new)
            )
        except InvalidField:
            assert self.allocator.snapshot() == before
            nowhere = not any(self.is_of_type(gpu_type, w) for w in there)
            assert (nowhere and there) or (
                unfinished
                and known is not None
                and (known.gpu_type != gpu_type or priority not in (None, known.priority))
            )

    def ask_for_the_same(self, event: LeaseRequested, n: int) -> None:
        """Ask for what an earlier request has been given, as far as it has."""
        given = [request for request in self.requests() if request.provenance is not None]
        earlier = given[n % len(given)] if given else None
        event = replace(event, like_request_id="never" if earlier is None else earlier.request_id)
        if earlier is not None:
            event = replace(event, requests=(replace(event.requests[0], spec=earlier.spec),))
        before = self.allocator.snapshot()
        try:
            self.tell(event)
        except (InvalidField, LLMNeverFits):
            assert self.allocator.snapshot() == before
        else:
            assert earlier is not None

    @precondition(lambda self: self.deployed())
    @rule(n=some)
    def client_releases(self, n: int) -> None:
        deployed = self.deployed()
        self.tell(LeaseReleased(deployed[n % len(deployed)].request_id))

    @precondition(lambda self: self.requests())
    @rule(n=some, what=st.sampled_from(["uses", "uses", "cancels", "names what never was"]), ago_s=st.floats(-10, 50))
    def client_does_anything(self, n: int, what: str, ago_s: float) -> None:
        requests = self.requests()
        request_id = requests[-1 - n % len(requests)].request_id
        if what == "uses":
            self.tell(LeaseUsed(request_id, self.now_s - ago_s))
        elif what == "cancels":
            self.tell(LeaseReleased(request_id))
        else:
            before = self.allocator.snapshot()
            for event in (LeaseReleased("never"), LeaseUsed("never", 0.0)):
                with pytest.raises(UnknownRequest):
                    self.tell(event)
            assert self.allocator.snapshot() == before

    @rule(step_s=st.sampled_from([0.001, 1.0, 5.0, 10.0, 30.0, 200.0, -20.0]))
    def clock_moves(self, step_s: float) -> None:
        self.now_s += step_s
        due_s = next_deadline_s(self.allocator)
        if due_s is not None and due_s <= self.now_s:
            self.tell(TimePassed(asked=()))
            assert all(lease.deadline_s > self.now_s for lease in self.allocator.snapshot().leases)
            self.tell(TimePassed())
            assert all(lease.ends_s > self.now_s for lease in self.allocator.snapshot().leases)

    @precondition(lambda self: self.cluster.commands)
    @rule(n=some)
    def command_arrives(self, n: int) -> None:
        self.cluster.send(self.cluster.commands[n % len(self.cluster.commands)], self.allocator)

    @precondition(lambda self: self.cluster.answers)
    @rule(n=some, again=st.booleans())
    def answer_arrives(self, n: int, again: bool) -> None:
        at = n % len(self.cluster.answers)
        _, answer = self.cluster.answers[at] if again else self.cluster.answers.pop(at)
        self.tell(answer(self.allocator))

    @precondition(lambda self: self.starting())
    @rule(n=some, how=st.sampled_from(["works", "works", "works", "fails", "fails for good"]))
    def llm_start_ends(self, n: int, how: str) -> None:
        starting = self.starting()
        self.cluster.finish(starting[n % len(starting)], works=how == "works", permanent=how == "fails for good")

    @rule()
    def watch_looks_at_all(self) -> None:
        for wrapper in self.allocator.wrappers():
            self.watch_looks_at(wrapper.wrapper_id)

    @rule(n=some, how=st.sampled_from(["works", "works", "works", "fails", "fails for good"]))
    def cluster_catches_up(self, n: int = 0, how: str = "works") -> None:
        """Every command arrives, all starts but perhaps one work, every answer comes back; what follows comes later."""
        self.watch_looks_at_all()
        for command in list(self.cluster.commands):
            self.cluster.send(command, self.allocator)
        for at, wrapper_id in enumerate(self.starting()):
            works = how == "works" or at != n % 4
            self.cluster.finish(wrapper_id, works=works, permanent=how == "fails for good")
        answers = list(self.cluster.answers)
        self.cluster.answers.clear()
        for _, answer in answers:
            self.tell(answer(self.allocator))

    @rule()
    def machines_come_back(self) -> None:
        for machine_id in sorted(MACHINES):
            self.machine_joins(machine_id)

    @precondition(lambda self: self.allocator.machines())
    @rule(n=some, undrains=st.booleans())
    def operator_drains(self, n: int, undrains: bool) -> None:
        machines = sorted(machine.machine_id for machine in self.allocator.machines())
        machine_id = machines[n % len(machines)]
        if undrains:
            self.leased_before.pop(machine_id, None)
            self.tell(MachineUndrained(machine_id))
        else:
            self.leased_before.setdefault(machine_id, self.leases_on(machine_id))
            self.tell(MachineDrained(machine_id))

    @precondition(lambda self: self.leased_before)
    @rule(n=some, removes=st.booleans())
    def drained_machine_is_reconciled(self, n: int, removes: bool) -> None:
        """As the reconciliation does it; the registry may die before the wrapper is removed."""
        machines = sorted(self.leased_before)
        for wrapper in self.allocator.wrappers_on(machines[n % len(machines)]):
            self.tell(WrapperSwitchedOff(wrapper.wrapper_id))
            after = self.allocator.wrapper(wrapper.wrapper_id)
            assert after is not None
            assert (after.status is W.OFF) == (wrapper.request_id is None)
            if after.status is W.OFF and removes:
                self.cluster.remove(wrapper.wrapper_id)

    @rule()
    def operator_names_what_never_was(self) -> None:
        before = self.allocator.snapshot()
        for event in (MachineDrained("never"), MachineUndrained("never")):
            with pytest.raises(UnknownMachine):
                self.tell(event)
        assert self.allocator.snapshot() == before

    @precondition(lambda self: self.cluster.wrappers)
    @rule(
        n=some,
        what=st.sampled_from(BREAKAGES),
    )
    def something_breaks(self, n: int, what: str) -> None:
        wrapper_ids = sorted(self.cluster.wrappers)
        wrapper_id = wrapper_ids[n % len(wrapper_ids)]
        record = self.allocator.wrapper(wrapper_id)
        assert record is not None
        match what:
            case "engine dies":
                self.cluster.lose_engine(wrapper_id)
            case "wrapper crashes":
                self.cluster.crash(wrapper_id)
            case "wrapper hangs":
                self.tell(WrapperFailed(wrapper_id, "no answer"))
            case "wrapper is removed":
                self.cluster.remove(wrapper_id)
                self.tell(WrapperRemoved(wrapper_id))
            case "wrapper is created anew":
                gpus = max(record.gpus - n % 2, 0)
                self.cluster.add(wrapper_id)
                self.tell(WrapperAdded(wrapper_id, record.machine_id, "http://anew", gpus, record.home))
            case "machine is lost":
                self.machine_is_lost(record.machine_id)
            case "registry restarts":
                self.registry_restarts()
            case "registry restarts without its key":
                self.registry_restarts()
                for lease in self.allocator.snapshot().leases:
                    self.tell(LeaseTokenLost(lease.request_id, "its key is gone"))
            case _:
                self.shutting_down = True
                self.tell(ShutdownBegun())
                if what.endswith("restarts"):
                    self.registry_restarts()

    @precondition(lambda self: self.shutting_down)
    @rule()
    def registry_restarts(self) -> None:
        snapshot = self.allocator.snapshot()
        self.allocator = Allocator(LIMITS, self.new_token)
        self.allocator.load(snapshot)
        self.cluster.forget_registry()
        self.shutting_down, self.just_loaded = False, True
        for record in (self.turns_of, self.later, self.by_priority):
            record.clear()  # turns begin anew

    def watch_looks_at(self, wrapper_id: str) -> None:
        event = self.cluster.look_at(wrapper_id, self.allocator)
        if event is not None:  # a wrapper that is OFF is not asked, even when it still runs
            self.cluster.unseen.discard(wrapper_id)
        self.tell(event)

    def machine_joins(self, machine_id: str) -> None:
        """A machine is there, with all its wrappers, as the registry's reconciliation tells it; not how much memory."""
        machine, wrapper_ids, gpus = MACHINES[machine_id]
        known = self.allocator.machine(machine_id)
        if known is None or replace(known, draining=False) not in (machine, bare(machine)):
            self.tell(MachineJoined(bare(machine)))
        for n, wrapper_id in enumerate(wrapper_ids):
            record = self.allocator.wrapper(wrapper_id)
            if self.is_draining(machine_id) and (record is None or record.request_id is None):
                continue
            gone = wrapper_id not in self.cluster.wrappers or record is None or record.gpus != gpus
            if gone:
                self.cluster.add(wrapper_id)
            if gone or (record is not None and record.status is W.OFF):
                home = LLMS["A"] if n == 0 else None
                self.tell(WrapperAdded(wrapper_id, machine_id, f"http://{wrapper_id}", gpus, home))

    @precondition(lambda self: self.allocator.machines())
    @rule(n=some)
    def wrapper_tells_memory(self, n: int) -> None:
        machines = [machine.machine_id for machine in self.allocator.machines() if machine.alive]
        if machines:
            self.tell(MachineJoined(MACHINES[machines[n % len(machines)]][0]))

    def machine_is_lost(self, machine_id: str) -> None:
        for wrapper_id in MACHINES[machine_id][1]:
            self.cluster.remove(wrapper_id)
        self.tell(MachineLost(machine_id, "it left"))

    # --- what must hold ---------------------------------------------------------------------------------

    @invariant()
    def everything_holds(self) -> None:
        for rule_of_the_house in (
            self.its_own_rules_hold,
            self.what_was_written_is_what_is_known,
            self.ended_requests_hold_nothing,
            self.one_request_of_a_measurement_is_served_at_a_time,
            self.a_measurement_stays_on_its_machine_or_says_so,
            self.a_wrapper_that_was_told_everything_serves_its_lease_and_nobody_else,
            self.a_token_whose_lease_has_ended_is_being_revoked,
            self.no_token_opens_two_wrappers,
            self.a_request_keeps_its_address_once_it_has_one,
            self.what_was_to_be_the_same_is_the_same,
            self.nobody_waits_while_something_is_free,
            self.nobody_is_overtaken_too_often,
            self.a_drained_machine_gets_no_new_lease,
        ):
            rule_of_the_house()

    # --- the end ----------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """When everything works again and every client releases what it gets, every request comes to an end."""
        try:
            self.come_to_an_end()
        finally:
            self.cluster.close()

    def come_to_an_end(self) -> None:
        self.registry_restarts()
        for machine_id in sorted(self.leased_before):
            self.tell(MachineUndrained(machine_id))
        self.leased_before.clear()
        for machine_id in sorted(MACHINES):
            self.machine_joins(machine_id)
        for _ in range(200):
            busy = self.cluster.commands or self.cluster.answers or self.cluster.unseen
            if not busy and all(request.status.ended for request in self.requests()):
                break
            self.cluster_catches_up()
            for request in self.deployed():
                self.tell(LeaseReleased(request.request_id))
            for request in self.heads():  # accepted while no machine was known
                if not any(self.may_use(request, wrapper) for wrapper in self.allocator.wrappers()):
                    self.tell(LeaseReleased(request.request_id))
            self.allocator.check()
        assert not [request for request in self.requests() if not request.status.ended]
        assert not self.allocator.snapshot().leases
        assert not [w for w in self.cluster.wrappers.values() if w.token is not None and not w.empty]


def bare(machine: Machine) -> Machine:
    """A machine as it is known before a wrapper has told of its memory."""
    return replace(machine, memory_bytes=None, gpu_memory_bytes=None)


# Two minutes on an idle machine, more on one that does something else.
TestAllocatorMachine = pytest.mark.timeout(1500)(AllocatorMachine.TestCase)
TestAllocatorMachine.settings = settings(stateful_step_count=200)
