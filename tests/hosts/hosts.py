"""Several hosts on one machine: network namespaces joined by a bridge.

Each has an address, processes, /tmp, a home directory, shared memory and an sshd of its own, and what it starts dies
with it. It takes root, iproute2, nftables, openssh-server and rsync.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = (
    "ip",
    "tc",
    "nft",
    "unshare",
    "nsenter",
    "setpriv",
    "sshd",
    "ssh-keygen",
    "rsync",
    "redis-server",
    "redis-cli",
)
HOME = Path("/srv/gp")
"""Home directory of root on a host."""
INSTALLED = HOME / "greenprompt"
"""Where the registry is installed on every host, as on machines made from one image."""

BOOT_LIMIT_S = 20.0
_SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# What becomes PID 1 of a host. The folder of the host may lie in /tmp, which it loses last.
_BOOT = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount -t tmpfs tmpfs {above} && mkdir {home} && mount --bind {folder}/home {home}
mkdir -p {installed} && mount --bind {shared} {installed}
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/hosts /etc/hosts
mkdir -m 1777 {folder}/tmp && mount --bind {folder}/tmp /tmp
cd /
exec {sshd} -D -e -f {home}/.sshd/config
"""
_SSHD = """\
Port 22
ListenAddress {address}
HostKey {home}/.sshd/host_key
AuthorizedKeysFile {home}/.ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 100
MaxSessions 100
"""
_BASHRC = """\
export PATH={path}
export HF_HUB_OFFLINE=1
"""
_DROP = """\
table inet fault {{
    chain {hook} {{
        type filter hook {hook} priority 0; policy accept;
        {rule} drop
    }}
}}
"""


def missing() -> list[str]:
    """What these hosts need and this machine lacks."""
    lacks = [program for program in PROGRAMS if shutil.which(program, path=_SEARCHED) is None]
    return lacks if os.geteuid() == 0 else ["root", *lacks]


