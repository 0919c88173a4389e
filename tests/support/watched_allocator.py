"""An allocator whose decisions are followed from outside, and what must hold after each of them."""

from __future__ import annotations

from collections import Counter
from itertools import count

from registry.core.allocator import Allocator
from registry.core.commands import BindLease
from registry.core.decision import Limits
from registry.core.events import Event, NewRequest
from registry.core.policy import PRIORITY_TURNS
from registry.core.records import MeasurementKey, Request, StoredToken, Wrapper, WrapperStatus
from registry.wire.words import RequestStatus
from tests.support.allocator_scene import Memory, stored_token
from tests.support.queued_cluster import QueuedCluster

R, W = RequestStatus, WrapperStatus
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


class WatchedAllocator:
    """An allocator, a store and a cluster; counts whom decisions pass over, and checks the allocator's guarantees."""

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
            # A late BindLease can reach a new process, which has no LLM; the next deploy ends such a lease. A wrapper
            # that was given up gets no commands; the belief that comes with each request for its report ends its lease.
            told = wrapper.empty or record.status is W.FAILED
            assert told or wrapper.token in (None, lease.token_id if lease is not None else None)
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


def usable(wrapper: Wrapper) -> bool:
    return wrapper.status not in (W.LOST, W.FAILED, W.OFF)
