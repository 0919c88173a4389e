"""The kernel's files: ``/sys/class/powercap`` and ``/proc`` under a directory of choice, at a simulated time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.energy_world.counters import Zone
from tests.energy_world.history import Engine, Reaping
from tests.energy_world.truth import Steps, Truth

HERTZ = 100
UPTIME_S = 100_000.0
"""How long the machine ran before the history began."""
TEAR_S = 0.06
"""For so long a child that was reaped is seen twice, or not at all."""
ZOMBIE_S = 0.5
INIT_PID, RAYLET_PID = 1, 50
USER_PART = 0.85
GIB_PAGES = 2**30 // 4096


@dataclass(eq=False)
class Process:
    """One process. ``parts`` are pairs of (busy processors over time, this process' share of them)."""

    pid: int
    parent: int
    command: str
    begin_s: float
    end_s: float
    parts: tuple[tuple[Steps, float], ...]
    earlier_cpu_s: float = 0.0
    children: tuple[Process, ...] = ()
    """Those that it reaps; their CPU time is added to its own."""
    reaping: Reaping = "at_once"
    pages: int = GIB_PAGES

    @cached_property
    def gone_s(self) -> float:
        """When its directory is gone [s]."""
        late = {"zombie": ZOMBIE_S, "twice": TEAR_S}.get(self.reaping, 0.0)
        return self.end_s + late

    @cached_property
    def reaped_s(self) -> float:
        """When its parent's counters hold its CPU time [s]."""
        late = {"zombie": ZOMBIE_S, "missing": TEAR_S}.get(self.reaping, 0.0)
        return self.end_s + late

    def own_cpu_s(self, now_s: float) -> float:
        """Return its own CPU time [s]."""
        begin_s, end_s = max(self.begin_s, 0.0), min(now_s, self.end_s)
        if end_s <= begin_s:
            return self.earlier_cpu_s
        return self.earlier_cpu_s + sum(share * steps.between(begin_s, end_s) for steps, share in self.parts)

    def children_cpu_s(self, now_s: float) -> float:
        """Return the CPU time [s] of the children that it has reaped."""
        now_s = min(now_s, self.end_s)
        return sum([child.final_cpu_s for child in self.children if child.reaped_s <= now_s])

    @cached_property
    def final_cpu_s(self) -> float:
        """CPU time [s] that its parent gets: its own and that of its children."""
        return self.own_cpu_s(self.end_s) + self.children_cpu_s(self.end_s)

    def ticks(self, now_s: float) -> tuple[int, int, int, int]:
        """Return utime, stime, cutime and cstime [clock ticks]."""
        own, children = self.own_cpu_s(now_s) * HERTZ, self.children_cpu_s(now_s) * HERTZ
        user, child_user = int(own * USER_PART), int(children * USER_PART)
        return user, int(own) - user, child_user, int(children) - child_user

    def stat(self, now_s: float) -> str:
        """Return the line of ``/proc/<pid>/stat``."""
        user, system, child_user, child_system = self.ticks(now_s)
        state = "Z" if now_s >= self.end_s else "S"
        started = int((UPTIME_S + self.begin_s) * HERTZ)
        size = self.pages * 4096
        return (
            f"{self.pid} ({self.command}) {state} {self.parent} {self.pid} {self.pid} 0 -1 4194304 99 0 0 0 "
            f"{user} {system} {child_user} {child_system} 20 0 4 0 {started} {size} {self.pages} "
            f"18446744073709551615 {'0 ' * 12}17 3 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
        )


def processes_of(truth: Truth) -> list[Process]:
    """Return all processes of a history: wrappers, their engines with a worker and a loader, and strangers."""
    history = truth.history
    system = [(truth.system_cpus, 0.5)]
    found = [
        Process(INIT_PID, 0, "systemd", -UPTIME_S, 1e9, (), 5.0, pages=3000),
        Process(RAYLET_PID, INIT_PID, "raylet", -UPTIME_S + 60, 1e9, tuple(system), 500.0, pages=20_000),
    ]
    for life in history.lives:
        engines = [_engine(truth, engine) for engine in history.engines if engine.wrapper_pid == life.pid]
        # One that ends with its wrapper is reaped by init.
        reaped = tuple(engine[0] for engine in engines if engine[0].end_s < life.end_s)
        front = truth.front_cpus[life.wrapper]
        found.append(
            Process(
                life.pid,
                RAYLET_PID,
                "ray::Wrapper",
                life.begin_s,
                life.end_s,
                ((front, 1.0),),
                20.0 if life.begin_s < 0 else 0.0,
                reaped,
                pages=GIB_PAGES // 2,
            )
        )
        found += [process for engine in engines for process in engine]
    for stranger in history.strangers:
        busy = truth.stranger_cpus[stranger.pid]
        # A name that a careless parser stumbles over.
        found.append(
            Process(stranger.pid, INIT_PID, "a) R 7 (b", stranger.begin_s, stranger.end_s, ((busy, 1.0),), pages=99_000)
        )
    return found


def _engine(truth: Truth, engine: Engine) -> list[Process]:
    serve, load = truth.serve_cpus[engine.wrapper], truth.load_cpus[engine.wrapper]
    earlier = engine.earlier_cpu_s
    begin_s, end_s, pid = engine.begin_s, engine.end_s, engine.pid
    worker = Process(pid + 1, pid, "VLLM::Worker", begin_s, end_s, ((serve, 0.3),), 0.3 * earlier, pages=8 * GIB_PAGES)
    children = [worker]
    if engine.loaded_s > begin_s >= 0:
        children.append(
            Process(
                pid + 2, pid, "loader", begin_s, min(engine.loaded_s, end_s), ((load, 1.0),), reaping=engine.reaping
            )
        )
    main = Process(
        pid,
        engine.wrapper_pid,
        "VLLM::EngineCore",
        begin_s,
        end_s,
        ((serve, 0.7),),
        0.7 * earlier,
        tuple(children),
        engine.reaping,
        pages=4 * GIB_PAGES,
    )
    return [main, *children]


class FileTree:
    """Writes the files as they are at a time; only what changed since the last time.

    Files are overwritten in place, so that both a reader that opens a file each time and one that keeps it open see
    the new content. A zone that can't be read has a directory in place of ``energy_uj``: reading raises OSError, for
    root too.
    """

    def __init__(self, truth: Truth, zones: Sequence[Zone]) -> None:
        self._truth, self._zones = truth, tuple(zones)
        self.processes = processes_of(truth)
        self._earlier_cpu_s = 3_000.0 + sum(process.earlier_cpu_s for process in self.processes)
        self._root: Path | None = None
        self._alive = list(self.processes)
        self._files: dict[str, tuple[int, int]] = {}
        self._last: dict[int | str, object] = {}

    def read(self, path: str, now_s: float) -> str:
        """Return one file, without writing any. ``path`` as in the kernel: ``/proc/…`` or ``/sys/class/powercap/…``.

        Raises FileNotFoundError if there is none, PermissionError for a zone that can't be read.
        """
        parts = path.strip("/").split("/")
        if parts[:3] == ["sys", "class", "powercap"]:
            for zone in self._zones:
                if zone.directory == parts[3]:
                    if parts[4] == "energy_uj":
                        if not zone.is_readable(now_s):
                            raise PermissionError(path)
                        return f"{zone.energy_uj(now_s)}\n"
                    if parts[4] in _static(zone):
                        return _static(zone)[parts[4]]
        elif parts == ["proc", "stat"]:
            return self._proc_stat(now_s)
        elif parts[0] == "proc" and parts[2:] == ["stat"]:
            for process in self.processes:
                if str(process.pid) == parts[1] and process.begin_s <= now_s < process.gone_s:
                    return process.stat(now_s)
        raise FileNotFoundError(path)

    def write(self, root: Path, now_s: float) -> None:
        """Bring the files under ``root`` to the state at a time that is not before the last one."""
        if self._root != root:
            self.close()
            self._root, self._alive = root, list(self.processes)
            self._begin(root)
        for zone in self._zones:
            self._write_zone(zone, now_s)
        self._put("proc/stat", self._proc_stat(now_s))
        for process in [p for p in self._alive if p.gone_s <= now_s]:
            self._alive.remove(process)
            if process.pid in self._last:
                self._remove(process)
        for process in self._alive:
            if process.begin_s > now_s:
                continue
            key = (process.ticks(now_s), now_s >= process.end_s)
            last = self._last.get(process.pid)
            if last == key:
                continue
            path = f"proc/{process.pid}"
            if last is None:
                self._add(process, root / path)
            self._last[process.pid] = key
            self._put(f"{path}/stat", process.stat(now_s))

    def close(self) -> None:
        """Close all files. Idempotent."""
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._last.clear()
        self._root = None

    def _begin(self, root: Path) -> None:
        cpu = self._truth.machine.cpu
        (root / "sys/class/powercap").mkdir(parents=True)
        (root / "proc").mkdir()
        cards = "".join(f"processor\t: {n}\nmodel name\t: {cpu.name}\n\n" for n in range(cpu.processors))
        (root / "proc/cpuinfo").write_text(cards)
        (root / "proc/meminfo").write_text("MemTotal:       536870912 kB\nMemAvailable:   402653184 kB\n")
        for zone in self._zones:
            control, *numbers = zone.directory.split(":")
            own = root / "sys/devices/virtual/powercap" / control
            for depth in range(1, len(numbers) + 1):
                own /= ":".join([control, *numbers[:depth]])
            own.mkdir(parents=True, exist_ok=True)
            for name, text in _static(zone).items():
                (own / name).write_text(text)
            link = root / "sys/class/powercap" / zone.directory
            link.symlink_to(os.path.relpath(own, link.parent))
            top = root / "sys/class/powercap" / control
            if not top.exists():
                top.symlink_to(os.path.relpath(root / "sys/devices/virtual/powercap" / control, top.parent))

    def _write_zone(self, zone: Zone, now_s: float) -> None:
        path = f"sys/class/powercap/{zone.directory}/energy_uj"
        if zone.is_readable(now_s):
            self._put(path, f"{zone.energy_uj(now_s)}\n")
        elif self._last.get(path) is None:
            self._last[path] = "unreadable"
            self._drop(path)
            assert self._root
            (self._root / path).unlink(missing_ok=True)
            (self._root / path).mkdir()

    def _add(self, process: Process, path: Path) -> None:
        path.mkdir()
        (path / "comm").write_text(f"{process.command}\n")
        (path / "cmdline").write_text(f"{process.command}\0")
        (path / "statm").write_text(f"{process.pages} {process.pages} 1000 1 0 {process.pages} 0\n")

    def _remove(self, process: Process) -> None:
        assert self._root
        del self._last[process.pid]
        self._drop(f"proc/{process.pid}/stat")
        shutil.rmtree(self._root / f"proc/{process.pid}")

    def _proc_stat(self, now_s: float) -> str:
        processors = self._truth.machine.cpu.processors
        busy_s = self._earlier_cpu_s + self._truth.busy_cpus.integral(now_s)
        idle_s = processors * (UPTIME_S + now_s) - busy_s
        user, system = int(busy_s * USER_PART * HERTZ), int(busy_s * (1 - USER_PART) * HERTZ)
        times = f"{user} 0 {system} {int(idle_s * HERTZ)} 0 0 0 0 0 0"
        each = f"{user // processors} 0 {system // processors} {int(idle_s * HERTZ / processors)} 0 0 0 0 0 0"
        lines = "".join(f"cpu{number} {each}\n" for number in range(processors))
        booted = int(self._truth.history.wall_s(now_s) - now_s - UPTIME_S)
        return (
            f"cpu  {times}\n{lines}intr 0\nctxt 0\nbtime {booted}\nprocesses 9999\nprocs_running 1\nprocs_blocked 0\n"
        )

    def _put(self, path: str, text: str) -> None:
        assert self._root
        data = text.encode()
        descriptor, length = self._files.get(path, (-1, 0))
        if descriptor < 0:
            descriptor = os.open(self._root / path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(descriptor, data, 0)
        if len(data) < length:
            os.ftruncate(descriptor, len(data))
        self._files[path] = (descriptor, len(data))

    def _drop(self, path: str) -> None:
        if path in self._files:
            os.close(self._files.pop(path)[0])


def _static(zone: Zone) -> dict[str, str]:
    """Return the files of a zone that never change."""
    return {
        "name": f"{zone.name}\n",
        "max_energy_range_uj": f"{zone.counter.range_uj}\n",
        "enabled": "1\n",
        "constraint_0_name": "long_term\n",
        "constraint_0_power_limit_uw": f"{int(zone.limit_w * 1e6)}\n",
        "constraint_0_max_power_uw": f"{int(zone.limit_w * 1e6)}\n",
    }
