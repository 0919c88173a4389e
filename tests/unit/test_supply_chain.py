"""``make audit``: what it finds, what it can't check, and that neither looks like success."""

from __future__ import annotations

import json
import tomllib
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests import supply_chain
from tests.supply_chain import FOUND, NOT_CHECKED, Findings

NOW = datetime(2026, 11, 30, tzinfo=UTC)
RULES = {"allowed": ["MIT"], "exceptions": {"odd": {"licence": "GPLv2", "reason": "a program"}}}
ODD = {"Name": "Odd", "License": "GPLv2"}
HASH = f"--hash=sha256:{'0' * 64}"
LOCK = f"""# made
some-package==1.5 ; python_version < '3.13' \\
    {HASH} \\
    {HASH}
some-package==1.9 ; python_version >= '3.13' \\
    {HASH}
other[extra]==2.0+cpu \\
    {HASH}
"""


def advisory(*events: dict[str, str], **more: Any) -> dict[str, Any]:
    """An advisory for some-package in the format of OSV."""
    package = {"ecosystem": "PyPI", "name": "Some_Package"}
    affected = {"package": package, "ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}
    return {"id": "TEST-1", "modified": "2026-11-20T00:00:00Z", "affected": [affected], **more}


@pytest.mark.parametrize(
    ("packages", "wrong"),
    [
        ([ODD, {"Name": "a", "License": "MIT\n\nCopyright"}], []),
        ([ODD, {"Name": "a", "License": "GPLv3"}], ["a has the licence 'GPLv3', which"]),
        ([ODD, {"Name": "a", "License": ""}], ["a has the licence 'UNKNOWN', which"]),
        ([{"Name": "Odd", "License": "AGPL"}], ["odd has the licence 'AGPL', no longer 'GPLv2'"]),
        ([], ["odd is not installed"]),
    ],
)
def test_licences(packages: list[dict[str, str]], wrong: list[str]) -> None:
    """A licence that is not listed is found, and so is an exception that no longer fits."""
    lines = list(supply_chain.wrong_licences(packages, RULES))
    assert len(lines) == len(wrong)
    assert all(line.startswith(begin) for line, begin in zip(lines, wrong, strict=True))


def test_each_exception_has_a_reason() -> None:
    """In the real list, an exception is for a licence that is not allowed anyway, and says why."""
    rules = tomllib.loads((supply_chain.LOCKS / "licences.toml").read_text())
    for exception in rules["exceptions"].values():
        assert exception.keys() == {"licence", "reason"}
        assert exception["licence"] not in rules["allowed"]
        assert exception["reason"]


def test_pins_of_a_lock() -> None:
    """Names are canonical; markers, extras and local versions are left out."""
    assert supply_chain.pins(LOCK) == {("some-package", "1.5"), ("some-package", "1.9"), ("other", "2.0")}


@pytest.mark.parametrize("line", ["a>=1 --hash=sha256:0", "a==1", "a @ https://example.com/a.whl"])
def test_a_requirement_that_is_not_pinned_is_an_error(line: str) -> None:
    """A lock that the audit can't read is not passed over."""
    with pytest.raises(ValueError, match="not one version with a hash"):
        supply_chain.pins(line)


@pytest.mark.parametrize(
    ("events", "is_affected"),
    [
        ([{"introduced": "0"}], True),
        ([{"introduced": "0"}, {"fixed": "1.5"}], False),
        ([{"introduced": "0"}, {"fixed": "1.10"}], True),
        ([{"introduced": "0"}, {"last_affected": "1.5"}], True),
        ([{"introduced": "0"}, {"last_affected": "1.4"}], False),
        ([{"introduced": "1.6"}], False),
        ([{"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.4"}, {"fixed": "1.6"}], True),
        ([{"introduced": "0"}, {"fixed": "after the summer"}], False),
    ],
)
def test_ranges_of_advisories(events: list[dict[str, str]], is_affected: bool) -> None:
    """Versions are compared as versions: 1.10 is newer than 1.5."""
    assert supply_chain.affected(advisory(*events), "some-package", "1.5") is is_affected


def test_other_ways_to_be_affected_or_not() -> None:
    """Listed versions count; withdrawn advisories, and those for other names and ecosystems, don't."""
    listed = advisory()
    listed["affected"][0]["versions"] = ["1.5"]
    assert supply_chain.affected(listed, "some-package", "1.5")
    assert not supply_chain.affected(listed, "some-package", "1.6")
    assert not supply_chain.affected(listed, "other", "1.5")
    assert not supply_chain.affected(listed | {"withdrawn": "2026-11-21T00:00:00Z"}, "some-package", "1.5")
    listed["affected"][0]["package"]["ecosystem"] = "npm"
    assert not supply_chain.affected(listed, "some-package", "1.5")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Findings]:
    """A function that searches a zip with these advisories for a lock's packages."""

    def search(*advisories: dict[str, Any]) -> Findings:
        lock, path, findings = tmp_path / "lock.txt", tmp_path / "all.zip", Findings()
        lock.write_text(LOCK)
        with zipfile.ZipFile(path, "w") as made:
            for number, each in enumerate(advisories):
                made.writestr(f"{number}.json", json.dumps(each))
        supply_chain.search_saved(supply_chain.read_saved(path), [lock], NOW, findings)
        return findings

    return search