def alive(process: psutil.Process) -> bool:
    """Tell whether this very process still runs: not one that has its number since, and no zombie."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@dataclass
class Host:
    """One of the hosts. ``folder`` holds what it sees as its home and its /tmp."""

    name: str
    address: str
    folder: Path
    namespace: str
    link: str
    """Its end of the cable, on the bridge."""
    shared: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """Its home directory, seen from outside."""
        return self.folder / "home"

    @property
    def logs(self) -> Path:
        """Where Ray's logs are kept, a folder for each time that it was on."""
        return self.folder / "logs"

    @property
    def pid(self) -> int:
        """The process that is PID 1 inside."""
        assert self.process is not None, f"{self.name} is off"
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii")
        return int(children.split()[0])

    def boot(self) -> None:
        """Switch it on; returns when its sshd answers."""
        assert self.process is None, f"{self.name} is on"
        script = _BOOT.format(
            name=self.name,
            folder=self.folder,
            shared=self.shared,
            above=HOME.parent,
            home=HOME,
            installed=INSTALLED,
            sshd=shutil.which("sshd", path=_SEARCHED),
        )
        apart = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc")
        with (self.folder / "boot.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *apart, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline_s = time.monotonic() + BOOT_LIMIT_S
        while "Server listening" not in (text := (self.folder / "boot.log").read_text(encoding="utf-8")):
            assert self.process.poll() is None, text
            assert time.monotonic() < deadline_s, text
            time.sleep(0.05)

    def power_off(self) -> None:
        """Cut the power: every process ends at once, files stay. Again is no error."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            (self.folder / "boot.log").unlink()
            for logs in (self.folder / "tmp").glob("ray/session_2*/logs"):
                logs.rename(self.logs / f"{len(list(self.logs.iterdir())) + 1:03}")
            shutil.rmtree(self.folder / "tmp")

    def start(self, command: str) -> subprocess.Popen[str]:
        """Run a shell command on it, as its operator would; the process, whose output is piped."""
        inside = [
            "nsenter",
            "-t",
            str(self.pid),
            "-n",
            "-p",
            "-m",
            "-u",
            "-i",
            "env",
            "-i",
            f"HOME={HOME}",
            "TERM=dumb",
        ]
        return subprocess.Popen(
            [*inside, "bash", "--login", "-c", f"source ~/.bashrc; cd ~/greenprompt; {command}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Without LD_PRELOAD, which engines set in the process of the tests: the host need not have that file.
            env={"PATH": _SEARCHED},
        )

    def run(self, command: str, *, limit_s: float = 120, check: bool = True) -> str:
        """The same, waited for; its output. A status other than 0 fails if ``check``."""
        process = self.start(command)
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"{self.name}: {command}: not over after {limit_s} s:\n{output}") from None
        assert not check or process.returncode == 0, f"{self.name}: {command}: {process.returncode}\n{output}"
        return output

    def processes(self) -> dict[int, str]:
        """What runs on it: command lines by pid as this machine counts, sshd's left out."""
        outside = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if (entry / "ns/pid").readlink() != outside:
                        continue
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                except OSError:
                    continue  # it has ended
                if line and not line.startswith(("sshd:", "/usr/sbin/sshd", "bash -c")):
                    found[int(entry.name)] = line
        return found

    def pids(self, part: str) -> list[int]:
        """The processes on it whose command line has this part."""
        return [pid for pid, line in self.processes().items() if part in line]

    def running(self, part: str) -> list[psutil.Process]:
        """The same, to be asked later whether they still run: by pid and begin, not by a command line.

        Ray rewrites the command line of an actor with each call, and who reads it meanwhile may find half of one.
        """
        found = [psutil.Process(pid) for pid in self.pids(part)]
        assert found, f"{self.name}: nothing with {part!r} runs: {self.processes()}"
        return found

    # --- its cable ---------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Unplug it."""
        _run("ip", "link", "set", self.link, "down")

    def deaf(self, hook: str) -> None:
        """Let nothing in (``input``), or nothing out (``output``)."""
        self._nft(_DROP.format(hook=hook, rule=""))

    def lose(self, percent: int) -> None:
        """Lose so many of the packets that come in."""
        self._nft(_DROP.format(hook="input", rule=f"numgen random mod 100 < {percent}"))

    def throttle(self, kbit: int) -> None:
        """Let so many kilobits a second out, queueing the rest for at most half a second."""
        shape = ("tbf", "rate", f"{kbit}kbit", "burst", "16kb", "latency", "500ms")
        _run("ip", "netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev", "eth0", "root", *shape)

    def heal(self) -> None:
        """The cable is as it was."""
        _run("ip", "link", "set", self.link, "up")
        inside = ("ip", "netns", "exec", self.namespace)
        subprocess.run([*inside, "nft", "delete", "table", "inet", "fault"], capture_output=True, check=False)
        subprocess.run([*inside, "tc", "qdisc", "del", "dev", "eth0", "root"], capture_output=True, check=False)

    def _nft(self, rules: str) -> None:
        command = ["ip", "netns", "exec", self.namespace, "nft", "-f", "-"]
        subprocess.run(command, input=rules, text=True, check=True, timeout=10)


@dataclass
class Network:
    """The bridge and the hosts on it, by name."""

    bridge: str
    prefix: str
    """First three numbers of every address."""
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def gateway(self) -> str:
        """This machine's address on the bridge."""
        return f"{self.prefix}.254"

    def host(self, name: str) -> Host:
        """The host with this name."""
        return self.hosts[name]


def seen_by_hosts(*paths: Path) -> None:
    """Fail at once where one of these lies in a place that a host has anew for itself."""
    for path in paths:
        assert not path.resolve().is_relative_to(HOME.parent), (
            f"{path} can't be used for tests/hosts: the hosts have a {HOME.parent} of their own. Clone the repository"
            f" (and keep Python, and pytest's --basetemp) elsewhere."
        )


@contextmanager
def network(folder: Path, names: Sequence[str], shared: Path) -> Iterator[Network]:
    """Hosts of these names, switched on. ``shared`` is what they have at INSTALLED; ``folder`` must be empty."""
    seen_by_hosts(folder, shared)
    number = os.getpid() % 250 + 1
    net = Network(f"gpbr{number}", f"10.213.{number}")
    with ExitStack() as undo:
        _run("ip", "link", "add", net.bridge, "type", "bridge")
        undo.callback(_run, "ip", "link", "del", net.bridge)
        _run("ip", "addr", "add", f"{net.gateway}/24", "dev", net.bridge)
        _run("ip", "link", "set", net.bridge, "up")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
        for n, name in enumerate(names, start=1):
            host = Host(
                name, f"{net.prefix}.{n}", folder / name, f"gp{number}-{name}", f"gpv{number}-{n}", shared.absolute()
            )
            net.hosts[name] = host
        for host in net.hosts.values():
            _furnish(host, net, folder)
            _cable(host, net, undo)
            undo.callback(host.power_off)
            host.boot()
        yield net


def install(repository: Path, shared: Path, exclude: Sequence[str]) -> None:
    """Copy the working tree with its environment, as ``locks/install.sh cpu .venv`` would make it at INSTALLED.

    The files of the packages are hard links; those that name their own place are written anew.
    """
    seen_by_hosts(repository, shared, Path(sys.base_prefix))
    environment = repository / ".venv"
    assert (environment / ".installed").exists(), "make the environment of the repository first: make env"
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir(parents=True)
    _run("rsync", "-a", *(f"--exclude={pattern}" for pattern in exclude), f"{repository}/", f"{shared}/")
    _run("cp", "--archive", "--link", str(environment), str(shared), limit_s=300)
    copy = shared / environment.name
    for file in [*(copy / "bin").iterdir(), *copy.glob("lib/*/site-packages/__editable__*.py")]:
        content = file.read_bytes()
        if not file.is_symlink() and bytes(repository) in content:
            mode = file.stat().st_mode
            file.unlink()  # not written in place: the repository has the same file
            file.write_bytes(content.replace(bytes(repository), bytes(INSTALLED)))
            file.chmod(mode)
    # The stamp of install.sh, which contains the place. If it is another one, install.sh makes the environment.
    stamp = "{ pwd; cat locks/install.sh locks/installer.txt locks/cpu.txt locks/torch-cpu.txt pyproject.toml; }"
    (copy / ".installed").unlink()
    script = (
        f"set -e; mount -t tmpfs tmpfs {HOME.parent}; mkdir -p {INSTALLED};"
        f" mount --bind {shared.absolute()} {INSTALLED}; cd {INSTALLED}; {stamp} | sha256sum > .venv/.installed;"
        f" PYTHON={sys.base_prefix}/bin/python3 locks/install.sh cpu .venv"
    )
    _run("unshare", "--mount", "bash", "-c", script, limit_s=600)


def _furnish(host: Host, net: Network, folder: Path) -> None:
    """Give a host its files."""
    for part in (".ssh", ".sshd"):
        (host.home / part).mkdir(parents=True)
    host.logs.mkdir()
    (host.folder / "passwd").write_text(
        "".join(
            f"root:x:0:0:root:{HOME}:/bin/bash\n" if line.startswith("root:") else f"{line}\n"
            for line in Path("/etc/passwd").read_text(encoding="utf-8").splitlines()
        ),
        encoding="utf-8",
    )
    lines = [f"127.0.0.1 localhost\n{net.gateway} outside\n"]
    lines += [f"{other.address} {other.name}\n" for other in net.hosts.values()]
    (host.folder / "hosts").write_text("".join(lines), encoding="utf-8")
    shutil.copy(folder / "key", host.home / ".ssh/key")
    shutil.copy(folder / "key.pub", host.home / ".ssh/authorized_keys")
    shutil.copy(folder / "host_key", host.home / ".sshd/host_key")
    (host.home / ".sshd/config").write_text(_SSHD.format(address=host.address, home=HOME), encoding="utf-8")
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    (host.home / ".bashrc").write_text(_BASHRC.format(path=path), encoding="utf-8")


def _cable(host: Host, net: Network, undo: ExitStack) -> None:
    """Give a host its network, and connect it to the bridge."""
    inside = ("ip", "netns", "exec", host.namespace, "ip")
    _run("ip", "netns", "add", host.namespace)
    undo.callback(_run, "ip", "netns", "del", host.namespace)
    _run("ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _run("ip", "link", "set", host.link, "master", net.bridge, "up")
    _run(*inside, "link", "set", "lo", "up")
    _run(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _run(*inside, "link", "set", "eth0", "up")
    # Nothing is forwarded: it is by this route that Ray finds out which address is the host's.
    _run(*inside, "route", "add", "default", "via", net.gateway)


def _run(*command: str, limit_s: float = 60) -> None:
    environment = os.environ | {"PATH": _SEARCHED}
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
