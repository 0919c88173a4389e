"""Runs engines as a second user of this machine, who can't read the files of the user who runs Ray.

A process that starts as root becomes that user in its first lines, and then executes itself again. So nothing of root
is left in it: neither rights nor variables. It also gets a network of its own, with a loopback interface only, because
a port of Ray on this machine runs code for everybody who reaches it, unless Ray's TLS is on.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import json
import os
import pwd
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from deployments.machine.child_processes import set_process_option
from deployments.machine.worker_environment import is_secret
from registry.errors import BadSettings

SETTING: Final = "wrappers.run_as"
USER: Final = "GREENPROMPT_ENGINE_USER"
"""Variable with the second user, as ``SecondUser.text``; engines run as their parent's user if it is not set."""
OWN: Final = "GREENPROMPT_ENGINE_OWN"
"""Variable with a JSON object: the variables that only processes of the second user get."""

PROBE_S: Final = 60.0
"""Time limit of ``require_usable``, seconds; it takes less than one on an idle machine."""

_CLONE_NEWNET: Final = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_CAPABILITIES: Final = ("CapInh", "CapPrm", "CapEff", "CapAmb")

_KEPT: Final = frozenset(
    {"PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX", "DO_NOT_TRACK"}
    | {"HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY"}
)
_KEPT_PREFIXES: Final = (
    *("GREENPROMPT_ENGINE_", "VLLM_", "PYTHON", "LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_"),
    *("TRITON_", "FLASHINFER_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TOKENIZERS_"),
)


@dataclass(frozen=True, slots=True)
class SecondUser:
    """A user of this machine: login name, user id, id of the main group."""

    name: str
    uid: int
    gid: int

    @property
    def text(self) -> str:
        """The value of the variable USER."""
        return f"{self.name}:{self.uid}:{self.gid}"


def _user_of(environment: Mapping[str, str]) -> SecondUser | None:
    """Return the user that the variable USER names; None without this variable."""
    if (text := environment.get(USER)) is None:
        return None
    name, uid, gid = text.split(":")  # a login name has no colon
    return SecondUser(name, int(uid), int(gid))


def second_user(name: str) -> SecondUser:
    """Return the user of this machine with this name.

    Raises:
        BadSettings: There is none, it is root, or this process may not start processes as another user.
    """
    try:
        found = pwd.getpwnam(name)
    except KeyError as error:
        raise BadSettings(SETTING, f"this machine has no user {name!r}: create it (useradd --system {name})") from error
    if found.pw_uid == 0 or found.pw_gid == 0:
        raise BadSettings(SETTING, f"{name!r} has the rights of root: name a user with a group of its own")
    if os.geteuid() != 0:
        problem = f"only root can start engines as {name!r}, but this is user {os.geteuid()}"
        raise BadSettings(SETTING, f"{problem}: start Ray as root, or remove the setting")
    return SecondUser(name, found.pw_uid, found.pw_gid)


def home_of(user: SecondUser, cache_dir: Path) -> Path:
    """Return the folder in ``cache_dir`` for what engines of this user keep, such as compiled kernels; create it.

    Raises:
        BadSettings: It is not a folder of that user alone.
        OSError: It can't be created.
    """
    home = cache_dir / f"engines-{user.name}"
    if not home.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f"{home.name}-", dir=cache_dir))
        os.chown(new, user.uid, user.gid)
        try:
            new.rename(home)
        except OSError:  # another wrapper was faster, and its engines have files in it
            new.rmdir()
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user.uid or found.st_mode & stat.S_IWOTH:
        raise BadSettings("cache_dir", f"{home} must be a folder of user {user.name!r} alone: remove it and try again")
    return home


