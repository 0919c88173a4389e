"""How long an LLM takes to start: "vllm serve" against a prepared EngineHost, alternating on the same machine.

``python -m tests.bench.cold_start [--rounds 3] [--output build/bench.json]`` prints the medians, their ratio, the
phases and the memory, and merges the figures by name into a list of results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from deployments import process_tree
from deployments.engine import EngineHost
from deployments.tiny_llm import make_tiny_llm

TARGET, AIM = 0.25, 0.10
MAX_MODEL_LEN, KV_CACHE_GIB = 512, 0.25
LIMIT_S = 600.0


def main(arguments: list[str]) -> int:
    """Measure, print, write; 1 if the ratio misses its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind, ≥ 1 (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of the host, 0 for the CPU (default)")
    chosen = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        results = asyncio.run(measure(Path(scratch), chosen.rounds, chosen.gpus))
    merge(chosen.output, results)
    return 0 if results[0]["ratio"] <= TARGET else 1


async def measure(scratch: Path, rounds: int, gpus: int) -> list[dict[str, Any]]:
    """One "vllm serve" and one start in the host after the other, ``rounds`` times."""
    llm = make_tiny_llm(scratch / "llm", seed=1)
    host = EngineHost(gpus=gpus, kv_cache_gib=KV_CACHE_GIB, cache_dir=scratch / "cache")
    begun_s = time.monotonic()
    await host.prepare()
    print(f"host prepared in {time.monotonic() - begun_s:.1f} s, warm: {host.warm} {host.cold_reason or ''}")
    serve_s, start_s, stop_s, phases = [], [], [], []
    memory: dict[str, int] = {}
    try:
        for number in range(1, rounds + 1):
            serve_s.append(await asyncio.to_thread(vllm_serve, llm, scratch / "serve-cache"))
            begun_s = time.monotonic()
            running = await host.start(
                str(llm), engine_args={"enforce_eager": True, "max_model_len": MAX_MODEL_LEN}, timeout_s=LIMIT_S
            )
            await answered(running.asgi)
            start_s.append(time.monotonic() - begun_s)
            phases.append(running.phases)
            memory = memory_of(host, running.pids)
            stop_s.append((await host.stop()).took_s)
            print(
                f"round {number}: vllm serve {serve_s[-1]:.1f} s, warm start {start_s[-1]:.2f} s, "
                f"stop {stop_s[-1]:.2f} s; phases: {rounded(phases[-1])}"
            )
    finally:
        await host.close()
    baseline = statistics.median(serve_s)
    results = [
        result("cold_start_ratio", start_s, "s", baseline=baseline),
        result("vllm_serve", serve_s, "s"),
        result("engine_stop", stop_s, "s"),
        *(result(f"memory_{name}", [value / 2**20], "MiB") for name, value in memory.items()),
    ]
    report(results)
    return results


def vllm_serve(llm: Path, cache: Path) -> float:
    """Seconds from the command of vLLM's own server until its /health answers 200."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llm), "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_MODEL_LEN),
        "--kv-cache-memory-bytes", str(int(KV_CACHE_GIB * 2**30)),
    ]  # fmt: skip
    # Its own environment, without what the host has set for its engines in this process.
    foreign = ("VLLM_", "OMP_", "GREENPROMPT_", "TMPDIR", "LD_PRELOAD", "TORCHINDUCTOR_", "GLOO_", "NCCL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"VLLM_CACHE_ROOT": str(cache), "VLLM_NO_USAGE_STATS": "1"}
    begun_s = time.monotonic()
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        family: set[psutil.Process] = set()
        try:
            wait_until_healthy(server, port, begun_s + LIMIT_S)
            took_s = time.monotonic() - begun_s
            family = process_tree.descendants(server.pid)
        except RuntimeError:
            log.seek(0)
            print(log.read().decode(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            server.terminate()
            server.wait(60)
            psutil.wait_procs(family, 10)
            process_tree.kill(family)
    return took_s


def wait_until_healthy(server: subprocess.Popen[bytes], port: int, deadline_s: float) -> None:
    """Ask every 50 ms. Raises RuntimeError when the server has ended or the deadline (monotonic) has passed."""
    with httpx.Client(timeout=5) as http:
        while time.monotonic() < deadline_s:
            if server.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {server.returncode}")
            try:
                if http.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.05)
    raise RuntimeError(f"vllm serve was not healthy after {LIMIT_S:g} s")


async def answered(asgi: Any) -> None:
    """The same question that "vllm serve" is asked."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(asgi), base_url="http://engine") as http:
        assert (await http.get("/health")).status_code == 200


def memory_of(host: EngineHost, engine_pids: tuple[int, ...]) -> dict[str, int]:
    """Bytes that each process takes up (PSS: what forks share is divided among them)."""
    assert host._forkserver is not None
    named = {
        "wrapper": os.getpid(),
        "forkserver": host._forkserver.pid,
        "engine": engine_pids[0],
        "worker": engine_pids[-1],
    }
    return {name: psutil.Process(pid).memory_full_info().pss for name, pid in named.items()}


def result(name: str, values: list[float], unit: str, *, baseline: float | None = None) -> dict[str, Any]:
    """One entry of the list of results; ``ratio`` is median ÷ baseline where there is one."""
    median = statistics.median(values)
    ratio = None if baseline is None else median / baseline
    return {
        "part": "engine", "name": name, "value": median if ratio is None else ratio,
        "unit": unit if ratio is None else "1", "n": len(values), "min": min(values), "median": median,
        "max": max(values), "baseline": baseline, "ratio": ratio,
    }  # fmt: skip


def report(results: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    cold = results[0]
    print(f"vllm serve: median {cold['baseline']:.1f} s; in a prepared host: median {cold['median']:.2f} s")
    print(f"ratio {cold['ratio']:.3f} (target ≤ {TARGET}, aim ≤ {AIM})")
    memory = [entry for entry in results if entry["name"].startswith("memory_")]
    parts = ", ".join(f"{entry['name'].removeprefix('memory_')} {entry['value']:.0f}" for entry in memory)
    print(f"memory (PSS, MiB): {parts}; together {sum(entry['value'] for entry in memory):.0f}")


def rounded(phases: dict[str, float]) -> dict[str, float]:
    """For people."""
    return {phase: round(seconds, 2) for phase, seconds in phases.items()}


def merge(output: Path, results: list[dict[str, Any]]) -> None:
    """Replace the entries of the same names in the file, and keep the others."""
    others = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
    names = {entry["name"] for entry in results}
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = [entry for entry in others if entry["name"] not in names]
    output.write_text(json.dumps([*kept, *results], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
