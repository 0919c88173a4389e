"""Wrappers that do what they are told, late, in any order, or not at all; and the registry's shell around them.

The wrappers follow ``deployments.wrapper.commands``, the shell ``registry.service.service``: commands and answers
lie in lists until a test lets one happen. Nothing here looks into the allocator's indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from registry.core.allocator import Allocator
from registry.core.commands import BindLease, DeployLLM, Effect, RestartWrapper, StopLLM, UnbindLease
from registry.core.events import (
    Event,
    LeaseBound,
    LLMDeployed,
    LLMDeployFailed,
    LLMDied,
    LLMStopped,
    WrapperFailed,
    WrapperStarted,
)
from registry.core.records import LLMSpec, WrapperStatus

Answer = Callable[[Allocator], Event | None]
"""What comes back of a command, made at the moment at which the registry hears it."""


@dataclass
class QueuedWrapper:
    """The process of one wrapper."""

    wrapper_id: str
    epoch: int = 0
    running: LLMSpec | None = None
    starting: LLMSpec | None = None
    waiting: list[int] = field(default_factory=list)
    """Epochs of the deploys that wait for what is being started."""
    token: str | None = None
    died: bool = False

    @property
    def empty(self) -> bool:
        """True when no LLM runs or starts."""
        return self.running is None and self.starting is None

    def report(self, _: Allocator) -> Event:
        """What it says when it is asked: how it is at that moment."""
        running = None if self.running is None else self.running.fingerprint
        return WrapperStarted(self.wrapper_id, self.epoch, running)

    def take(self, effect: Effect, allocator: Allocator) -> list[Answer]:
        """Carry out a command; what it answers now."""
        # The shell looks the lease up when it sends a command.
        lease = allocator.lease_by_wrapper(self.wrapper_id)
        if isinstance(effect, BindLease) and (lease is None or lease.request_id != effect.request_id):
            return []  # and sends nothing for one that has ended
        if effect.epoch < self.epoch:
            return []  # StaleEpoch
        self.epoch = effect.epoch
        match effect:
            case BindLease(wrapper_id, epoch, _):
                assert lease is not None
                self.token = lease.token
                kind = "xeon" if wrapper_id < "c" else "epyc"
                return [said(LeaseBound(wrapper_id, epoch, provenance=f'{{"cpu":"{kind}"}}'))]
            case UnbindLease():
                self.token = None
                return []
            case DeployLLM(wrapper_id, epoch, spec, _):
                # A lease that waits for its LLM to come back stays; its holder is told to try again.
                self.token = None if lease is None else lease.token
                if self.running == spec:
                    return [said(LLMDeployed(wrapper_id, epoch))]
                if self.starting != spec:
                    self.running, self.starting, self.waiting, self.died = None, spec, [], False
                self.waiting.append(epoch)
                return []
            case StopLLM(wrapper_id, epoch):
                self._reset()
                return [said(LLMStopped(wrapper_id, epoch))]
            case RestartWrapper():
                self.epoch = 0
                self._reset()
                return [self.report]

    def finish(self, *, works: bool, permanent: bool) -> list[Answer]:
        """What was being started runs, or could not be started."""
        spec, epochs = self.starting, self.waiting
        self.starting, self.waiting = None, []
        if works:
            self.running = spec
            return [said(LLMDeployed(self.wrapper_id, epoch)) for epoch in epochs]
        return [said(LLMDeployFailed(self.wrapper_id, epoch, "out of memory", permanent)) for epoch in epochs]

    def crash(self) -> list[Answer]:
        """The process dies and another takes its place; deploys that were waited for end in an error."""
        epochs = self.waiting
        self.epoch = 0
        self._reset()
        return [unreachable(self.wrapper_id, epoch) for epoch in epochs]

    def lose_engine(self) -> None:
        """The engine's process dies; the next look at the wrapper tells."""
        self.running, self.died = None, True

    def _reset(self) -> None:
        self.running = self.starting = self.token = None
        self.waiting, self.died = [], False


