"""An LLM from the request to its release with ``greenprompt`` alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import REPOSITORY, Registry, greenprompt

pytestmark = pytest.mark.cluster

LIMIT_S = 120


def ran(registry: Registry, *words: str) -> str:
    """Return the output of a command that must succeed."""
    shown = greenprompt(*words, environment={"GREENPROMPT_URL": registry.url}, limit_s=LIMIT_S)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_an_llm_from_request_to_release(registry: Registry, llm: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """One command holds the LLM, others prompt it and show its events; Ctrl-C releases it."""
    model = llm("a")["model"]
    options = ["--arg", "max_new_tokens=4", "--deployment-arg", "enforce_eager=true", "--wait", "--json"]
    log = tmp_path / "progress.log"
    with (
        log.open("w") as progress,
        subprocess.Popen(
            [sys.executable, "-m", "greenprompt_client.cli.main", "request", model, *options, "--url", registry.url],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=progress,
            text=True,
        ) as holder,
    ):
        try:
            assert holder.stdout is not None
            line = holder.stdout.readline()
            assert line, log.read_text()
            held = json.loads(line)
            registry.note_lease(held["url"])
            request_id = held["requestId"]
            registry.posted.append(request_id)
            answer = json.loads(ran(registry, "prompt", request_id, "Is the grid green?", "--json"))
            assert answer["usage"]["completion_tokens"] == 4
            assert {json.loads(line)["model"] for line in ran(registry, "llms", "--json").splitlines()} == {model}
            shown = json.loads(ran(registry, "status", "--json"))
            assert [each["leases"] for each in shown["machines"]] == [1]
            holder.send_signal(signal.SIGINT)
            assert holder.wait(LIMIT_S) == 0
        finally:
            holder.kill()
    what = [json.loads(line)["what"] for line in ran(registry, "events", request_id, "--json").splitlines()]
    assert what[0] == "LeaseRequested"
    assert registry.get(request_id)["status"] == "released"
