"""What the registry's address costs a prompt: a lease's address against vLLM's own server, both running, in turn.

Both engines are the same LLM with the same arguments and threads; only one is asked at a time. The client, the two
servers and everything else share this machine's processors.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from greenprompt_client.demo.tiny_llm import make_tiny_llm
from tests.bench.report import Result, measured, percentile
from tests.bench.wire import Connection
from tests.bench.yardstick import VllmServe

if TYPE_CHECKING:
    from tests.cluster.conftest import Registry

PART = "engine"
CONNECTIONS = (1, 8, 32)
TOKENS = (32, 256)
LOADS = [(connections, tokens) for connections in CONNECTIONS for tokens in TOKENS]
MAX_MODEL_LEN = 512
KV_CACHE_GIB = 1
p99 = percentile(0.99)


@dataclass
class Target:
    """Where to ask, whom, and what came of it.

    Completions per second, by load; milliseconds to each first token; of each round the 99th percentile of the
    milliseconds between tokens.
    """

    base_url: str
    model: str
    per_s: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    first_ms: list[float] = field(default_factory=list)
    between_p99_ms: list[float] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The path of completions."""
        return f"{urlsplit(self.base_url).path}/v1/completions"


def measure(scratch: Path, rounds: int, seconds: float) -> list[Result]:
    """Both servers side by side, asked in turn ``rounds`` times, twice for ``seconds`` at each load."""
    from tests.cluster.conftest import start, stop  # needs pytest, which a machine that only measures starts has not

    llm = make_tiny_llm(scratch / "llms" / "a", seed=0)
    registry = start(scratch, wrappers={"kv_cache_gib": KV_CACHE_GIB})
    try:
        threads = max(1, (psutil.cpu_count() or 1) - 1)  # what the wrapper gives its engine
        sizes = {"max_model_len": MAX_MODEL_LEN, "kv_cache_gib": KV_CACHE_GIB, "cpu_threads": threads}
        with VllmServe(llm, scratch / "serve-cache", "--dtype", "bfloat16", **sizes) as server:
            ours = Target(lease(registry, llm), str(llm))
            theirs = Target(server.url, str(llm))
            asyncio.run(ask_in_turn(theirs, ours, rounds, seconds))
            memory = measured(PART, "rss_ratio", [wrapper_bytes(registry) / server.memory_bytes()], "1", baseline=1.0)
    finally:
        stop(registry)
    return [*compared(ours, theirs), memory]


