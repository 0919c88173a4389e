"""Renames what each row of the tables of patches depends on, in the real modules, and asks the check of a start.

It changes the modules of its process, so ``test_patches`` runs it in one of its own. The answers are one line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from deployments.engine.warm.patches import PYTHON, VLLM, VLLM_ENGINES, shape_problem
from tests.support.renamed import renamed

_UTILS, _CORE, _EXECUTOR = "vllm.v1.engine.utils", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"
_REGISTRY = "vllm.model_executor.models.registry"
_MESSAGES, _DECORATORS = "vllm.distributed.device_communicators.shm_broadcast", "vllm.compilation.decorators"
_ASYNC_LLM, _OUTPUT = "vllm.v1.engine.async_llm", "vllm.v1.engine.output_processor"
_CLIENT = "vllm.v1.engine.core_client"

CASES: Final[dict[str, list[tuple[str, str]]]] = {
    f"{_UTILS}.get_mp_context": [(_UTILS, "get_mp_context"), (_UTILS, "Process"), (_CORE, "run_engine_core")],
    f"{_REGISTRY}._run_in_subprocess": [(_REGISTRY, "_run_in_subprocess")],
    f"{_EXECUTOR}.get_mp_context": [(_EXECUTOR, "get_mp_context"), (_EXECUTOR, "Process")],
    f"{_MESSAGES}.SpinCondition": [
        *[(_MESSAGES, name) for name in ("SpinCondition", "wait", "record_read", "last_read", "busy_loop_s")],
        *[(_MESSAGES, name) for name in ("_spin_condition", "timeout_ms")],
    ],
    f"{_CORE}.EngineCore._initialize_kv_caches": [(_CORE, "_initialize_kv_caches")],
    f"{_DECORATORS}.monitor_torch_compile": [
        (_DECORATORS, "monitor_torch_compile"),
        ("vllm.compilation.monitor", "announce_start"),
    ],
    "vllm.platforms.current_platform.register_triton_kernel_overrides": [
        ("vllm.v1.worker.worker_base", "register_triton_kernel_overrides")
    ],
    "AsyncLLM.output_processor": [(_ASYNC_LLM, "output_processor")],
    "OutputProcessor.request_states": [(_OUTPUT, "request_states")],
    "RequestState: request_id, prompt_len, is_prefilling, detokenizer": [
        (_OUTPUT, name) for name in ("request_id", "prompt_len", "is_prefilling", "detokenizer")
    ],
    "IncrementalDetokenizer.num_output_tokens": [("vllm.v1.engine.detokenizer", "num_output_tokens")],
    "AsyncLLM.scheduler_config.max_num_batched_tokens": [
        (_ASYNC_LLM, "scheduler_config"),
        ("vllm.v1.core.sched.scheduler", "max_num_batched_tokens"),
    ],
    "AsyncLLM.output_handler": [(_ASYNC_LLM, "output_handler")],
    "AsyncLLM.engine_core.resources.ctx": [(_ASYNC_LLM, "engine_core"), (_CLIENT, "resources"), (_CLIENT, "ctx")],
    "AsyncLLM.generate": [(_ASYNC_LLM, name) for name in ("generate", "prompt", "sampling_params")],
    "user_middleware of its app": [
        ("prometheus_fastapi_instrumentator.instrumentation", "PrometheusInstrumentatorMiddleware"),
        ("starlette.applications", "user_middleware"),
        ("starlette.applications", "middleware_stack"),
    ],
    "trust_request_mm_kwargs of its app": [
        ("vllm.entrypoints.launchers.api_server.app_state", "trust_request_mm_kwargs"),
        ("vllm.entrypoints.generate.base.protocol", "validate_request_mm_kwargs"),
    ],
    "spawn._fixup_main_from_name and _fixup_main_from_path": [
        ("multiprocessing.spawn", "_fixup_main_from_name"),
        ("multiprocessing.spawn", "_fixup_main_from_path"),
    ],
    "Socket.bind": [("zmq.sugar.socket", "addr")],
    "spawn.prepare": [("multiprocessing.spawn", name) for name in ("_main", "dir")],
    "context.ForkServerContext.Process": [("multiprocessing.context", "ForkServerContext.Process")],
    "context.SpawnContext.Process": [("multiprocessing.context", "SpawnContext.Process")],
    "forkserver._forkserver: _forkserver_pid, _stop": [
        ("multiprocessing.forkserver", name) for name in ("_forkserver", "_forkserver_pid", "_stop")
    ],
    "resource_tracker._resource_tracker: _fd, _pid, _stop": [
        ("multiprocessing.resource_tracker", name) for name in ("_resource_tracker", "_fd", "_pid", "_stop")
    ],
    "current_process()._config['tempdir']": [("multiprocessing.util", "_config"), ("multiprocessing.util", "tempdir")],
    "unfreeze": [("gc", "unfreeze")],
}
"""By the name of each row, modules and names in them that our code uses: taken from our code, not from the guards."""


def answers() -> dict[str, Any]:
    """Return the check's answers: without a change, and by row for each of its renames."""
    rows = {patch.name: patch for patch in (*VLLM, *PYTHON)}

    def answer(module: str, name: str) -> dict[str, Any]:
        with renamed(module, name):
            noticed = [row for row, patch in rows.items() if patch.problem() is not None]
            return {
                "renamed": name.rpartition(".")[2],
                "noticed": noticed,
                "wrapper": shape_problem(),
                "forkserver": shape_problem(VLLM_ENGINES),
            }

    before = [shape_problem(), shape_problem(VLLM_ENGINES)]
    found = {row: [answer(*case) for case in cases] for row, cases in CASES.items()}
    return {"before": before, "rows": found, "after": [shape_problem(), shape_problem(VLLM_ENGINES)]}


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(answers())}")
