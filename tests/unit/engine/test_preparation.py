"""A host whose engines can't run as the second user does not start any."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deployments.engine.media import CLOSED
from deployments.engine.preparation import Preparation
from deployments.machine.second_user import SecondUser
from registry.errors import BadSettings


@pytest.mark.parametrize(
    ("cold_reason", "pid", "said"),
    [
        ("vLLM has changed", None, "engines of user 'llm' need a warm start, which is not possible: vLLM has changed"),
        (None, None, "the process from which engines are forked does not run as 'llm'"),
        (None, os.getpid(), "the process from which engines are forked does not run as 'llm'"),
    ],
    ids=["cold", "no forkserver", "forkserver of this user"],
)
def test_engines_never_run_as_this_user_instead(
    tmp_path: Path, cold_reason: str | None, pid: int | None, said: str
) -> None:
    """Neither a cold start nor a forkserver that has kept its user is accepted."""
    user = SecondUser("llm", os.getuid() + 1, os.getgid() + 1)
    prepared = Preparation(
        cast("Any", None),
        gpus=0,
        cache_dir=tmp_path,
        kv_cache_gib=None,
        cpu_threads=1,
        preload=(),
        media=CLOSED,
        user=user,
    )
    prepared.forkserver = cast("Any", SimpleNamespace(pid=pid))
    prepared.cold_reason = cold_reason
    with pytest.raises(BadSettings) as refused:
        prepared._require_user(user)
    assert str(refused.value) == f"wrappers.run_as: {said}"