def lease(registry: Registry, llm: Path) -> str:
    """The address of a lease."""
    args = {"prompting": {}, "deployment": {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": MAX_MODEL_LEN}}
    config = {"modeltyp": "text-generation", "model": str(llm), "uses_chat_template": False, "args": args}
    (request_id,) = registry.post(time.time_ns(), config)
    address: str = registry.until(request_id, "deployed")["url"]
    return address


def wrapper_bytes(registry: Registry) -> int:
    """What the wrapper takes up, with its forkserver and engine (PSS)."""
    replica = registry.replica()
    return sum(process.memory_full_info().pss for process in [replica, *replica.children(recursive=True)])


async def ask_in_turn(theirs: Target, ours: Target, rounds: int, seconds: float) -> None:
    """Every load in short slices, A B B A, so that what slows the machine down for a while slows both down.

    Each of ``rounds`` gives one ratio per load. The first slices are for warming up. A slice should see each connection
    answered some times: of 256 tokens at 32 connections one takes about a second, so one more or less in a slice of a
    second is half of it.
    """
    numbers = count()
    for connections in CONNECTIONS:
        for target in (theirs, ours):
            await completions_per_s(target, connections, TOKENS[0], seconds, numbers)
    for number in range(1, rounds + 1):
        ratios = []
        for connections, tokens in LOADS:
            slices: dict[str, list[float]] = defaultdict(list)
            for target in (theirs, ours, ours, theirs):
                per_s = await completions_per_s(target, connections, tokens, seconds, numbers)
                slices[target.base_url].append(per_s)
            for target in (theirs, ours):
                target.per_s[connections, tokens].append(statistics.mean(slices[target.base_url]))
            ratio = ours.per_s[connections, tokens][-1] / theirs.per_s[connections, tokens][-1]
            ratios.append(f"c{connections}/{tokens}: {ratio:.3f}")
        waits: dict[str, list[float]] = defaultdict(list)
        for target in (theirs, ours, ours, theirs):
            first_ms, between_ms = await streamed(target, seconds, numbers)
            target.first_ms += first_ms
            waits[target.base_url] += between_ms
        for target in (theirs, ours):
            target.between_p99_ms.append(p99(waits[target.base_url]))
        ratios.append(f"p99 between tokens: {ours.between_p99_ms[-1] / theirs.between_p99_ms[-1]:.3f}")
        print(f"round {number}: " + ", ".join(ratios), flush=True)


def body_of(target: Target, tokens: int, numbers: count[int], **more: Any) -> bytes:
    """A prompt that was not asked before, so that no cache answers it."""
    body = {"model": target.model, "prompt": f"prompt {next(numbers)}", "max_tokens": tokens, "ignore_eos": True}
    return json.dumps({**body, "temperature": 0, **more}).encode()


async def completions_per_s(
    target: Target, connections: int, tokens: int, seconds: float, numbers: count[int]
) -> float:
    """Completions per second with so many connections, each asking again as soon as it is answered."""
    done = 0
    begun_s = time.perf_counter()

    async def client() -> None:
        nonlocal done
        async with Connection(target.base_url) as http:
            while time.perf_counter() - begun_s < seconds:
                status, answer = await http.call("POST", target.path, body_of(target, tokens, numbers))
                if status != 200:
                    raise RuntimeError(f"HTTP {status}: {answer.decode(errors='replace')[:300]}")
                done += 1

    await asyncio.gather(*(client() for _ in range(connections)))
    return done / (time.perf_counter() - begun_s)


async def streamed(target: Target, seconds: float, numbers: count[int]) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token of each answer, and between its tokens, at one connection."""
    first_ms, between_ms = [], []
    begun_s = time.perf_counter()
    async with Connection(target.base_url) as http:
        while time.perf_counter() - begun_s < seconds:
            asked_s = time.perf_counter()
            body = body_of(target, 32, numbers, stream=True)
            times = [at_s async for at_s, _ in http.stream("POST", target.path, body)]
            first_ms.append(1000 * (times[0] - asked_s))
            between_ms += [1000 * (after - before) for before, after in pairwise(times)]
    return first_ms, between_ms


def compared(ours: Target, theirs: Target) -> list[Result]:
    """Ratios of pairs, by load; the ratio of a number of connections is that of its worst length of answer."""
    by_load = {load: [a / b for a, b in zip(ours.per_s[load], theirs.per_s[load], strict=True)] for load in ours.per_s}
    results = []
    for connections in CONNECTIONS:
        worst = min((by_load[connections, tokens] for tokens in TOKENS), key=statistics.median)
        results.append(measured(PART, f"throughput_ratio_c{connections}", worst, "1", baseline=1.0))
    for (connections, tokens), ratios in by_load.items():
        results.append(measured(PART, f"throughput_ratio_c{connections}_{tokens}_tokens", ratios, "1", baseline=1.0))
        per_s = [tokens * value for value in ours.per_s[connections, tokens]]
        baseline = tokens * statistics.median(theirs.per_s[connections, tokens])
        results.append(measured(PART, f"tokens_per_s_c{connections}_{tokens}_tokens", per_s, "1/s", baseline=baseline))
    extra_ms = statistics.median(ours.first_ms) - statistics.median(theirs.first_ms)
    results.append(measured(PART, "ttft_extra_ms", [extra_ms], "ms"))
    results.append(measured(PART, "ttft_ms", ours.first_ms, "ms", baseline=statistics.median(theirs.first_ms)))
    p99_ms = statistics.median(theirs.between_p99_ms)
    results.append(measured(PART, "inter_token_p99_ms", ours.between_p99_ms, "ms", baseline=p99_ms))
    # In pairs, as throughput: a percentile of all rounds together is that of the machine's worst moments.
    worse = [a / b for a, b in zip(ours.between_p99_ms, theirs.between_p99_ms, strict=True)]
    return [*results, measured(PART, "inter_token_p99_ratio", worse, "1", baseline=1.0)]
