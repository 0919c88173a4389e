"""Random histories by seed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from tests.energy_world.history import (
    ClockStep,
    Engine,
    History,
    Lease,
    Life,
    Load,
    Outcome,
    Pause,
    Prompt,
    Reaping,
    Stranger,
)
from tests.energy_world.machine import Machine, Wrapper

PATTERNS: dict[str, float] = {
    "single": 0.22,  # one at a time, with gaps
    "equal": 0.12,  # equal prompts of 0.05 to 2 s, one at a time, at equal distances
    "steady": 0.24,  # 1, 4 or 16 in flight all the time
    "overlapping": 0.18,  # arrivals at random
    "bursts": 0.16,  # 2 to 16 begin within 20 ms
    "quiet": 0.08,  # a lease without prompts
}
"""How the prompts of a lease arrive → probability."""

DEATH = 0.25
"""Probability that a wrapper's process dies once, in the middle of a lease."""
REFUSED = 0.03
HUNG_UP = 0.05
MOST_PROMPTS = 250
"""At most so many prompts in a lease."""
FOREVER_S = 1e9


def random_history(rng: Random, machine: Machine, horizon_s: float, *, calm: bool = False) -> History:
    """Return a random history; a calm one has no deaths, strangers, pauses, steps or refusals."""
    parts = [_WrapperHistory(rng, machine, wrapper, horizon_s, calm=calm) for wrapper in machine.wrappers]
    midnight_s = 1_767_225_600.0 + 86_400 * rng.randrange(300)
    crosses = rng.random() < 0.2
    epoch_s = midnight_s - rng.uniform(0.2, 0.8) * horizon_s if crosses else midnight_s + rng.uniform(3_600, 80_000)
    ends_s = [lease.end_s for part in parts for lease in part.leases]
    ends_s += [load.end_s for part in parts for load in part.loads]
    horizon_s = max(horizon_s, max(ends_s, default=0.0) + 2.0)
    steps, pauses = [], []
    if not calm and rng.random() < 0.15:
        by_s = rng.choice((-3600.0, -2.0, -0.4, 0.4, 2.0, 3600.0))
        steps.append(ClockStep(rng.uniform(0.1, 0.9) * horizon_s, by_s))
    if not calm and rng.random() < 0.1:
        begin_s = rng.uniform(0.1, 0.7) * horizon_s
        pauses.append(Pause(begin_s, begin_s + rng.uniform(0.5, 20.0)))
    return History(
        machine=machine,
        horizon_s=horizon_s,
        leases=tuple(lease for part in parts for lease in part.leases),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        loads=tuple(load for part in parts for load in part.loads),
        lives=tuple(life for part in parts for life in part.lives),
        engines=tuple(engine for part in parts for engine in part.engines),
        strangers=() if calm else _random_strangers(rng, machine, horizon_s),
        clock_steps=tuple(steps),
        pauses=tuple(pauses),
        epoch_s=epoch_s,
    )


def _random_strangers(rng: Random, machine: Machine, horizon_s: float) -> tuple[Stranger, ...]:
    """Return others' load on the CPUs (in half of the histories) and on one GPU (in a tenth)."""
    found = []
    free_cpus = machine.cpu.processors - 6.0 * len(machine.wrappers)
    if rng.random() < 0.5:
        for number in range(rng.choice((1, 1, 2))):
            begin_s = rng.uniform(0, 0.7) * horizon_s
            length_s = rng.uniform(2, 0.5 * horizon_s)
            cpus = rng.choice((0.3, 1.0, free_cpus / 4, free_cpus / 2))
            found.append(Stranger(9000 + number, begin_s, begin_s + length_s, cpus=cpus))
    used = [gpu for wrapper in machine.wrappers for gpu in wrapper.gpus]
    if used and rng.random() < 0.1:
        begin_s = rng.uniform(0, 0.8) * horizon_s
        end_s = begin_s + rng.uniform(1, 30)
        watts = rng.uniform(20, 150)
        found.append(Stranger(9100, begin_s, end_s, cpus=0.5, gpu=rng.choice(used), gpu_w=watts))
    return tuple(found)


