"""Chromium without a window, for tests of what a page can do and of how a page looks."""

from __future__ import annotations

import os
import shutil

import pytest

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--enable-logging=stderr",
)
"""Options of every Chromium here: it calls nobody but the pages of a test, and writes console messages to stderr."""


def installed_chromium() -> str:
    """Return Debian's Chromium, or another that is on the path. Skips the test without one; in CI, fails."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium is installed")
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    return found
