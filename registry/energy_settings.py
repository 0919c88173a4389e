"""Settings for measuring and scoring energy, for the whole site; those of one wrapper are derived from them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.errors import BadSettings
from registry.grid_mixes import zone_intensity


class Section(BaseModel):
    """Base of all sections: frozen; refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GridSettings(Section):
    """Carbon intensity of the grid: a zone of the data set, or the operator's own value with its source."""

    zone: str | None = Field(None, description="ISO 3166 alpha-3 code of the zone (DEU, FRA …); WOR: world mean")
    gco2eq_per_kwh: float | None = Field(None, gt=0, description="Carbon intensity, if no zone is given, gCO2eq/kWh")
    source: str | None = Field(None, description="Source of gco2eq_per_kwh")
    date: str | None = Field(None, description="Day or time for which gco2eq_per_kwh is valid")
    year: int | None = Field(None, ge=1990, le=2100, description="If the value is the mean of a year: that year")
    low_gco2eq_per_kwh: float | None = Field(None, ge=0, description="Lower bound of the value, gCO2eq/kWh")
    high_gco2eq_per_kwh: float | None = Field(None, gt=0, description="Upper bound of the value, gCO2eq/kWh")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.zone is None) == (self.gco2eq_per_kwh is None):
            raise ValueError("give either zone, or gco2eq_per_kwh with source, and year or date")
        if self.gco2eq_per_kwh is not None and not (self.source and (self.date or self.year)):
            raise ValueError("gco2eq_per_kwh needs source, and year or date")
        if self.zone is not None and (self.source or self.date):
            raise ValueError("source and date belong to gco2eq_per_kwh; the source of a zone's value is the data set")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.gco2eq_per_kwh is not None:
            value = self.gco2eq_per_kwh
        else:
            try:
                value = zone_intensity(self.zone or "")
            except BadSettings as error:
                raise ValueError(error.problem) from None
        low, high = self.low_gco2eq_per_kwh, self.high_gco2eq_per_kwh
        if (low is None) != (high is None):
            raise ValueError("give both low_gco2eq_per_kwh and high_gco2eq_per_kwh, or neither")
        if low is not None and high is not None and not low <= value <= high:
            raise ValueError(f"needs low_gco2eq_per_kwh <= {value:g} <= high_gco2eq_per_kwh")
        return self


class EmbodiedSettings(Section):
    """Embodied carbon of the hardware that one wrapper reserves, gCO2eq per reserved hour, with its source."""

    g_per_hour: float = Field(gt=0, description="Grams CO2eq per reserved hour")
    low_g_per_hour: float = Field(gt=0, description="Lower bound of g_per_hour")
    high_g_per_hour: float = Field(gt=0, description="Upper bound of g_per_hour")
    source: str = Field(description="Source of these values")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.low_g_per_hour <= self.g_per_hour <= self.high_g_per_hour:
            raise ValueError("needs low_g_per_hour <= g_per_hour <= high_g_per_hour")
        return self


# D72: coefficients of single machines
class SiteEmbodiedSettings(EmbodiedSettings):
    """Embodied carbon of a whole machine, or of each GPU including its share of the rest of the machine."""

    per: Literal["machine", "gpu"] = Field(description="Whether the values are per machine or per GPU")

    def of_wrapper(self, *, gpus: int, on_machine: int) -> EmbodiedSettings | None:
        """Return the share of a wrapper with ``gpus`` GPUs, on a machine with ``on_machine`` wrappers.

        None if the values are per GPU and the wrapper has no GPU: its share is then not known.
        """
        share = gpus if self.per == "gpu" else 1 / on_machine
        if not share:
            return None
        return EmbodiedSettings(
            g_per_hour=self.g_per_hour * share,
            low_g_per_hour=self.low_g_per_hour * share,
            high_g_per_hour=self.high_g_per_hour * share,
            source=self.source,
        )


