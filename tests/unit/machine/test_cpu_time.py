from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.machine.cpu_time import TICKS_PER_S, CPUTimeTree, ProcessStat, ProcessTable
from tests.support.fake_counters import end_process, write_process

ROOT, CHILD, GRANDCHILD, STRANGER = 100, 101, 102, 200


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "uptime").write_text("1 1")
    write_process(tmp_path, 1, 0, ticks=(9999, 0, 0, 0))
    write_process(tmp_path, ROOT, 1, ticks=(100, 10, 0, 0))
    write_process(tmp_path, CHILD, ROOT, ticks=(50, 0, 0, 0), name="a) R 1 (b")
    write_process(tmp_path, GRANDCHILD, CHILD, ticks=(7, 0, 0, 0))
    write_process(tmp_path, STRANGER, 1, ticks=(5000, 0, 0, 0))
    return tmp_path


@pytest.fixture
def tree(proc: Path) -> CPUTimeTree:
    tree = CPUTimeTree(ROOT, proc_root=proc)
    assert tree.read_s(0.0) == 0.0
    return tree


def ticks(tree: CPUTimeTree, now_s: float) -> float:
    return tree.read_s(now_s) * TICKS_PER_S


def test_the_tree_and_nobody_else(tree: CPUTimeTree, proc: Path) -> None:
    """User and system time of the root and all its descendants count, whatever they are called; strangers' does not."""
    write_process(proc, ROOT, 1, ticks=(103, 12, 0, 0))
    write_process(proc, CHILD, ROOT, ticks=(60, 0, 0, 0), name="a) R 1 (b")
    write_process(proc, GRANDCHILD, CHILD, ticks=(8, 0, 0, 0))
    write_process(proc, STRANGER, 1, ticks=(9000, 0, 0, 0))
    assert ticks(tree, 0.05) == 3 + 2 + 10 + 1
    assert tree.pids() == {ROOT, CHILD, GRANDCHILD}


def test_new_descendants_are_found(tree: CPUTimeTree, proc: Path) -> None:
    """A process that joins the tree counts from its birth, as soon as it is looked for."""
    write_process(proc, 300, GRANDCHILD, ticks=(20, 0, 0, 0))
    assert ticks(tree, 0.5) == 0
    assert ticks(tree, 1.0) == 20


def test_reaped_child_counts_once(tree: CPUTimeTree, proc: Path) -> None:
    """The time of a child that was reaped moves to its parent: it is neither lost nor counted twice."""
    end_process(proc, GRANDCHILD)
    write_process(proc, CHILD, ROOT, ticks=(50, 0, 7 + 4, 0))
    assert ticks(tree, 0.05) == 4


def test_time_that_its_parent_shows_some_looks_later_counts_once(tree: CPUTimeTree, proc: Path) -> None:
    """A child of 7 ticks is gone at 0.05 s, and its parent shows them at 0.15 s only, with 4 that nobody saw: 4 count.

    What a parent inherits half a second after that is of others: 5 more ticks count in full.
    """
    end_process(proc, GRANDCHILD)
    assert [ticks(tree, now_s) for now_s in (0.05, 0.10)] == [0, 0]
    write_process(proc, CHILD, ROOT, ticks=(50, 0, 7 + 4, 0))
    assert ticks(tree, 0.15) == 4
    write_process(proc, CHILD, ROOT, ticks=(50, 0, 7 + 4 + 5, 0))
    assert ticks(tree, 0.70) == 9


class Racing(ProcessTable):
    """A proc in which something happens just before a certain process is read."""

    def __init__(self, proc_root: Path, pid: int, happens: Callable[[], None]) -> None:
        super().__init__(proc_root)
        self._pid, self._happens = pid, happens

    def stat(self, pid: int) -> ProcessStat | None:
        if pid == self._pid and self.armed:
            self.armed = False
            self._happens()
        return super().stat(pid)

    armed = False


