"""Lists and checks our changes to vLLM and Python for engines, and makes the changes that engine processes need.

The tables name all that is replaced, and all private names that are read. Importing this file does
not import vLLM; only ``shape_problem`` and ``patch_engine_processes`` do.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deployments.engine.warm.spin_wait import be_patient
from deployments.patch import Has, How, Patch, first_problem

PHASE_FILE: Final = "GREENPROMPT_ENGINE_PHASE_FILE"
"""Variable with the path of the file that engine processes write their phases to."""

_UTILS = "vllm.v1.engine.utils"
_EXECUTOR = "vllm.v1.executor.multiproc_executor"
_REGISTRY = "vllm.model_executor.models.registry"
_CORE = "vllm.v1.engine.core"
_MESSAGES = "vllm.distributed.device_communicators.shm_broadcast"
_DECORATORS = "vllm.compilation.decorators"
_ASYNC_LLM = "vllm.v1.engine.async_llm"
_OUTPUT = "vllm.v1.engine.output_processor"
_CLIENT = "vllm.v1.engine.core_client"
_HANG_WATCH = "the hang watch sees whether prompts make progress"
_WITH_PROCESS = "never: the process of the engine ends with it"
_WITH_FORKSERVER = "when the forkserver is stopped"
_NOTHING = "only read"

VLLM_ENGINES: Final = (
    # Several modules import `get_mp_context` by name, so it is replaced in each of them.
    Patch(
        "vLLM", f"{_UTILS}.get_mp_context", How.REPLACED, "engine processes are forks of the warm forkserver",
        (
            Has(_UTILS, "get_mp_context"),
            Has(_UTILS, "CoreEngineProcManager.__init__", ("get_mp_context", "Process")),
            Has(_CORE, "EngineCoreProc.run_engine_core"),
        ),
        _WITH_FORKSERVER,
    ),
    Patch(
        "vLLM", f"{_REGISTRY}._run_in_subprocess", How.REPLACED,
        "an LLM's class is inspected in a fork, not by a new import",
        (
            Has(_REGISTRY, "_run_in_subprocess"),
            Has(_REGISTRY, "_LazyRegisteredModel.inspect_model_cls", ("_run_in_subprocess",)),
        ),
        _WITH_FORKSERVER,
    ),
    Patch(
        "vLLM", f"{_EXECUTOR}.get_mp_context", How.REPLACED, "workers are forks of their engine process",
        (
            Has(_EXECUTOR, "get_mp_context"),
            Has(_EXECUTOR, "MultiprocExecutor._init_executor", ("get_mp_context",)),
            Has(_EXECUTOR, "WorkerProc.make_worker_process", ("get_mp_context", "Process")),
        ),
        _WITH_PROCESS,
    ),
    Patch(
        "vLLM", f"{_MESSAGES}.SpinCondition", How.WRAPPED, "engine processes sleep while no message is due",
        (
            Has(_MESSAGES, "SpinCondition.wait", ("last_read", "busy_loop_s"), takes=("timeout_ms",)),
            Has(_MESSAGES, "SpinCondition.record_read", ("last_read",)),
            Has(_MESSAGES, "MessageQueue.acquire_read", ("_spin_condition", "wait", "record_read")),
        ),
        _WITH_PROCESS,
    ),
    Patch(
        "vLLM", f"{_CORE}.EngineCore._initialize_kv_caches", How.WRAPPED, "an engine announces its warm-up",
        (Has(_CORE, "EngineCore._initialize_kv_caches"),), _WITH_PROCESS,
    ),
    Patch(
        "vLLM", f"{_DECORATORS}.monitor_torch_compile", How.WRAPPED, "an engine announces that it compiles",
        (Has(_DECORATORS, "monitor_torch_compile", takes=("announce_start",)),), _WITH_PROCESS,
    ),
    Patch(
        "vLLM", "vllm.platforms.current_platform.register_triton_kernel_overrides", How.REPLACED,
        "it is called once in the forkserver, not in each worker, where it would look through all modules",
        (Has("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_worker", ("register_triton_kernel_overrides",)),),
        _WITH_PROCESS,
    ),
)  # fmt: skip
"""Changes to vLLM in engine processes, and in how they are started. The forkserver checks and installs these."""

VLLM_WRAPPER: Final = (
    Patch(
        "vLLM", "AsyncLLM.output_processor", How.READ, _HANG_WATCH,
        (Has(_ASYNC_LLM, "AsyncLLM.__init__", ("output_processor",)),), _NOTHING,
    ),
    Patch(
        "vLLM", "OutputProcessor.request_states", How.READ, _HANG_WATCH,
        (Has(_OUTPUT, "OutputProcessor.__init__", ("request_states",)),), _NOTHING,
    ),
    Patch(
        "vLLM", "RequestState: request_id, prompt_len, is_prefilling, detokenizer", How.READ, _HANG_WATCH,
        (Has(_OUTPUT, "RequestState.__init__", ("request_id", "prompt_len", "is_prefilling", "detokenizer")),),
        _NOTHING,
    ),
    Patch(
        "vLLM", "IncrementalDetokenizer.num_output_tokens", How.READ, _HANG_WATCH,
        (Has("vllm.v1.engine.detokenizer", "IncrementalDetokenizer.num_output_tokens"),), _NOTHING,
    ),
    Patch(
        "vLLM", "AsyncLLM.scheduler_config.max_num_batched_tokens", How.READ,
        "the hang watch knows how many steps a prefill takes",
        (
            Has(_ASYNC_LLM, "AsyncLLM.__init__", ("scheduler_config",)),
            Has("vllm.v1.core.sched.scheduler", "Scheduler.__init__", ("max_num_batched_tokens",)),
        ),
        _NOTHING,
    ),
    Patch(
        "vLLM", "AsyncLLM.output_handler", How.READ, "it is cancelled at a stop, else it logs the end as an error",
        (Has(_ASYNC_LLM, "AsyncLLM.__init__", ("output_handler",)),), _NOTHING,
    ),
    Patch(
        "vLLM", "AsyncLLM.engine_core.resources.ctx", How.READ,
        "it is destroyed at a stop, which vLLM leaves to the garbage collector",
        (
            Has(_ASYNC_LLM, "AsyncLLM.__init__", ("engine_core",)),
            Has(_CLIENT, "MPClient.__init__", ("resources",)),
            Has(_CLIENT, "BackgroundResources.__init__", ("ctx",)),
        ),
        _NOTHING,
    ),
    Patch(
        "vLLM", "AsyncLLM.generate", How.WRAPPED, "tokens are counted for answers that report no usage",
        (Has(_ASYNC_LLM, "AsyncLLM.generate", takes=("prompt", "sampling_params")),),
        "never: it is an attribute of one engine, and ends with it",
    ),
    Patch(
        "vLLM", "user_middleware of its app", How.EDITED,
        "PrometheusInstrumentatorMiddleware is removed: it takes 3 to 6 % of the process's time for metrics not served",
        (
            Has(
                "prometheus_fastapi_instrumentator", "Instrumentator.instrument",
                ("add_middleware", "PrometheusInstrumentatorMiddleware"),
            ),
            Has("starlette.applications", "Starlette.add_middleware", ("user_middleware", "middleware_stack")),
        ),
        "never: it is of one app, and ends with it",
    ),
    Patch(
        "vLLM", "trust_request_mm_kwargs of its app", How.SET,
        "false, so that a prompt's mm_processor_kwargs are refused: they may name URLs, which transformers would load",
        (
            Has("vllm.entrypoints.launchers.api_server.app_state", "init_app_state", ("trust_request_mm_kwargs",)),
            Has(
                "vllm.entrypoints.generate.base.protocol", "validate_request_mm_kwargs",
                takes=("mm_processor_kwargs", "trust_request_mm_kwargs"),
            ),
        ),
        "never: it is an argument of one app",
    ),
)  # fmt: skip
"""Changes to vLLM in the wrapper's process by ``vllm_api``, and private names that it and the hang watch read."""

