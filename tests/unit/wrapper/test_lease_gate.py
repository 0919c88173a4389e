"""Who may prompt: one token at a time, for as long as its lease lasts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from deployments.wrapper import lease_gate
from deployments.wrapper.lease_gate import LeaseGate
from registry.contract.messages import LeaseGrant, Moment
from registry.errors import EngineNotReady, LeaseEnded, NoSuchLease, RegistryUnheard
from tests.support.fake_counters import ManualClock

GRANT = LeaseGrant("request-1", 1, "token-1", "{}", ends_in_s=100.0, idle_limit_s=10.0)
FENCE_S = 30.0
OTHER = replace(GRANT, request_id="request-2", token="token-2")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def gate(clock: ManualClock) -> LeaseGate:
    return LeaseGate(clock, fence_s=FENCE_S, process="this")


def ended_how(gate: LeaseGate, token: str) -> str:
    with pytest.raises(LeaseEnded) as caught:
        gate.check(token)
    return caught.value.how


def test_nothing_bound_lets_nobody_in(gate: LeaseGate) -> None:
    """Without a lease no token is good, not even an empty one."""
    gate.commanded = True
    for token in ("", "token-1", "tökén"):
        with pytest.raises(NoSuchLease):
            gate.check(token)
    assert gate.grant is None
    assert gate.idle_for_s is None


def test_a_fresh_wrapper_sends_nobody_away_for_good(gate: LeaseGate) -> None:
    """Before the registry has said anything a token may be good: its holder is told to try again."""
    with pytest.raises(EngineNotReady) as told:
        gate.check("token-1")
    assert told.value.retryable


@pytest.mark.parametrize("token", ["", "token-", "token-11", "TOKEN-1", "token-2", "tökén-1"])
def test_only_the_whole_token_is_good(gate: LeaseGate, token: str) -> None:
    """Nothing but the very token of the lease is let in."""
    gate.bind(GRANT)
    assert gate.check("token-1") is GRANT
    with pytest.raises(NoSuchLease):
        gate.check(token)


# --- ends --------------------------------------------------------------------------------------------------


def test_deadline_is_the_first_moment_outside(gate: LeaseGate, clock: ManualClock) -> None:
    """A lease is held while now < deadline, used or not; at the deadline it has expired."""
    gate.bind(replace(GRANT, idle_limit_s=1000.0))
    clock.now_s += 99.999
    gate.check("token-1")
    gate.touch()
    clock.now_s = 1100.0
    assert ended_how(gate, "token-1") == "expired"
    assert gate.grant is None
    assert gate.idle_for_s is None


def test_idle_limit_is_the_first_moment_outside(gate: LeaseGate, clock: ManualClock) -> None:
    """A lease that nobody uses ends when the idle limit is reached, not before."""
    gate.bind(GRANT)
    clock.now_s += 9.999
    gate.check("token-1")
    clock.now_s = 1010.0
    assert ended_how(gate, "token-1") == "expired"


def test_check_does_not_extend(gate: LeaseGate, clock: ManualClock) -> None:
    """Asking for the status is no use: only a prompt or a keep-alive extends a lease."""
    gate.bind(GRANT)
    clock.now_s += 9
    gate.check("token-1")
    clock.now_s += 1
    assert ended_how(gate, "token-1") == "expired"


def test_keep_alive_extends(gate: LeaseGate, clock: ManualClock) -> None:
    """A keep-alive starts the idle time anew, up to the deadline."""
    gate.bind(GRANT)
    for _ in range(10):
        clock.now_s += 9.9
        gate.check("token-1")
        gate.touch()
    clock.now_s += 1
    assert ended_how(gate, "token-1") == "expired"


def test_prompt_in_flight_is_use(gate: LeaseGate, clock: ManualClock) -> None:
    """While a prompt is answered the lease is not idle; its idle time starts when the prompt is over."""
    gate.bind(GRANT)
    gate.enter()
    clock.now_s += 50
    assert gate.check("token-1") is GRANT
    assert gate.idle_for_s == 0.0
    assert gate.in_flight == 1
    gate.leave(GRANT)
    clock.now_s += 9.5
    assert gate.idle_for_s == 9.5
    gate.check("token-1")
    clock.now_s += 0.5
    assert ended_how(gate, "token-1") == "expired"


def test_prompt_in_flight_does_not_outlast_the_deadline(gate: LeaseGate, clock: ManualClock) -> None:
    """The deadline is for prompts in flight too."""
    gate.bind(GRANT)
    gate.enter()
    clock.now_s += 100
    assert ended_how(gate, "token-1") == "expired"
    gate.leave(GRANT)
    assert gate.in_flight == 0


@pytest.mark.parametrize("how", ["released", "shutdown", "failed"])
def test_holder_is_told_how_it_ended(gate: LeaseGate, how: str) -> None:
    """A token of a lease that was ended is refused at once, with the reason, as often as it comes."""
    gate.bind(GRANT)
    gate.unbind(how)
    assert ended_how(gate, "token-1") == how
    assert ended_how(gate, "token-1") == how
    gate.unbind("again")
    assert ended_how(gate, "token-1") == how


def test_late_release_does_not_change_how_it_ended(gate: LeaseGate, clock: ManualClock) -> None:
    """A lease that expired unnoticed has expired, though a release or another lease comes before anybody asks."""
    gate.bind(GRANT)
    clock.now_s += 10
    gate.unbind("released")
    assert ended_how(gate, "token-1") == "expired"
    gate.bind(OTHER)
    clock.now_s += 10
    gate.bind(GRANT)
    assert ended_how(gate, "token-2") == "expired"


# --- binding -----------------------------------------------------------------------------------------------


def test_new_lease_takes_the_place_of_the_old(gate: LeaseGate) -> None:
    """There is one lease: who comes next ends who was there."""
    gate.bind(GRANT)
    gate.bind(OTHER)
    assert ended_how(gate, "token-1") == "released"
    assert gate.check("token-2") is OTHER


def test_binding_again_renews_the_times(gate: LeaseGate, clock: ManualClock) -> None:
    """A registry that restarted binds its lease again: the same token, with what is left of its time."""
    gate.bind(GRANT)
    clock.now_s += 9
    gate.bind(replace(GRANT, ends_in_s=20.0))
    clock.now_s += 9
    gate.check("token-1")
    gate.touch()
    clock.now_s += 9
    gate.touch()
    clock.now_s += 2
    assert ended_how(gate, "token-1") == "expired"


def test_prompt_counts_for_its_lease_though_it_was_bound_again(gate: LeaseGate, clock: ManualClock) -> None:
    """The end of a prompt extends its lease also when the lease was bound again meanwhile."""
    gate.bind(GRANT)
    gate.enter()
    gate.bind(replace(GRANT, ends_in_s=90.0))
    clock.now_s += 50
    gate.leave(GRANT)
    clock.now_s += 9
    assert gate.check("token-1").ends_in_s == 90.0


def test_prompt_of_an_older_lease_does_not_extend(gate: LeaseGate, clock: ManualClock) -> None:
    """A prompt that outlived its lease gives the next lease no time."""
    gate.bind(GRANT)
    gate.enter()
    gate.bind(OTHER)
    clock.now_s += 9
    gate.leave(GRANT)
    clock.now_s += 1
    assert ended_how(gate, "token-2") == "expired"


def test_lease_without_time_is_over_at_once(gate: LeaseGate) -> None:
    """A lease that reaches the wrapper after its end is never held."""
    gate.bind(replace(GRANT, ends_in_s=0.0))
    assert ended_how(gate, "token-1") == "expired"


def test_lease_can_come_back(gate: LeaseGate) -> None:
    """A lease that ended here and is bound again is good again: the registry knows better."""
    gate.bind(GRANT)
    gate.unbind("expired")
    gate.bind(GRANT)
    assert gate.check("token-1") is GRANT


def test_old_tokens_are_forgotten(gate: LeaseGate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many ended leases are remembered; the oldest are forgotten, and are still refused."""
    monkeypatch.setattr(lease_gate, "REMEMBERED_TOKENS", 2)
    for number in range(4):
        gate.bind(replace(GRANT, request_id=f"r{number}", token=f"t{number}"))
    gate.unbind("released")
    for token in ("t0", "t1"):
        with pytest.raises(NoSuchLease):
            gate.check(token)
    assert [ended_how(gate, token) for token in ("t2", "t3")] == ["released", "released"]


