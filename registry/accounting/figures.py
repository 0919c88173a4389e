"""Computes the figures of an LLM on a machine, with their intervals, from energy windows. Pure.

Both `greenprompt measure` and the report use this module, so their digits agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import fsum

from registry.accounting.amounts import (
    ANSWERED,
    AmountOf,
    UnitsOf,
    answers_of,
    embodied_of,
    grams_of,
    joules_of,
    operational_of,
    seconds_of,
    tokens_of,
    unit_of,
    units_in,
)
from registry.accounting.estimate import MIN_PROMPTS, Estimate, Sample, estimate
from registry.accounting.totals import sum_of
from registry.accounting.window_report import WindowReport, held_windows
from registry.contract.windows import CountedRecord, read_counted
from registry.wire.flags import Flag
from registry.wire.labels import MEASURED, Label, label_of, worst, worst_word
from registry.wire.words import WindowKind


@dataclass(frozen=True, slots=True)
class KnownPart:
    """The sum of a figure's windows whose amount and units are known. It may exist even if the figure has no value.

    ``windows``: number of these windows, out of ``of``. ``amount``: in J, gCO2eq or s, the numerator of
    the figure's unit. ``joules``: their energy, None if unknown for any of them. ``units``: their units.
    """

    windows: int
    of: int
    joules: float | None
    amount: float
    units: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure(Estimate):
    """An estimate with everything needed to cite it.

    ``bound_low``, ``bound_high``: hard bounds of the value for exactly these windows. They allow for the largest errors
    of all counters and factors; None if not known. ``label``: the worst label of its windows. ``left_out``: number of
    windows whose amount or units are not known. ``reason``: why windows are left out, or why there is no value.
    ``known``: sum of the known windows; it may be shown even without a value.
    """

    unit: str
    label: str
    bound_low: float | None
    bound_high: float | None
    left_out: int
    reason: str | None
    known: KnownPart | None = None


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """Figures of the counted stretches of leases. The energy of a stretch is read from the counters, not summed.

    A stretch lasts from the start of the first prompt after the warm-up to the end of the last prompt.
    ``in_flight_max``, ``in_flight_mean``: number of prompts answered at the same time. ``flags``: number of stretches
    with each flag. The figures have no value if a warm-up was in flight during a stretch.
    """

    leases: int
    prompts: int
    output_tokens: int | None
    seconds: float
    in_flight_max: int | None
    in_flight_mean: float | None
    joules_per_token: Figure
    gco2eq_per_unit: Figure
    flags: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MachineFigures:
    """Figures of an LLM's prompts on one machine. Warm-ups are excluded from all figures but ``with_idle``.

    ``warmups``: number of warm-ups. ``unmarked``: number of prompts that don't say whether they are warm-ups; they are
    included. ``gco2eq_per_unit`` is ``operational_per_unit`` plus ``embodied_per_unit``. ``with_idle``: gCO2eq per unit
    including the leases' idle time. ``batch``: None without a finished lease. ``flags``: number of prompts per flag.
    """

    machine: str | None
    prompts: int
    warmups: int
    unmarked: int
    units: int | None
    output_tokens: int | None
    gco2eq_per_unit: Figure
    operational_per_unit: Figure
    embodied_per_unit: Figure
    joules_per_token: Figure
    joules_per_prompt: Figure
    seconds_per_prompt: Figure
    with_idle: Figure
    batch: BatchFigures | None
    flags: Mapping[str, int]


# D67: figures are made of final windows, here only
def figures_of(windows: Sequence[WindowReport]) -> tuple[MachineFigures, ...]:
    """Return the figures of one LLM from all its windows, one per machine: machines are not averaged."""
    by_machine: dict[str | None, list[WindowReport]] = {}
    for window in windows:
        by_machine.setdefault(window.machine, []).append(window)
    return tuple(_of_machine(machine, own) for machine, own in by_machine.items())


def _of_machine(machine: str | None, windows: Sequence[WindowReport]) -> MachineFigures:
    prompts = of_kind(windows, WindowKind.PROMPT)
    counted = [prompt for prompt in prompts if not prompt.warmup]
    answered = [prompt for prompt in counted if prompt.status in ANSWERED]
    names = _prompt_names(counted)
    unit = unit_of(prompts)
    return MachineFigures(
        machine=machine,
        prompts=len(counted),
        warmups=len(prompts) - len(counted),
        unmarked=sum(prompt.warmup is None for prompt in prompts),
        units=_known_sum(prompt.units for prompt in counted),
        output_tokens=_known_sum(prompt.output_tokens for prompt in counted),
        gco2eq_per_unit=_score(counted, unit, names),
        operational_per_unit=_score(counted, unit, names, operational_of),
        embodied_per_unit=_score(counted, unit, names, embodied_of),
        joules_per_token=_figure(counted, "J/output_token", joules_of, tokens_of, names),
        joules_per_prompt=_figure(counted, "J/prompt", joules_of, answers_of, names),
        seconds_per_prompt=_figure(answered, "s/prompt", seconds_of, answers_of, names, measured=True),
        with_idle=_with_idle(windows, unit),
        batch=_batch(of_kind(windows, WindowKind.LEASE)),
        flags=dict(Counter(flag for prompt in counted for flag in prompt.flags).most_common()),
    )


def of_kind(windows: Iterable[WindowReport], kind: WindowKind) -> list[WindowReport]:
    """Return the windows of this kind."""
    return [window for window in windows if window.kind == kind]


def why(
    windows: Sequence[WindowReport], lacks: Callable[[WindowReport], bool], what: str, noun: str = "windows"
) -> str | None:
    """Return a text for the windows for which ``lacks`` is true: their number and most frequent flags.

    ``what``: the verb and object of the text. None if there are no such windows.
    """
    holes = [window for window in windows if lacks(window)]
    if not holes:
        return None
    flags = Counter(flag for window in holes for flag in window.flags)
    because = f" ({', '.join(flag for flag, _ in flags.most_common(5))})" if flags else ""
    return f"{len(holes)} of {len(windows)} {noun} {what}{because}"


# --- figures ------------------------------------------------------------------------------------------------


def _score(
    windows: Sequence[WindowReport], unit: str | None, names: Mapping[str, str], amount_of: AmountOf | None = None
) -> Figure:
    """Return gCO2eq per functional unit. No value if a window is an estimate and the operator forbids estimates."""
    told, amount_of, units_of = f"gCO2eq/{unit or 'unit'}", amount_of or grams_of, units_in(unit)
    found = _figure(windows, told, amount_of, units_of, names, sci=True)
    refused = why(
        windows, lambda window: Flag.ESTIMATES_NOT_ALLOWED in window.flags, "are estimates, which are not allowed"
    )
    if refused is not None:
        allowed = [window for window in windows if Flag.ESTIMATES_NOT_ALLOWED not in window.flags]
        known = _figure(allowed, told, amount_of, units_of, names, sci=True).known
        if known is not None and known.windows:
            found = replace(found, known=replace(known, of=len(windows)))
            of_joules = "" if known.joules is None else f"{known.joules:.4g} J, "
            grams_and_units = f"{known.amount:.4g} gCO2eq, {known.units:g} units"
            refused += f"; known for {known.windows} of {len(windows)}: {of_joules}{grams_and_units}"
    return found if refused is None else _without_value(found, refused)


def _without_value(figure: Figure, reason: str) -> Figure:
    """Return the figure with a reason in place of its values, which must not be cited."""
    return replace(
        figure,
        value=None,
        mean_of_ratios=None,
        median=None,
        stdev=None,
        low=None,
        high=None,
        statistical_low=None,
        statistical_high=None,
        systematic_low=None,
        systematic_high=None,
        bound_low=None,
        bound_high=None,
        label=Label.UNAVAILABLE,
        reason=reason,
    )


# D69: what a figure leaves out
def _figure(
    windows: Sequence[WindowReport],
    unit: str,
    amount_of: AmountOf,
    units_of: UnitsOf,
    names: Mapping[str, str],
    *,
    sci: bool = False,
    measured: bool = False,
) -> Figure:
    """Return the amount per unit of these windows; ``names`` maps each window to its prompt.

    The label is the worst label of their joules, or with ``sci`` the worst ``sci_method``. With
    ``measured``, it is always ``measured``: for amounts that are not energy, such as seconds.
    """
    known = []
    for window in windows:
        amount, units = amount_of(window), units_of(window)
        if amount is not None and units is not None:
            known.append((window, amount, units))
    found = estimate(
        [
            Sample(
                window.requestId or "",
                names[window.window],
                amount.value,
                units,
                amount.less or 0.0,
                amount.more or 0.0,
            )
            for window, amount, units in known
        ]
    )
    unsaid = sum(None in (amount.less, amount.more) for _, amount, _ in known)
    if unsaid:
        said = f"{unsaid} of {len(known)} windows don't say how wrong their counters may be"
        found = replace(found, low=None, high=None, systematic_low=None, systematic_high=None)
        found = replace(found, too_few=found.too_few or said)
    units = fsum(units for _, _, units in known)
    lows, highs = ([amount[at] for _, amount, _ in known] for at in (1, 2))
    used = [window for window, _, _ in known]
    label: str = Label.MEASURED
    if not measured:
        label = worst_word(w.label for w in used) if not sci else worst(label_of(w.sci_method) for w in used)
    return Figure(
        **asdict(found),
        unit=unit,
        known=KnownPart(
            windows=len(known),
            of=len(windows),
            joules=sum_of(window.joules for window in used).value,
            amount=fsum(amount.value for _, amount, _ in known),
            units=units,
        ),
        label=Label.UNAVAILABLE if found.value is None else label,
        bound_low=_per_unit(lows, units),
        bound_high=_per_unit(highs, units),
        left_out=len(windows) - len(known),
        reason=_reason(windows, amount_of, units_of, found.value),
    )


def _per_unit(amounts: Sequence[float | None], units: float) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return fsum(known) / units if units and len(known) == len(amounts) else None


def _reason(windows: Sequence[WindowReport], amount_of: AmountOf, units_of: UnitsOf, value: float | None) -> str | None:
    if not windows:
        return "there are no such windows"
    reasons = (
        why(windows, lambda window: amount_of(window) is None, "have no known amount"),
        why(windows, lambda window: amount_of(window) is not None and units_of(window) is None, "have unknown units"),
    )
    found = "; ".join(reason for reason in reasons if reason is not None)
    return found or ("no unit was produced" if value is None else None)


def _with_idle(windows: Sequence[WindowReport], unit: str | None) -> Figure:
    """Return gCO2eq per functional unit with idle time; each lease is one sample."""
    held = held_windows(windows)
    figure = _score(held, unit, _lease_names(held))
    if figure.too_few is None or figure.leases >= MIN_PROMPTS:
        return figure
    return replace(figure, too_few=f"too few leases: {figure.leases} (at least {MIN_PROMPTS})")


def _batch(leases: Sequence[WindowReport]) -> BatchFigures | None:
    pairs = [(lease, read_counted(lease.counted)) for lease in leases if lease.counted]
    if not pairs:
        return None
    stretches = [_stretch(lease, counted) for lease, counted in pairs]
    names = _lease_names(stretches)
    seconds = fsum(stretch.seconds for stretch in stretches)
    most = [stretch.in_flight_max for stretch in stretches if stretch.in_flight_max is not None]
    mean = sum_of(None if s.in_flight_mean is None else s.in_flight_mean * s.seconds for s in stretches).value
    return BatchFigures(
        leases=len(stretches),
        prompts=sum(counted.prompts or 0 for _, counted in pairs),
        output_tokens=_known_sum(stretch.output_tokens for stretch in stretches),
        seconds=seconds,
        in_flight_max=max(most, default=None),
        in_flight_mean=None if mean is None or not seconds else mean / seconds,
        joules_per_token=_of_leases(_figure(stretches, "J/output_token", joules_of, tokens_of, names), stretches),
        gco2eq_per_unit=_of_leases(_score(stretches, unit_of(stretches), names), stretches),
        flags=dict(Counter(flag for stretch in stretches for flag in stretch.flags).most_common()),
    )


def _of_leases(figure: Figure, stretches: Sequence[WindowReport]) -> Figure:
    """Return a figure that has one sample per lease; its ``too_few`` then counts leases, not prompts.

    It has no value if a warm-up was in flight during a stretch: the warm-up's joules are included, its
    tokens are not.
    """
    unclean = sum(Flag.WARMUP_INSIDE in stretch.flags for stretch in stretches)
    if unclean:
        return _without_value(figure, f"a warm-up was in flight in {unclean} of {len(stretches)} leases")
    if figure.too_few is None:
        return figure
    return replace(figure, too_few=f"too few leases: {figure.leases} (at least {MIN_PROMPTS})")


def _stretch(lease: WindowReport, counted: CountedRecord) -> WindowReport:
    """Return the counted stretch of a lease as a window."""
    flags = set(counted.flags)
    if counted.label not in MEASURED and Flag.ESTIMATES_NOT_ALLOWED in lease.flags:
        flags.add(Flag.ESTIMATES_NOT_ALLOWED)
    return replace(
        lease,
        seconds=counted.seconds,
        units=counted.units,
        output_tokens=counted.output_tokens,
        joules=counted.total_j,
        low_j=counted.low_j,
        high_j=counted.high_j,
        systematic_j=counted.systematic_j,
        resolution_j=None,
        label=counted.label,
        o_g=counted.o_g,
        o_low_g=counted.o_low_g,
        o_high_g=counted.o_high_g,
        m_g=counted.m_g,
        m_low_g=counted.m_low_g,
        m_high_g=counted.m_high_g,
        sci_score=None,
        sci_low=None,
        sci_high=None,
        sci_method=worst((label_of(counted.label), Label.SOURCED)),
        in_flight_max=counted.in_flight.max,
        in_flight_mean=counted.in_flight.mean,
        flags=tuple(sorted(flags)),
    )


def _prompt_names(prompts: Sequence[WindowReport]) -> dict[str, str]:
    """Map each window to its prompt: the client's id, or else its position in its lease."""
    seen: Counter[str | None] = Counter()
    names = {}
    for prompt in sorted(prompts, key=lambda each: (each.begunAt, each.window)):
        seen[prompt.requestId] += 1
        names[prompt.window] = prompt.prompt or f"#{seen[prompt.requestId]}"
    return names


def _lease_names(windows: Iterable[WindowReport]) -> dict[str, str]:
    return {window.window: window.requestId or "" for window in windows}


def _known_sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
