"""The simulated machine of tests/energy_world: its consistency, and examples that were computed by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.energy_world.expected import Expected
from tests.energy_world.history import Engine as EngineProcess
from tests.energy_world.history import History, Lease, Life, Load, Prompt, Stranger
from tests.energy_world.machine import KINDS, Cpu, Gpu, Llm, Machine, Wrapper, random_kind, random_machine
from tests.energy_world.random_history import random_history
from tests.energy_world.truth import Energy, Steps, Truth, sum_of, total
from tests.energy_world.world import EnergyWorld

pytestmark = pytest.mark.slow

seeds = st.integers(0, 10**6)
some_seeds = settings(max_examples=20, deadline=None)


def by_hand(*prompts: tuple[float, float, float], limit_w: float = 700.0) -> History:
    """Return a history of ten seconds on a machine with one GPU, one CPU package and these prompts.

    GPU: 60 W if idle, 40 W for a CUDA context, 400 W more during prefill, 200 W more during decode; two prompts
    together take √2 of that. CPU: 50 W if idle, 4 W per busy processor. DRAM: 10 W, 1 W per busy processor.
    ``prompts``: times of begin, first token and end, seconds.
    """
    machine = Machine(
        kind="calm",
        gpus=(Gpu(0, "GPU-0", "H100", 60.0, 40.0, 30.0, 1.0, 80 * 2**30, ((0.0, limit_w),)),),
        cpu=Cpu("CPU", 1, 32, (50.0,), 4.0, (10.0,), 1.0, 350.0),
        wrappers=(Wrapper("wrapper-0", (0,), (1.0,), (1.0,), 0.0, 0.5, 2.0),),
        llms=(Llm("alpha", 400.0, 200.0, 1000.0, 100.0, 0.5, 1.0, 0.0, 2**30),),
        system_cpus=0.0,
    )
    made = tuple(
        Prompt(f"p{n}", "lease", "wrapper-0", "alpha", begin, first, end, 100, 0, 10)
        for n, (begin, first, end) in enumerate(prompts)
    )
    return History(
        machine=machine,
        horizon_s=10.0,
        leases=(Lease("lease", "wrapper-0", "alpha", "single", None, 1.0, 9.0),),
        prompts=made,
        loads=(),
        lives=(Life("wrapper-0", 100, -100.0, 1e9),),
        engines=(EngineProcess("wrapper-0", "alpha", 101, 100, -100.0, 0.0, 1e9, 0.0, "at_once"),),
        strangers=(),
        clock_steps=(),
        pauses=(),
        epoch_s=1e9,
    )


def close(left: Energy, right: Energy, scale_j: float = 1.0) -> bool:
    """Whether two energies are equal in each component."""
    return all(
        math.isclose(getattr(left, name), getattr(right, name), rel_tol=1e-9, abs_tol=1e-9 * max(scale_j, 1.0))
        for name in Energy.__slots__
    )


def test_one_prompt_by_hand() -> None:
    """A prompt with 0.5 s of prefill and 1 s of decode costs 400 J for its own GPU power, and the base power of 1.5 s.

    Own: 400 W·0.5 s + 200 W·1 s = 400 J; one processor for 1.5 s: 6 J CPU, 1.5 J DRAM. Base power for 1.5 s: GPU 100 W,
    half a processor (CPU 2 W, DRAM 0.5 W), idle CPU 50 W and DRAM 10 W: 150 + 3 + 75 + 0.75 + 15 = 243.75 J.
    """
    history = by_hand((2.0, 2.5, 3.5))
    prompt = Expected(Truth(history)).prompt("p0")
    assert close(prompt.own, Energy(400.0, 6.0, 0.0, 1.5, 0.0))
    assert close(prompt.base, Energy(150.0, 3.0, 75.0, 0.75, 15.0))
    assert close(prompt.total, prompt.window)


def test_two_prompts_by_hand() -> None:
    """Two prompts that decode together for 1 s take 200·√2 W above the base. Each is charged half of it all."""
    history = by_hand((2.0, 2.0, 3.0), (2.0, 2.0, 3.0))
    expected = Expected(Truth(history))
    for name in ("p0", "p1"):
        assert expected.prompt(name).own.gpu_j == pytest.approx(100 * math.sqrt(2))
        assert expected.prompt(name).base.gpu_j == pytest.approx(50.0)
    assert sum_of(expected.prompt(name).total for name in ("p0", "p1")).total_j == pytest.approx(
        expected.prompt("p0").window.total_j
    )


def test_prefill_beside_decode_by_hand() -> None:
    """A prompt in prefill and one in decode, for 1 s: they take √(400² + 200²) W, two thirds and one third of it."""
    history = by_hand((2.0, 3.0, 3.0), (2.0, 2.0, 3.0))
    expected = Expected(Truth(history))
    both_j = math.sqrt(400**2 + 200**2)
    assert expected.prompt("p0").own.gpu_j == pytest.approx(both_j * 2 / 3)
    assert expected.prompt("p1").own.gpu_j == pytest.approx(both_j / 3)


def test_power_limit_by_hand() -> None:
    """With a power limit of 250 W and a base of 100 W, a prefill of 400 W takes only 150 W."""
    history = by_hand((2.0, 4.0, 4.0), limit_w=250.0)
    truth = Truth(history)
    assert truth.gpus[0].at(3.0) == 250.0
    assert Expected(truth).prompt("p0").own.gpu_j == pytest.approx(300.0)


def test_stranger_by_hand() -> None:
    """Another program's 100 W for 2 s on the wrapper's GPU are 200 J that the machine used, but not the lease."""
    plain = by_hand((2.0, 2.5, 3.5))
    shared = replace(plain, strangers=(Stranger(9, 2.0, 4.0, cpus=1.0, gpu=0, gpu_w=100.0),))
    alone, beside = Expected(Truth(plain)), Expected(Truth(shared))
    assert close(beside.unassigned(), Energy(200.0, 8.0, 0.0, 2.0, 0.0))
    assert close(beside.machine() - alone.machine(), Energy(200.0, 8.0, 0.0, 2.0, 0.0), 5000.0)
    assert beside.lease("lease").foreign_j == pytest.approx(200.0)
    assert close(beside.lease("lease").total, alone.lease("lease").total)


def test_death_by_hand() -> None:
    """A wrapper whose process is dead for 2 s uses 60 W (idle GPU), 50 W (CPU) and 10 W (DRAM): a hole of 240 J."""
    plain = by_hand((2.0, 2.5, 3.0))
    [engine], [life], [lease] = plain.engines, plain.lives, plain.leases
    back = replace(engine, pid=201, wrapper_pid=200, begin_s=6.0, loaded_s=7.0)
    died = replace(
        plain,
        lives=(replace(life, end_s=4.0), replace(life, pid=200, begin_s=6.0)),
        engines=(replace(engine, end_s=4.0), back),
        loads=(Load("load", "wrapper-0", "alpha", 6.0, 7.0, "lease"),),
        leases=(replace(lease, holes=((4.0, 6.0),)),),
    )
    truth = Expected(Truth(died)).lease("lease")
    assert [hole.energy.total_j for hole in truth.holes] == [pytest.approx(240.0)]
    assert [load.energy.gpu_j for load in truth.loads] == [pytest.approx(130.0)]
    assert [(part.begin_s, part.end_s) for part in truth.idle] == [(1.0, 2.0), (3.0, 4.0), (7.0, 9.0)]
    assert truth.metered.total_j == pytest.approx(truth.total.total_j - 240.0)


def test_counted_and_steady_by_hand() -> None:
    """A stretch has the tokens that were generated in it: half of a decode has half of its tokens."""
    expected = Expected(Truth(by_hand((2.0, 2.5, 3.5), (4.0, 4.5, 5.5))))
    counted = expected.counted("lease")
    assert counted
    assert (counted.begin_s, counted.end_s, counted.output_tokens) == (2.0, 5.5, 20)
    half = expected.stretch("lease", 3.0, 4.0)
    assert half.output_tokens == pytest.approx(5.0)
    assert half.j_per_token == pytest.approx(half.energy.total_j / 5)
    assert expected.steady("lease") is None


def test_same_arguments_same_world() -> None:
    """Two worlds with the same arguments have the same events, and equal counters at every moment."""
    one, two, other = EnergyWorld(5, "h100_intel"), EnergyWorld(5, "h100_intel"), EnergyWorld(6, "h100_intel")
    assert one.history == two.history
    assert one.history != other.history
    assert [c.energy_mj(50.0) for c in one.gpu_counters] == [c.energy_mj(50.0) for c in two.gpu_counters]
    assert [z.energy_uj(50.0) for z in one.zones] == [z.energy_uj(50.0) for z in two.zones]


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(0, 700)), min_size=1, max_size=20), st.floats(0.0, 1.0))
def test_integral_is_quadrature(pieces: list[tuple[float, float]], part: float) -> None:
    """The exact integral of a function equals a sum over small steps, for numbers and for arrays."""
    times = np.concatenate(([0.0], np.cumsum([length for length, _ in pieces])))
    steps = Steps(times.tolist(), [watts for _, watts in pieces])
    end_s = part * float(times[-1])
    grid = np.linspace(0.0, end_s, 4001)
    middles = (grid[1:] + grid[:-1]) / 2
    numeric = sum(steps.at(at_s) for at_s in middles.tolist()) * end_s / 4000
    assert steps.integral(end_s) == pytest.approx(numeric, abs=700 * (len(pieces) + 1) * end_s / 4000 + 1e-9)
    assert steps.integrals(grid)[-1] == pytest.approx(steps.integral(end_s))
    assert total([(steps, 2.0), (steps, 0.5)]).integral(end_s) == pytest.approx(2.5 * steps.integral(end_s))


@pytest.mark.parametrize("kind", ["h100_intel", "gh200"])
def test_machine_is_quadrature_of_its_power(kind: str) -> None:
    """The power of all components, summed over steps of 2 ms, equals the machine's energy within 0.2 %."""
    world = EnergyWorld(11, kind, horizon_s=60.0)
    truth = world.truth
    middles = np.arange(0.001, world.horizon_s, 0.002)
    numeric = sum(s.at(at) for s in (*truth.gpus, *truth.packages, *truth.drams) for at in middles.tolist()) * 0.002
    assert world.expected.machine().total_j == pytest.approx(numeric, rel=2e-3)