def said(event: Event) -> Answer:
    """An answer that is what it is, whenever it is heard."""
    return lambda _: event


def unreachable(wrapper_id: str, epoch: int) -> Answer:
    """What the shell makes of a command that got no answer: news, unless a newer command was given since."""

    def outcome(allocator: Allocator) -> Event | None:
        wrapper = allocator.wrapper(wrapper_id)
        newest = wrapper is not None and wrapper.epoch == epoch
        return WrapperFailed(wrapper_id, "no answer") if newest else None

    return outcome


class QueuedCluster:
    """All wrappers, the commands that are under way to them and the answers that are under way back."""

    def __init__(self) -> None:
        self.wrappers: dict[str, QueuedWrapper] = {}
        self.commands: list[Effect] = []
        self.answers: list[tuple[str, Answer]] = []
        self.unseen: set[str] = set()
        """Wrappers that this life of the registry has not heard of yet."""

    def add(self, wrapper_id: str) -> None:
        """A wrapper is created; an older one of this name is gone."""
        self.wrappers[wrapper_id] = QueuedWrapper(wrapper_id)

    def remove(self, wrapper_id: str) -> None:
        """A wrapper's process is gone, and nobody takes its place."""
        self.wrappers.pop(wrapper_id, None)

    def send(self, command: Effect, allocator: Allocator) -> None:
        """Let a command arrive, or find nobody."""
        self.commands.remove(command)
        wrapper = self.wrappers.get(command.wrapper_id)
        if wrapper is None:
            self._hear(command.wrapper_id, [unreachable(command.wrapper_id, command.epoch)])
        else:
            self._hear(command.wrapper_id, wrapper.take(command, allocator))

    def finish(self, wrapper_id: str, *, works: bool, permanent: bool = False) -> None:
        """Let what a wrapper is starting run, or fail."""
        self._hear(wrapper_id, self.wrappers[wrapper_id].finish(works=works, permanent=permanent))

    def crash(self, wrapper_id: str) -> None:
        """Let a wrapper's process die; Serve starts another."""
        self._hear(wrapper_id, self.wrappers[wrapper_id].crash())

    def look_at(self, wrapper_id: str, allocator: Allocator) -> Event | None:
        """What the registry's watch makes of a wrapper."""
        record, wrapper = allocator.wrapper(wrapper_id), self.wrappers.get(wrapper_id)
        if record is None or record.status in (WrapperStatus.LOST, WrapperStatus.OFF):
            return None
        if wrapper is None:
            return WrapperFailed(wrapper_id, "no answer")
        if wrapper_id in self.unseen or record.status is WrapperStatus.STARTING:
            return wrapper.report(allocator)
        if self.is_busy(wrapper_id) or record.status is WrapperStatus.RESTARTING:
            return None
        if record.status is WrapperStatus.FAILED or wrapper.epoch < record.epoch:
            return wrapper.report(allocator)
        if record.status in (WrapperStatus.READY, WrapperStatus.LEASED):
            if wrapper.died:
                return LLMDied(wrapper_id, wrapper.epoch, "killed")
            if wrapper.running != record.spec:
                return wrapper.report(allocator)  # its process was replaced before it took the last command
        return None

    def is_busy(self, wrapper_id: str) -> bool:
        """True while a command is under way to the wrapper, being carried out, or its answer under way back."""
        wrapper = self.wrappers.get(wrapper_id)
        return (
            any(command.wrapper_id == wrapper_id for command in self.commands)
            or any(sender == wrapper_id for sender, _ in self.answers)
            or (wrapper is not None and bool(wrapper.waiting))
        )

    def forget_registry(self) -> None:
        """The registry dies: commands that were not sent are lost, and so are all answers."""
        self.commands.clear()
        self.answers.clear()
        self.unseen = set(self.wrappers)
        for wrapper in self.wrappers.values():
            wrapper.waiting = []

    def _hear(self, wrapper_id: str, answers: list[Answer]) -> None:
        self.answers += [(wrapper_id, answer) for answer in answers]
