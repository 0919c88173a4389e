import fcntl
import json
import logging
import logging.config
import logging.handlers
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.engine.environment import EngineEnvironment, log_handlers_kept, remove_orphans
from deployments.engine.phases import Phase, PhaseClock
from deployments.engine.root_cause import root_cause
from deployments.machine.second_user import SecondUser, engine_environment

WORKER = """\x1eWorkerProc failed to start.\x1f
Traceback (most recent call last):
  File "executor.py", line 10, in worker_main
    worker = WorkerProc(*args)
             ^^^^^^^^^^^^^^^^^
  File "loader.py", line 20, in load
    raise safetensors_rust.SafetensorError(why)
safetensors_rust.SafetensorError: invalid header: too short
"""
ENGINE = """\x1eEngineCore failed to start.\x1f
Traceback (most recent call last):
  File "core.py", line 30, in run_engine_core
    engine = EngineCoreProc()
Exception: WorkerProc initialization failed. See stack trace for root cause.
"""
BENIGN = """\x1eError saving the cache.\x1f
Traceback (most recent call last):
  File "registry.py", line 1, in save
    open(path)
PermissionError: no
"""
CHAINED = """\x1eEngineCore failed to start.\x1f
Traceback (most recent call last):
  File "a.py", line 1, in a
    b()
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in b
    c()
ValueError: To serve at least one request
more memory is needed.
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files of the test's own, with a short name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@pytest.mark.parametrize(
    ("errors", "cause"),
    [
        ("", None),
        ("\x1ea plain error without a traceback\x1f\n", None),
        (WORKER, "SafetensorError: invalid header: too short"),
        (WORKER + ENGINE, "SafetensorError: invalid header: too short"),
        (BENIGN + WORKER + ENGINE, "SafetensorError: invalid header: too short"),
        (BENIGN, "PermissionError: no"),
        (CHAINED, "To serve at least one request\nmore memory is needed."),
    ],
    ids=["nothing", "no traceback", "worker", "worker and engine", "benign before", "benign only", "chained"],
)
def test_root_cause(errors: str, cause: str | None) -> None:
    """The reason told is the first error of the start, not those that followed from it."""
    assert root_cause(errors) == cause


def test_last_words_go_through_logging(temporary: Path) -> None:
    """What vLLM logs, in whatever process, is found as last words and last lines, and forgotten by the next start."""
    environment = EngineEnvironment(temporary / "cache", cpu_threads=1)
    logger = logging.getLogger("vllm.some.part")
    try:
        config = json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text())
        logging.config.dictConfig(config)
        assert environment.first_error() is None
        try:
            raise RuntimeError("the weights are cursed")
        except RuntimeError:
            logger.exception("EngineCore failed to start.")
        assert environment.first_error() == "the weights are cursed"
        logger.debug("too much")
        for number in range(20):
            logger.info("step %d", number)
        lines = environment.last_lines().splitlines()
        assert (lines[0], lines[-1]) == ("INFO step 12", "INFO step 19")
        environment.begin_start()
        assert environment.first_error() is None
        assert environment.last_lines() == ""
    finally:
        for handler in logging.getLogger("vllm").handlers[:]:
            logging.getLogger("vllm").removeHandler(handler)
            handler.close()
        environment.close()


def test_operators_logging_is_kept(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logging configuration that the operator has chosen for vLLM stays, with ours beside it."""
    own = temporary / "logging.json"
    own.write_text(
        json.dumps(
            {
                "version": 1,
                "handlers": {"null": {"class": "logging.NullHandler"}},
                "loggers": {"vllm": {"handlers": ["null"], "level": "ERROR"}},
            }
        )
    )
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", str(own))
    environment = EngineEnvironment(temporary / "cache", cpu_threads=None)
    used = json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text())
    environment.close()
    assert used["loggers"]["vllm"] == {
        "handlers": ["null", "greenprompt_errors", "greenprompt_lines"],
        "level": "ERROR",
    }
    assert os.environ["VLLM_LOGGING_CONFIG_PATH"] == str(own)