@given(seeds)
@some_seeds
def test_sums(seed: int) -> None:
    """Prompts + idle + loads + holes = lease; leases + the rest = wrapper; wrappers + unassigned = machine = days."""
    world = EnergyWorld(seed)
    expected, history = world.expected, world.history
    for lease in history.leases:
        truth = expected.lease(lease.id)
        parts = sum_of(part.energy for part in (*truth.idle, *truth.loads, *truth.holes))
        assert close(truth.prompts + parts, truth.total, truth.total.total_j)
        assert all(hole.begin_s >= lease.begin_s and hole.end_s <= lease.end_s for hole in truth.holes)
    wrappers = [expected.wrapper(wrapper.name) for wrapper in world.machine.wrappers]
    for wrapper in wrappers:
        rest = sum_of(part.energy for part in wrapper.unleased)
        assert close(wrapper.leases + rest, wrapper.total, wrapper.total.total_j)
    machine = expected.machine()
    assert close(sum_of(w.total for w in wrappers) + expected.unassigned(), machine, machine.total_j)
    assert close(sum_of(expected.day(day) for day in expected.days), machine, machine.total_j)


@given(seeds)
@some_seeds
def test_prompts_alone_take_all(seed: int) -> None:
    """A prompt alone in flight is charged all energy of its window; together with others, less; if refused, nothing."""
    world = EnergyWorld(seed)
    for prompt in world.history.prompts:
        truth = world.expected.prompt(prompt.id)
        others = [
            p
            for p in world.history.prompts
            if p.ran and p is not prompt and p.wrapper == prompt.wrapper
            if p.begin_s < prompt.end_s and prompt.begin_s < p.end_s
        ]
        if not prompt.ran:
            assert truth.total == Energy()
        elif others:
            assert truth.total.total_j < truth.window.total_j
        else:
            assert close(truth.total, truth.window, truth.window.total_j)


