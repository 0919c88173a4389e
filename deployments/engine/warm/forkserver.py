"""Starts engine processes without imports; the kernel kills them when their owner ends.

Importing vLLM takes longer than loading a small LLM. So a *forkserver* imports it once, in parallel with the wrapper's
own import, and every engine process is a fork of it. vLLM has no setting for this inside a Ray actor, so some of its
names are replaced; ``engine.warm.patches`` lists them and checks that vLLM still has them.

The kernel kills the whole chain owner → forkserver → engine → worker with its owner (PR_SET_PDEATHSIG), even if the
owner is killed and can't clean up.
"""

from __future__ import annotations

import importlib
import io
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import context, forkserver, resource_tracker
from pathlib import Path
from typing import Any, Final, TypeVar

from deployments.machine.second_user import USER, engine_environment, not_second_user
from registry.background import spawn_thread

T = TypeVar("T")

LOOK_S = 0.05
"""Seconds between two checks of ``given_up`` in ``run_apart``."""

LEAVE_S: Final = 5.0
"""Seconds in which the process of ``run_apart`` must end after its answer; then it is killed."""

ANSWER_BYTES: Final = 2**20
"""Longest answer of ``run_apart``, bytes; those of vLLM have about 1,000."""

_RESULTS: Final = frozenset({("vllm.model_executor.models.registry", "_ModelInfo")})
"""Classes that a result of ``run_apart`` may contain, as (module, name): a dataclass of vLLM with plain fields."""

PRELOAD = "deployments.engine.warm.preload"
OWNER_PID = "GREENPROMPT_ENGINE_OWNER_PID"
PRELOAD_EXTRA = "GREENPROMPT_ENGINE_PRELOAD"


class WarmStartUnavailable(Exception):
    """A warm start is not possible, so engines must start cold; the text says why."""


def forkserver_variables(preload: Sequence[str]) -> Mapping[str, str]:
    """Return the environment variables that a forkserver of this process needs.

    It imports the modules in ``preload`` in addition to those that every engine needs.
    """
    root = str(Path(__file__).resolve().parents[3])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
    return {
        "PYTHONPATH": os.pathsep.join([root, *paths]),  # the forkserver does not inherit this process's sys.path
        OWNER_PID: str(os.getpid()),
        PRELOAD_EXTRA: ",".join(preload),
    }


