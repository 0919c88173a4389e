"""What a simulated machine is made of, and random machines of the kinds that are in use."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

KINDS: dict[str, float] = {
    "h100_intel": 0.28,  # RAPL with packages and DRAM
    "calm": 0.10,  # the same without any fault
    "h200_amd": 0.12,  # packages only, 65.5 kJ range
    "amd_mirrored": 0.12,  # two dies of a package show one counter
    "intel_dies": 0.06,  # two dies of a package with a counter each
    "gh200": 0.12,  # the GPU's counter is the module's; no RAPL
    "sampled": 0.08,  # GPUs without an energy counter
    "no_rapl": 0.05,  # as in a container: an empty powercap
    "cpu_only": 0.07,  # no GPU, no driver
}
"""Kind of machine → probability in ``EnergyWorld(seed)``."""

RARE_KINDS = ("low_counter",)
"""Only by name: the GPU's counter shows too little under load, so no interval can contain the truth."""

INTEL_RANGE_UJ = 262_143_328_850
AMD_RANGE_UJ = 65_532_610_987
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. ``limits`` are pairs (from [s], limit [W]) in order of time; the first is from 0 s."""

    index: int
    uuid: str
    name: str
    idle_w: float
    context_w: float
    load_w: float
    gain: float
    memory_bytes: int
    limits: tuple[tuple[float, float], ...]

    def limit_w(self, at_s: float) -> float:
        """Return the enforced power limit [W] at a time."""
        return next((watts for from_s, watts in reversed(self.limits) if from_s <= at_s), self.limits[0][1])


@dataclass(frozen=True, slots=True)
class Cpu:
    """All CPU packages of a machine: idle power [W] of each, and [W] per busy processor."""

    name: str
    packages: int
    processors: int
    idle_w: tuple[float, ...]
    busy_w: float
    dram_idle_w: tuple[float, ...]
    dram_busy_w: float
    limit_w: float


@dataclass(frozen=True, slots=True)
class Llm:
    """One LLM: power above idle [W] that one prompt alone takes on each GPU, and rates [tokens/s]."""

    name: str
    prefill_w: float
    decode_w: float
    prefill_rate: float
    decode_rate: float
    batch_exponent: float
    """n equal prompts together take n ** batch_exponent times the power of one."""
    cpus_first: float
    cpus_more: float
    """Busy processors with one prompt in flight, and for each further one."""
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One wrapper: its GPUs, its share of each package's idle power, and on which packages its processes run."""

    name: str
    gpus: tuple[int, ...]
    idle_shares: tuple[float, ...]
    busy_shares: tuple[float, ...]
    idle_cpus: float
    loaded_cpus: float
    load_cpus: float


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine and the wrappers on it."""

    kind: str
    gpus: tuple[Gpu, ...]
    cpu: Cpu
    wrappers: tuple[Wrapper, ...]
    llms: tuple[Llm, ...]
    system_cpus: float
    """Busy processors of the system itself, always."""

    @property
    def is_module(self) -> bool:
        """True if the counter of GPU n holds package n and its memory, too."""
        return self.kind == "gh200"

    def wrapper(self, name: str) -> Wrapper:
        """Return a wrapper by name. Raises StopIteration if there is none."""
        return next(w for w in self.wrappers if w.name == name)


def random_kind(rng: Random) -> str:
    """Return a kind by the probabilities of ``KINDS``."""
    return rng.choices(list(KINDS), list(KINDS.values()))[0]


def random_machine(rng: Random, kind: str, horizon_s: float, wrappers: int | None = None) -> Machine:
    """Return a random machine of a kind. Raises ValueError for an unknown kind."""
    if kind not in KINDS and kind not in RARE_KINDS:
        raise ValueError(kind)
    count = wrappers or rng.choices((1, 2, 3, 4), (0.45, 0.3, 0.1, 0.15))[0]
    gpus = _random_gpus(rng, kind, count, horizon_s)
    cpu = _random_cpu(rng, kind, len(gpus))
    return Machine(
        kind=kind,
        gpus=gpus,
        cpu=cpu,
        wrappers=_random_wrappers(rng, kind, count, len(gpus), cpu),
        llms=tuple(_random_llm(rng, name, kind) for name in ("alpha-8b", "beta-70b", "gamma-1b")),
        system_cpus=rng.uniform(0.02, 0.2),
    )


def _random_gpus(rng: Random, kind: str, wrappers: int, horizon_s: float) -> tuple[Gpu, ...]:
    """Return at least one GPU a wrapper; some machines have spare ones."""
    if kind == "cpu_only":
        return ()
    per_wrapper = rng.choice((1, 1, 2)) if wrappers <= 2 else 1
    count = min(8, wrappers * per_wrapper + (rng.choice((1, 2)) if rng.random() < 0.25 else 0))
    name, memory_gib, limit = {
        "gh200": ("NVIDIA GH200 480GB", 96, 900.0),
        "sampled": ("Tesla P40", 24, 250.0),
        "h200_amd": ("NVIDIA H200", 141, 700.0),
    }.get(kind, ("NVIDIA H100 80GB HBM3", 80, 700.0))
    small = kind == "sampled"
    gpus = []
    for index in range(count):
        limits = [(0.0, limit)]
        if kind not in {"calm", "sampled", "gh200"} and rng.random() < 0.2:
            limits[0] = (0.0, rng.choice((limit, 350.0)))
            limits.append((rng.uniform(0.2, 0.8) * horizon_s, rng.choice((300.0, 400.0, 700.0))))
        gpus.append(
            Gpu(
                index=index,
                uuid=f"GPU-{rng.getrandbits(32):08x}-{rng.getrandbits(16):04x}-4{rng.getrandbits(12):03x}"
                f"-8{rng.getrandbits(12):03x}-{rng.getrandbits(48):012x}",
                name=name,
                idle_w=rng.uniform(9, 15) if small else rng.uniform(55, 75),
                context_w=rng.uniform(20, 40) if small else rng.uniform(26, 66),
                load_w=rng.uniform(5, 20) if small else rng.uniform(20, 60),
                gain=rng.uniform(0.95, 1.05) * (0.3 if small else 1.0),
                memory_bytes=memory_gib * GIB,
                limits=tuple(limits),
            )
        )
    return tuple(gpus)


def _random_cpu(rng: Random, kind: str, gpus: int) -> Cpu:
    """Return the CPUs: one package for each GPU of a GH200, else one or two."""
    packages = gpus if kind == "gh200" else 1 if kind in {"cpu_only", "sampled"} else 2
    processors = 16 * packages if kind == "gh200" else 32
    amd = kind in {"h200_amd", "amd_mirrored"}
    name = "Neoverse-V2" if kind == "gh200" else "AMD EPYC 9654" if amd else "Intel(R) Xeon(R) Platinum 8480+"
    return Cpu(
        name=name,
        packages=packages,
        processors=processors,
        idle_w=tuple(rng.uniform(15, 40) if kind == "gh200" else rng.uniform(40, 110) for _ in range(packages)),
        busy_w=rng.uniform(2.0, 4.5),
        dram_idle_w=tuple(rng.uniform(5, 20) for _ in range(packages)),
        dram_busy_w=rng.uniform(0.2, 0.8),
        limit_w=350.0,
    )


def _random_wrappers(rng: Random, kind: str, count: int, gpus: int, cpu: Cpu) -> tuple[Wrapper, ...]:
    """Return wrappers with equal numbers of GPUs, each with its part of the machine."""
    each = 0 if not gpus else 1 if count > 2 else min(2, gpus // count)
    wrappers = []
    for place in range(count):
        own = tuple(range(place * each, (place + 1) * each))
        if kind == "gh200":
            idle = tuple(1.0 if p in own else 0.0 for p in range(cpu.packages))
            busy = tuple(1 / each if p in own else 0.0 for p in range(cpu.packages))
        else:
            idle = (each / gpus if gpus else 1 / count,) * cpu.packages
            busy = (1 / cpu.packages,) * cpu.packages
        wrappers.append(
            Wrapper(
                name=f"wrapper-{place}",
                gpus=own,
                idle_shares=idle,
                busy_shares=busy,
                idle_cpus=rng.uniform(0.01, 0.1),
                loaded_cpus=rng.uniform(0.02, 0.6),
                load_cpus=rng.uniform(1.0, 3.5),
            )
        )
    return tuple(wrappers)


def _random_llm(rng: Random, name: str, kind: str) -> Llm:
    """Return an LLM whose prefill costs more power, and far less time a token, than its decode."""
    large = name == "beta-70b"
    on_cpu = kind == "cpu_only"
    return Llm(
        name=name,
        prefill_w=rng.uniform(350, 520),
        decode_w=rng.uniform(140, 300),
        prefill_rate=rng.uniform(150, 600) if on_cpu else rng.uniform(3000, 20000) / (4 if large else 1),
        decode_rate=rng.uniform(5, 15) if on_cpu else rng.uniform(60, 180) / (3 if large else 1),
        batch_exponent=rng.uniform(0.25, 0.55),
        cpus_first=rng.uniform(1.5, 2.5) if on_cpu else rng.uniform(0.8, 1.6),
        cpus_more=rng.uniform(0.01, 0.1),
        memory_bytes=(40 if large else 16) * GIB,
    )
