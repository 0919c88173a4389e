"""The true value of each figure that a meter may publish for a history. Attribution: see ``truth.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from tests.energy_world.history import Lease, Load, Prompt
from tests.energy_world.truth import NOTHING, Energy, Truth, sum_of

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a wrapper's time and its energy, without strangers on its GPUs."""

    begin_s: float
    end_s: float
    energy: Energy


@dataclass(frozen=True, slots=True)
class PromptTruth:
    """One prompt. A refused one took nothing.

    ``window`` is all that the wrapper took from its begin to its end: the same as ``total`` if it ran alone, more if
    others were in flight.
    """

    prompt: Prompt
    base: Energy
    own: Energy
    window: Energy

    @property
    def total(self) -> Energy:
        """Its own energy and its part of the base."""
        return self.base + self.own


@dataclass(frozen=True, slots=True)
class LeaseTruth:
    """One lease: ``total`` = prompts + idle + loads + holes.

    A hole is a stretch without a process of the wrapper: no meter can know it but by reading counters that went on.
    ``foreign_j`` is what strangers took on its GPUs: counters show it on top of ``total``.
    """

    lease: Lease
    total: Energy
    prompts: Energy
    idle: tuple[Part, ...]
    loads: tuple[Part, ...]
    holes: tuple[Part, ...]
    foreign_j: float

    @property
    def metered(self) -> Energy:
        """All but the holes."""
        return self.total - sum_of(hole.energy for hole in self.holes)


