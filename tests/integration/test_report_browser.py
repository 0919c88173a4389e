"""The report's page in a real browser: Chromium without a window."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from greenprompt_client.report.html import report_html
from tests.support.browser import QUIET, installed_chromium
from tests.support.energy_windows import an_experiment

WIDTH, HEIGHT = 1100, 2400


@pytest.fixture(scope="module")
def chromium() -> str:
    return installed_chromium()


def browse(chromium: str, page: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Open a page and have it dumped or drawn; console messages are on stderr."""
    profile = page.parent / "profile"
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}")
    command = [chromium, *QUIET, *offline, f"--window-size={WIDTH},{HEIGHT}", *what, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(report_html(an_experiment()), encoding="utf-8")
    return path


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_console_errors_would_be_seen(chromium: str, page: Path) -> None:
    """The page's own policy refuses whatever would be loaded from elsewhere, and the console tells of it."""
    page.write_text(page.read_text(encoding="utf-8").replace("<h1>", '<img src="http://127.0.0.1:9/a.png"><h1>'))
    assert "127.0.0.1:9" in "".join(console(browse(chromium, page, "--dump-dom")))


def test_plots_are_there(chromium: str, page: Path) -> None:
    """All four plots are in the page as the browser has it; nothing was loaded from elsewhere, nothing went wrong."""
    done = browse(chromium, page, "--dump-dom")
    assert re.findall(r'<figure id="plot-(\w+)">', done.stdout) == ["score", "joules", "power", "uses"]
    assert done.stdout.count("<svg") == 4
    assert "org/large" in done.stdout
    assert console(done) == []


def test_plots_are_drawn(chromium: str, page: Path, tmp_path: Path) -> None:
    """What the browser draws has the colours of active, idle and load in it, and ends no blank sheet."""
    shot = tmp_path / "page.png"
    browse(chromium, page, f"--screenshot={shot}")
    with Image.open(shot) as image:
        assert image.size == (WIDTH, HEIGHT)
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    drawn = {colour: count for count, colour in colours}
    assert all(drawn.get(colour, 0) > 1000 for colour in [(0x2E, 0x7D, 0x5B), (0xD9, 0xA4, 0x41), (0x5B, 0x7D, 0xB1)])
