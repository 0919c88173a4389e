"""YAML and JSON that can be read in one way only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from greenprompt_client.measure.experiment import argument, arguments, load_plan
from greenprompt_client.measure.prompt_files import load_prompts
from registry.errors import BadSettings
from registry.settings import load_settings
from registry.strict_yaml import STRICT_JSON, load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-05-01", "2024-05-01"),
        ("1e-1", 0.1),
        ("1.5e+3", 1500.0),
        ("-.5E2", -50.0),
        ("0", 0),
        ("0.74", 0.74),
        ("0x1f", 31),
        ("true", True),
        ("null", None),
        ('"NO"', "NO"),
        ("'010'", "010"),
        ("'1:30'", "1:30"),
        ("n", "n"),
        ("NOR", "NOR"),
        ("one", "one"),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    """Dates are texts, numbers with an exponent are numbers, and quotes make a text of anything."""
    found = load_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("NO", "write true or false, or put it in quotes"),
        ("yes", "write true or false"),
        ("off", "write true or false"),
        ("010", "leave the 0 out, or put it in quotes"),
        ("-08", "leave the 0 out"),
        ("1:30", "put it in quotes"),
        ("12:30:45.5", "put it in quotes"),
        ("8_001", "plain digits"),
        ("1_000.5", "plain digits"),
        ("0b101", "plain digits"),
        ("0o17", "plain digits"),
    ],
)
def test_ambiguous_values_are_refused(text: str, remedy: str) -> None:
    """What YAML 1.1 and 1.2 read in different ways is an error with its line and the remedy."""
    with pytest.raises(yaml.MarkedYAMLError, match=remedy) as caught:
        load_yaml(f"x: 1\na: {text}")
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == 1
    with pytest.raises(yaml.MarkedYAMLError):
        load_yaml(f"{text}: 1")


def test_a_key_that_is_there_twice_is_refused() -> None:
    """The second of two equal keys would silently win; merged keys of an anchor may be overridden."""
    with pytest.raises(yaml.MarkedYAMLError, match="port occurs twice"):
        load_yaml("http: {port: 1, host: a, port: 2}")
    with pytest.raises(ValueError, match="'a' occurs twice"):
        STRICT_JSON.decode('{"x": {"a": 1, "b": 2, "a": 3}}')
    assert load_yaml("base: &b {a: 1}\nc: {<<: *b, a: 2}")["c"] == {"a": 2}
    assert STRICT_JSON.decode('{"a": {"a": 1}, "b": {"a": 1}}') == {"a": {"a": 1}, "b": {"a": 1}}


def test_a_key_that_is_there_twice_is_found_among_many() -> None:
    """Clients send such bodies: the work grows with the number of keys, not with its square (hours for these)."""
    keys = ", ".join(f'"{n}": 0' for n in range(500_000))
    with pytest.raises(ValueError, match="'499999' occurs twice"):
        STRICT_JSON.decode(f'{{{keys}, "499999": 0}}')


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "settings": ("http: {port: 1, port: 2}", load_settings),
    "settings in JSON": ('{"http": {"port": 1, "port": 2}}', load_settings),
    "LLM of the settings": ("deploy: [{llm: {model: a, modeltyp: b, model: c}}]", load_settings),
    "experiment": ("repetitions: 1\nrepetitions: 2", load_plan),
    "experiment in JSON": ('{"llms": [], "llms": []}', load_plan),
    "LLM of an experiment": ("llms: [{model: a, args: {prompting: {top_k: 1, top_k: 2}}}]", load_plan),
    "prompts, a line each": ('{"question": "a", "question": "b"}', load_prompts),
    "prompts, an array": ('[{"question": "a", "more": {"x": 1, "x": 2}}]', load_prompts),
    "argument": ("word={a: 1, a: 2}", lambda path: argument(path.read_text())),
    "arguments": ("word=1 other=2 word=3", lambda path: arguments(path.read_text().split())),
}


@pytest.mark.parametrize("name", READERS)
def test_every_file_refuses_a_key_that_is_there_twice(name: str, tmp_path: Path) -> None:
    """Whatever people write, file or argument, at any depth: the second key is refused by name."""
    text, read = READERS[name]
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(BadSettings, match="occurs twice"):
        read(path)