@dataclass
class _WrapperHistory:
    """Writes the history of one wrapper, lease after lease."""

    rng: Random
    machine: Machine
    wrapper: Wrapper
    horizon_s: float
    calm: bool
    leases: list[Lease] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.place = self.machine.wrappers.index(self.wrapper)
        self.numbered = 0
        self.next_pid = 1000 * (self.place + 1)
        self.end_s = self.horizon_s - 2.0
        self.llm = rng.choice(self.machine.llms)
        running = rng.random() < 0.4
        now_s = 0.0 if running else rng.uniform(0.0, 4.0)
        self._start_process(-rng.uniform(60, 10_000) if running else now_s)
        now_s = self._load(now_s, done=running)
        dies_in = rng.randrange(3) if not self.calm and rng.random() < DEATH else None
        while now_s < self.end_s - 4.0:
            if self.leases and rng.random() < 0.25:
                self.llm = rng.choice(self.machine.llms)
                now_s = self._load(now_s)
            now_s += 0.0 if self.leases and rng.random() < 0.4 else min(rng.expovariate(1 / 3.0), 20.0)
            if now_s > self.end_s - 4.0:
                break
            now_s = self._lease(now_s, dies=len(self.leases) == dies_in)

    def _pid(self) -> int:
        self.next_pid += 1
        return self.next_pid

    def _start_process(self, at_s: float) -> None:
        self.lives.append(Life(self.wrapper.name, self._pid(), at_s, FOREVER_S))

    def _load(self, at_s: float, *, done: bool = False, lease_id: str | None = None) -> float:
        """Load the LLM, or have it loaded since before the begin; return when it is ready [s]."""
        rng = self.rng
        self._stop_engine(at_s)
        end_s = at_s if done else at_s + rng.uniform(2.0, 12.0)
        begin_s = self.lives[-1].begin_s if done else at_s
        if not done:
            load_id = f"load-{self.place}-{len(self.loads)}"
            self.loads.append(Load(load_id, self.wrapper.name, self.llm.name, at_s, end_s, lease_id))
        reaping: Reaping = "at_once" if self.calm else rng.choice(("at_once", "at_once", "zombie", "twice", "missing"))
        earlier_cpu_s = rng.choice((30.0, 3600.0)) * rng.uniform(0.5, 1.5) if done else 0.0
        self.engines.append(
            Engine(
                wrapper=self.wrapper.name,
                llm=self.llm.name,
                pid=self._pid(),
                wrapper_pid=self.lives[-1].pid,
                begin_s=begin_s,
                loaded_s=end_s,
                end_s=FOREVER_S,
                earlier_cpu_s=earlier_cpu_s,
                reaping=reaping,
            )
        )
        self.next_pid += 4  # for the engine's own children
        return end_s

    def _stop_engine(self, at_s: float) -> None:
        if self.engines and self.engines[-1].end_s == FOREVER_S:
            self.engines[-1] = replace(self.engines[-1], end_s=at_s)

    def _lease(self, begin_s: float, *, dies: bool) -> float:
        """Write one lease and return its end [s]."""
        rng = self.rng
        lease_id = f"lease-{self.place}-{len(self.leases)}"
        pattern = rng.choices(list(PATTERNS), list(PATTERNS.values()))[0]
        concurrency = rng.choice((1, 4, 16)) if pattern == "steady" else None
        limit_s = min(self.end_s, begin_s + rng.uniform(4.0, 60.0))
        made = self._prompts(lease_id, pattern, concurrency, begin_s, limit_s)
        holes: tuple[tuple[float, float], ...] = ()
        if dies:
            death_s = begin_s + rng.uniform(0.2, 0.9) * (limit_s - begin_s)
            made = [_cut(p, death_s, "died") if p.end_s > death_s else p for p in made if p.begin_s < death_s]
            self.lives[-1] = replace(self.lives[-1], end_s=death_s)
            self._stop_engine(death_s)
            back_s = death_s + rng.uniform(1.0, 8.0)
            holes = ((death_s, back_s),)
            self._start_process(back_s)
            ready_s = self._load(back_s, lease_id=lease_id)
            limit_s = max(ready_s, min(self.end_s, ready_s + rng.uniform(0.0, 20.0)))
            made += self._prompts(lease_id, pattern, concurrency, ready_s, limit_s)
        last_s = max([begin_s + 0.5, *(p.end_s for p in made), *(e.loaded_s for e in self.engines[-1:] if dies)])
        # A third ends with its last prompt, to the instant.
        end_s = last_s if made and rng.random() < 0.33 else max(last_s, rng.uniform(last_s, limit_s))
        if concurrency and rng.random() < 0.5:
            made = [replace(p, warm_up=place < concurrency) for place, p in enumerate(made)]
        self.prompts += made
        self.leases.append(
            Lease(lease_id, self.wrapper.name, self.llm.name, pattern, concurrency, begin_s, end_s, holes)
        )
        return end_s

    def _prompts(
        self, lease_id: str, pattern: str, concurrency: int | None, begin_s: float, limit_s: float
    ) -> list[Prompt]:
        """Return the prompts of a pattern that end within the limit, in order of their begin."""
        rng = self.rng
        first_s = begin_s + (0.0 if rng.random() < 0.3 else min(rng.expovariate(1 / 1.0), 5.0))
        begins: list[tuple[float, float, float]] = []  # when, its shortest and longest [s]
        if pattern == "overlapping":
            gap_s, now_s = rng.uniform(0.3, 2.0), first_s
            while now_s < limit_s:
                begins.append((now_s, 0.05, 20.0))
                now_s += rng.expovariate(1 / gap_s)
        elif pattern == "bursts":
            now_s = first_s
            while now_s < limit_s:
                begins += [(now_s + rng.uniform(0, 0.02), 0.05, 6.0) for _ in range(rng.randint(2, 16))]
                now_s += rng.uniform(2.0, 8.0)
        elif pattern != "quiet":
            return self._in_turn(lease_id, pattern, concurrency or 1, first_s, limit_s)
        made = [self._prompt(lease_id, at_s, low_s, high_s) for at_s, low_s, high_s in begins[:MOST_PROMPTS]]
        return self._numbered([p for p in made if p.end_s <= limit_s])

    def _in_turn(self, lease_id: str, pattern: str, slots: int, first_s: float, limit_s: float) -> list[Prompt]:
        """Return prompts of which each begins when another of its slot ended."""
        rng = self.rng
        model = self._prompt(lease_id, first_s, 0.05, 2.0, plain=True)
        step_s = (model.end_s - model.begin_s) + rng.uniform(0.05, 1.0)
        made: list[Prompt] = []
        for _ in range(slots):
            now_s = first_s
            while len(made) < MOST_PROMPTS:
                if pattern == "equal":
                    by_s = now_s - model.begin_s
                    prompt = replace(
                        model,
                        begin_s=now_s,
                        prefill_end_s=model.prefill_end_s + by_s,
                        end_s=model.end_s + by_s,
                    )
                else:
                    prompt = self._prompt(lease_id, now_s, 0.05 if pattern == "single" else 0.8, 20.0 / slots**0.4)
                if prompt.end_s > limit_s:
                    break
                made.append(prompt)
                if pattern == "equal":
                    now_s += step_s
                elif pattern == "steady" or rng.random() < 0.2:
                    now_s = prompt.end_s
                else:
                    now_s = prompt.end_s + min(rng.expovariate(1 / 1.0), 10.0)
        return self._numbered(made)

    def _numbered(self, made: list[Prompt]) -> list[Prompt]:
        """Return the prompts in order of their begin, each with its id."""
        ordered = sorted(made, key=lambda p: p.begin_s)
        self.numbered += len(ordered)
        first = self.numbered - len(ordered)
        return [replace(p, id=f"prompt-{self.place}-{first + place}") for place, p in enumerate(ordered)]

    def _prompt(self, lease_id: str, at_s: float, low_s: float, high_s: float, *, plain: bool = False) -> Prompt:
        """Return a prompt of about log-uniform length; most fit into ``low_s`` to ``high_s``."""
        rng, llm = self.rng, self.llm
        wish_s = low_s * (high_s / low_s) ** rng.random()
        longest = max(4.0, 0.5 * wish_s * llm.prefill_rate)
        tokens = int(min(rng.choice((3, 40, 800)) * rng.uniform(0.5, 4.0), longest)) + 1
        cached = 16 * int(tokens * rng.uniform(0.3, 0.95) / 16) if rng.random() < 0.25 else 0
        prefill_s = 0.002 + (tokens - cached) / llm.prefill_rate
        output = max(1, round((wish_s - prefill_s) * llm.decode_rate))
        prompt = Prompt(
            id="",
            lease_id=lease_id,
            wrapper=self.wrapper.name,
            llm=llm.name,
            begin_s=at_s,
            prefill_end_s=at_s + prefill_s,
            end_s=at_s + prefill_s + output / llm.decode_rate,
            prompt_tokens=tokens,
            cached_tokens=cached,
            output_tokens=output,
        )
        chance = 1.0 if plain or self.calm else rng.random()
        if chance < REFUSED:
            end_s = at_s + rng.uniform(0.001, 0.005)
            return replace(
                prompt, prefill_end_s=end_s, end_s=end_s, cached_tokens=0, output_tokens=0, outcome="refused"
            )
        if chance < REFUSED + HUNG_UP:
            return _cut(prompt, at_s + rng.uniform(0.1, 0.9) * (prompt.end_s - at_s), "hung_up")
        return prompt


def _cut(prompt: Prompt, at_s: float, outcome: Outcome) -> Prompt:
    """Return the prompt as it is if it ends earlier, with the output tokens that were complete by then."""
    if not prompt.ran:
        return replace(prompt, end_s=at_s, prefill_end_s=min(prompt.prefill_end_s, at_s))
    tokens = int(prompt.output_tokens_by(at_s))
    return replace(
        prompt,
        prefill_end_s=min(prompt.prefill_end_s, at_s),
        end_s=at_s,
        output_tokens=tokens,
        outcome=outcome,
    )
