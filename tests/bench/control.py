"""How fast LLMs are handed over and requests answered: real HTTP against a real ``greenprompt up`` on this machine.

``python -m tests.bench.control [--seconds 8]``. One wrapper, one tiny LLM that stays warm. Clients, registry and the
LLM share this machine's processors. What a call costs at the least here is measured in the same run: the same
clients against a server that knows the answer by heart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from deployments.launch.local_ray import free_ports
from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.bench.report import OUTPUT, Result, counted, measured, percentile, publish
from tests.bench.wire import Connection
from tests.cluster.conftest import Registry, start, stop

PART = "control"
CLIENTS = (1, 4, 16, 64)
CONNECTIONS = 16
GRANTS = 200
LONG_POLL_S = 10
OLD_CYCLES_PER_S = 74.0
"""An in-memory stand-in of 130 lines, without database or Ray, on a machine like this one."""
OLD_GET_PER_S, OLD_POST_PER_S, OLD_POST_P50_MS = 3300.0, 230.0, 63.0
"""The old registry's, which asked a database and no cluster, with 16 connections on a machine like this one."""

TARGETS = {
    "warm_grant_p50_ms": "≤ 10",
    "lease_cycles_per_s": f"> {OLD_CYCLES_PER_S:g}",
    "get_per_s": f"≥ {OLD_GET_PER_S:,.0f}",
    "post_per_s": f"≥ {OLD_POST_PER_S:g}",
    "post_p50_ms": f"≤ {OLD_POST_P50_MS:g}",
}
"""On an otherwise idle machine of two processors."""

REQUEST = "/promptingservice/request"

measurement_ids = itertools.count(time.time_ns())
p50, p99 = statistics.median, percentile(0.99)


def llmconfig(folder: Path) -> dict[str, Any]:
    """The LLM that everybody asks for."""
    deployment = {"torch_dtype": "torch.bfloat16", "enforce_eager": True}
    args = {"prompting": {"max_new_tokens": 16}, "deployment": deployment}
    return {"modeltyp": "text-generation", "model": str(folder), "uses_chat_template": True, "args": args}


@contextlib.contextmanager
def registry_with_llm() -> Iterator[tuple[Registry, dict[str, Any]]]:
    """A new registry, which ends with the block, and the LLM that may be asked of it."""
    with tempfile.TemporaryDirectory(prefix="gprompt-bench-") as scratch:
        llm = llmconfig(make_tiny_llm(Path(scratch) / "llms" / "a", seed=0))
        registry = start(Path(scratch))
        try:
            yield registry, llm
        finally:
            stop(registry)


class Clock:
    """Milliseconds that calls took, by name."""

    def __init__(self) -> None:
        self.took_ms: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a block."""
        begun_s = time.perf_counter()
        yield
        self.took_ms[name].append(1000 * (time.perf_counter() - begun_s))


async def cycle(http: Connection, llm: dict[str, Any], clock: Clock) -> None:
    """POST, wait until the LLM is ours, DELETE."""
    with clock.time("cycle"):
        with clock.time("grant"):
            with clock.time("post"):
                request_id, address = await post(http, llm)
            if address is None:
                with clock.time("wait"):
                    await deployed(http, request_id)
        with clock.time("delete"):
            await http.json("DELETE", f"{REQUEST}/{request_id}")


async def post(http: Connection, llm: dict[str, Any]) -> tuple[str, str | None]:
    """Ask for an LLM in a measurement of its own; the request's id, and the address of an LLM that is ours already."""
    answer = await http.json("POST", REQUEST, {"measurementId": next(measurement_ids), "llms": [llm]})
    (accepted,) = answer["requests"]
    return accepted["requestId"], accepted["url"]


async def deployed(http: Connection, request_id: str) -> None:
    """Return when the LLM is ours."""
    while True:
        state = await http.json("GET", f"{REQUEST}/{request_id}?wait={LONG_POLL_S}")
        if state["status"] == "deployed":
            return
        if state["endedAt"] is not None:
            raise RuntimeError(f"not handed over: {state}")


async def repeated(url: str, clients: int, seconds: float, work: Callable[[Connection], Awaitable[object]]) -> float:
    """Let clients repeat their work for this long; how often they did it per second."""
    begun_s = time.perf_counter()
    done = 0

    async def client() -> None:
        nonlocal done
        async with Connection(url) as http:
            while time.perf_counter() < begun_s + seconds:
                await work(http)
                done += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / (time.perf_counter() - begun_s)


async def warm_grants(url: str, llm: dict[str, Any]) -> list[Result]:
    """From the POST until the client sees that the LLM is its own; nobody else asks."""
    clock = Clock()
    async with Connection(url) as http:
        for _ in range(GRANTS):
            await cycle(http, llm, clock)
    took_ms = clock.took_ms["grant"]
    return [
        measured(PART, "warm_grant_p50_ms", took_ms, "ms"),
        measured(PART, "warm_grant_p99_ms", took_ms, "ms", pick=p99),
    ]


