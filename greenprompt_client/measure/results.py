"""The folder of an experiment's results: the experiment, and every answer as soon as it arrives.

``experiment.yaml`` is the resolved experiment, ``prompts.jsonl`` its prompts. ``answers.jsonl`` has a line per answer,
``leases.jsonl`` one per LLM that was handed over, ``windows.jsonl`` one per final energy window. ``windows.csv``,
``summary.json`` and ``summary.csv`` are made of these whenever a run ends. A process may be killed at any moment: the
files stay intact, except for an incomplete last line, which the next run removes.

A folder belongs to one experiment once the registry has accepted it (``accept``). The experiment may grow; answers are
kept.
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

from greenprompt_client.measure.experiment import GROWS, Plan, growth, identity_differences
from greenprompt_client.measure.figures import without_window
from greenprompt_client.measure.prompt_files import Prompt, load_prompts
from registry.accounting.window_report import WindowReport
from registry.errors import BadSettings
from registry.wire.words import canonical_json

_WINDOW = TypeAdapter(WindowReport)
MAX_DIFFERENCES = 10
"""Most differences between two experiments that an error lists."""

HEADER = "# Made by `greenprompt measure`. Repeat the same command to continue. Don't change this file.\n"


class Results:
    """The results of one experiment, opened by one process at a time.

    ``plan``: the caller's plan, with the names and orders of LLMs from the first run in this folder. ``begun``: an
    earlier run used the folder. ``resumed``: the registry had accepted that run. ``grown``: what was added since, as
    texts. ``measurement_id`` is the current one; it is replaced if the registry has lost its state.
    """

    def __init__(self, folder: Path, plan: Plan, *, measurement_id: int) -> None:
        """Begin in a folder with this measurementId, or resume from its contents.

        Raises:
            BadSettings: The folder can't be written, holds another experiment (the text lists the differences) or
                something else, or another process uses it.
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
                raise BadSettings(str(folder), "another `greenprompt measure` uses it") from None
            except OSError as error:
                raise BadSettings(str(folder), f"can't be written: {error.strerror}") from None
            self.begun = (folder / "experiment.yaml").exists()
            if _whole_lines(self._answers) and not self.begun:
                raise BadSettings(str(folder), "has answers, but no experiment.yaml, so their prompts are not known")
            answers = self.answers()
            _whole_lines(self._leases)
            self._windows = {window.window: window for window in self._read_windows()}
            first: dict[str, Any] = {"measurement_id": measurement_id, "accepted": False}
            self._told = self._read_experiment() if self.begun else first
            self.resumed = bool(self._told.get("accepted", True))
            self.grown: tuple[str, ...] = ()
            self.plan = self._same_or_grown(plan) if self.resumed else plan
            self._require_measurement(plan.experiment.measurement_id)
            if not self.resumed:
                self._write_experiment(accepted=False)  # written before the first POST, which the registry may accept
            self._done = self._settled(answers)
            self._files = files.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def answers(self) -> list[dict[str, Any]]:
        """Return the lines of ``answers.jsonl``; if a prompt was asked again, its last line. Raises BadSettings."""
        lines = _whole_lines(self._answers)
        try:
            last = {_key(line): number for number, line in enumerate(lines) if not line["warmup"]}
        except (KeyError, TypeError):
            raise BadSettings(self._answers.name, "has a line that is not an answer") from None
        return [line for number, line in enumerate(lines) if line["warmup"] or last[_key(line)] == number]

    @property
    def measurement_id(self) -> int:
        """The measurementId for the registry."""
        return int(self._told["measurement_id"])

    def accept(self) -> None:
        """Bind the folder to the experiment or its growth, once the registry has accepted it. Idempotent."""
        if self._told.get("accepted") and self._told["experiment"] == self.plan.identity():
            return
        self.write("prompts.jsonl", "".join(json.dumps(_prompt_line(each)) + "\n" for each in self.plan.prompts))
        self._write_experiment(accepted=True)

    def begin_measurement(self, measurement_id: int) -> int:
        """Continue with a new measurementId, because the registry has lost the previous one.

        Returns:
            The number of prompts that are asked again, because the registry has lost their final windows.
        """
        earlier = [*self._told.get("earlier_measurement_ids", ()), self.measurement_id]
        self._told |= {"measurement_id": measurement_id, "earlier_measurement_ids": earlier}
        self._write_experiment(accepted=True)
        before, self._done = self._done, self._settled(self.answers())
        return len(before - self._done)

    def current_leases(self) -> list[str]:
        """Return the requestIds of the current measurement's leases: only their windows can still arrive."""
        ids = (line["requestId"] for line in self.leases() if line.get("measurementId") == self.measurement_id)
        return list(dict.fromkeys(ids))

    def without_window(self) -> list[Mapping[str, Any]]:
        """Return the counted answers without a final window."""
        answered = [line for line in self.answers() if line["error"] is None and not line["warmup"]]
        return without_window(answered, self.windows())

    @property
    def done(self) -> int:
        """Number of prompts, over all LLMs and repetitions, that need not be asked again: answered or refused."""
        return len(self._done)

    def has(self, llm: str, repetition: int, prompt: str) -> bool:
        """Whether this prompt need not be asked again: it was answered or refused (see `_settled`)."""
        return (llm, repetition, prompt) in self._done

    def add(self, line: dict[str, Any]) -> None:
        """Append an answer; durable on return. Raises BadSettings if it can't be written, e.g. if the disk is full."""
        self._append(self._answers, line)
        if not line["warmup"]:
            self._done.add(_key(line))

    def add_lease(self, line: dict[str, Any]) -> None:
        """Append the data of an LLM that was handed over, like ``add``."""
        self._append(self._leases, line)

    def leases(self) -> list[dict[str, Any]]:
        """Return all lines of ``leases.jsonl``. Raises BadSettings for a line that is not JSON."""
        return _whole_lines(self._leases)

    def windows(self) -> list[WindowReport]:
        """Return the final energy windows so far, without duplicates, ordered by start time."""
        return sorted(self._windows.values(), key=lambda window: (window.begunAt, window.window))

    def add_windows(self, windows: Iterable[WindowReport]) -> None:
        """Append the new ones of these windows; durable on return. Raises BadSettings if they can't be written."""
        new = {window.window: window for window in windows if window.window not in self._windows}
        if new:
            self._append(self._windows_file, *(_WINDOW.dump_python(window, mode="json") for window in new.values()))
            self._windows |= new

    def _read_windows(self) -> list[WindowReport]:
        try:
            return [_WINDOW.validate_python(line) for line in _whole_lines(self._windows_file)]
        except ValidationError:
            raise BadSettings(self._windows_file.name, "has a line that is not an energy window") from None

    def write(self, name: str, text: str) -> None:
        """Write or replace a file atomically. Raises BadSettings if it can't be written."""
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
        """Write an object as JSON, like ``write``."""
        self.write(name, json.dumps(value, indent=2) + "\n")

    # D42: an answer is on disk before it counts
    def _append(self, file: IO[bytes], *lines: Mapping[str, Any]) -> None:
        try:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise BadSettings(str(self.folder), f"can't be written: {error.strerror}") from error

    def _write_experiment(self, *, accepted: bool) -> None:
        identity = self.plan.identity()
        orders = {number: self.plan.order(number) for number in range(1, self.plan.experiment.repetitions + 1)}
        self._told |= {
            "accepted": accepted,
            "sha256": sha256(canonical_json(identity).encode()).hexdigest(),
            "experiment": identity,
            "order": orders,
        }
        self.write("experiment.yaml", HEADER + yaml.safe_dump(self._told, sort_keys=False))

    def _read_experiment(self) -> dict[str, Any]:
        path = self.folder / "experiment.yaml"
        try:
            told: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
            told |= {"experiment": dict(told["experiment"]), "measurement_id": int(told["measurement_id"])}
            told["order"] = {int(number): list(order) for number, order in told["order"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            raise BadSettings(str(path), "is not the folder of an experiment of `greenprompt measure`") from None
        return told

    def _same_or_grown(self, plan: Plan) -> Plan:
        """Return the plan as a continuation of the folder's. Raises BadSettings if it is another experiment."""
        there = self._told["experiment"]
        plan = plan.going_on(there["llms"], self._told["order"])
        asked = plan.identity()
        known = self._prompts_there()
        found = []
        if known is not None:
            here = {prompt.id: prompt.question for prompt in plan.prompts}
            found += [f"prompt {id_!r} has changed" for id_ in known if here.get(id_, known[id_]) != known[id_]]
            found += [f"prompt {id_!r} is missing now" for id_ in known if id_ not in here]
        same_prompts = {"prompts": asked["prompts"]} if known is not None else {}
        found += identity_differences(there | same_prompts, asked)
        if found:
            what = f"holds another experiment: {'; '.join(found[:MAX_DIFFERENCES])}"
            more = f" (and {len(found) - MAX_DIFFERENCES} more)" if len(found) > MAX_DIFFERENCES else ""
            rule = f"Only {', '.join(GROWS)} may grow; for other changes use another folder"
            raise BadSettings(str(self.folder), f"{what}{more}. {rule}")
        self.grown = tuple(growth(there, asked))
        return plan

    def _prompts_there(self) -> dict[str, str] | None:
        """Return the questions of the accepted experiment by id; None if the folder has none."""
        path = self.folder / "prompts.jsonl"
        return {each.id: each.question for each in load_prompts(path)} if path.exists() else None

    def _require_measurement(self, wanted: int | None) -> None:
        there = {self.measurement_id, *self._told.get("earlier_measurement_ids", ())}
        if wanted is not None and wanted not in there:
            problem = f"measurement_id is {self.measurement_id} in the folder and {wanted} now. Use another folder"
            raise BadSettings(str(self.folder), problem)

    def _settled(self, answers: Iterable[Mapping[str, Any]]) -> set[tuple[str, int, str]]:
        """Return the prompts that need not be asked again.

        These are the answered ones (but not if the final window was lost with an earlier measurement), and the refused
        ones of LLMs that have answered at least one prompt. An LLM that refused all may have been repaired.
        """
        counted = [line for line in answers if not line["warmup"]]
        usable = {line["llm"] for line in counted if line["error"] is None}
        current = set(self.current_leases())
        lost = {_key(line) for line in self.without_window() if line["request_id"] not in current}
        return {_key(line) for line in counted if line["llm"] in usable} - lost


def _key(line: Mapping[str, Any]) -> tuple[str, int, str]:
    return line["llm"], line["repetition"], line["prompt"]


def _prompt_line(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "question": prompt.question, "fields": prompt.fields}


def _whole_lines(file: IO[bytes]) -> list[dict[str, Any]]:
    """Return the complete lines of a file and truncate the rest. Raises BadSettings for a line that is not JSON."""
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