# --- the fence ---------------------------------------------------------------------------------------------


def heard(gate: LeaseGate) -> bool:
    """Whether new prompts of the bound lease are taken."""
    try:
        gate.require_heard()
    except RegistryUnheard:
        return False
    return True


def test_fence_is_the_first_moment_outside(gate: LeaseGate, clock: ManualClock) -> None:
    """Prompts are taken while the last word is younger than the fence, and again with the next; the lease stays."""
    gate.bind(replace(GRANT, as_of=gate.moment, idle_limit_s=1000.0))
    clock.now_s += 29.999
    assert heard(gate)
    clock.now_s = 1030.0
    assert not heard(gate)
    assert gate.check("token-1").token == "token-1"
    gate.believe("request-1", gate.moment)
    assert heard(gate)


def test_a_word_counts_from_when_it_was_said(gate: LeaseGate, clock: ManualClock) -> None:
    """A word that was on its way for long opens nothing, and takes nothing from one that was quicker."""
    said = gate.moment
    clock.now_s += 20
    gate.bind(replace(GRANT, as_of=gate.moment, idle_limit_s=1000.0))
    gate.believe("request-1", said)
    clock.now_s += 29
    assert heard(gate)
    clock.now_s += 1
    gate.believe("request-1", said)
    gate.bind(replace(GRANT, as_of=said, idle_limit_s=1000.0))
    assert not heard(gate)


@pytest.mark.parametrize("as_of", [None, Moment("another", 1e9)])
def test_a_moment_of_another_process_says_nothing(gate: LeaseGate, as_of: Moment | None) -> None:
    """What was said to a process that is gone, or before anybody heard of this one, lets nobody in."""
    gate.bind(replace(GRANT, as_of=as_of))
    gate.believe("request-1", as_of)
    assert not heard(gate)
    gate.believe("request-1", gate.moment)
    assert heard(gate)
    gate.believe("request-2", as_of)
    assert heard(gate)


