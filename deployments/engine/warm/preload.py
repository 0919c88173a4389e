"""Imports everything an engine process needs; the warm forkserver runs this, so that its forks start at once.

Import it nowhere else: it changes the process permanently.
"""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing.spawn
import os
from collections.abc import Callable, Mapping
from typing import Any

from deployments.engine.warm.forkserver import OWNER_PID, PRELOAD_EXTRA
from deployments.engine.warm.patches import VLLM_ENGINES, patch_engine_processes, shape_problem
from deployments.machine.child_processes import allow_amx, die_with_parent
from deployments.machine.out_of_memory import ENGINE_SCORE, raise_score
from deployments.machine.second_user import USER, run_as_second_user

_ALWAYS = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.lora.resolver",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.registry",
)
_CPU = ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.v1.attention.backends.cpu_attn")
_GPU = ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner")
_parent_pid = os.getpid()
not_preloaded: list[str] = []
"""Modules that could not be preloaded, with the reason."""


def _before_fork() -> None:
    global _parent_pid  # noqa: PLW0603 - the child needs its parent's pid
    _parent_pid = os.getpid()


def _in_child() -> None:
    die_with_parent(_parent_pid)
    raise_score(ENGINE_SCORE)


def _preload() -> str | None:
    """Import everything; return why a fork of this process can't be an engine, or None."""
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.utils.platform_utils import cuda_is_initialized

    platform = _CPU if current_platform.is_cpu() else _GPU
    for module in (*_ALWAYS, *platform):
        importlib.import_module(module)
    for module in filter(None, os.environ[PRELOAD_EXTRA].split(",")):
        try:
            importlib.import_module(module)
        except Exception as error:
            not_preloaded.append(f"{module}: {type(error).__name__}: {error}")
    load_general_plugins()
    problem = shape_problem(VLLM_ENGINES)
    if problem is not None:
        return problem
    if cuda_is_initialized():
        return "importing vLLM has initialised CUDA, and a fork could not use it any more"
    patch_engine_processes()
    allow_amx()
    # Imported objects stay. Without this, every engine and worker would scan all of them for garbage at its start and
    # end. That takes as long as the rest of a start, and copies the memory that forks share.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None
    return None


def _stay_in_folder(prepare: Callable[[Mapping[str, Any]], None]) -> Callable[[Mapping[str, Any]], None]:
    """Let forks not enter their owner's current folder, which a second user may not be able to enter."""

    @functools.wraps(prepare)
    def stay(data: Mapping[str, Any]) -> None:
        prepare({name: value for name, value in data.items() if name != "dir"})

    return stay


die_with_parent(int(os.environ[OWNER_PID]))
problem = run_as_second_user()  # executes this program again, from its first line
os.register_at_fork(before=_before_fork, after_in_child=_in_child)
# An engine does not need its owner's main module, and in a Ray worker importing it is slow and unsafe.
multiprocessing.spawn._fixup_main_from_name = lambda _name: None  # type: ignore[attr-defined]  # noqa: SLF001
multiprocessing.spawn._fixup_main_from_path = lambda _path: None  # type: ignore[attr-defined]  # noqa: SLF001
if USER in os.environ:
    multiprocessing.spawn.prepare = _stay_in_folder(multiprocessing.spawn.prepare)  # type: ignore[assignment]
try:
    problem = problem or _preload()
except Exception as error:
    problem = f"importing vLLM failed: {type(error).__name__}: {error}"