@given(seeds)
@some_seeds
def test_histories_make_sense(seed: int) -> None:
    """Events are in order, prompts are within their lease and not in holes, a wrapper's leases don't overlap."""
    world = EnergyWorld(seed)
    history = world.history
    times = [event.at_s for event in world.events]
    assert times == sorted(times)
    assert times[-1] <= world.horizon_s
    leases = {lease.id: lease for lease in history.leases}
    assert len({p.id for p in history.prompts}) == len(history.prompts)
    for prompt in history.prompts:
        lease = leases[prompt.lease_id]
        assert lease.begin_s <= prompt.begin_s <= prompt.prefill_end_s <= prompt.end_s <= lease.end_s
        assert prompt.llm == lease.llm
        assert all(prompt.end_s <= begin_s or prompt.begin_s >= end_s for begin_s, end_s in lease.holes)
        assert 0 <= prompt.cached_tokens < prompt.prompt_tokens
    for wrapper in world.machine.wrappers:
        own = [lease for lease in history.leases if lease.wrapper == wrapper.name]
        assert all(one.end_s <= two.begin_s for one, two in pairwise(own))
        for segment in world.truth.segments[wrapper.name]:
            assert segment.loaded or not segment.in_flight


@given(seeds)
@some_seeds
def test_power_is_within_limits(seed: int) -> None:
    """No GPU or module exceeds its current power limit, and no machine uses more processors than it has."""
    world = EnergyWorld(seed)
    truth, machine = world.truth, world.machine
    for gpu, counter in zip(machine.gpus, world.gpu_counters, strict=True):
        for at_s in np.arange(0.0, world.horizon_s, 0.5).tolist():
            assert gpu.idle_w <= truth.gpus[gpu.index].at(at_s) <= gpu.limit_w(at_s) + 1e-9
            assert counter.power.at(at_s) <= gpu.limit_w(at_s) + 1e-9
    assert truth.busy_cpus.values.max() <= machine.cpu.processors


