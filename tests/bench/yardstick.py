"""vLLM's own server, as a process of its own: what the engine parts of the benchmarks compare with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

from deployments.machine import process_tree

FIRST_PROMPT = " ".join(["one"] * 64)
"""No single word: of one, vLLM's own server dies on a processor with AMX (``allow_amx`` of machine/child_processes)."""

LIMIT_S = 600.0
"""Longest start of a server, seconds."""

_FOREIGN = ("VLLM_", "OMP_", "GREENPROMPT_", "TMPDIR", "LD_PRELOAD", "TORCHINDUCTOR_", "GLOO_", "NCCL_")
"""Variables that an engine host has set for its own engines in this process."""


class VllmServe:
    """``vllm serve`` of one LLM: ``with VllmServe(…) as server`` returns as soon as its /health answers 200.

    ``took_s``: seconds from the command until then.
    """

    def __init__(
        self,
        llm: Path,
        cache: Path,
        *arguments: str,
        max_model_len: int,
        kv_cache_gib: float,
        cpu_threads: int | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            llm: Folder of the LLM.
            cache: Folder for what vLLM compiles.
            arguments: More arguments of its command line.
            max_model_len: Context length, tokens.
            kv_cache_gib: Size of the KV cache.
            cpu_threads: Threads of its engine, as a wrapper sets them; None leaves it to vLLM.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.took_s = 0.0
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llm), "--enforce-eager",
            "--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(max_model_len),
            "--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30)), *arguments,
        ]  # fmt: skip
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        self._environment |= {"VLLM_CACHE_ROOT": str(cache), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        cache.mkdir(parents=True, exist_ok=True)
        self._environment["TMPDIR"] = str(cache)  # vLLM leaves its sockets there
        if cpu_threads is not None:
            self._environment |= {"OMP_NUM_THREADS": str(cpu_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        begun_s = time.monotonic()
        with tempfile.TemporaryFile() as log:
            self._server = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
            try:
                self._wait_until_healthy(begun_s + LIMIT_S)
            except BaseException:
                log.seek(0)
                print(log.read().decode(errors="replace")[-4000:], file=sys.stderr)
                self.stop()
                raise
        self.took_s = time.monotonic() - begun_s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server with all its processes. Again is not an error."""
        if self._server is None:
            return
        family = process_tree.descendants(self._server.pid)
        self._server.terminate()
        try:
            self._server.wait(60)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        psutil.wait_procs(family, 10)
        process_tree.kill(family)
        self._server = None

    def memory_bytes(self) -> int:
        """What all its processes take up (PSS: what they share is divided among them)."""
        assert self._server is not None
        family = {psutil.Process(self._server.pid), *process_tree.descendants(self._server.pid)}
        return sum(process.memory_full_info().pss for process in family)

    def first_token(self, model: str) -> None:
        """Have it answer with one token."""
        body = {"model": model, "prompt": FIRST_PROMPT, "max_tokens": 1}
        httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).raise_for_status()

    def _wait_until_healthy(self, deadline_s: float) -> None:
        assert self._server is not None
        with httpx.Client(timeout=5) as http:
            while time.monotonic() < deadline_s:
                if self._server.poll() is not None:
                    raise RuntimeError(f"vllm serve ended with {self._server.returncode}")
                try:
                    if http.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # not listening yet
                time.sleep(0.05)
        raise RuntimeError(f"vllm serve was not healthy after {LIMIT_S:g} s")