@pytest.mark.parametrize("before", [ROOT, CHILD, GRANDCHILD])
def test_child_that_is_reaped_while_it_is_read_counts_once(proc: Path, before: int) -> None:
    """A child of 3,600 CPU-seconds is reaped between two reads of one look: not one tick comes from nothing.

    Whichever process is read next when it happens, the time was counted while the child lived, and is not again when
    its parent shows it.
    """
    hour = 3600 * TICKS_PER_S
    write_process(proc, GRANDCHILD, CHILD, ticks=(hour, 0, 0, 0))

    def reap() -> None:
        end_process(proc, GRANDCHILD)
        write_process(proc, CHILD, ROOT, ticks=(50, 0, hour, 0))

    table = Racing(proc, before, reap)
    tree = CPUTimeTree(ROOT, table=table)
    assert tree.read_s(0.0) == 0.0
    table.armed = True
    assert [ticks(tree, look / 20) for look in range(1, 60)] == [0.0] * 59


def test_time_is_bounded_by_the_processors(proc: Path) -> None:
    """2 processors can't have worked for more than 2 s in each second, and 2 s more for a process just found.

    A process that shows 3,600 s within 0.05 s is counted with 2 * (0.05 + 1) = 2.1 s; what is left is not made up for.
    """
    tree = CPUTimeTree(ROOT, proc_root=proc, processors=2)
    tree.read_s(0.0)
    write_process(proc, CHILD, ROOT, ticks=(50 + 3600 * TICKS_PER_S, 0, 0, 0))
    assert tree.read_s(0.05) == pytest.approx(2.1)
    assert tree.read_s(60.0) == pytest.approx(2.1)


def test_unreaped_child_does_not_take_its_time_along(tree: CPUTimeTree, proc: Path) -> None:
    """When a process ends and nobody inherits its time the sum stays, and goes on growing from there."""
    end_process(proc, CHILD)
    assert ticks(tree, 0.05) == 0
    write_process(proc, ROOT, 1, ticks=(130, 10, 0, 0))
    assert ticks(tree, 0.10) == 30


def test_orphan_stays(tree: CPUTimeTree, proc: Path) -> None:
    """A descendant whose parent died is still ours after the next look."""
    end_process(proc, CHILD)
    write_process(proc, GRANDCHILD, 1, ticks=(7, 0, 0, 0))
    tree.read_s(0.05)
    write_process(proc, GRANDCHILD, 1, ticks=(17, 0, 0, 0))
    assert ticks(tree, 2.0) == 10
    assert GRANDCHILD in tree.pids()


def test_reused_pid_is_a_stranger(tree: CPUTimeTree, proc: Path) -> None:
    """A pid that was given to another process is not ours any more, and its time is not counted."""
    write_process(proc, GRANDCHILD, 1, ticks=(8000, 0, 0, 0), started=777)
    assert ticks(tree, 0.05) == 0
    assert ticks(tree, 2.0) == 0
    assert GRANDCHILD not in tree.pids()


def test_root_is_gone(tree: CPUTimeTree, proc: Path) -> None:
    """When all of the tree has ended the sum stays what it was."""
    write_process(proc, ROOT, 1, ticks=(120, 10, 0, 0))
    assert ticks(tree, 0.05) == 20
    for pid in (ROOT, CHILD, GRANDCHILD):
        end_process(proc, pid)
    assert ticks(tree, 0.1) == 20
    assert ticks(tree, 5.0) == 20
    assert not tree.exists(ROOT)


def test_this_process() -> None:
    """On real /proc the CPU time of this process is seen to grow by what it used."""
    tree = CPUTimeTree(os.getpid())
    tree.read_s(0.0)
    begun_s = time.process_time()
    while time.process_time() - begun_s < 0.1:
        pass
    assert tree.read_s(0.05) >= 0.08
    assert os.getpid() in tree.pids()
