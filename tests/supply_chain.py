"""``make audit``: licences, known vulnerabilities and a CycloneDX list of all packages that the locks install.

The exit status is 1 if something was found, 3 if nothing was found but a check could not be made, else 0.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
BUILD = ROOT / "build" / "audit"
TOOLS = ROOT / ".venv-audit" / "bin"
PYTHON = ROOT / ".venv" / "bin" / "python"
FOUND, NOT_CHECKED = 1, 3
TOOL_LIMIT_S = 900.0
"""Time limit of one run of a tool, seconds. pip-audit sends one query for each package of a lock."""

OLDEST = timedelta(days=30)
"""A saved database whose newest advisory is older than this proves nothing about today."""


@dataclass
class Findings:
    """What is wrong, and what could not be checked; one line each."""

    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        return FOUND if self.wrong else NOT_CHECKED if self.unchecked else 0


def tool(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of ``.venv-audit``. One that can't be started, or takes too long, has failed like any other."""
    command = [TOOLS / name, *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TOOL_LIMIT_S, cwd=ROOT)
    except subprocess.TimeoutExpired:
        problem = f"{name} took longer than {TOOL_LIMIT_S:g} s"
    except OSError as error:
        problem = str(error)
    return subprocess.CompletedProcess(command, NOT_CHECKED, "", problem)


def pins(text: str) -> set[tuple[str, str]]:
    """Return name and version of the requirements in a lock, without local versions: advisories name none.

    A name can have several versions, for different Pythons.

    Raises:
        ValueError: A requirement has no single version, or no hash.
    """
    entries = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).split("\n")
    found: set[tuple[str, str]] = set()
    for entry in filter(None, entries):
        pinned = re.fullmatch(r"([\w.-]+)(?:\[[\w,.-]+\])?==([^ +;]+)(?:\+[\w.]+)?( .*)? *--hash=sha256:.*", entry)
        if pinned is None:
            raise ValueError(f"not one version with a hash: {entry[:80]}")
        found.add((canonicalize_name(pinned[1]), pinned[2]))
    return found


# --- licences ------------------------------------------------------------------------------------------------


def wrong_licences(packages: Iterable[dict[str, str]], rules: dict[str, Any]) -> Iterator[str]:
    """Compare the output of pip-licenses with locks/licences.toml; yield a line for each difference."""
    exceptions = dict(rules["exceptions"])
    for package in packages:
        name = canonicalize_name(package["Name"])
        # Some packages have the whole text here.
        licence = (package["License"].strip().splitlines() or ["UNKNOWN"])[0]
        exception = exceptions.pop(name, None)
        if exception is not None and exception["licence"] != licence:
            yield f"{name} has the licence {licence!r}, no longer {exception['licence']!r}: read it, change the list"
        elif exception is None and licence not in rules["allowed"]:
            yield f"{name} has the licence {licence!r}, which locks/licences.toml does not allow: read it, or remove it"
    for name in exceptions:
        yield f"{name} is not installed: remove its exception from locks/licences.toml"


def audit_licences(findings: Findings) -> None:
    """Check the licences of everything in ``.venv``."""
    done = tool("pip-licenses", "--python", PYTHON, "--from=mixed", "--format=json")
    if done.returncode:
        findings.unchecked.append(f"licences: pip-licenses failed: {_last_line(done.stderr)}")
        return
    packages = json.loads(done.stdout)
    rules = tomllib.loads((LOCKS / "licences.toml").read_text())
    findings.wrong += wrong_licences(packages, rules)
    print(f"licences: {len(packages)} packages in .venv, {len(rules['exceptions'])} exceptions")


# --- known vulnerabilities -----------------------------------------------------------------------------------


def ask_osv(lock: Path, findings: Findings) -> bool:
    """Ask the OSV database about a lock, with pip-audit. Return whether it answered."""
    options = ("--require-hashes", "--disable-pip", "-s", "osv", "-f", "json", "--progress-spinner", "off")
    done = tool("pip-audit", "-r", lock, *options)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        # It ends with 1 both if it finds something and if it can't ask; only an answer is JSON.
        findings.unchecked.append(f"vulnerabilities: {lock.name} and the rest: no answer: {_last_line(done.stderr)}")
        return False
    for package in packages:
        if "skip_reason" in package:
            findings.unchecked.append(f"vulnerabilities: {package['name']}: {package['skip_reason']}")
        for vulnerability in package.get("vulns", ()):
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
            findings.wrong.append(
                f"{lock.name}: {package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}"
            )
    print(f"vulnerabilities: {lock.name}: {len(packages)} packages")
    return True


def affected(advisory: dict[str, Any], name: str, version: str) -> bool:
    """Whether an advisory in the format of OSV (https://ossf.github.io/osv-schema/) is about this version."""
    if "withdrawn" in advisory:
        return False
    for each in advisory.get("affected", ()):
        package = each.get("package", {})
        if package.get("ecosystem") != "PyPI" or canonicalize_name(package["name"]) != name:
            continue
        ranges = [r["events"] for r in each.get("ranges", ()) if r["type"] == "ECOSYSTEM"]
        if version in each.get("versions", ()) or any(_in_range(events, Version(version)) for events in ranges):
            return True
    return False