class EngineProcess(context.ForkServerProcess):
    """A fork of the warm forkserver, with the environment that the owner had when this object was created.

    If engines run as a second user, it gets only what ``engine_environment`` leaves of it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = engine_environment(os.environ)

    def run(self) -> None:
        """Run the target; in the child."""
        os.environ.clear()
        os.environ.update(self._environment)
        if USER in os.environ:
            if self._target is not _answer and (problem := _why_refused()) is not None:  # type: ignore[attr-defined]
                raise RuntimeError(problem)
            _leave_tracker()
        super().run()


def _why_refused() -> str | None:
    """Return why this process must run nothing, because the forkserver is not the second user; None if it may.

    It was at the host's start. But multiprocessing starts a forkserver that has died again.
    """
    left = not_second_user()
    return None if left is None else getattr(sys.modules.get(PRELOAD), "problem", None) or left


def _leave_tracker() -> None:
    """Let this process start a resource tracker of its own if it needs one.

    The owner's tracker runs as root, and removes every file that a process asks it to remove.
    """
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is not None:
        os.close(tracker._fd)
    tracker._fd = tracker._pid = None


class _WarmContext(context.ForkServerContext):
    Process = EngineProcess


class WarmForkserver:
    """The process from which engines are forked. One per owner, because multiprocessing has one forkserver."""

    def __init__(self, directory: Path) -> None:
        """Do nothing yet; ``directory`` is where the forkserver's socket is created."""
        self.context = _WarmContext()
        self._directory = directory
        self._closing = threading.Event()
        self._keeper: threading.Thread | None = None
        self._replaced: list[tuple[Any, str, Any]] = []
        self.not_preloaded: list[str] = []
        """Modules that could not be preloaded, with the reason; known after ``start``."""
        self._had_tracker = resource_tracker._resource_tracker._fd is not None  # type: ignore[attr-defined]

    @staticmethod
    def tracker_pid() -> int | None:
        """Process id of multiprocessing's resource tracker, which is no engine process; None while it does not run."""
        return resource_tracker._resource_tracker._pid  # type: ignore[attr-defined,no-any-return]

    @property
    def pid(self) -> int | None:
        """Process id of the forkserver; None while it does not run."""
        return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined,no-any-return]

    def start(self) -> None:
        """Start the forkserver and wait until it has imported everything. Blocks for 15 to 50 s.

        It reads the values of ``forkserver_variables`` and all other settings from the environment.

        Raises:
            WarmStartUnavailable: It could not be started, or lacks something that a warm engine needs.
        """
        started: list[BaseException | None] = []
        ready = threading.Event()

        def keep() -> None:
            # The kernel kills the forkserver when the *thread* that started it ends, so this thread stays.
            config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
            before = config.get("tempdir")
            try:
                config["tempdir"] = str(self._directory)
                forkserver.set_forkserver_preload([PRELOAD])
                forkserver.ensure_running()
                started.append(None)
            except BaseException as problem:
                started.append(problem)
            finally:
                config["tempdir"] = before
            ready.set()
            self._closing.wait()

        self._keeper = spawn_thread("engine-forkserver-keeper", keep)
        ready.wait()
        if started[0] is not None:
            raise WarmStartUnavailable(f"the forkserver did not start: {started[0]}")
        try:
            problem, self.not_preloaded = self.run(_preload_outcome)
        except Exception as error:
            raise WarmStartUnavailable(f"the forkserver does not answer: {error}") from error
        if problem is not None:
            raise WarmStartUnavailable(problem)

    def install(self) -> None:
        """Make vLLM in this process start engines and inspect LLM classes in forks of the forkserver."""
        self._replace("vllm.v1.engine.utils", "get_mp_context", lambda: self.context)
        self._replace("vllm.model_executor.models.registry", "_run_in_subprocess", self.run)

    def _replace(self, module_name: str, name: str, new: object) -> None:
        module = importlib.import_module(module_name)
        self._replaced.append((module, name, getattr(module, name)))
        setattr(module, name, new)

    def run(self, function: Callable[[], T]) -> T:
        """Call ``function`` in a fork of the forkserver and return its result; see ``run_apart``."""
        return run_apart(self.context, function)

    def stop(self) -> None:
        """End the forkserver and its children, and restore vLLM's own names.

        Returns when the forkserver is gone. The kernel kills its children with it; this method does
        not wait for them.
        """
        for module, name, old in reversed(self._replaced):
            setattr(module, name, old)
        self._replaced.clear()
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)  # its children keep its pipe open, so it may not see a stop request
            forkserver._forkserver._stop()  # type: ignore[attr-defined]
        self._closing.set()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        if not self._had_tracker:
            resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def run_apart(
    context: Any,
    function: Callable[[], T],
    timeout_s: float | None = None,
    *,
    given_up: Callable[[], bool] = lambda: False,
) -> T:
    """Call ``function`` in a separate process and return its result. Blocks until then.

    Args:
        context: The multiprocessing context that creates the process.
        function: Anything that cloudpickle can pickle, including a lambda. It returns plain data or ``_RESULTS``.
        timeout_s: Seconds ≥ 0 after which the process is killed; None: no limit.
        given_up: Checked every LOOK_S seconds; the process is killed when it returns True.

    Raises:
        TimeoutError: It did not answer in time, or ``given_up`` returned True.
        RuntimeError: It raised (the text says what), its process ended without an answer, or the answer is refused.
    """
    import cloudpickle  # type: ignore[import-untyped]  # comes with vLLM; plain pickle refuses lambdas

    reader, writer = context.Pipe(duplex=False)
    with reader:
        with writer:
            arguments = (cloudpickle.dumps(function), writer)
            process = context.Process(target=_answer, args=arguments, name="EngineErrand", daemon=True)
            process.start()
        try:
            until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
            while not reader.poll(max(min(until_s - time.monotonic(), LOOK_S), 0.0)):
                if given_up() or time.monotonic() >= until_s:
                    process.kill()
                    raise TimeoutError
            answer = reader.recv_bytes(ANSWER_BYTES)
        except EOFError:
            process.join(LEAVE_S)
            raise RuntimeError(f"the process ended without an answer (exit code {process.exitcode})") from None
        except OSError as error:
            process.kill()  # it waits until all of the answer is read
            raise RuntimeError(f"the answer of the process is longer than {ANSWER_BYTES} bytes") from error
        finally:
            process.join(LEAVE_S)
            if process.exitcode is None:
                process.kill()
                process.join()
            process.close()
    succeeded, value = _read(answer)
    if not succeeded:
        raise RuntimeError(value)
    return value  # type: ignore[no-any-return]


def _read(answer: bytes) -> tuple[bool, Any]:
    try:
        succeeded, value = _Answer(io.BytesIO(answer)).load()
    except Exception as error:  # bytes by a stranger can raise anything
        raise RuntimeError(f"the answer of the process can't be read ({error})") from None
    return succeeded, value


class _Answer(pickle.Unpickler):
    """Reads plain data and ``_RESULTS`` only, because the code of a checkpoint may have written the bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _RESULTS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _answer(pickled: bytes, writer: Any) -> None:
    """Run the function and send its result; the child's side of ``run_apart``."""
    try:
        refused = _why_refused()
        outcome = (True, pickle.loads(pickled)()) if refused is None else (False, refused)
    except Exception as problem:
        outcome = (False, f"{type(problem).__name__}: {problem}")
    writer.send_bytes(pickle.dumps(outcome))
    writer.close()


def _preload_outcome() -> tuple[str | None, list[str]]:
    """Return why a fork of the forkserver can't be an engine (None if it can), and the modules not preloaded."""
    preload = sys.modules.get(PRELOAD)
    if preload is None:
        return f"the forkserver could not import {PRELOAD}", []
    return preload.problem, preload.not_preloaded