def test_operators_choice_stands(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator has set for vLLM's caches and thread binding is not overridden."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", "elsewhere")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    environment = EngineEnvironment(temporary / "cache", cpu_threads=2)
    try:
        assert os.environ["VLLM_CACHE_ROOT"] == "elsewhere"
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
    finally:
        environment.close()


def test_others_go_on_logging(tmp_path: Path) -> None:
    """A handler that passes on to a file still does so after a library has configured logging."""
    file = logging.FileHandler(tmp_path / "serve.log")
    logger = logging.getLogger("test_others_go_on_logging")
    memory = logging.handlers.MemoryHandler(1, target=file)
    logger.addHandler(memory)
    try:
        with log_handlers_kept():
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
        logger.error("still here")
        assert memory.target is file
        assert "still here" in (tmp_path / "serve.log").read_text()
    finally:
        logger.removeHandler(memory)
        memory.close()
        file.close()


def test_environment_is_given_back(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After close the variables are what they were, and the directory is gone."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    before = dict(os.environ)
    environment = EngineEnvironment(
        temporary / "cache", cpu_threads=2, without=["VLLM_CPU_KVCACHE_SPACE", "UNHEARD_OF"]
    )
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    environment.close()
    assert dict(os.environ) == before
    assert list(temporary.glob("gp-engine-*")) == []


def test_orphans_are_removed(temporary: Path) -> None:
    """What a killed owner left behind goes, its shared memory too; what a living one uses stays."""
    memory = temporary / "psm_1"
    memory.touch()
    orphan = temporary / "gp-engine-orphan"
    orphan.mkdir(mode=0o700)
    (orphan / "owner.lock").touch()
    (orphan / "shared_memory").write_text(f"{memory}\n{temporary / 'gone already'}\n")
    foreign = temporary / "gp-engine-foreign"
    foreign.mkdir(mode=0o700)
    environment = EngineEnvironment(temporary / "cache", cpu_threads=1)
    remove_orphans()
    assert environment.directory.exists()
    assert foreign.exists()
    assert not orphan.exists()
    assert not memory.exists()
    environment.close()


def test_what_another_user_could_have_made_is_no_orphan(temporary: Path) -> None:
    """A folder that is open, or a link, is left alone: in /tmp anyone could make it list files of ours to remove."""
    ours = temporary / "registry.db"
    ours.touch()
    planted = temporary / "gp-engine-planted"
    planted.mkdir()
    planted.chmod(0o755)
    (planted / "owner.lock").touch()
    (planted / "shared_memory").write_text(f"{ours}\n")
    (temporary / "gp-engine-link").symlink_to(planted)
    remove_orphans()
    assert ours.exists()
    assert planted.exists()


def test_a_start_finds_nothing_of_the_one_before(temporary: Path) -> None:
    """Sockets, phases and shared memory of an engine that was killed are gone when the next one starts."""
    environment = EngineEnvironment(temporary / "cache", cpu_threads=1)
    memory = temporary / "psm_2"
    memory.touch()
    environment.remember_shared_memory([memory])
    socket = Path(os.environ["VLLM_RPC_BASE_PATH"]) / "some-socket"
    socket.touch()
    Path(os.environ["GREENPROMPT_ENGINE_PHASE_FILE"]).write_text("warming_up\n")
    assert environment.phases() == [Phase.WARMING_UP]
    environment.begin_start()
    assert environment.phases() == []
    assert not memory.exists()
    assert not socket.exists()
    environment.close()


@pytest.mark.parametrize("depth", [0, 40, 48, 49, 90])
def test_socket_paths_are_short(temporary: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    """However deep the directory for temporary files, vLLM's sockets fit into the 107 characters that a path has."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        deep = Path(short) / ("d" * max(1, depth - len(short) - 1))
        deep.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(deep))
        environment = EngineEnvironment(temporary, cpu_threads=1)
        socket = Path(os.environ["VLLM_RPC_BASE_PATH"]) / "01234567-0123-0123-0123-0123456789ab"
        environment.close()
    assert len(str(socket)) <= 107
    assert socket.is_relative_to(deep) == (len(str(deep)) < 49)


def test_phase_clock_adds_up() -> None:
    """Each phase is told once as it begins, and its time is known when the next begins."""
    told: list[Phase] = []
    clock = PhaseClock(told.append)
    clock.enter(Phase.CONFIGURING)
    assert clock.took_s == {}
    clock.enter(Phase.LOADING)
    clock.enter(Phase.LOADING)  # told twice, by two who know
    clock.enter(Phase.READY)
    assert told == [Phase.CONFIGURING, Phase.LOADING, Phase.READY]
    assert list(clock.took_s) == ["configuring", "loading"]
    assert min(clock.took_s.values()) >= 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_a_second_user_gets_only_what_its_engines_need(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engines own their sockets, temporary files and logs; all else is root's, and closed to other users.

    If the wrapper is killed, the next one removes all of it, and follows no link that an engine has left.
    """
    monkeypatch.setattr("deployments.engine.environment._OPEN_TO_ALL", temporary)
    user = SecondUser("nobody", 65_534, 65_534)
    environment = EngineEnvironment(temporary / "cache", cpu_threads=1, user=user)
    own = engine_environment(os.environ)
    directory = environment.directory
    try:
        owned = {file.name for file in directory.iterdir() if file.stat().st_uid == user.uid}
        assert owned == {"errors", "es", "etmp", "log", "phases"}
        assert {directory / name for name in ("es", "etmp")} == {
            Path(own[name]) for name in ("VLLM_RPC_BASE_PATH", "TMPDIR")
        }
        assert os.environ["VLLM_RPC_BASE_PATH"] == str(environment.sockets)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o710
        open_to_all = [file for file in directory.rglob("*") if file.stat().st_mode & stat.S_IWOTH]
        assert open_to_all == []
        kept = temporary / "kept"
        (kept / "folder").mkdir(parents=True)
        (directory / "es" / "link").symlink_to(kept)
        (directory / "es" / "folder").mkdir()
        environment.begin_start()
        assert list((directory / "es").iterdir()) == []
        assert (kept / "folder").exists()
    finally:
        fcntl.flock(environment._lock, fcntl.LOCK_UN)  # as the kernel does when the process ends
        remove_orphans()
        assert not directory.exists()
        directory.mkdir()  # so that ``close`` finds what it removes
        environment.close()
