"""The pages of docs/: those made from the code are current, those written by hand name what there is."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.flags import flags_of_the_code, flags_of_the_page
from tests.docs.pages import OTHER_ERRORS, PAGES, REFERENCE, errors, modules
from tests.docs.settings_page import parts


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    """Each generated page is as the code makes it; `.venv/bin/python -m tests.docs` writes it."""
    assert (REFERENCE / name).read_text() == PAGES[name](), "say: .venv/bin/python -m tests.docs"


def test_every_setting_is_explained() -> None:
    """Each field of the configuration says what it is for, and has a variable unless it is in a list or a mapping."""
    settings = [each for part in parts() for each in part.settings]
    assert [f"{each.section}.{each.name}" for each in settings if not each.field.description] == []
    assert [each for each in settings if (each.variable is None) != bool(re.search(r"\[\]|<", each.section))] == []


def test_every_flag_is_explained() -> None:
    """docs/reference/flags.md explains each flag that the code can set, once, and no other."""
    explained = flags_of_the_page()
    assert sorted(set(explained)) == sorted(explained)
    assert set(explained) == flags_of_the_code()


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
