"""Starts, serves, queries and shuts down vLLM's engine. In the wrapper's process, only this file uses vLLM's API.

The changes to vLLM's internals for a fast start are in ``engine.warm``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import math
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import psutil
from pydantic import ValidationError

from deployments.engine.environment import log_handlers_kept
from deployments.engine.heartbeat import Work
from deployments.engine.media import CONNECTOR, MediaLimits
from deployments.engine.order import ASGIApp, Order, pids
from deployments.engine.phases import Phase
from deployments.engine.token_count import counted
from deployments.machine import process_tree
from deployments.machine.out_of_memory import OOMKills
from registry.background import spawn_awaited
from registry.errors import EngineNotReady

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.multimodal.media import MediaIO
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
Engine: TypeAlias = "AsyncLLM"

_SERVING = (
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.generate.api_router",
)
_RUNNERS: Mapping[str, Mapping[str, Any]] = {
    "feature-extraction": {"runner": "pooling", "convert": "embed"},
    "sentence-similarity": {"runner": "pooling", "convert": "embed"},
    "text-classification": {"runner": "pooling", "convert": "classify"},
    "text-generation": {"runner": "generate"},
    "text-ranking": {"runner": "pooling", "convert": "classify"},
}
_PUBLIC = frozenset(
    {("GET", "/v1/models"), ("GET", "/health"), ("GET", "/version")}
    | {
        ("POST", path)
        for path in (
            "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
            "/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score",
            "/rerank", "/v1/rerank", "/v2/rerank", "/tokenize", "/detokenize",
        )
    }
)  # fmt: skip
_WARM_UP_ID = "warm-up"
_OF_THE_API = ("tool_call_parser",)  # arguments for vLLM's API, not for its engine
_STOP_TIMEOUT_S = 5.0  # for vLLM's own shutdown; remaining processes are then killed
FORGET_TIMEOUT_S: Final = 5.0
"""Longest wait of a hand-over until the engine is idle and its caches can be emptied, seconds."""
_FORGET_POLL_S = 0.02


def public_path(method: str, path: str) -> bool:
    """Whether the holder of a lease may call this path of the LLM's app. All others are for operators only."""
    return (method.upper(), path) in _PUBLIC


class RunningLLM:
    """An LLM that answers prompts. Created by ``EngineHost.start``; unusable after ``EngineHost.stop``.

    ``asgi`` is vLLM's own OpenAI app (check ``public_path`` first). ``phases`` holds the seconds of each phase of the
    start, or of the wake-up from sleep; ``started_s`` is their sum. ``pids`` are all its processes.
    ``died`` is set when one of them ends unexpectedly or the engine counts as hung; ``death_reason`` then gives the
    reason, and ``out_of_memory`` is True if the kernel killed a process because main memory ran out.
    ``engine_args`` are the arguments that vLLM was started with, except those that name the model; an argument that is
    not in it has vLLM's default. ``weights`` are its weight files, None if unknown.
    """

    def __init__(self, engine: AsyncLLM, asgi: ASGIApp, order: Order, processes: Iterable[psutil.Process]) -> None:
        """Internal: called by ``EngineHost``."""
        self.engine = engine
        self.app = asgi
        self._calls = 0
        self.order = order
        self.served_model_name = order.name
        self.weights = order.weights
        self.weights_bytes = None if order.weights is None else order.weights.size_bytes
        self.engine_args: Mapping[str, Any] = order.given
        self.max_model_len: int = engine.model_config.max_model_len
        self.processes = frozenset(processes)
        self.phases: Mapping[str, float] = {}
        self.died = asyncio.Event()
        self.death_reason: str | None = None
        self.out_of_memory = False
        self.oom_kills = OOMKills()
        self.watch: process_tree.DeathWatch | None = None
        self.heart: asyncio.Task[None] | None = None

    @property
    def started_s(self) -> float:
        """How long the start or the wake-up took, seconds."""
        return sum(self.phases.values())

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the engine and its workers, ascending."""
        return pids(self.processes)

    async def asgi(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Pass one request to vLLM's app."""
        self._calls += 1
        await self.app(scope, receive, send)

    @property
    def failed(self) -> bool:
        """Whether vLLM itself reports the engine as dead; ``died`` is set at about the same time."""
        return self.died.is_set() or self.engine.errored

    @property
    def unfinished(self) -> int:
        """Number of prompts that the engine has not finished, including those in its queue."""
        count: int = self.engine.get_num_unfinished_requests()
        return count

    def work(self) -> Work:
        """Return the engine's current work and its progress."""
        prompts = self.engine.output_processor.request_states.values()
        unread = max((prompt.prompt_len for prompt in prompts if prompt.is_prefilling), default=0)
        return Work(
            self._calls,
            frozenset(
                (prompt.request_id, prompt.detokenizer.num_output_tokens() if prompt.detokenizer else 0)
                for prompt in prompts
            ),
            steps=math.ceil(unread / self.engine.scheduler_config.max_num_batched_tokens),
        )

    async def warm_up(self) -> None:
        """Process one prompt: generate one token, or compute one result of a pooling task.

        Does nothing if vLLM supports neither for this LLM.

        Raises:
            Exception: vLLM's own, if it fails.
        """
        from vllm import PoolingParams, SamplingParams, TokensPrompt
        from vllm.tasks import POOLING_TASKS

        prompt = TokensPrompt(prompt_token_ids=[0])
        tasks = await self.engine.get_supported_tasks()
        task = next((task for task in POOLING_TASKS if task in tasks), None)
        answers: AsyncIterator[object]
        if "generate" in tasks:
            params = SamplingParams(max_tokens=1, temperature=0.0)
            answers = self.engine.generate(prompt, params, _WARM_UP_ID)
        elif task is not None:
            answers = self.engine.encode(prompt, PoolingParams(task=task), _WARM_UP_ID)
        else:
            return
        async for _answer in answers:
            pass

    async def forget_prompts(self) -> bool:
        """Empty the caches that one lease would leave to the next: prefixes, images and audio.

        Waits until the engine has nothing in flight, because vLLM can't empty its prefix cache while a request runs.

        Returns:
            False if earlier prompts may still be cached: the engine was still busy after FORGET_TIMEOUT_S.

        Raises:
            Exception: vLLM's own, if it fails.
        """
        self._calls += 1
        try:
            async with asyncio.timeout(FORGET_TIMEOUT_S):
                while not await self.engine.reset_prefix_cache(reset_connector=True):  # noqa: ASYNC110 - no event
                    await asyncio.sleep(_FORGET_POLL_S)
                if self.engine.model_config.is_multimodal_model:
                    await self.engine.reset_mm_cache()
                    await self.engine.reset_encoder_cache()
        except TimeoutError:
            return False
        return True


