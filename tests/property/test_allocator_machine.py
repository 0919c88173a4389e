"""The allocator against a cluster that answers late, twice, wrongly or never. What must hold is judged from outside."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from registry.core.allocator import Allocator
from registry.core.commands import BindLease
from registry.core.decision import Limits
from registry.core.events import (
    Event,
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
from registry.core.policy import PRIORITY_TURNS
from registry.core.records import LLMMemory, Machine, MeasurementKey, Request, StoredToken, Wrapper, WrapperStatus
from registry.errors import InvalidField, LLMNeverFits, UnknownMachine, UnknownRequest
from registry.wire.words import Priority, RequestStatus
from tests.support.allocator_scene import Memory, llm, next_deadline_s, stored_token
from tests.support.queued_cluster import QueuedCluster

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
GPU_TYPES = {"h100": "H100", "NVIDIA A100-SXM4-40GB": "A100"}
"""GPU types as clients ask for them, and as machines have them."""

LIMITS = Limits(
    lease_max_s=100.0,
    lease_idle_s=30.0,
    deploy_attempts=2,
    wrapper_attempts=2,
    max_overtakes=2,
    max_overtake_s=40.0,
    tenant_weights=(("lab", 2.0),),
)

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


class AllocatorMachine(RuleBasedStateMachine):
    """Clients, a clock and a cluster, all of them free to do anything in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.tokens = count(1)
        self.ids = count(1)
        self.cluster = QueuedCluster()
        self.memory = Memory()
        self.allocator = Allocator(LIMITS, self.new_token)
        self.shutting_down = False
        self.just_loaded = False
        self.epochs: dict[str, int] = {}
        self.token_of: dict[str, str] = {}
        self.served_on: dict[MeasurementKey, set[str]] = {}
        self.overtaken: dict[str, int] = {}
        self.turns_of: dict[str, Counter[str]] = {}
        """By tenant that waits: turns of others since its own last, or since it came, that it could have used."""
        self.later: dict[str, dict[str, int]] = {}
        """By tenant that waits: those that came after it, with how many turns they had had before that."""
        self.by_priority: Counter[str] = Counter()
        """Turns in a row of a tenant that an older request of it could have used."""
        self.leased_before: dict[str, set[str]] = {}
        """The leases that there were on each machine that is drained, when that began."""

    def new_token(self) -> StoredToken:
        return stored_token(f"token-{next(self.tokens)}")

    # --- what happens -----------------------------------------------------------------------------------

    def tell(self, event: Event | None) -> None:
        """Let the registry know, write what it decided, and keep its commands for later."""
        if event is None:
            return
        before = {request.request_id: request for request in self.requests()}
        decision = self.allocator.handle(event, self.now_s)
        self.just_loaded = False
        self.memory.commit(decision.changes)
        for wrapper_id in decision.changes.removed_wrappers:
            self.epochs.pop(wrapper_id, None)
        for effect in decision.effects:
            assert effect.epoch > self.epochs.get(effect.wrapper_id, 0), "every command is newer than the last"
            self.epochs[effect.wrapper_id] = effect.epoch
            self.cluster.commands.append(effect)
        bound = {effect.wrapper_id for effect in decision.effects if isinstance(effect, BindLease)}
        turns = [
            (request, wrapper, wrapper.wrapper_id in bound)
            for request in decision.changes.requests
            if (wrapper := self.granted(before.get(request.request_id), request)) is not None
        ]
        for winner, wrapper, warm in turns:
            self.note_overtaken(winner, wrapper, warm=warm)
        # From outside, the order of the turns of one decision is not known. It matters for by_priority only: turns that
        # set it to 0 come last, so that it is never too large.
        for winner, wrapper, warm in sorted(turns, key=lambda turn: not self.has_older(*turn[:2])):
            self.note_turn(winner, wrapper, warm=warm)
        # Here and not after each step: a step can tell of several events, and a tenant's turn begins its counts anew.
        self.every_tenant_has_its_turn()
        self.low_is_served_too()
        self.note_who_waits()

    def granted(self, before: Request | None, after: Request) -> Wrapper | None:
        """The wrapper that a decision gave to a request, None if it gave none.

        A request can lose one wrapper and get another one in the same decision, so it is DEPLOYING before and after it.
        In between it was in the queue: this is one more turn of its tenant.
        """
        if after.status is not R.DEPLOYING or after.wrapper_id is None:
            return None
        if before is not None and before.wrapper_id == after.wrapper_id:
            return None
        wrapper = self.allocator.wrapper(after.wrapper_id)
        assert wrapper is not None
        return wrapper

    def has_older(self, winner: Request, wrapper: Wrapper) -> bool:
        """True when an older request of its tenant waits that could have used the winner's wrapper."""
        own = [request for request in self.heads() if request.tenant == winner.tenant]
        return any(request.seq < winner.seq and self.may_use(request, wrapper) for request in own)

    def note_turn(self, winner: Request, wrapper: Wrapper, *, warm: bool) -> None:
        """Count whom a turn has passed over that could have used it. Warm matches are counted by themselves."""
        able = [request for request in self.heads() if self.may_use(request, wrapper)]
        self.turns_of.pop(winner.tenant, None)
        if not self.has_older(winner, wrapper):
            self.by_priority[winner.tenant] = 0
        elif not warm:
            self.by_priority[winner.tenant] += 1
        for tenant in {request.tenant for request in able} & set(self.turns_of):
            self.turns_of[tenant][winner.tenant] += not warm

    def note_who_waits(self) -> None:
        """Those that began to wait in one and the same decision came neither before nor after each other."""
        waiting = {request.tenant for request in self.heads()}
        for record in (self.turns_of, self.later, self.by_priority):
            for gone in set(record) - waiting:
                del record[gone]
        new = waiting - set(self.turns_of)
        for tenant, turns in self.turns_of.items():
            self.later[tenant] = {other: turns[other] for other in new} | self.later[tenant]
        for tenant in new:
            self.turns_of[tenant], self.later[tenant] = Counter(), {}

    def note_overtaken(self, winner: Request, wrapper: Wrapper, *, warm: bool) -> None:
        """Count who of the same tenant and priority came before the winner and could have had its wrapper."""
        won = self.allocator.measurement(winner.measurement_key)
        for request in self.heads():
            theirs = self.allocator.measurement(request.measurement_key)
            earlier = (theirs.tenant, theirs.priority) == (won.tenant, won.priority) and request.seq < winner.seq
            if earlier and self.may_use(request, wrapper):
                assert warm, f"{winner.request_id} was served before {request.request_id} without a reason"
                self.overtaken[request.request_id] = self.overtaken.get(request.request_id, 0) + 1

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

    # --- how it is, from outside ------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        return sorted(self.allocator.snapshot().requests, key=lambda request: request.seq)

    def deployed(self) -> list[Request]:
        return [request for request in self.requests() if request.status is R.DEPLOYED]

    def starting(self) -> list[str]:
        return [w.wrapper_id for w in self.cluster.wrappers.values() if w.starting is not None]

    def served(self) -> set[MeasurementKey]:
        return {measurement.key for measurement in self.allocator.snapshot().measurements}

    def unfinished(self, key: MeasurementKey) -> list[Request]:
        return [request for request in self.requests() if request.measurement_key == key and not request.status.ended]

    def heads(self) -> list[Request]:
        """The first unfinished request of each measurement, where that is queued."""
        heads = []
        for key in sorted(self.served()):
            unfinished = self.unfinished(key)
            if unfinished and unfinished[0].status is R.QUEUED:
                heads.append(unfinished[0])
        return heads

    def may_use(self, request: Request, wrapper: Wrapper) -> bool:
        """True when a waiting request could be given this wrapper, as the contract has it."""
        if wrapper.wrapper_id in request.failed_on:
            return False
        measurement = self.allocator.measurement(request.measurement_key)
        pin = measurement.machine_id
        others = [w for w in self.allocator.wrappers() if usable(w) and not self.is_draining(w.machine_id)]
        if self.is_draining(wrapper.machine_id):
            return False

        def fits_all(other: Wrapper) -> bool:
            return all(self.fits(each, other) for each in self.unfinished(request.measurement_key))

        if pin is not None:
            if any(w.machine_id == pin and self.fits(request, w) for w in others):
                return wrapper.machine_id == pin and self.fits(request, wrapper)
            alike = [w for w in others if self.gpu_type(w.machine_id) == self.gpu_type(pin) and fits_all(w)]
            if alike and self.gpu_type(wrapper.machine_id) != self.gpu_type(pin):
                return False
        return fits_all(wrapper) and self.is_of_type(measurement.gpu_type, wrapper)

    def fits(self, asked: Request | NewRequest, wrapper: Wrapper) -> bool:
        """True when a wrapper has the GPUs that an LLM needs, and the memory as far as both are known."""
        machine = self.allocator.machine(wrapper.machine_id)
        assert machine is not None
        has_bytes = machine.gpu_memory_bytes if wrapper.gpus else machine.memory_bytes
        if wrapper.gpus < asked.spec.gpus or asked.memory is None or has_bytes is None:
            return wrapper.gpus >= asked.spec.gpus
        return asked.memory.weights_bytes <= has_bytes * (asked.memory.gpus or max(1, wrapper.gpus))

    def is_draining(self, machine_id: str) -> bool:
        machine = self.allocator.machine(machine_id)
        return machine is not None and machine.draining

    def leases_on(self, machine_id: str) -> set[str]:
        wrappers = self.allocator.wrappers_on(machine_id)
        return {lease.request_id for w in wrappers if (lease := self.allocator.lease_by_wrapper(w.wrapper_id))}

    def is_of_type(self, asked: str | None, wrapper: Wrapper) -> bool:
        return asked is None or GPU_TYPES.get(asked, asked) == self.gpu_type(wrapper.machine_id)

    def gpu_type(self, machine_id: str) -> str | None:
        machine = self.allocator.machine(machine_id)
        return None if machine is None else machine.gpu_type

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

    def its_own_rules_hold(self) -> None:
        self.allocator.check()

    def what_was_written_is_what_is_known(self) -> None:
        assert self.memory.knows(self.allocator.snapshot())

    def ended_requests_hold_nothing(self) -> None:
        for request in self.requests():
            if request.status.ended:
                assert self.allocator.lease_of(request.request_id) is None
                assert all(w.request_id != request.request_id for w in self.allocator.wrappers())

    def one_request_of_a_measurement_is_served_at_a_time(self) -> None:
        served = [r.measurement_key for r in self.requests() if r.status in (R.DEPLOYING, R.DEPLOYED)]
        assert len(served) == len(set(served))

    def a_measurement_stays_on_its_machine_or_says_so(self) -> None:
        for request in self.requests():
            if request.status is R.DEPLOYED and request.machine_id is not None:
                self.served_on.setdefault(request.measurement_key, set()).add(request.machine_id)
        for key, machines in self.served_on.items():
            flags = self.allocator.measurement(key).flags
            assert len(machines) == 1 or any(flag.startswith("machine_") for flag in flags)

    def a_wrapper_that_was_told_everything_serves_its_lease_and_nobody_else(self) -> None:
        for wrapper_id, wrapper in self.cluster.wrappers.items():
            record = self.allocator.wrapper(wrapper_id)
            if record is None or record.epoch != wrapper.epoch:
                continue
            lease = self.allocator.lease_by_wrapper(wrapper_id)
            # A late BindLease can reach a new process, which has no LLM; the next deploy ends such a lease.
            assert wrapper.empty or wrapper.token in (None, lease.token_id if lease is not None else None)
            if lease is not None and self.allocator.request(lease.request_id).status is R.DEPLOYED:
                assert wrapper.token == lease.token_id
                well = wrapper.running == self.allocator.request(lease.request_id).spec
                noticed = self.cluster.is_busy(wrapper_id) or self.cluster.look_at(wrapper_id, self.allocator)
                assert well or noticed

    def a_token_whose_lease_has_ended_is_being_revoked(self) -> None:
        for wrapper_id, wrapper in self.cluster.wrappers.items():
            record, lease = self.allocator.wrapper(wrapper_id), self.allocator.lease_by_wrapper(wrapper_id)
            given_up = record is None or record.status in (W.FAILED, W.LOST, W.OFF)
            if (
                wrapper.token is None
                or wrapper.empty
                or given_up
                or (lease is not None and lease.token_id == wrapper.token)
            ):
                continue
            on_the_way = [c for c in self.cluster.commands if c.wrapper_id == wrapper_id and c.epoch > wrapper.epoch]
            assert on_the_way or wrapper_id in self.cluster.unseen

    def no_token_opens_two_wrappers(self) -> None:
        tokens = [wrapper.token for wrapper in self.cluster.wrappers.values() if wrapper.token is not None]
        assert len(tokens) == len(set(tokens))

    def what_was_to_be_the_same_is_the_same(self) -> None:
        for request in self.requests():
            if request.like_request_id is not None and request.deployed_s is not None:
                earlier = self.allocator.request(request.like_request_id)
                assert (request.spec, request.provenance) == (earlier.spec, earlier.provenance)

    def a_request_keeps_its_address_once_it_has_one(self) -> None:
        for request in self.requests():
            lease = self.allocator.lease_of(request.request_id)
            if request.deployed_s is not None and lease is not None:
                address = f"{lease.wrapper_id}/{lease.token_id}"
                assert self.token_of.setdefault(request.request_id, address) == address
        assert len(self.token_of) == len(set(self.token_of.values()))

    def nobody_waits_while_something_is_free(self) -> None:
        if self.shutting_down or self.just_loaded:
            return  # a registry that was loaded decides with the first event
        free = [w for w in self.allocator.wrappers() if w.status in (W.IDLE, W.READY)]
        for request in self.heads():
            assert not [w.wrapper_id for w in free if self.may_use(request, w)]

    def nobody_is_overtaken_too_often(self) -> None:
        for request_id, times in self.overtaken.items():
            assert times <= self.allocator.request(request_id).overtaken <= LIMITS.max_overtakes

    def every_tenant_has_its_turn(self) -> None:
        """The bound of ``Turns``: floor(w) + 1 turns of another with w times its weight; none if that came later."""
        weights = dict(LIMITS.tenant_weights)
        for tenant, turns in self.turns_of.items():
            for other, times in turns.items():
                ratio = weights.get(other, 1.0) / weights.get(tenant, 1.0)
                most = int(ratio) + 1
                if ratio <= 1:
                    most = self.later[tenant].get(other, most)
                assert times <= most, f"{other} before {tenant}: {turns}, {self.later[tenant]}"

    def low_is_served_too(self) -> None:
        """The bound of PRIORITY_TURNS."""
        assert all(times <= PRIORITY_TURNS for times in self.by_priority.values())

    def a_drained_machine_gets_no_new_lease(self) -> None:
        draining = {machine.machine_id for machine in self.allocator.machines() if machine.draining}
        assert draining == set(self.leased_before), "it is drained from the operator's one word to the other"
        for machine_id, before in self.leased_before.items():
            assert self.leases_on(machine_id) <= before
            for wrapper in self.allocator.wrappers_on(machine_id):
                assert wrapper.request_id is None or wrapper.request_id in before

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


def usable(wrapper: Wrapper) -> bool:
    return wrapper.status not in (W.LOST, W.FAILED, W.OFF)


# Two minutes on an idle machine, more on one that does something else.
TestAllocatorMachine = pytest.mark.timeout(1500)(AllocatorMachine.TestCase)
TestAllocatorMachine.settings = settings(stateful_step_count=200)