async def lease_cycles(url: str, llm: dict[str, Any], clients: int, seconds: float) -> list[Result]:
    """Clients that want the same LLM, each for a measurement of its own, one lease after another."""
    clock = Clock()
    rate = await repeated(url, clients, seconds, lambda http: cycle(http, llm, clock))
    n = len(clock.took_ms["cycle"])
    name = f"{clients}_clients"
    results = [counted(PART, f"lease_cycles_per_s_{name}", rate, "1/s", of=n, baseline=OLD_CYCLES_PER_S)]
    for call, took_ms in sorted(clock.took_ms.items()):
        results.append(measured(PART, f"{call}_p50_ms_{name}", took_ms, "ms"))
        results.append(measured(PART, f"{call}_p99_ms_{name}", took_ms, "ms", pick=p99))
    return results


async def calls(url: str, llm: dict[str, Any], seconds: float) -> list[Result]:
    """GETs of a request that holds its LLM, and POSTs of requests that have to wait for it."""
    clock = Clock()
    async with Connection(url) as holder:
        held, _ = await post(holder, llm)
        await deployed(holder, held)

        async def get(http: Connection) -> None:
            with clock.time("get"):
                await http.json("GET", f"{REQUEST}/{held}")

        waiting: list[str] = []

        async def add(http: Connection) -> None:
            with clock.time("post"):
                waiting.append((await post(http, llm))[0])

        async def cancel(http: Connection) -> None:
            if waiting:
                with clock.time("delete"):
                    await http.json("DELETE", f"{REQUEST}/{waiting.pop()}")

        gets = await repeated(url, CONNECTIONS, seconds, get)
        posts = await repeated(url, CONNECTIONS, seconds, add)
        while waiting:
            await repeated(url, CONNECTIONS, 1.0, cancel)
        await holder.json("DELETE", f"{REQUEST}/{held}")
        by_heart = await repeated_by_heart(await holder.call("GET", f"{REQUEST}/{held}"), seconds)
    return [
        counted(PART, "get_per_s", gets, "1/s", of=len(clock.took_ms["get"]), baseline=OLD_GET_PER_S),
        measured(PART, "get_p50_ms", clock.took_ms["get"], "ms"),
        measured(PART, "get_p99_ms", clock.took_ms["get"], "ms", pick=p99),
        counted(PART, "post_per_s", posts, "1/s", of=len(clock.took_ms["post"]), baseline=OLD_POST_PER_S),
        measured(PART, "post_p50_ms", clock.took_ms["post"], "ms", baseline=OLD_POST_P50_MS),
        measured(PART, "post_p99_ms", clock.took_ms["post"], "ms", pick=p99),
        measured(PART, "cancel_p50_ms", clock.took_ms["delete"], "ms"),
        counted(PART, "get_per_s_of_by_heart", gets, "1/s", of=len(clock.took_ms["get"]), baseline=by_heart),
    ]


async def repeated_by_heart(answer: tuple[int, bytes], seconds: float) -> float:
    """GETs per second, by the same clients, of a server in a process of its own that always gives this answer."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    server = multiprocessing.get_context("spawn").Process(target=serve_by_heart, args=(port, answer[1]), daemon=True)
    server.start()
    try:
        async with asyncio.timeout(60), Connection(url) as http:
            while True:
                try:
                    await http.json("GET", "/")
                    break
                except OSError:
                    await asyncio.sleep(0.05)
        return await repeated(url, CONNECTIONS, seconds, lambda http: http.json("GET", "/"))
    finally:
        server.terminate()
        server.join()


def serve_by_heart(port: int, answer: bytes) -> None:
    """FastAPI under uvicorn, which is what an ingress consists of, and nothing behind it."""
    import uvicorn
    from fastapi import FastAPI, Response

    app = FastAPI()

    @app.get("/")
    async def by_heart() -> Response:
        return Response(answer, media_type="application/json")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


async def measure(url: str, llm: dict[str, Any], seconds: float) -> AsyncIterator[list[Result]]:
    """All parts, one after another."""
    async with Connection(url) as http:
        await cycle(http, llm, Clock())  # the LLM is started
    yield await warm_grants(url, llm)
    for clients in CLIENTS:
        results = await lease_cycles(url, llm, clients, seconds)
        if clients == 4:
            first = results[0]
            yield [counted(PART, "lease_cycles_per_s", first.value, "1/s", of=first.n, baseline=OLD_CYCLES_PER_S)]
        yield results
    yield await calls(url, llm, seconds)


async def collect(url: str, llm: dict[str, Any], seconds: float) -> list[Result]:
    """All results, the main ones first."""
    results = [result async for some in measure(url, llm, seconds) for result in some]
    main_ones = ("warm_grant_p50_ms", "lease_cycles_per_s", "get_per_s", "post_per_s", "post_p50_ms")
    return sorted(results, key=lambda result: result.name not in main_ones)


def main(arguments: list[str]) -> int:
    """Start a registry, measure, print, write, end it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each part (default: 8)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(arguments)
    with registry_with_llm() as (registry, llm):
        results = asyncio.run(collect(registry.url, llm, chosen.seconds))
    publish(results, output=chosen.output, targets=TARGETS)
    print(
        "Baselines: the old registry's floor, and for lease cycles an in-memory stand-in; both on a machine like this."
    )
    print("get_per_s_of_by_heart: its baseline is a bare FastAPI that always gives the same answer, in this run.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