class VLLM:
    """vLLM in this process. One per host; use it from the host's event loop.

    All blocking calls run in one thread, which lives as long as the host. When a thread ends, the
    kernel kills the processes that it has started.
    """

    def __init__(self, gpus: int, *, kv_cache_gib: float | None, may_sleep: bool, media: MediaLimits) -> None:
        """Do nothing yet; see ``EngineHost`` for the arguments. ``may_sleep``: LLMs may be put to sleep."""
        self._gpus = gpus
        self._kv_cache_gib = kv_cache_gib
        self._may_sleep = may_sleep
        self._media = media
        self._defaults: Namespace | None = None
        self._thread = _engine_thread()

    def import_modules(self) -> None:
        """Import vLLM's serving modules; runs in the engine thread."""
        with log_handlers_kept():
            for module in _SERVING:
                importlib.import_module(module)
            from vllm.config.logging import LoggingConfig
            from vllm.logger import configure_logging_if_needed

            configure_logging_if_needed(LoggingConfig())  # now, so that no engine start does it later
        register_connector(self._media)
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self._defaults = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        gc.collect()
        gc.freeze()  # imported objects stay; scanning them in the garbage collection of each stop would take 0.5 s
        # A prompt leaves almost no cyclic garbage. With Python's default threshold of 700, the objects of prompts in
        # flight are scanned about 20 times a second: 7 % of this process's CPU time with 32 prompts.
        gc.set_threshold(10_000, 10, 10)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call a blocking function of vLLM in its thread and return the result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def replace_thread(self) -> None:
        """Use a new thread, because the present one hangs in a call that can't be ended, probably on the network."""
        self._thread.shutdown(wait=False)
        self._thread = _engine_thread()

    def close(self) -> None:
        """End the thread when its last call has returned. Does not wait for that."""
        self._thread.shutdown(wait=False)

    def gpu_share(self, order: Order) -> float:
        """Return the share of each GPU's memory that vLLM requires to be free, 0 to 1."""
        share: float = order.engine_args.get("gpu_memory_utilization", self._defaults.gpu_memory_utilization)  # type: ignore[union-attr]
        return share

    @log_handlers_kept()
    def launch(self, order: Order, enter: Callable[[Phase], object]) -> AsyncLLM:
        """Create an engine, load its weights and warm it up. Blocks; runs in the engine thread.

        Raises:
            RuntimeError: the order was given up, or vLLM failed.
            Exception: vLLM's own, if it fails or rejects the arguments.
        """
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        enter(Phase.CONFIGURING)
        config = self.arguments(order).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        order.accepted = True
        if order.given_up:
            raise RuntimeError("given up")
        enter(Phase.LOADING)
        return AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=False,
            disable_log_stats=True,
        )

    def arguments(self, order: Order) -> AsyncEngineArgs:
        """Return vLLM's arguments for an order, and record them in ``order.given``.

        Raises:
            ValueError: vLLM does not have one of the arguments.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs

        given = {name: value for name, value in order.engine_args.items() if name not in _OF_THE_API}
        unknown = set(given) - {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        if unknown:
            raise ValueError(f"vLLM has no engine argument {', '.join(sorted(unknown))}")
        stages = order.engine_args.get("pipeline_parallel_size", 1)
        ours = {"tensor_parallel_size": max(1, self._gpus // stages), **_RUNNERS.get(order.modeltyp, {})}
        if self._gpus and self._may_sleep:
            ours["enable_sleep_mode"] = True
        if not self._gpus and self._kv_cache_gib is not None:
            ours["kv_cache_memory_bytes"] = int(self._kv_cache_gib * 2**30)
        order.given = {**ours, **given}
        fixed = {"model": order.model, "revision": order.revision, "served_model_name": [order.name]}
        return AsyncEngineArgs(**{**order.given, **fixed, "allowed_media_domains": self._media.domains})

    async def serve(self, engine: AsyncLLM, order: Order) -> ASGIApp:
        """Build vLLM's OpenAI app on a running engine."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        args = Namespace(**vars(self._defaults))
        args.model, args.served_model_name = order.model, [order.name]
        args.disable_fastapi_docs = args.disable_log_stats = True
        args.enable_prompt_tokens_details = True  # else answers do not say how many prompt tokens were cached
        args.tool_call_parser = order.engine_args.get("tool_call_parser")
        args.enable_auto_tool_choice = args.tool_call_parser is not None
        args.trust_request_mm_kwargs = False  # D123: else mm_processor_kwargs may name URLs that transformers loads
        tasks = await engine.get_supported_tasks()
        app: Starlette = await self.in_thread(build_app, args, tasks, engine.model_config)
        # Remove a middleware that counts HTTP requests for /metrics. It takes 3 to 6 % of this process's time, and
        # /metrics is not served here.
        unused = "PrometheusInstrumentatorMiddleware"
        app.user_middleware = [one for one in app.user_middleware if getattr(one.cls, "__name__", None) != unused]
        app.middleware_stack = None  # built with the removed middleware; Starlette rebuilds it
        engine.generate = counted(engine.generate)
        await init_app_state(engine, app.state, args, tasks)
        # vLLM sets this to end its own server when the engine dies; here the death watch handles that.
        app.state.server = Namespace(should_exit=False)
        return app

    async def shut_down(self, engine: AsyncLLM) -> None:
        """Stop an engine by vLLM's own shutdown; requests in flight are aborted."""
        with suppress(Exception):  # if the engine is dead or hangs, its requests in flight fail anyway
            if engine.get_num_unfinished_requests():
                await asyncio.wait_for(abort_all(engine), 1.0)
            if engine.output_handler is not None and not engine.get_num_unfinished_requests():
                engine.output_handler.cancel()  # else it logs the end of the engine as an error
        stopping = spawn_awaited("shut an engine down", self.in_thread(engine.shutdown, _STOP_TIMEOUT_S))
        pokes = []
        while not (await asyncio.wait([stopping], timeout=0.2))[0]:
            # The engine's main thread misses a signal that arrives just before it goes to sleep; any call wakes it.
            pokes.append(spawn_awaited("wake an engine's main thread", engine.is_sleeping()))
        for poke in pokes:
            poke.cancel()
        await asyncio.gather(*pokes, return_exceptions=True)
        stopping.result()
        # vLLM leaves the threads and files of its message queue to the garbage collector.
        messages = getattr(getattr(engine.engine_core, "resources", None), "ctx", None)
        if messages is not None:
            await self.in_thread(messages.destroy, 0)


