"""Finds a machine's energy sources: NVIDIA's energy counters, the kernel's powercap zones, a model of the CPU.

`probe_sources` tries each with real calls. A source that can't be read does not raise: it is
returned as `Unreadable` with the reason, and gets no figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deployments.energy.counters.base import POWER_HEADROOM, CounterLost, Joules, Source, Unreadable
from deployments.energy.counters.cpu_model import CPUModelSource
from deployments.energy.counters.machine_share import CPUPart, shares
from deployments.energy.counters.module_counters import module_counters
from deployments.energy.counters.nvml import GPUCounter, GPUPower, GPUPowerAtMost, probe_gpu
from deployments.energy.counters.powercap import PowercapZone, probe_powercap
from deployments.energy.figures import SCISettings
from deployments.machine.cpu_quota import cpus_here
from deployments.machine.gpus import ReadFailed, all_gpu_uuids
from deployments.machine.machine_cpu import MachineCPU

__all__ = [
    "POWER_HEADROOM",
    "CPUModelSource",
    "CounterLost",
    "GPUCounter",
    "GPUPower",
    "Joules",
    "PowercapZone",
    "Source",
    "Unreadable",
    "probe_sources",
]

POWERCAP_ROOT = Path("/sys/class/powercap")


def _probe_gpus(gpu_uuids: Sequence[str], machine: MachineCPU) -> list[Source | Unreadable]:
    """Return a source for each GPU, and a second one, an upper bound, for each GPU without an energy counter."""
    gpus: list[Source | Unreadable] = []
    for uuid in gpu_uuids:
        gpus.append(gpu := probe_gpu(uuid, machine.tree))
        if isinstance(gpu, GPUPower):
            gpus.append(GPUPowerAtMost(gpu))
    return gpus


def probe_sources(
    gpu_uuids: Sequence[str],
    *,
    pid: int,
    settings: SCISettings,
    powercap_root: Path = POWERCAP_ROOT,
    proc_root: Path = Path("/proc"),
    cpus: float | None = None,
    machine: MachineCPU | None = None,
    on_machine: int = 1,
) -> list[Source | Unreadable]:
    """Return the sources for these GPUs and this machine's CPUs, each tried with a real call.

    - A GPU that can't be read stays inside the boundary, so no total is known.
    - The CPU is counted by hardware if possible, else by the operator's model. If there are GPUs and estimates are not
      allowed, the model is left out: it would make every total an estimate. Figures are then flagged
      ``cpu_not_covered``.
    - If a GPU's counter counts its module with the CPU (Grace Hopper, Grace Blackwell), nothing else is counted. If
      another wrapper's GPU has the same counter, there is no figure.
    - With several wrappers on the machine, each gets a share of the machine-wide counters, which is an estimate.

    Args:
        gpu_uuids: The wrapper's GPUs, empty for none.
        pid: The root of the process tree that does the work.
        settings: The operator's choices, with the CPU model.
        powercap_root: Where the kernel shows its powercap zones.
        proc_root: Where proc is mounted.
        cpus: How many CPUs are reserved, for the model; None: all that this process may use.
        machine: The CPU time on the machine; None: only the tree of ``pid`` is known.
        on_machine: How many wrappers share the machine, this one included.
    """
    machine = machine or MachineCPU(pid, proc_root=proc_root)
    gpus = _probe_gpus(gpu_uuids, machine)
    modules = [gpu for gpu in gpus if isinstance(gpu, GPUCounter) and gpu.covers_cpu]
    if modules:
        gpus = [*(gpu for gpu in gpus if gpu not in modules), *_told_apart(modules, machine, on_machine)]
        return [*gpus, Unreadable("cpu", "the energy counter of the GPU's module has the CPU and its memory in it")]
    estimates = settings.allow_estimates or not gpus
    zones = probe_powercap(powercap_root)
    if on_machine > 1 and estimates:
        machine.look_often()
        zones = shares(zones, probe_powercap(powercap_root), CPUPart(machine, on_machine))
    elif on_machine > 1:
        why = f"a share of one of {on_machine} wrappers is an estimate; energy.allow_estimates is false"
        zones = [Unreadable(zone.name, why) if isinstance(zone, Source) else zone for zone in zones]
    found = [*gpus, *zones]
    if any(isinstance(zone, Source) and zone.name.startswith("package-") for zone in zones):
        return found
    if settings.cpu_model is None:
        found.append(Unreadable("cpu-model", "the settings hold no energy.cpu_model"))
    elif not estimates:
        found.append(Unreadable("cpu-model", "energy.allow_estimates is false, and GPUs are counted without it"))
    else:
        machine.look_often()
        found = [_in_model(source) for source in found]
        found.append(CPUModelSource(settings.cpu_model, machine.tree, cpus=cpus_here() if cpus is None else cpus))
    return found


def _told_apart(modules: Sequence[GPUCounter], machine: MachineCPU, on_machine: int) -> Sequence[Source | Unreadable]:
    """Return sources that count each module's counter once, and not at all if another wrapper's GPU has it, too."""
    others: list[GPUCounter] = []
    try:
        for uuid in all_gpu_uuids() if on_machine > 1 else ():
            gpu = probe_gpu(uuid, machine.tree)
            if isinstance(gpu, GPUCounter) and gpu.covers_cpu and gpu.name not in {own.name for own in modules}:
                others.append(gpu)
            elif isinstance(gpu, Source):
                gpu.close()
    except ReadFailed as error:  # then it is unknown whose counters these are
        for own in modules:
            own.close()
        return [Unreadable(own.name, str(error), in_boundary=True) for own in modules]
    return module_counters(modules, others) if len(modules) + len(others) > 1 else modules


def _in_model(source: Source | Unreadable) -> Source | Unreadable:
    """Return the source, but no source of main memory: the CPU model includes memory."""
    if isinstance(source, Source) and source.name.startswith("dram-"):
        return Unreadable(source.name, "energy.cpu_model has the memory in it, and no package can be read")
    return source