def test_every_ingredient_occurs() -> None:
    """150 seeds contain every kind, pattern and outcome, deaths, other programs, loads in leases and clock steps."""
    found: Counter[str] = Counter()
    for seed in range(150):
        rng = Random(f"{seed}:machine")
        kind = random_kind(rng)
        history = random_history(rng, random_machine(rng, kind, 120.0), 120.0, calm=kind == "calm")
        found[kind] += 1
        found.update({lease.pattern for lease in history.leases} | {prompt.outcome for prompt in history.prompts})
        found.update({f"reaping {engine.reaping}" for engine in history.engines})
        found["hole"] += any(lease.holes for lease in history.leases)
        found["load in a lease"] += any(load.lease_id for load in history.loads)
        found["stranger on the CPU"] += any(s.cpus and s.gpu is None for s in history.strangers)
        found["stranger on a GPU"] += any(s.gpu is not None for s in history.strangers)
        found["limit changes"] += any(len(gpu.limits) > 1 for gpu in history.machine.gpus)
        found["clock step"] += bool(history.clock_steps)
        found["pause"] += bool(history.pauses)
        found["warm-up"] += any(prompt.warm_up for prompt in history.prompts)
        found["cached"] += any(prompt.cached_tokens for prompt in history.prompts)
        ends = {lease.end_s for lease in history.leases}
        found["lease at once"] += any(lease.begin_s in ends for lease in history.leases)
    wanted = {*KINDS, "single", "equal", "steady", "overlapping", "bursts", "quiet", "ok", "hung_up", "refused", "died"}
    wanted |= {"reaping at_once", "reaping zombie", "reaping twice", "reaping missing", "lease at once"}
    assert wanted <= found.keys()
    assert min(found.values()) > 2


def test_wall_clock_steps() -> None:
    """A step changes the wall clock; the days are those of a correct clock, and cover the history once."""
    world = next(w for w in map(EnergyWorld, range(200)) if w.history.clock_steps)
    [step] = world.history.clock_steps
    before_s = world.history.wall_s(step.at_s - 0.01)
    assert world.history.wall_s(step.at_s) - before_s == pytest.approx(step.by_s + 0.01, abs=1e-5)
    spans = list(world.expected.days.values())
    assert spans[0][0] == 0.0
    assert spans[-1][1] == world.horizon_s
    assert all(one[1] == two[0] for one, two in pairwise(spans))


def test_clock_never_goes_back() -> None:
    """The simulated clock refuses a time that has passed."""
    world = EnergyWorld(1)
    world.clock.advance(5.0)
    with pytest.raises(ValueError, match=r"4\.0"):
        world.clock.advance_to(4.0)


@given(seeds)
@some_seeds
def test_llms_and_steady_stretches(seed: int) -> None:
    """The leases of all LLMs together are all leases; a steady stretch is within its lease, and has no idle time."""
    world = EnergyWorld(seed)
    expected = world.expected
    leases_j = sum(expected.lease(lease.id).total.total_j for lease in world.history.leases)
    assert sum(expected.llm(llm.name).leases_j for llm in world.machine.llms) == pytest.approx(leases_j)
    for lease in world.history.leases:
        steady, counted = expected.steady(lease.id), expected.counted(lease.id)
        if steady:
            assert lease.begin_s <= steady.begin_s < steady.end_s <= lease.end_s
        if counted and not any(p.warm_up for p in world.history.prompts_of(lease.id)):
            tokens = sum(p.output_tokens for p in world.history.prompts_of(lease.id))
            assert counted.output_tokens == pytest.approx(tokens)