def register_connector(limits: MediaLimits) -> None:
    """Register a media connector in vLLM that refuses what ``limits`` do not allow, with status 400. Imports vLLM.

    The environment variables in ``MediaLimits.variables`` make vLLM use it.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

    def require(url: str) -> None:
        problem = limits.problem(url)
        if problem is not None:
            raise VLLMValidationError(problem)

    @MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
    class Connector(MediaConnector):  # type: ignore[misc]
        def load_from_url(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None) -> Any:
            require(url)
            return super().load_from_url(url, media_io, fetch_timeout=fetch_timeout)

        async def load_from_url_async(
            self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None
        ) -> Any:
            require(url)
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)


def _engine_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="engine")


async def abort_all(engine: AsyncLLM) -> None:
    """Abort every generation in flight; each returns its tokens so far with finish_reason "abort"."""
    await engine.pause_generation(mode="abort", clear_cache=False)
    await engine.resume_generation()


async def stopped(*_args: object) -> None:
    """Replaces the app of a stopped LLM, so that no reference keeps the app alive."""
    raise EngineNotReady("it was stopped")


def text_of(problem: BaseException) -> str:
    """Return the message of a vLLM exception, readable without knowledge of pydantic."""
    if isinstance(problem, ValidationError):
        # The first error of each field: for a union, pydantic reports one error per type.
        texts: dict[tuple[int | str, ...], str] = {}
        for error in problem.errors():
            texts.setdefault(error["loc"][:1], str(error["msg"]).removeprefix("Value error, "))
        return "; ".join(f"{field[0]}: {text}" if field else text for field, text in texts.items())
    return str(problem) or type(problem).__name__
