"""Energy windows: what a wrapper measures and the registry keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from registry.wire.words import WindowKind


@dataclass(frozen=True, slots=True)
class EnergyWindow:
    """Energy and emissions of a time window on a wrapper, measured by the wrapper.

    * ``window_id``: ``<process>-<number>``, or ``<process>-p<n>`` for the n-th prompt of the wrapper's process; that is
      known when the prompt starts, so that the answer can contain it.
    * ``number``: position in the log of its process, from 1, without gaps; 0 if read back from the database.
    * ``request_id``, ``measurement_id``: those of the lease, None without one.
    * ``begun_s``, ``ended_s``: UTC seconds.
    * ``total_j`` [J], ``o_g`` and ``m_g`` [gCO2eq]: None if not known.
    * ``label``: label of the energy (deployments.energy.figures.Label).
    * ``detail``: the whole record, canonical JSON.
    """

    window_id: str
    kind: WindowKind
    wrapper_id: str
    request_id: str | None
    measurement_id: int | None
    begun_s: float
    ended_s: float
    total_j: float | None
    o_g: float | None
    m_g: float | None
    label: str
    detail: str
    number: int = field(default=0, compare=False)
