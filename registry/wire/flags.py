"""The flags: each names something unusual about a figure or a measurement, and has a meaning.

Clients read these names, and the database stores them, so a name never changes. Records and answers
hold plain strings, because an older release may have written flags that this release does not know.
docs/reference/flags.md is generated from this file.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Self

MEASUREMENT: Final = "Of a measurement"
GRADE: Final = "Of a lease of measurement grade"
BUDGET: Final = "Of a budget"
COUNTERS: Final = "Of an energy window: what the counters say"
SCORE: Final = "Of an energy window: the score"
STRETCH: Final = "Of a counted stretch: a lease's prompts without its warm-up"

KEPT: Final = "kept"
UNKNOWN: Final = "unknown"
ESTIMATE: Final = "estimate"
CHECK: Final = "check"
_NO_SCORE: Final = "score unknown, joules kept"
_NO_BATCH: Final = "no figure for the stretch"


# D107: every flag is here
class Flag(StrEnum):
    """A flag: its group (``about``), what happens to a ``figure`` that has it, and its ``meaning``."""

    about: str
    figure: str
    meaning: str

    def __new__(cls, word: str, about: str, figure: str, meaning: str) -> Self:
        """Return a member that equals its name in records."""
        flag = str.__new__(cls, word)
        flag._value_ = word
        flag.about, flag.figure, flag.meaning = about, figure, meaning
        return flag

    MACHINE_CHANGED = (
        "machine_changed",
        MEASUREMENT,
        "check: figures of different machines are not comparable",
        "The measurement continued on another machine with the same type of GPU.",
    )
    MACHINE_TYPE_CHANGED = (
        "machine_type_changed",
        MEASUREMENT,
        "check: figures of different machines are not comparable",
        "The measurement continued on a machine with another type of GPU.",
    )
    MACHINE_DRAINED = (
        "machine_drained",
        MEASUREMENT,
        "check: see the two flags above",
        "The measurement continued elsewhere because an operator drained its machine.",
    )
    VERSION_CHANGED = (
        "version_changed",
        MEASUREMENT,
        CHECK,
        "The measurement's LLMs ran on different versions of the software: vLLM, the driver …",
    )
    ENGINE_RESTARTED = (
        "engine_restarted",
        MEASUREMENT,
        CHECK,
        "During one of its leases the LLM had to be started again.",
    )
    ENGINE_OUT_OF_MEMORY = (
        "engine_out_of_memory",
        MEASUREMENT,
        CHECK,
        "The kernel ended an engine during the measurement, because main memory had run out.",
    )
    CONTENDED = (
        "contended",
        GRADE,
        CHECK,
        "Another program or wrapper used the machine before the hand-over, or during the lease or window.",
    )
    NOT_STEADY = (
        "not_steady",
        GRADE,
        CHECK,
        "The idle power of the machine did not become steady in time, or the LLM did not answer its first prompt.",
    )
    STEADINESS_UNKNOWN = (
        "steadiness_unknown",
        GRADE,
        CHECK,
        "The machine has no energy counter, so it could not be checked whether its power was steady.",
    )
    PREFIX_CACHE_KEPT = (
        "prefix_cache_kept",
        GRADE,
        CHECK,
        "The LLM may still have prompts of an earlier lease in its caches, because they could not be emptied.",
    )
    BUDGET_NEARLY_USED = (
        "budget_nearly_used",
        BUDGET,
        KEPT,
        "The lease has used 80 % or more of ``maxJoules`` or ``maxGco2eq``.",
    )
    BUDGET_NOT_ENFORCED = (
        "budget_not_enforced",
        BUDGET,
        KEPT,
        "The lease has a budget, but its use is not known.",
    )
    PROVISIONAL = (
        "provisional",
        COUNTERS,
        KEPT,
        "The counters have not moved since the end of the window; a later reading gives a more exact figure.",
    )
    TOO_SHORT = (
        "too_short",
        COUNTERS,
        "unknown, or estimate",
        "The window is so short that the counter's readings are too coarse to give its energy.",
    )
    SHARED = ("shared", COUNTERS, ESTIMATE, "The figure is a prompt's share of what several prompts took together.")
    SHARE_ESTIMATED = (
        "share_estimated",
        COUNTERS,
        ESTIMATE,
        "The share was computed with assumed token rates, because other prompts in flight had not ended yet.",
    )
    STALE = (
        "stale",
        COUNTERS,
        UNKNOWN,
        "The counter has not moved for too long, so it does not cover the end of the window.",
    )
    NO_EDGE = ("no_edge", COUNTERS, UNKNOWN, "The counter answers, but has not moved often enough to give a figure.")
    OUT_OF_HISTORY = ("out_of_history", COUNTERS, UNKNOWN, "The window began before the readings that the meter keeps.")
    COUNTER_RESET = ("counter_reset", COUNTERS, UNKNOWN, "The counter fell back during the window.")
    POLL_GAP = (
        "poll_gap",
        COUNTERS,
        UNKNOWN,
        "The counter was not read for so long that it may have overflowed more than once.",
    )
    UNDERSAMPLED = ("undersampled", COUNTERS, UNKNOWN, "Two power samples of a GPU were too far apart.")
    IMPLAUSIBLE_POWER = ("implausible_power", COUNTERS, UNKNOWN, "The counter rose by more than the hardware can use.")
    MODULE_SHARED = (
        "module_shared",
        COUNTERS,
        UNKNOWN,
        "The counter also counts the GPU of another wrapper, and the parts can't be told apart.",
    )
    UNREADABLE = (
        "unreadable",
        COUNTERS,
        UNKNOWN,
        "Hardware that belongs to the wrapper has a counter that can't be read.",
    )
    NO_SOURCE = ("no_source", COUNTERS, UNKNOWN, "There is no counter at all.")
    COUNTER_DISAGREES = (
        "counter_disagrees",
        COUNTERS,
        CHECK,
        "In a check, the counter of a GPU and its power readings did not agree.",
    )
    CONTENTION_UNKNOWN = (
        "contention_unknown",
        COUNTERS,
        CHECK,
        "The meter could not check for other programs during a part of the window.",
    )
    CPU_NOT_COVERED = ("cpu_not_covered", COUNTERS, "kept, without the CPU", "No counter covers the CPU.")
    DRAM_NOT_COVERED = ("dram_not_covered", COUNTERS, "kept, without main memory", "No counter covers main memory.")
    CLOCK_STEPPED = (
        "clock_stepped",
        COUNTERS,
        "kept: energy does not depend on it",
        "The wall clock was set during the window, so its dates may be wrong.",
    )
    NO_GRID = ("no_grid", SCORE, _NO_SCORE, "No carbon intensity is configured (``energy.grid``).")
    NO_EMBODIED = (
        "no_embodied",
        SCORE,
        _NO_SCORE,
        "No embodied carbon is configured, or none that fits this wrapper (``energy.embodied``).",
    )
    NO_UNITS = ("no_units", SCORE, _NO_SCORE, "No functional units were produced.")
    UNITS_UNKNOWN = ("units_unknown", SCORE, _NO_SCORE, "The number of functional units is not known.")
    TOKENS_UNKNOWN = (
        "tokens_unknown",
        SCORE,
        CHECK,
        "The number of tokens is not known, for instance because an answer was cut.",
    )
    ESTIMATES_NOT_ALLOWED = (
        "estimates_not_allowed",
        SCORE,
        _NO_SCORE,
        "The energy is an estimate, and ``energy.allow_estimates`` is false.",
    )
    IMPLAUSIBLE_J_PER_TOKEN = (
        "implausible_j_per_token",
        SCORE,
        CHECK,
        "The joules per output token are outside the range of known GPUs.",
    )
    WARMUP_INSIDE = (
        "warmup_inside",
        STRETCH,
        _NO_BATCH,
        "A warm-up was in flight during the stretch: its joules are included, its tokens are not.",
    )
    LLM_STARTED_INSIDE = (
        "llm_started_inside",
        STRETCH,
        CHECK,
        "The LLM had to be started again during the stretch; the time of the start is left out.",
    )
