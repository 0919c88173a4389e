"""The kernel's out-of-memory killer, as far as it can be asked without having it kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deployments.launch.local_ray import RAY_ENVIRONMENT
from deployments.machine import process_tree
from deployments.machine.out_of_memory import ENGINE_SCORE, WRAPPER_SCORE, OOMKills, raise_score


@pytest.mark.parametrize(("before", "after"), [("0", "900"), ("200", "900"), ("1000", "1000"), ("-17", "900")])
def test_a_score_is_only_raised(tmp_path: Path, before: str, after: str) -> None:
    """Only root may lower one, and who has a higher one was given it."""
    file = tmp_path / "oom_score_adj"
    file.write_text(f"{before}\n")
    raise_score(ENGINE_SCORE, file)
    assert file.read_text().strip() == after


def test_a_process_may_raise_its_own() -> None:
    """The kernel takes it, and what is started later inherits it."""
    code = (
        "import subprocess; from deployments.machine.out_of_memory import *; raise_score(WRAPPER_SCORE);"
        "print(subprocess.check_output(['cat', '/proc/self/oom_score_adj'], text=True))"
    )
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True)) >= WRAPPER_SCORE


def test_engines_go_before_wrappers_and_ray_ends_nobody() -> None:
    """Ray's own monitor is off, and its workers are not put in front of everybody else."""
    assert ENGINE_SCORE > WRAPPER_SCORE > 0
    assert RAY_ENVIRONMENT["RAY_memory_monitor_refresh_ms"] == RAY_ENVIRONMENT["RAY_worker_oom_score_adjustment"] == "0"


def test_kills_are_those_since_the_last_look(tmp_path: Path) -> None:
    """A kill of last week is not why an engine has died now."""
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 9\noom_kill 3\nnr_free_pages 7\n")
    kills = OOMKills(counters)
    seen = [kills.happened]
    counters.write_text("pgfault 12\noom_kill 4\n")
    seen.append(kills.happened)
    kills.look()
    assert [*seen, kills.happened] == [False, True, False]


def test_a_kernel_that_does_not_count_tells_nothing(tmp_path: Path) -> None:
    """Not known is no kill."""
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 9\n")
    assert not OOMKills(counters).happened


@pytest.mark.parametrize(("how", "signal"), [("os.kill(os.getpid(), 9)", 9), ("os._exit(3)", 0)])
def test_the_signal_that_ended_a_process_is_known_until_its_parent_fetches_it(how: str, signal: int) -> None:
    """SIGKILL is told from an exit of its own; nothing is told of one that runs, or is gone."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, sys; sys.stdin.read(); {how}"], stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process_tree.ended_by(process.pid) is None
    process.stdin.close()
    while (ended_by := process_tree.ended_by(process.pid)) is None:
        pass
    assert ended_by == signal
    process.wait()
    assert process_tree.ended_by(process.pid) is None