class CPUModelSettings(Section):
    """A model of the CPU's power for machines without counters: watts per logical CPU, idle and fully used.

    Each value has a range, low to high. If the processor is not known, the range covers all possible ones.
    """

    idle_w_per_cpu: float = Field(ge=0, description="Power of an idle logical CPU, watts")
    idle_low_w_per_cpu: float = Field(ge=0, description="Lower bound of idle_w_per_cpu, watts")
    idle_high_w_per_cpu: float = Field(ge=0, description="Upper bound of idle_w_per_cpu, watts")
    busy_w_per_cpu: float = Field(gt=0, description="Power of a fully used logical CPU, watts")
    busy_low_w_per_cpu: float = Field(gt=0, description="Lower bound of busy_w_per_cpu, watts")
    busy_high_w_per_cpu: float = Field(gt=0, description="Upper bound of busy_w_per_cpu, watts")
    source: str = Field(description="Source of these values")

    @model_validator(mode="before")
    @classmethod
    def _without_factors(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.keys() & {"low_factor", "high_factor"}:
            raise ValueError(
                "low_factor and high_factor no longer exist: give idle_low_w_per_cpu, idle_high_w_per_cpu, "
                "busy_low_w_per_cpu and busy_high_w_per_cpu, in watts"
            )
        return given

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        idle = (self.idle_low_w_per_cpu, self.idle_w_per_cpu, self.idle_high_w_per_cpu)
        busy = (self.busy_low_w_per_cpu, self.busy_w_per_cpu, self.busy_high_w_per_cpu)
        if list(idle) != sorted(idle) or list(busy) != sorted(busy):
            raise ValueError("needs low <= value <= high, for idle and for busy")
        if any(a > b for a, b in zip(idle, busy, strict=True)):
            raise ValueError("needs idle_w_per_cpu <= busy_w_per_cpu, and the same for their lower and upper bounds")
        return self


class EnergySettings(Section):
    """How energy is measured and scored on one wrapper. Without ``grid`` or ``embodied`` there is no score."""

    allow_estimates: bool = Field(
        False, description="Whether a sci_score may be an estimate; it is then labelled as an estimate"
    )
    functional_unit: Literal["output_token", "token", "request", "word"] = Field(
        "output_token", description="Functional unit of sci_score; token: tokens of prompt and answer"
    )
    pue: float = Field(1.0, ge=1.0, description="Power usage effectiveness of the site; energy is multiplied by it")
    poll_s: float = Field(0.05, gt=0, le=1.0, description="Time between two readings of an energy counter, seconds")
    settle_max_s: float = Field(
        60, gt=0, description="Maximum wait for the machine to be at rest, before a lease of measurement grade, seconds"
    )
    steady_cv: float = Field(
        0.05,
        gt=0,
        description="A machine is at rest if its power varies by at most this: standard deviation / mean of 1 s slices",
    )
    grid: GridSettings | None = Field(None, description="Carbon intensity; null: not known, no score is computed")
    embodied: EmbodiedSettings | None = Field(
        None, description="Embodied carbon; null: not known, no score is computed"
    )
    cpu_model: CPUModelSettings | None = Field(
        None, description="Power model of CPUs without a counter; null: their energy is not covered"
    )


class MachineMatch(Section):
    """Selects machines: all given fields must match. Case-sensitive patterns with ``*`` and ``?``."""

    machine: str | None = Field(None, description="Id of the machine")
    gpu_type: str | None = Field(None, description="Type of its GPUs, as in `greenprompt status`")
    zone: str | None = Field(None, description="Its availability zone, from the label of its Ray node")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.machine is None and self.gpu_type is None and self.zone is None:
            raise ValueError("needs machine, gpu_type or zone")
        return self

    def fits(self, *, machine: str, gpu_type: str | None, zone: str | None) -> bool:
        """True when a machine with these values matches. An unknown value matches no pattern, not even ``*``."""
        pairs = ((self.machine, machine), (self.gpu_type, gpu_type), (self.zone, zone))
        return all(pattern is None or (value is not None and fnmatchcase(value, pattern)) for pattern, value in pairs)


class MachineEnergySettings(Section):
    """Settings of single machines that replace those of the site. A missing field: as for the site; null: not known."""

    match: MachineMatch = Field(description="Selects the machines")
    pue: float = Field(1.0, ge=1.0, description="Replaces energy.pue on these machines")
    grid: GridSettings | None = Field(None, description="Replaces energy.grid on these machines")
    embodied: SiteEmbodiedSettings | None = Field(None, description="Replaces energy.embodied on these machines")
    cpu_model: CPUModelSettings | None = Field(None, description="Replaces energy.cpu_model on these machines")


class SiteEnergySettings(EnergySettings):
    """How energy is measured and scored on the site. For a machine, the first match in ``machines`` applies."""

    embodied: SiteEmbodiedSettings | None = Field(
        None, description="Embodied carbon; null: not known, no score is computed"
    )
    machines: tuple[MachineEnergySettings, ...] = Field(
        (), description="Settings of single machines that replace those of the site"
    )

    def of_wrapper(
        self, *, machine: str, gpu_type: str | None, zone: str | None, gpus: int, on_machine: int
    ) -> EnergySettings:
        """Return the settings of one wrapper.

        Args:
            machine: Its machine's id.
            gpu_type: The type of the machine's GPUs, None if not known or if it has none.
            zone: The machine's availability zone, None if not known.
            gpus: How many GPUs the wrapper reserves, >= 0.
            on_machine: How many wrappers share the machine, this one included, >= 1.
        """
        fitting = (each for each in self.machines if each.match.fits(machine=machine, gpu_type=gpu_type, zone=zone))
        own = next(fitting, None)
        chosen: dict[str, Any] = {name: getattr(self, name) for name in EnergySettings.model_fields}
        if own is not None:
            chosen |= {name: getattr(own, name) for name in own.model_fields_set - {"match"}}
        embodied: SiteEmbodiedSettings | None = chosen["embodied"]
        if embodied is not None:
            chosen["embodied"] = embodied.of_wrapper(gpus=gpus, on_machine=on_machine)
        return EnergySettings(**chosen)