def test_a_word_for_another_is_none_for_the_bound_lease(gate: LeaseGate) -> None:
    """Who is told that somebody else has the lease, or nobody, takes no prompts, until it is bound anew."""
    for believed in (None, "request-2"):
        gate.bind(replace(GRANT, as_of=gate.moment))
        assert heard(gate)
        gate.believe(believed, gate.moment)
        assert not heard(gate)


def test_without_a_lease_there_is_nothing_to_hear(gate: LeaseGate) -> None:
    """The fence is about leases: without one the token itself is refused."""
    assert heard(gate)


# --- all of it together ------------------------------------------------------------------------------------


class GateMachine(RuleBasedStateMachine):
    """Any order of binds, unbinds, prompts and waiting, against the rule in words: held while now < its end."""

    prompts = Bundle("prompts")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(0.0)
        self.gate = LeaseGate(self.clock, fence_s=FENCE_S, process="this")
        self.count = 0
        self.grant: LeaseGrant | None = None
        self.deadline_s = self.used_s = 0.0
        self.flying = 0
        self.ended: dict[str, str] = {}

    def over(self) -> bool:
        assert self.grant is not None
        idle = self.clock.now_s >= self.used_s + self.grant.idle_limit_s and not self.flying
        return self.clock.now_s >= self.deadline_s or idle

    def settle(self) -> None:
        if self.grant is not None and self.over():
            self.ended[self.grant.token] = "expired"
            self.grant = None

    def take(self, grant: LeaseGrant) -> None:
        self.gate.bind(grant)
        self.grant, self.deadline_s, self.used_s = grant, self.clock.now_s + grant.ends_in_s, self.clock.now_s
        self.ended.pop(grant.token, None)

    @rule(ends_in_s=st.integers(0, 30), idle_limit_s=st.integers(1, 10))
    def bind(self, ends_in_s: int, idle_limit_s: int) -> None:
        self.settle()
        if self.grant is not None:
            self.ended[self.grant.token] = "released"
        self.count += 1
        self.take(LeaseGrant(f"r{self.count}", 1, f"t{self.count}", "{}", ends_in_s, idle_limit_s))

    @precondition(lambda self: self.grant is not None)
    @rule(ends_in_s=st.integers(0, 30))
    def bind_again(self, ends_in_s: int) -> None:
        self.settle()
        if self.grant is not None:
            self.take(replace(self.grant, ends_in_s=ends_in_s))

    @rule(how=st.sampled_from(["released", "shutdown"]))
    def unbind(self, how: str) -> None:
        self.settle()
        self.gate.unbind(how)
        if self.grant is not None:
            self.ended[self.grant.token] = how
            self.grant = None

    @rule(seconds=st.integers(0, 12))
    def wait(self, seconds: int) -> None:
        self.settle()  # what is over now stays over
        self.clock.now_s += seconds

    @rule(target=prompts)
    def begin(self) -> str:
        self.settle()
        if self.grant is None:
            return ""
        self.gate.enter()
        self.flying += 1
        self.used_s = self.clock.now_s
        return self.grant.token

    @rule(token=consumes(prompts))
    def finish(self, token: str) -> None:
        if not token:
            return
        self.settle()
        self.gate.leave(LeaseGrant("any", 1, token, "{}", 1, 1))
        self.flying -= 1
        if self.grant is not None and self.grant.token == token:
            self.used_s = self.clock.now_s

    @invariant()
    def one_token_is_good(self) -> None:
        self.settle()
        assert self.gate.grant == self.grant
        assert self.gate.in_flight == self.flying
        for number in range(1, self.count + 1):
            token = f"t{number}"
            if self.grant is not None and self.grant.token == token:
                assert self.gate.check(token) is self.grant
            else:
                assert ended_how(self.gate, token) == self.ended[token]
        expected = None if self.grant is None else 0.0 if self.flying else self.clock.now_s - self.used_s
        assert self.gate.idle_for_s == expected


GateMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestGate = GateMachine.TestCase


def test_change_of_holder_is_told(clock: ManualClock) -> None:
    """Each bind is told, and each end of a lease with the time at which it was over, however late that is noticed."""
    told: list[tuple[str | None, float]] = []
    gate = LeaseGate(
        clock,
        fence_s=FENCE_S,
        process="this",
        on_change=lambda grant, since_s: told.append((grant.request_id if grant else None, since_s)),
    )
    gate.bind(GRANT)
    clock.now_s += 1
    gate.bind(OTHER)
    clock.now_s += 25
    assert gate.grant is None
    gate.bind(GRANT)
    gate.enter()
    clock.now_s += 150
    assert gate.grant is None
    gate.bind(OTHER)
    gate.unbind("released")
    assert told == [
        ("request-1", 1000.0),
        (None, 1001.0),
        ("request-2", 1001.0),
        (None, 1011.0),  # its idle limit
        ("request-1", 1026.0),
        (None, 1126.0),  # its deadline
        ("request-2", 1176.0),
        (None, 1176.0),
    ]