def own_variables(user: SecondUser, home: Path) -> dict[str, str]:
    """Return variables that keep the files of this user's processes below ``home``."""
    cache = home / ".cache"
    return {
        "HOME": str(home),
        "USER": user.name,
        "LOGNAME": user.name,
        "HF_HOME": str(cache / "huggingface"),
        "HF_MODULES_CACHE": str(cache / "huggingface" / "modules"),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(home / ".config" / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for an engine of a process that has this one.

    With a second user these are only variables that an engine may need, without secrets, and the user's own.
    """
    if USER not in environment:
        return dict(environment)
    kept = {
        name: value
        for name, value in environment.items()
        if (name in _KEPT or name.startswith(_KEPT_PREFIXES)) and not is_secret(name, value)
    }
    own: dict[str, str] = json.loads(environment[OWN])
    return kept | own


# D129: engines run as a second user
def run_as_second_user() -> str | None:
    """Execute this program again as the user of ``USER``, with that user's environment. Call it in one thread only.

    Returns None if this process already runs as that user, or if there is no such variable; else the
    reason why it can't. Then the process may have lost its rights; end it.
    """
    user = _user_of(os.environ)
    if user is None or os.geteuid() != 0:
        return not_second_user()
    try:
        groups = os.getgrouplist(user.name, user.gid)  # before the network is gone, which may have the list
        _have_own_network()
        _become(user, groups)
        _execute_again(user)
    except BadSettings as error:
        return error.problem
    except OSError as error:
        return f"root can't start a process of user {user.name!r} here ({error})"


def not_second_user() -> str | None:
    """Return why this process must not be an engine, because it has more rights than the user of USER.

    None if it has not, or if there is no such variable.
    """
    user = _user_of(os.environ)
    if user is None:
        return None
    if os.getresuid() != (user.uid,) * 3 or os.getresgid() != (user.gid,) * 3:
        return f"the engine's process is still user {os.getresuid()}, group {os.getresgid()}"
    if 0 in (user.uid, user.gid, *os.getgroups()):
        return f"user {user.name!r} is in the group of root: remove it from this group"
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    left = [name for name in _CAPABILITIES if int(status[name], 16)]
    if left or status["NoNewPrivs"] != "1":
        return f"the engine's process still has rights of root ({', '.join(left) or 'NoNewPrivs'})"
    return None


def _execute_again(user: SecondUser) -> NoReturn:
    try:
        os.execve(sys.executable, sys.orig_argv, engine_environment(os.environ))  # noqa: S606 - our own command line
    except OSError as error:
        problem = f"user {user.name!r} can't execute {os.path.realpath(sys.executable)} ({error.strerror})"
        raise BadSettings(SETTING, f"{problem}: install Python where this user can read it") from error


def _have_own_network() -> None:
    """Give this process a network with nothing but a loopback interface. Raises BadSettings, OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.unshare(_CLONE_NEWNET) != 0:
            raise PermissionError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))
    except PermissionError as error:
        problem = f"root may not give engines a network of their own here ({error.strerror})"
        remedy = "allow this container CAP_SYS_ADMIN and CAP_NET_ADMIN, or remove the setting"
        raise BadSettings(SETTING, f"{problem}: {remedy}") from error


def _become(user: SecondUser, groups: list[int]) -> None:
    """Give all rights of root up for good. Raises OSError."""
    os.chdir("/")  # else relative paths would lead into a folder that this user can't enter
    os.umask(stat.S_IRWXG | stat.S_IRWXO)
    if os.getpgrp() != os.getpid():
        os.setsid()  # else it could type into the operator's terminal
    set_process_option("PR_SET_NO_NEW_PRIVS", 1)
    os.setgroups(groups)  # some may give access to GPUs
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def runs_as(pid: int, user: SecondUser) -> bool:
    """Whether a process runs as this user, with all of its user ids. May raise OSError."""
    lines = Path(f"/proc/{pid}/status").read_text("utf-8", errors="replace").splitlines()
    (uids,) = [line.split()[1:] for line in lines if line.startswith("Uid:")]
    return set(uids) == {str(user.uid)}


def unreadable(files: list[str]) -> str | None:
    """Return the first of these files that this process can't read; None if it can read all of them."""
    return next((file for file in files if not os.access(file, os.R_OK)), None)


def require_usable(user: SecondUser, home: Path) -> None:
    """Check that a process can become this user, run this program, and write to ``home``. Blocks up to PROBE_S.

    Raises:
        BadSettings: It can't; says why.
    """
    own = {USER: user.text, OWN: json.dumps(own_variables(user, home))}
    program = Path(__file__).resolve().parents[2]
    paths = [str(program), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BadSettings(SETTING, f"a process of user {user.name!r} did not answer in {PROBE_S:g} s") from error
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()
        raise BadSettings(SETTING, said[-1] if said else f"a process of user {user.name!r} ended without an answer")


def _probe() -> str | None:
    """Return why this process can't be an engine of the second user; None if it can."""
    name, home = os.environ["USER"], os.environ["HOME"]
    if importlib.util.find_spec("vllm") is None:
        return f"user {name!r} can't import vLLM: install it where this user can read it"
    try:
        with tempfile.TemporaryFile(dir=home):
            return None
    except OSError as error:
        remedy = "let others enter the folders above it (chmod o+x), or choose another cache_dir"
        return f"user {name!r} can't write to {home} ({error.strerror}): {remedy}"


if __name__ == "__main__":
    problem = run_as_second_user() or _probe()
    if problem is not None:
        sys.stdout.write(problem)
        sys.exit(1)