@dataclass(frozen=True, slots=True)
class WrapperTruth:
    """One wrapper over the whole history: ``total`` = leases + what it took without a lease."""

    total: Energy
    leases: Energy
    unleased: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class LLMTruth:
    """Joules per output token of one LLM over all of its leases; None without tokens."""

    output_tokens: int
    prompts_j: float
    leases_j: float

    @property
    def prompt_j_per_token(self) -> float | None:
        """Energy of the prompts, per output token [J]."""
        return self.prompts_j / self.output_tokens if self.output_tokens else None

    @property
    def lease_j_per_token(self) -> float | None:
        """Energy of the leases, idle time included, per output token [J]."""
        return self.leases_j / self.output_tokens if self.output_tokens else None


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a lease that counts for a batch figure, with the output tokens made in it."""

    begin_s: float
    end_s: float
    energy: Energy
    output_tokens: float

    @property
    def j_per_token(self) -> float | None:
        """Joules per output token; None without tokens."""
        return self.energy.total_j / self.output_tokens if self.output_tokens else None


class Expected:
    """Answers for one history. Energies are exact; times are seconds since its begin."""

    def __init__(self, truth: Truth) -> None:
        self.truth, self.history = truth, truth.history
        self._leases = {lease.id: lease for lease in self.history.leases}
        self._prompts = {prompt.id: prompt for prompt in self.history.prompts}

    def prompt(self, id: str) -> PromptTruth:  # noqa: A002
        """Return the truth about a prompt. Raises KeyError for an unknown one."""
        prompt = self._prompts[id]
        base, own = self.truth.prompts[id]
        window = self.truth.wrapper(prompt.wrapper, prompt.begin_s, prompt.end_s) if prompt.ran else NOTHING
        return PromptTruth(prompt, base, own, window)

    def lease(self, id: str) -> LeaseTruth:  # noqa: A002
        """Return the truth about a lease. Raises KeyError for an unknown one."""
        lease = self._leases[id]
        loads = [(x.begin_s, x.end_s) for x in self.history.loads if x.lease_id == id]
        busy = [(p.begin_s, p.end_s) for p in self.history.prompts_of(id) if p.ran]
        idle = _gaps(lease.begin_s, lease.end_s, [*loads, *lease.holes, *busy])
        return LeaseTruth(
            lease=lease,
            total=self.truth.wrapper(lease.wrapper, lease.begin_s, lease.end_s),
            prompts=sum_of(self.prompt(p.id).total for p in self.history.prompts_of(id)),
            idle=self._parts(lease.wrapper, idle),
            loads=self._parts(lease.wrapper, loads),
            holes=self._parts(lease.wrapper, lease.holes),
            foreign_j=self.truth.foreign[lease.wrapper].between(lease.begin_s, lease.end_s),
        )

    def load(self, load: Load) -> Energy:
        """Return the energy of a wrapper while it loads an LLM, its idle power included."""
        return self.truth.wrapper(load.wrapper, load.begin_s, load.end_s)

    def wrapper(self, name: str) -> WrapperTruth:
        """Return the truth about a wrapper. Raises KeyError for an unknown one."""
        leases = [lease for lease in self.history.leases if lease.wrapper == name]
        free = _gaps(0.0, self.history.horizon_s, [(lease.begin_s, lease.end_s) for lease in leases])
        return WrapperTruth(
            total=self.truth.wrapper(name, 0.0, self.history.horizon_s),
            leases=sum_of(self.truth.wrapper(name, lease.begin_s, lease.end_s) for lease in leases),
            unleased=self._parts(name, free),
        )

    def machine(self, begin_s: float = 0.0, end_s: float | None = None) -> Energy:
        """Return the energy of the whole machine, in all or between two times."""
        return self.truth.whole(begin_s, self.history.horizon_s if end_s is None else end_s)

    def unassigned(self, begin_s: float = 0.0, end_s: float | None = None) -> Energy:
        """Return the energy that belongs to no wrapper, summed from its parts and not as a difference."""
        end_s = self.history.horizon_s if end_s is None else end_s
        machine, time_s = self.truth.machine, end_s - begin_s
        used = {gpu for wrapper in machine.wrappers for gpu in wrapper.gpus}
        spare_j = sum(s.between(begin_s, end_s) for n, s in enumerate(self.truth.gpus) if n not in used)
        foreign_j = sum(steps.between(begin_s, end_s) for steps in self.truth.foreign.values())
        other_s = self.truth.other_cpus.between(begin_s, end_s)
        free = [1.0 - sum(w.idle_shares[p] for w in machine.wrappers) for p in range(machine.cpu.packages)]
        return Energy(
            gpu_j=spare_j + foreign_j,
            cpu_busy_j=other_s * machine.cpu.busy_w,
            cpu_idle_j=time_s * sum(f * w for f, w in zip(free, machine.cpu.idle_w, strict=True)),
            dram_busy_j=other_s * machine.cpu.dram_busy_w,
            dram_idle_j=time_s * sum(f * w for f, w in zip(free, machine.cpu.dram_idle_w, strict=True)),
        )

    @cached_property
    def days(self) -> dict[str, tuple[float, float]]:
        """UTC day → (begin, end) [s] in the history, by a right clock: steps of the machine's own don't count."""
        found, now_s, epoch_s = {}, 0.0, self.history.epoch_s
        while now_s < self.history.horizon_s:
            next_s = (int((epoch_s + now_s) // DAY_S) + 1) * DAY_S - epoch_s
            day = datetime.fromtimestamp(epoch_s + now_s, UTC).date().isoformat()
            found[day] = (now_s, min(next_s, self.history.horizon_s))
            now_s = next_s
        return found

    def day(self, day: str) -> Energy:
        """Return the energy of the machine in a UTC day. Raises KeyError for one outside the history."""
        return self.machine(*self.days[day])

    def llm(self, name: str) -> LLMTruth:
        """Return the joules per output token of an LLM."""
        leases = [lease for lease in self.history.leases if lease.llm == name]
        prompts = [p for p in self.history.prompts if p.llm == name]
        return LLMTruth(
            output_tokens=sum(p.output_tokens for p in prompts),
            prompts_j=sum(self.prompt(p.id).total.total_j for p in prompts),
            leases_j=sum(self.truth.wrapper(x.wrapper, x.begin_s, x.end_s).total_j for x in leases),
        )

    def counted(self, lease_id: str) -> Stretch | None:
        """Return the stretch of a lease from the begin of its first prompt that is no warm-up to the last one's end.

        None without such a prompt. Raises KeyError for an unknown lease.
        """
        lease = self._leases[lease_id]
        prompts = [p for p in self.history.prompts_of(lease_id) if p.ran and not p.warm_up]
        if not prompts:
            return None
        return self._stretch(lease, min(p.begin_s for p in prompts), max(p.end_s for p in prompts))

    def steady(self, lease_id: str) -> Stretch | None:
        """Return the longest stretch of a lease in which as many prompts were in flight as it states.

        None if there is none, or if the lease states no number. Raises KeyError for an unknown lease.
        """
        lease = self._leases[lease_id]
        spans: list[tuple[float, float]] = []
        for segment in self.truth.segments[lease.wrapper]:
            inside = lease.begin_s <= segment.begin_s and segment.end_s <= lease.end_s
            if not inside or len(segment.in_flight) != lease.concurrency:
                continue
            if spans and spans[-1][1] == segment.begin_s:
                spans[-1] = (spans[-1][0], segment.end_s)
            else:
                spans.append((segment.begin_s, segment.end_s))
        if not spans:
            return None
        return self._stretch(lease, *max(spans, key=lambda span: span[1] - span[0]))

    def stretch(self, lease_id: str, begin_s: float, end_s: float) -> Stretch:
        """Return any stretch of a lease. Raises KeyError for an unknown lease."""
        return self._stretch(self._leases[lease_id], begin_s, end_s)

    def _stretch(self, lease: Lease, begin_s: float, end_s: float) -> Stretch:
        prompts = self.history.prompts_of(lease.id)
        tokens = sum(p.output_tokens_by(end_s) - p.output_tokens_by(begin_s) for p in prompts)
        return Stretch(begin_s, end_s, self.truth.wrapper(lease.wrapper, begin_s, end_s), tokens)

    def _parts(self, wrapper: str, spans: Iterable[tuple[float, float]]) -> tuple[Part, ...]:
        return tuple(Part(begin, end, self.truth.wrapper(wrapper, begin, end)) for begin, end in spans)


def _gaps(begin_s: float, end_s: float, busy: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return what of a stretch none of these cover."""
    found, now_s = [], begin_s
    for busy_begin_s, busy_end_s in sorted(busy):
        if busy_begin_s > now_s:
            found.append((now_s, min(busy_begin_s, end_s)))
        now_s = max(now_s, busy_end_s)
    if now_s < end_s:
        found.append((now_s, end_s))
    return found
