"""Energies and scores of prompts and flows: joules by the meter, grams by the SCI formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

from deployments.energy.attribution import Flow
from deployments.energy.figures import Energy, GridIntensity, SCISettings
from deployments.energy.flights import Flight, Flights
from deployments.energy.lease_account import LeaseAccount
from deployments.energy.meter import Meter
from deployments.energy.sci import Score, score
from deployments.energy.timeline import Interval
from registry.contract.windows import EmbodiedRecord, GridRecord
from registry.wire.flags import Flag


class Scorer:
    """Scores energy by the operator's settings. Not thread-safe."""

    def __init__(self, meter: Meter, flights: Flights, settings: SCISettings, grid: GridIntensity | None) -> None:
        self.meter = meter
        self._flights = flights
        self._settings = settings
        # An embedding has no output: its input tokens count instead.
        of_output = settings.functional_unit in ("output_token", "word")
        self._without_text = replace(settings, functional_unit="token") if of_output else settings
        self._grid = grid

    @property
    def grid(self) -> GridRecord | None:
        """The carbon intensity that scores use, None if not configured."""
        grid = self._grid
        if grid is None:
            return None
        return GridRecord(
            value=grid.gco2eq_per_kwh,
            unit="gCO2eq/kWh",
            zone=grid.zone,
            dataset=grid.dataset,
            version=grid.version,
            year=grid.year,
            source=grid.source,
            low=grid.low,
            high=grid.high,
        )

    @property
    def embodied(self) -> EmbodiedRecord | None:
        """The embodied carbon that scores use, None if not configured."""
        embodied = self._settings.embodied
        return None if embodied is None else EmbodiedRecord(*astuple(embodied))

    @property
    def pue(self) -> float:
        """The power usage effectiveness that scores use."""
        return self._settings.pue

    def prompt(self, flight: Flight, *, for_good: bool = False) -> tuple[Energy, Score]:
        """Return a prompt's share of the energy while it was in flight, and its score.

        The score includes its share of the reserved time. With ``for_good`` the rates that were assumed become final.
        """
        assert flight.end_s is not None  # callers end a prompt before they account for it
        had = flight.had
        reserved_s = flight.end_s - flight.start_s
        range_s: tuple[float, float] | None = None
        assumed = False
        if flight.alone and had is None:
            energy = self.meter.window(flight.start_s, flight.end_s, estimate_short=True, final=for_good)
        else:
            parts, assumed = self._flights.parts(flight, for_good=for_good)
            before = None if had is None else had.shares
            energy = self.meter.share(parts, before=before, final=for_good)
            reserved_s, range_s = parts.reserved_s, (parts.reserved_low_s, parts.reserved_high_s)
            if before is not None:
                reserved_s += before.reserved_s
                range_s = range_s[0] + before.reserved_low_s, range_s[1] + before.reserved_high_s
        flags = [
            *((Flag.TOKENS_UNKNOWN,) if flight.tokens is None else ()),
            *((Flag.SHARE_ESTIMATED,) if assumed else ()),
        ]
        units, account = self.units(flight), flight.account
        return energy, self.score(energy, reserved_s, units, flags, account=account, duration_range_s=range_s)

    def units(self, flight: Flight) -> int | None:
        """Return the functional units of a prompt, None if unknown. A prompt without an answer is 0 requests."""
        tokens = flight.tokens
        match self._settings_of(flight.account).functional_unit:
            case "output_token":
                return None if tokens is None else tokens.output
            case "token":
                return None if tokens is None else tokens.prompt + tokens.output
            case "request":
                return int(flight.status == "answered")
            case "word":
                return flight.words

    def score(
        self,
        energy: Energy,
        duration_s: float,
        units: int | None,
        flags: Sequence[str] = (),
        *,
        account: LeaseAccount | None = None,
        duration_range_s: tuple[float, float] | None = None,
    ) -> Score:
        """Score an energy and the time that the hardware was reserved, seconds; ``account`` is the lease's, if any.

        ``duration_range_s`` is the range of that time if it is a share.
        """
        return score(
            energy,
            duration_s=duration_s,
            units=units,
            settings=self._settings_of(account),
            grid=self._grid,
            flags=flags,
            duration_range_s=duration_range_s,
        )

    # D90: an LLM that writes no text is scored per token
    def _settings_of(self, account: LeaseAccount | None) -> SCISettings:
        """Return the operator's settings; for an LLM that writes no text the functional unit is a token."""
        return self._settings if account is None or account.writes_text else self._without_text

    def summed(self, flow: Flow | None, times: Sequence[Sequence[Interval]], *, final: bool = False) -> Flow | None:
        """Return ``flow`` plus the flows of these intervals; None if there are none. ``final``: see `Meter`."""
        for intervals in times:
            if intervals:
                more = self.meter.flow(intervals, final=final)
                flow = more if flow is None else flow.plus(more)
        return flow
