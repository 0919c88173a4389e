"""Energy windows as the store returns them, with the machine and the tenant."""

from __future__ import annotations

from dataclasses import dataclass

from registry.contract.windows import EnergyWindow


@dataclass(frozen=True, slots=True)
class KeptWindow:
    """A stored energy window, the machine that it was measured on, and the tenant that it is charged to.

    ``machine_id`` None: the machine was no longer known. ``tenant`` None: charged to no tenant.
    """

    window: EnergyWindow
    machine_id: str | None
    tenant: str | None