VLLM: Final = (*VLLM_ENGINES, *VLLM_WRAPPER)

PYTHON: Final = (
    Patch(
        "pyzmq", "Socket.bind", How.WRAPPED, "engines of a second user can connect to sockets of the wrapper",
        (Has("zmq.sugar.socket", "Socket.bind", takes=("addr",)),), "never: it only concerns the folder of one host",
    ),
    Patch(
        "multiprocessing", "spawn._fixup_main_from_name and _fixup_main_from_path", How.REPLACED,
        "an engine does not import its owner's main module",
        (Has("multiprocessing.spawn", "prepare", ("_fixup_main_from_name", "_fixup_main_from_path")),), _WITH_PROCESS,
    ),
    Patch(
        "multiprocessing", "spawn.prepare", How.WRAPPED,
        "an engine of a second user does not enter its owner's current folder",
        (Has("multiprocessing.spawn", "_main", ("prepare",)), Has("multiprocessing.spawn", "prepare", ("dir",))),
        _WITH_PROCESS,
    ),
    Patch(
        "multiprocessing", "context.ForkServerContext.Process", How.SUBCLASSED,
        "a fork gets the environment variables of the process that asks for it, as they are then",
        (Has("multiprocessing.context", "ForkServerContext.Process"),), "never: only our own context uses the subclass",
    ),
    Patch(
        "multiprocessing", "context.SpawnContext.Process", How.REPLACED,
        "where engines start cold, the kernel kills them with their parent",
        (Has("multiprocessing.context", "SpawnContext.Process"),), "never: it lasts until the process ends",
    ),
    Patch(
        "multiprocessing", "forkserver._forkserver: _forkserver_pid, _stop", How.READ,
        "the forkserver's processes are found and ended",
        (
            Has("multiprocessing.forkserver", "_forkserver"),
            Has("multiprocessing.forkserver", "ForkServer.__init__", ("_forkserver_pid",)),
            Has("multiprocessing.forkserver", "ForkServer._stop"),
        ),
        _NOTHING,
    ),
    Patch(
        "multiprocessing", "resource_tracker._resource_tracker: _fd, _pid, _stop", How.SET,
        "the tracker must not count as an engine's process, nor serve one of a second user, and must end with the "
        "forkserver",
        (
            Has("multiprocessing.resource_tracker", "_resource_tracker"),
            Has("multiprocessing.resource_tracker", "ResourceTracker.__init__", ("_fd", "_pid")),
            Has("multiprocessing.resource_tracker", "ResourceTracker._stop"),
        ),
        "set only in engines of a second user, and ends with them",
    ),
    Patch(
        "multiprocessing", "current_process()._config['tempdir']", How.REPLACED,
        "the forkserver's socket is in the folder of the engines",
        (Has("multiprocessing.util", "get_temp_dir", ("_config", "tempdir")),), "once the forkserver has started",
    ),
    Patch(
        "gc", "unfreeze", How.REPLACED, "vLLM's engines do not scan what they share with the forkserver",
        (Has("gc", "unfreeze"),), _WITH_PROCESS,
    ),
)  # fmt: skip
"""What is changed or privately read of Python's own modules."""


