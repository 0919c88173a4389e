"""Which code of a checkpoint may run: that of its own folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.models.remote_code import foreign_code, foreign_model
from deployments.models.small_files import CONFIG_BYTES, FileTooLarge


def write(folder: Path, name: str, content: object) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def test_code_of_the_own_folder_may_run(tmp_path: Path) -> None:
    """Modules in the folder and below it, in both forms of auto_map; files without code say nothing."""
    write(tmp_path, "config.json", {"auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "a/b.C"}})
    write(tmp_path, "tokenizer_config.json", {"auto_map": ["tokenization_own.OwnTokenizer", None]})
    write(tmp_path, "preprocessor_config.json", {"auto_map": {"AutoProcessor": "image-own.Own"}})
    write(tmp_path, "generation_config.json", {"temperature": 1})
    write(tmp_path, "tokenizer.json", "not read")
    assert foreign_code(str(tmp_path)) is None


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
        *("video_preprocessor_config.json", "config.4.0.0.json", "params.json", "sub/config.json"),
    ],
)
def test_code_of_another_repository_is_found_in_every_configuration(tmp_path: Path, name: str) -> None:
    """The code would be downloaded and run, at the newest commit of the other repository."""
    write(tmp_path, "config.json", {})
    write(tmp_path, name, {"auto_map": {"AutoModel": "other/repo--modeling.Own"}})
    problem = foreign_code(str(tmp_path))
    assert problem is not None
    assert f"auto_map in {Path(name).name} names 'other/repo--modeling.Own'" in problem


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoTokenizer": ["own.Slow", "other/repo--own.Fast"]}},
        {"auto_map": {"AutoImageProcessor": {"torchvision": "other/repo--own.Fast"}}},
        {"text_config": {"auto_map": {"AutoConfig": "other/repo--own.Config"}}},
        {"parts": [{"auto_map": {"AutoConfig": "other/repo--own.Config"}}]},
        {"auto_map": {"AutoConfig": "/srv/elsewhere/own.Config"}},
        {"auto_map": {"AutoConfig": "../own.Config"}},
        {"auto_map": {"AutoConfig": "own--own.Config"}},
        {"auto_map": {"AutoConfig": 7}},
        '{"auto\\u005fmap": {"AutoConfig": "other/repo--own.Config"}}',
        "{",
        "[" * 100_000,
    ],
)
def test_code_from_elsewhere_is_found_in_every_form(tmp_path: Path, config: object) -> None:
    """Lists, objects, parts of a configuration, paths that lead out, names with escapes. Nonsense is refused, too."""
    write(tmp_path, "config.json", config)
    assert foreign_code(str(tmp_path)) is not None


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"speculators_config": {"verifier": {"name_or_path": "other/repo"}}}, "speculators_config in config.json"),
        ('{"speculators\\u005fconfig": {"verifier": {"name_or_path": "/etc"}}}', "speculators_config in config.json"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files in config.json"),
        ("{", "config.json is not JSON"),
        ("[" * 100_000, "config.json is not JSON"),
    ],
)
def test_a_configuration_that_names_another_model_is_found(tmp_path: Path, config: object, problem: str) -> None:
    """The engine would load that model, or a configuration that was not checked, in its place."""
    write(tmp_path, "config.json", config)
    assert (foreign_model(str(tmp_path)) or "").startswith(problem)


def test_a_configuration_that_names_no_other_model(tmp_path: Path) -> None:
    """Also none at all: models in Mistral's format have no config.json. A huge one is not read."""
    assert foreign_model(str(tmp_path)) is None
    write(tmp_path, "config.json", {"model_type": "llama", "text_config": {"speculators_config": {}}})
    assert foreign_model(str(tmp_path)) is None
    (tmp_path / "config.json").write_bytes(b" " * (CONFIG_BYTES + 1))
    with pytest.raises(FileTooLarge):
        foreign_model(str(tmp_path))


def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    """A file above the limit is an error that says its size."""
    (tmp_path / "config.json").write_bytes(b" " * (CONFIG_BYTES + 1))
    with pytest.raises(FileTooLarge, match=r"its config.json has 8,388,609 bytes, and at most 8,388,608 are read"):
        foreign_code(str(tmp_path))
