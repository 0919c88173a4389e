"""The pages of docs/: those made from the code are current, those written by hand name what there is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from registry.wire.flags import Flag
from tests.docs.flags import flags_as_texts, flags_used
from tests.docs.modules import ROOT, modules
from tests.docs.pages import DOCS, OTHER_ERRORS, PAGES, errors
from tests.docs.settings_page import parts
from tests.docs.site import on_config

README_LINES = 150
"""A stranger reads no more."""

DESIGN_LINES = 250
"""A map is looked at as a whole."""

PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DESIGN = ROOT / "registry" / "DESIGN.md"


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    """Each generated page is as the code makes it; `.venv/bin/python -m tests.docs` writes it."""
    assert (DOCS / name).read_text() == PAGES[name](), "say: .venv/bin/python -m tests.docs"


def test_every_setting_is_explained() -> None:
    """Each field of the configuration says what it is for, and has a variable unless it is in a list or a mapping."""
    settings = [each for part in parts() for each in part.settings]
    assert [f"{each.section}.{each.name}" for each in settings if not each.field.description] == []
    assert [each for each in settings if (each.variable is None) != bool(re.search(r"\[\]|<", each.section))] == []


def test_flags_are_set_by_the_enum_only() -> None:
    """No code sets a flag by a text, which could be missing on the page of flags; and each flag is used."""
    assert flags_as_texts() == []
    assert {flag.name for flag in Flag} - flags_used() == set()


def test_every_error_code_is_explained() -> None:
    """Each code that is answered without an error of the tree is on the page of errors."""
    known = {error.code for error in errors()} | OTHER_ERRORS.keys()
    literal = {
        text.value
        for _, tree in modules()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("error_answer", "openai_error")
        for text in ast.walk(call.args[1])
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    }
    assert literal - known == set()


def test_readme_is_short() -> None:
    """The README has few enough lines to be read to its end."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_design_is_a_map() -> None:
    """registry/DESIGN.md is short: decisions, explanations and figures have pages of their own."""
    assert len(DESIGN.read_text().splitlines()) <= DESIGN_LINES


def test_links_lead_somewhere() -> None:
    """Each relative link of the README, the design and docs/ leads to a file, and to a heading that is there."""
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in [*PROSE, DESIGN]
        for link in links(page)
        if not leads_somewhere(page, *link.partition("#")[::2])
    ]
    assert broken == []


def test_index_names_every_page() -> None:
    """docs/index.md links to each page but itself, and to the decisions by their list."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    pages = {page for page in PROSE if page.is_relative_to(index.parent) and not page.name[:4].isdigit()}
    assert pages - linked - {index} == set()


def test_site_has_every_page() -> None:
    """The site's navigation has each page of docs/; the decisions are added to it when it is built."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config = SimpleNamespace(docs_dir=str(ROOT / "docs"), nav=site["nav"])
    assert site["hooks"] == ["tests/docs/site.py"]
    named = re.findall(r"[\w/-]+\.md", str(on_config(config).nav))
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in PROSE[1:])


def links(page: Path) -> Iterator[str]:
    """The relative links of a page, outside of code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return (link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link)


def leads_somewhere(page: Path, path: str, heading: str) -> bool:
    """Whether a link of a page has its end."""
    end = (page.parent / path).resolve() if path else page
    return end.exists() and (not heading or heading in {slug(each) for each in headings(end)})


def headings(page: Path) -> list[str]:
    """The headings of a page."""
    return re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)


def slug(heading: str) -> str:
    """How a heading is called in a link."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading.strip().lower())).replace(" ", "-")
