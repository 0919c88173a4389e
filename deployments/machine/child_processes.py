"""Child processes that the kernel kills when their parent ends, even if the parent is killed and can't clean up."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from multiprocessing import context
from typing import Any

from deployments.machine.out_of_memory import ENGINE_SCORE, raise_score

_PRCTL = {"PR_SET_PDEATHSIG": 1, "PR_SET_CHILD_SUBREAPER": 36, "PR_SET_NO_NEW_PRIVS": 38}
"""Numbers of the options that we set. Source: linux/prctl.h."""

_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILE_DATA = 158, 0x1023, 18


def set_process_option(name: str, value: int) -> None:
    """Set an option of this process by prctl(2). Raises OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PRCTL[name], value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({name}) failed")


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when the thread that started it ends; exit now if that has already happened.

    Raises OSError if the kernel refuses.
    """
    set_process_option("PR_SET_PDEATHSIG", signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def allow_amx() -> None:
    """Request permission for Intel AMX tile registers, for this process and its forks; do nothing on other processors.

    vLLM 0.32 uses them in its attention without requesting permission. If torch has not requested
    it before (in a matrix product), vLLM's worker is killed by SIGILL. That happens with an eager
    LLM whose first prompt is short.

    Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    if platform.machine() == "x86_64":  # a raw system call; it fails harmlessly if the processor has no AMX
        ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILE_DATA)


class ParentBoundProcess(context.SpawnProcess):
    """A spawned engine process that the kernel kills when its parent dies.

    It gets an engine's score for the out-of-memory killer. The same holds for its own spawned processes.
    """

    def __reduce__(self) -> Any:
        # Create the object before its state is unpickled, because that imports vLLM.
        return (_recreate_in_child, (os.getpid(),), self.__dict__)


def _recreate_in_child(parent_pid: int) -> ParentBoundProcess:
    die_with_parent(parent_pid)
    raise_score(ENGINE_SCORE)
    bind_spawned_processes()
    allow_amx()
    return ParentBoundProcess.__new__(ParentBoundProcess)


def bind_spawned_processes() -> None:
    """Make every process that this one spawns through multiprocessing die with it, from now on."""
    context.SpawnContext.Process = ParentBoundProcess
