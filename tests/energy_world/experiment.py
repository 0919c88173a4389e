"""The history of an experiment, as ``greenprompt measure`` makes it: the same prompts in each lease, some in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from random import Random

from tests.energy_world.history import Engine, History, Lease, Life, Load, Prompt, llm_of
from tests.energy_world.machine import Llm, Machine
from tests.energy_world.random_history import FOREVER_S

CLIENT_S = (0.001, 0.008)
"""From an answer to the client's next prompt."""


@dataclass(frozen=True)
class Experiment:
    """``leases`` are the LLM of each lease, by its id and in turn; each is asked all ``prompts``, by name."""

    leases: Mapping[str, str]
    prompts: Sequence[str]
    warmups: int
    concurrency: int

    def history(self, rng: Random, machine: Machine) -> History:
        """Return what happens on the only wrapper of a machine."""
        return _Written(self, rng, machine).history()


class _Written:
    def __init__(self, experiment: Experiment, rng: Random, machine: Machine) -> None:
        self.experiment, self.rng, self.machine = experiment, rng, machine
        [wrapper] = machine.wrappers
        self.life = Life(wrapper.name, 100, -1000.0, FOREVER_S)
        self.leases: list[Lease] = []
        self.prompts: list[Prompt] = []
        self.loads: list[Load] = []
        self.engines: list[Engine] = []
        self.texts = {
            (llm, name): self._text(llm_of(machine, llm), name)
            for llm in dict.fromkeys(experiment.leases.values())
            for name in experiment.prompts
        }

    def history(self) -> History:
        now_s = 0.0
        for lease_id, llm in self.experiment.leases.items():
            now_s = self._lease(lease_id, llm, self._loaded(llm, now_s))
        return History(
            machine=self.machine,
            horizon_s=now_s + 3.0,
            leases=tuple(self.leases),
            prompts=tuple(self.prompts),
            loads=tuple(self.loads),
            lives=(self.life,),
            engines=tuple(self.engines),
            strangers=(),
            clock_steps=(),
            pauses=(),
            epoch_s=1_767_225_600.0 + self.rng.uniform(3_600, 80_000),
        )

    def _text(self, llm: Llm, name: str) -> Prompt:
        """Return a prompt, 0.3 to 3 s long, that begins at 0."""
        tokens = self.rng.randint(10, 600)
        prefill_s = 0.002 + tokens / llm.prefill_rate
        output = max(1, round(0.3 * 10 ** self.rng.random() * llm.decode_rate))
        end_s = prefill_s + output / llm.decode_rate
        return Prompt("", "", self.life.wrapper, llm.name, 0.0, prefill_s, end_s, tokens, 0, output, name=name)

    def _loaded(self, llm: str, at_s: float) -> float:
        """Start another LLM; return when it may be handed over [s]."""
        if self.engines and self.engines[-1].llm == llm:
            return at_s + self.rng.uniform(0.01, 0.5)
        loaded_s = at_s + self.rng.uniform(3.0, 8.0) if self.engines else at_s
        begin_s = at_s if self.engines else self.life.begin_s
        if self.engines:
            self.engines[-1] = replace(self.engines[-1], end_s=at_s)
            self.loads.append(Load(f"load-{len(self.loads)}", self.life.wrapper, llm, at_s, loaded_s))
        pid = self.life.pid + 10 * (len(self.engines) + 1)
        self.engines.append(
            Engine(self.life.wrapper, llm, pid, self.life.pid, begin_s, loaded_s, FOREVER_S, 0.0, "at_once")
        )
        return loaded_s + self.rng.uniform(0.2, 3.0)

    def _lease(self, lease_id: str, llm: str, begin_s: float) -> float:
        """Write a lease: the warm-ups and, when all of them are answered, what counts. Return its end [s]."""
        names, warmups, slots = self.experiment.prompts, self.experiment.warmups, self.experiment.concurrency
        now_s = self._asked(lease_id, llm, names[:warmups], begin_s + self.rng.uniform(0.05, 0.5), warm_up=True)
        now_s = self._asked(lease_id, llm, names, now_s, warm_up=False)
        end_s = now_s + self.rng.uniform(0.05, 0.5)
        self.leases.append(Lease(lease_id, self.life.wrapper, llm, "steady", slots, begin_s, end_s))
        return end_s

    def _asked(self, lease_id: str, llm: str, names: Sequence[str], at_s: float, *, warm_up: bool) -> float:
        """Ask prompts, as many at once as the experiment says; return when the last is answered [s]."""
        free = [at_s] * self.experiment.concurrency
        heapify(free)
        for name in names:
            begin_s = heappop(free) + self.rng.uniform(*CLIENT_S)
            text = self.texts[llm, name]
            prompt = replace(
                text,
                id=f"prompt-{len(self.prompts)}",
                lease_id=lease_id,
                begin_s=begin_s,
                prefill_end_s=begin_s + text.prefill_end_s,
                end_s=begin_s + text.end_s,
                warm_up=warm_up,
            )
            self.prompts.append(prompt)
            heappush(free, prompt.end_s)
        return max(free)