def test_saved_advisories(saved: Callable[..., Findings]) -> None:
    """What they name is found; if they are old, finding nothing is no success."""
    assert saved(advisory({"introduced": "0"})).wrong == [f"lock.txt: some-package {v}: TEST-1" for v in ("1.5", "1.9")]
    assert saved(advisory({"introduced": "2"})).status == 0
    old = saved(advisory({"introduced": "2"}, modified="2026-10-30T00:00:00Z"))
    assert (old.wrong, old.status) == ([], NOT_CHECKED)


@pytest.mark.parametrize("content", [None, b"", b"no zip"])
def test_unreadable_advisories(content: bytes | None, tmp_path: Path) -> None:
    """A missing, broken or empty file of advisories is a check that was not made."""
    path, findings = tmp_path / "all.zip", Findings()
    if content == b"":
        zipfile.ZipFile(path, "w").close()
    elif content is not None:
        path.write_bytes(content)
    supply_chain.audit_vulnerabilities(path, findings)
    assert findings.status == NOT_CHECKED


@pytest.mark.parametrize(
    "broken", [{"id": "X"}, {"id": "X", "modified": "in May"}, {"id": "X", "modified": "2026-11-20"}, [], "X"]
)
def test_advisories_in_another_format(broken: object, tmp_path: Path) -> None:
    """An advisory without its date, or that is no object, is a check that was not made."""
    path, findings = tmp_path / "all.zip", Findings()
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("1.json", json.dumps(advisory({"introduced": "0"})))
        made.writestr("2.json", json.dumps(broken))
    supply_chain.audit_vulnerabilities(path, findings)
    assert (findings.wrong, findings.status) == ([], NOT_CHECKED)


def test_a_lock_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """The other locks are searched."""
    (tmp_path / "bad.txt").write_text("a>=1\n")
    (tmp_path / "good.txt").write_text(LOCK)
    findings = Findings()
    locks = [tmp_path / "bad.txt", tmp_path / "good.txt"]
    supply_chain.search_saved([advisory({"introduced": "0"})], locks, NOW, findings)
    assert len(findings.wrong) == 2
    assert findings.unchecked == ["vulnerabilities: bad.txt: not one version with a hash: a>=1"]


@pytest.mark.parametrize(
    ("stdout", "stderr", "status"),
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', "", 0),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X", "fix_versions": ["2"]}]}]}', "", FOUND),
        ('{"dependencies": [{"name": "a", "skip_reason": "unknown"}]}', "", NOT_CHECKED),
        ("", "…\nConnectionError: no such host", NOT_CHECKED),
    ],
)
def test_answers_of_pip_audit(stdout: str, stderr: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit status is 1 for findings and for failures, so its output decides. A skipped package was not checked."""
    monkeypatch.setattr(supply_chain, "tool", lambda *_: CompletedProcess([], 1, stdout, stderr))
    findings = Findings()
    supply_chain.ask_osv(Path("cpu.txt"), findings)
    assert findings.status == status
    assert "no such host" in "".join(findings.unchecked) or not stderr


def test_a_tool_that_is_missing_or_slow_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each check is named as not made, without a traceback."""
    monkeypatch.setattr(supply_chain, "BUILD", tmp_path / "build")
    monkeypatch.setattr(supply_chain, "TOOLS", tmp_path)
    assert supply_chain.main([]) == NOT_CHECKED
    slow = tmp_path / "pip-audit"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(supply_chain, "TOOL_LIMIT_S", 0.05)
    findings = Findings()
    assert not supply_chain.ask_osv(Path("cpu.txt"), findings)
    assert findings.unchecked == ["vulnerabilities: cpu.txt and the rest: no answer: pip-audit took longer than 0.05 s"]


def test_a_tool_that_fails_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If no tool runs, each check is named as not made."""
    monkeypatch.setattr(supply_chain, "tool", lambda *_: CompletedProcess([], 2, "", "broken"))
    monkeypatch.setattr(supply_chain, "BUILD", tmp_path)
    assert supply_chain.main([]) == NOT_CHECKED
