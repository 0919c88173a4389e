"""Runs an engine host whose engines are a second user's, prints what it saw as JSON, and ends while an LLM runs.

``python -m tests.engine.as_second_user FOLDER``: a folder that the second user can enter, with the LLMs ``a`` and
``spy``, and ``closed``, which that user can't read. Started as root.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from deployments.engine.host import EngineHost
from deployments.machine import process_tree
from deployments.machine.second_user import second_user
from registry.errors import EngineStartFailed
from tests.engine.calls import FAST, complete, still_running


async def _failure(host: EngineHost, model: Path, **more: Any) -> str:
    try:
        await host.start(str(model), engine_args=FAST | more)
    except EngineStartFailed as failed:
        return failed.reason
    return "it started"


async def main(folder: Path) -> dict[str, Any]:
    user = second_user("nobody")
    host = EngineHost(gpus=0, kv_cache_gib=0.125, cache_dir=folder / "cache", preload=(), user=user)
    found: dict[str, Any] = {}
    try:
        await host.prepare()
        llm = await host.start(str(folder / "a"), engine_args=FAST)
        processes = [psutil.Process(pid) for pid in llm.pids]
        found["uids"] = sorted({uid for process in processes for uid in process.uids()})
        found["variables"] = sorted({name for process in processes for name in process.environ()})
        scores = [Path(f"/proc/{pid}/oom_score_adj") for pid in llm.pids]
        found["scores"] = [int(file.read_text()) for file in scores]
        found["tokens"] = (await complete(llm))["usage"]["completion_tokens"]
        stopped = await host.stop()
        found["killed"], found["problem"] = stopped.killed, stopped.problem
        found["still running"] = sorted(still_running(llm.pids))
        found["spy"] = await _failure(host, folder / "spy", trust_remote_code=True)
        found["closed"] = await _failure(host, folder / "closed")
        last = await host.start(str(folder / "a"), engine_args=FAST)
    except BaseException:
        await host.close()
        raise
    children = process_tree.descendants(os.getpid())
    found["pids"] = [each.pid for each in children if user.uid in each.uids()]
    assert set(last.pids) < set(found["pids"])
    memory = process_tree.shared_memory(last.processes)
    found["files"] = [str(file) for file in (host._prepared.environment.directory, *memory)]
    return found


if __name__ == "__main__":
    report = asyncio.run(main(Path(sys.argv[1])))
    sys.stdout.write(f"\n{json.dumps(report)}\n")
    sys.stdout.flush()
    os._exit(0)  # as if it was killed: nothing is stopped or removed
