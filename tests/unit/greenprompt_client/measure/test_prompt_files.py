"""Data sets of prompts: what is read as it is, and the line that is named where something can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenprompt_client.measure.prompt_files import Prompt, load_prompts
from registry.errors import BadSettings


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A current directory of our own."""
    monkeypatch.chdir(tmp_path)


def read(content: bytes, question_field: str = "question") -> tuple[Prompt, ...]:
    path = Path("p.jsonl")
    path.write_bytes(content)
    return load_prompts(path, question_field)


def test_ids_default_to_line_numbers() -> None:
    """A prompt is called what its line says, else by the number of the line; empty lines are no prompts."""
    odd = json.dumps({"question": "one\u2028prompt"}, ensure_ascii=False)
    found = read(f'{{"question": "a"}}\n\n{{"id": "x", "question": "b"}}\n{odd}\n{{"id": 7, "question": "c"}}'.encode())
    assert [prompt.id for prompt in found] == ["1", "x", "4", "7"]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"question": "a", "n": 1}\r\n\r\n{"question": "b", "id": "2"}\r\n',
        b'[{"question": "a", "n": 1}, {"question": "b"}]',
        b'\xef\xbb\xbf \r\n[\r\n  {"question": "a", "n": 1},\r\n  "b"\r\n]\r\n',
    ],
)
def test_data_sets_are_read_as_they_are(content: bytes) -> None:
    """A BOM, CRLF, a JSON array and plain texts are no obstacle; other fields are carried along."""
    first, second = read(content)
    assert (first.id, first.question, first.fields) == ("1", "a", {"n": 1})
    assert (second.question, second.fields) == ("b", {})


def test_question_may_have_another_name() -> None:
    """The field of the question is the caller's choice; one called ``question`` is then carried along."""
    (prompt,) = read(b'{"instruction": "a", "question": "no"}', "instruction")
    assert (prompt.question, prompt.fields) == ("a", {"question": "no"})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "contains no prompts"),
        (b"[]", "contains no prompts"),
        (b'{"question": "a"}\n{"id": 1, "question": "b"}', "line 2: id: '1' is also the id of another prompt"),
        (b'{"question": "a"}\r\nwhat', "line 2: is not JSON: Expecting value"),
        (b'{"question": "a"}\n{"question": "b"} {}', "line 2: has more than one JSON value"),
        (b'{"question": "a", "question": "b"}', "line 1: is not JSON: the key 'question' occurs twice"),
        (b'{"question": "a", "x": NaN}', "line 1: is not JSON: NaN is not a number in JSON"),
        (b'{"question": ""}', "line 1: question: give a text that is not empty"),
        (b'{"question": 7}', "line 1: question: give a text that is not empty"),
        (b'{"question": "\\ud800"}', "line 1: question: contains a lone surrogate"),
        (b'{"query": "a", "n": 1}', "line 1: question: is missing; the prompt's fields are 'query', 'n'"),
        (b'{"question": "a", "id": true}', "line 1: id: give a text that is not empty, or a whole number"),
        (b'{"question": "a", "id": "' + b"x" * 2000 + b'"}', "line 1: id: is longer than 1024 characters"),
        (b"\n7", "line 2: is no prompt"),
        (b"[1]", "line 1: is no prompt"),
        (b'[\n{"question": "a"},\n{"question":\n"b" "c"}]', "line 4: is not JSON"),
        (b'[\n"a",\n\n7\n]', "line 4: is no prompt"),
        (b'["a"\n"b"]', "line 2: is not JSON: a comma or ] is missing here"),
        (b'["a",\n]', "line 2: is not JSON: Expecting value"),
        (b'["a"', "line 1: is not JSON: a comma or ] is missing here"),
        (b'["a"]\n["b"]', "line 2: is not JSON: there is more after the end of the array"),
        (b"[" * 100_000, "line 1: is nested too deeply"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_unusable_prompts_name_the_line(content: bytes, problem: str) -> None:
    """What can't be used is told with the file, the line and the field."""
    with pytest.raises(BadSettings) as caught:
        read(content)
    assert str(caught.value).startswith(f"p.jsonl: {problem}")


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_read_or_told(content: bytes) -> None:
    """Whatever is in a file: prompts that can be sent, or one error of ours."""
    try:
        prompts = read(content)
    except BadSettings:
        return
    assert prompts
    assert all(prompt.question.encode() and prompt.id for prompt in prompts)
    json.dumps([prompt.fields for prompt in prompts], allow_nan=False)


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=5), st.sampled_from([None, 0, 2])
)
def test_array_and_lines_are_the_same(questions: list[str], indent: int | None) -> None:
    """The same prompts as JSONL and as an array, however that is laid out, are equal."""
    entries = [{"question": question, "n": number} for number, question in enumerate(questions)]
    lines = read("\n".join(map(json.dumps, entries)).encode())
    assert read(json.dumps(entries, indent=indent).encode()) == lines