def shape_problem(vllm: Sequence[Patch] = VLLM) -> str | None:
    """Return what the installed vLLM or Python lacks for a warm start, as text; None if nothing.

    ``vllm``: the patches of vLLM to check; their modules are imported.
    """
    return first_problem((*vllm, *PYTHON))


def patch_engine_processes() -> None:
    """Patch vLLM here, in the forkserver: engines fork their workers, sleep between messages, announce phases."""
    from vllm.compilation import decorators
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.platforms import current_platform
    from vllm.utils.platform_utils import cuda_is_initialized
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import multiproc_executor

    normal = multiproc_executor.get_mp_context
    # A process that has used CUDA can't be forked; only then use vLLM's own method.
    multiproc_executor.get_mp_context = lambda: normal() if cuda_is_initialized() else fork_context()
    be_patient(SpinCondition)
    EngineCore._initialize_kv_caches = _announced("warming_up", EngineCore._initialize_kv_caches)  # noqa: SLF001
    decorators.monitor_torch_compile = _announced_within("compiling", decorators.monitor_torch_compile, "warming_up")
    # In each worker this would search all imported modules; forks inherit the result from here.
    current_platform.register_triton_kernel_overrides()
    current_platform.register_triton_kernel_overrides = lambda: None


def _announce(phase: str) -> None:
    with Path(os.environ[PHASE_FILE]).open("a", encoding="utf-8") as file:
        file.write(f"{phase}\n")


def _announced(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def announce(*args: Any, **kwargs: Any) -> Any:
        _announce(phase)
        return function(*args, **kwargs)

    return announce


def _announced_within(phase: str, context: Callable[..., Any], after: str) -> Callable[..., Any]:
    """Wrap a vLLM context manager to announce ``phase`` on entry and ``after`` on exit.

    Nothing is announced when vLLM only checks whether the work is needed (``announce_start`` False).
    """

    @contextmanager
    @functools.wraps(context)
    def within(*args: Any, announce_start: bool = True, **kwargs: Any) -> Iterator[Any]:
        if announce_start:
            _announce(phase)
        with context(*args, announce_start=announce_start, **kwargs) as entered:
            yield entered
        if announce_start:
            _announce(after)

    return within


def fork_context() -> Any:
    """Return the replacement for `get_mp_context` in an engine process: its workers are forks of it."""
    return multiprocessing.get_context("fork")