def _in_range(events: list[dict[str, str]], version: Version) -> bool:
    """Whether a version lies in a range, whose events are ordered as the format's description evaluates them."""

    def at(event: dict[str, str]) -> Version:
        text = next(iter(event.values()))
        try:
            return Version(text)
        except InvalidVersion:
            return Version("0")  # such a bound ends nothing, so the advisory is shown

    inside = False
    for event in sorted(events, key=at):
        if "introduced" in event:
            inside = inside or version >= at(event)
        elif ("fixed" in event and version >= at(event)) or ("last_affected" in event and version > at(event)):
            inside = False
    return inside


def read_saved(path: Path) -> list[dict[str, Any]]:
    """Return the advisories of OSV's file for PyPI, ``all.zip``.

    Raises:
        ValueError: It is no such file, or has no advisory.
        OSError: It can't be read.
    """
    try:
        with zipfile.ZipFile(path) as saved:
            advisories = [json.loads(saved.read(name)) for name in saved.namelist() if name.endswith(".json")]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: {error}") from error
    if not advisories:
        raise ValueError(f"{path}: there is no advisory in it")
    return advisories


def search_saved(advisories: list[dict[str, Any]], locks: Iterable[Path], now: datetime, findings: Findings) -> None:
    """Look for all packages of the locks in saved advisories. Old ones can find something, but prove nothing."""
    newest = max(datetime.fromisoformat(advisory["modified"]) for advisory in advisories)
    print(f"vulnerabilities: {len(advisories)} saved advisories, the newest of {newest:%Y-%m-%d}")
    if now - newest > OLDEST:
        findings.unchecked.append(f"vulnerabilities: the newest saved advisory is of {newest:%Y-%m-%d}: get a new one")
    about: dict[str, list[dict[str, Any]]] = {}
    for advisory in advisories:
        for each in {canonicalize_name(a["package"]["name"]) for a in advisory.get("affected", ()) if "package" in a}:
            about.setdefault(each, []).append(advisory)
    for lock in locks:
        try:
            packages = sorted(pins(lock.read_text()))
        except ValueError as error:
            findings.unchecked.append(f"vulnerabilities: {lock.name}: {error}")
            continue
        for name, version in packages:
            findings.wrong += [
                f"{lock.name}: {name} {version}: {advisory['id']}"
                for advisory in about.get(name, ())
                if affected(advisory, name, version)
            ]


def audit_vulnerabilities(saved: Path | None, findings: Findings) -> None:
    """Compare all locks with the saved advisories or, without a file, with the database on the network."""
    locks = sorted(LOCKS.glob("*.txt"))
    if saved is None:
        for lock in locks:
            if lock.name != "torch-cpu.txt" and not ask_osv(lock, findings):  # its release is in gpu.txt
                return  # the others would wait for the same failure
        return
    try:
        search_saved(read_saved(saved), locks, datetime.now(UTC), findings)
    except (ValueError, OSError) as error:
        findings.unchecked.append(f"vulnerabilities: {error}")
    except (KeyError, TypeError, AttributeError) as error:  # an advisory without a field, or with another type in it
        findings.unchecked.append(f"vulnerabilities: {saved}: an advisory is not in OSV's format: {error!r}")


# --- CycloneDX -----------------------------------------------------------------------------------------------


def write_cyclonedx(findings: Findings) -> None:
    """Write what is installed, with licences; and what the GPU lock names, which is not installed here, with hashes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    made: dict[str, tuple[str | Path, ...]] = {
        "sbom.json": ("environment", PYTHON, "--pyproject", ROOT / "pyproject.toml"),
        "sbom-gpu.json": ("requirements", LOCKS / "gpu.txt"),
    }
    for name, args in made.items():
        done = tool("cyclonedx-py", *args, "--of", "JSON", "-o", BUILD / name)
        if done.returncode:
            findings.unchecked.append(f"CycloneDX: {name} was not written: {_last_line(done.stderr)}")
        else:
            print(f"made: build/audit/{name}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


def main(argv: list[str] | None = None) -> int:
    """Run all checks, print what they found, and return the exit status."""
    parser = argparse.ArgumentParser(prog="make audit")
    parser.add_argument("--advisories", type=Path, help="OSV's file for PyPI, all.zip, where there is no network")
    saved = parser.parse_args(argv).advisories
    findings = Findings()
    write_cyclonedx(findings)
    audit_licences(findings)
    audit_vulnerabilities(saved, findings)
    for line in findings.wrong:
        print(f"WRONG: {line}")
    for line in findings.unchecked:
        print(f"NOT CHECKED: {line}")
    return findings.status


if __name__ == "__main__":
    sys.exit(main())
