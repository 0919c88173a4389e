"""The folder of an experiment's results: what it was, and every answer from the moment that it came.

``experiment.yaml`` is the experiment as it was resolved; ``answers.jsonl`` has a line for every answer,
``leases.jsonl`` one for every LLM that was handed over, ``windows.jsonl`` one for every final energy window of them;
``windows.csv``, ``summary.json`` and ``summary.csv`` are made of these whenever a run ends. A process may be killed at
any moment: what is there is whole, but for a last line that the next run drops.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import yaml
from pydantic import TypeAdapter, ValidationError

from deployments.experiment import Plan, differences
from registry.errors import BadSettings
from registry.state import canonical_json
from registry.window_report import WindowReport

_WINDOW = TypeAdapter(WindowReport)
HEADER = "# Made by `greenprompt measure`; the same command goes on with it. Don't change it.\n"


class Results:
    """The results of one experiment, open to one process at a time.

    ``resumed`` says that another run began it; ``measurement_id`` is its own for all of them.
    """

    def __init__(self, folder: Path, plan: Plan, *, measurement_id: int) -> None:
        """Begin in a folder with this measurementId, or go on with what is there.

        Raises:
            BadSettings: the folder can't be written, holds another experiment (the text says what differs) or something
                that is none, or another process is at work there.
        """
        self.folder = folder
        with ExitStack() as files:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._answers = files.enter_context((folder / "answers.jsonl").open("a+b"))
                fcntl.flock(self._answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._leases = files.enter_context((folder / "leases.jsonl").open("a+b"))
                self._windows_file = files.enter_context((folder / "windows.jsonl").open("a+b"))
            except BlockingIOError:
                raise BadSettings(str(folder), "another `greenprompt measure` is at work there") from None
            except OSError as error:
                raise BadSettings(str(folder), f"can't be written: {error.strerror}") from None
            answers = self.answers()
            _whole_lines(self._leases)
            self._windows = {window.window: window for window in self._read_windows()}
            self.resumed = (folder / "experiment.yaml").exists()
            if answers and not self.resumed:
                raise BadSettings(str(folder), "has answers, but no experiment.yaml that tells to what")
            self.measurement_id = self._known(plan) if self.resumed else self._begin(plan, measurement_id)
            self._done = {_key(line) for line in answers if not line["warmup"]}
            self._files = files.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def answers(self) -> list[dict[str, Any]]:
        """All lines of ``answers.jsonl``, as they are on disk: an interrupted ``add`` may have written its own."""
        return _whole_lines(self._answers)

    @property
    def done(self) -> int:
        """How many answers that count are there."""
        return len(self._done)

    def has(self, llm: str, repetition: int, prompt: str) -> bool:
        """Whether this answer is there, or the error in its place."""
        return (llm, repetition, prompt) in self._done

    def add(self, line: dict[str, Any]) -> None:
        """Keep an answer; durable when this returns. Raises BadSettings when the disk is full."""
        self._append(self._answers, line)
        if not line["warmup"]:
            self._done.add(_key(line))

    def add_lease(self, line: dict[str, Any]) -> None:
        """Keep what is known of an LLM that was handed over; as ``add``."""
        self._append(self._leases, line)

    def leases(self) -> list[dict[str, Any]]:
        """All lines of ``leases.jsonl``."""
        return _whole_lines(self._leases)

    def windows(self) -> list[WindowReport]:
        """The final energy windows that are there, each once, in the order in which they began."""
        return sorted(self._windows.values(), key=lambda window: (window.begunAt, window.window))

    def add_windows(self, windows: Iterable[WindowReport]) -> None:
        """Keep those that are not there yet; durable when this returns. Raises BadSettings when the disk is full."""
        new = {window.window: window for window in windows if window.window not in self._windows}
        if new:
            self._append(self._windows_file, *(_WINDOW.dump_python(window, mode="json") for window in new.values()))
            self._windows |= new

    def _read_windows(self) -> list[WindowReport]:
        try:
            return [_WINDOW.validate_python(line) for line in _whole_lines(self._windows_file)]
        except ValidationError:
            raise BadSettings(self._windows_file.name, "holds a line that is no energy window") from None

    def write(self, name: str, text: str) -> None:
        """Write a file whole, in place of one that may be there. Raises BadSettings when the disk is full."""
        written = self.folder / f".{name}"
        try:
            with written.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            written.replace(self.folder / name)
            directory = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise BadSettings(str(self.folder / name), f"can't be written: {error.strerror}") from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """As ``write``, of an object."""
        self.write(name, json.dumps(value, indent=2) + "\n")

    def _append(self, file: IO[bytes], *lines: Mapping[str, Any]) -> None:
        try:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise BadSettings(str(self.folder), f"can't be written: {error.strerror}") from error

    def _begin(self, plan: Plan, measurement_id: int) -> int:
        identity = plan.identity()
        orders = {number: plan.order(number) for number in range(1, plan.experiment.repetitions + 1)}
        told = {
            "sha256": sha256(canonical_json(identity).encode()).hexdigest(),
            "measurement_id": measurement_id,
            "experiment": identity,
            "order": orders,
        }
        self.write("experiment.yaml", HEADER + yaml.safe_dump(told, sort_keys=False))
        return measurement_id

    def _known(self, plan: Plan) -> int:
        path = self.folder / "experiment.yaml"
        try:
            told = yaml.safe_load(path.read_text(encoding="utf-8"))
            there, measurement_id = dict(told["experiment"]), int(told["measurement_id"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            raise BadSettings(str(path), "is no experiment that `greenprompt measure` has begun") from None
        if found := list(differences(there, plan.identity())):
            raise BadSettings(str(self.folder), f"holds another experiment: {'; '.join(found)}. Use another folder")
        return measurement_id


def _key(line: Mapping[str, Any]) -> tuple[str, int, str]:
    return line["llm"], line["repetition"], line["prompt"]


def _whole_lines(file: IO[bytes]) -> list[dict[str, Any]]:
    """The lines of a file, which then ends with the last whole one. Raises BadSettings for one that is not ours."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
    lines = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise BadSettings(file.name, f"line {number} is not JSON") from None
    return lines
