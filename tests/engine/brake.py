"""Preloaded into the engines of tests: makes their steps slow, or hang as they do where a driver or a kernel hangs.

As long as there is a file at the path that the environment names under BRAKE, each step takes the seconds that it
holds, or lasts until the file is removed if it holds ``hang``.
"""

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.worker.worker_base import WorkerWrapperBase

BRAKE = "GREENPROMPT_TEST_BRAKE"
_step = WorkerWrapperBase.execute_model


def _braked_step(self: WorkerWrapperBase, scheduler_output: Any) -> Any:
    brake = Path(os.environ.get(BRAKE, os.devnull))
    if brake.is_file():
        setting = brake.read_text(encoding="utf-8")
        while setting == "hang" and brake.exists():
            time.sleep(0.05)
        if setting != "hang":
            time.sleep(float(setting))
    return _step(self, scheduler_output)


WorkerWrapperBase.execute_model = _braked_step
