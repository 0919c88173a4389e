"""Which models may be deployed, and where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.models.sources import ModelSources
from registry.errors import InvalidField


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an allowed folder ``llms`` and, beside it, a forbidden one."""
    for folder in ("llms/tiny", "llms-of-others/tiny", "secret/keys"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def sources(base: Path) -> ModelSources:
    return ModelSources(huggingface=True, roots=(base / "llms",), base_dir=base)


def refused(sources: ModelSources, model: str) -> str:
    with pytest.raises(InvalidField) as caught:
        sources.locate(model, field="llms[0].model")
    assert caught.value.field == "llms[0].model"
    return caught.value.problem


@pytest.mark.parametrize(
    "model",
    ["gpt2", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "org/m_1.0-x", "0/0", "LLMS/tiny", "Qwen/Qwen2.5-0.5B", "x" * 300],
)
def test_hub_ids_stay_as_they_are(sources: ModelSources, model: str) -> None:
    """An id of the hub is handed to the engine as it is."""
    assert sources.locate(model) == model


@pytest.mark.parametrize(
    "model", ["llms/tiny", "./llms/tiny", "llms//tiny/", "llms/tiny/.", "llms/x/../tiny", "llms-of-others/../llms/tiny"]
)
def test_spellings_of_an_allowed_folder(base: Path, sources: ModelSources, model: str) -> None:
    """However a folder below a root is written, it is located by its one absolute path."""
    assert sources.locate(model) == str(base / "llms/tiny")


def test_absolute_and_home_paths(base: Path) -> None:
    """Absolute paths and those that begin with ~ are good below a root, there or not: the machine loads them."""
    sources = ModelSources(False, (base / "home/llms",), base)
    assert sources.locate("~/llms/x") == str(base / "home/llms/x")
    assert sources.locate(str(base / "home/llms/a/b")) == str(base / "home/llms/a/b")


@pytest.mark.parametrize(
    "model",
    [
        "",
        ".",
        "..",
        "/",
        "/etc/passwd",
        "/etc",
        "llms",
        "llms/",
        "llms/..",
        "llms/../secret/keys",
        "llms/../../x",
        "secret/keys",
        "llms-of-others/tiny",
        "./secret/keys",
        "../x",
        "~",
        "~/x",
        "~nobody-has-this-name/x",
        "a/b/c",
        "org/",
        "/org/model",
        "-x",
        "org/-x",
        "org/.x",
        "org /model",
        "org/model\n",
        "llms/tiny\n",
        "llms/ti\0ny",
        "llms/\ud800",
        "modèle",
        "org\\model",
        "https://x/y",
        "s3://bucket/x",
        "C:/x",
    ],
)
def test_everything_else_is_refused(sources: ModelSources, model: str) -> None:
    """What is neither an id nor below a root is refused by its field's name, in words that say what is allowed."""
    assert "allowed folder" in refused(sources, model)


def test_folder_beside_the_root_is_not_taken_for_an_id(sources: ModelSources, base: Path) -> None:
    """A folder of the working directory is what vLLM would load before it asks the hub: such an id is refused."""
    assert sources.locate("org/model") == "org/model"
    (base / "org/model").mkdir(parents=True)
    assert "neither" in refused(sources, "org/model")


def test_hub_can_be_shut_off(base: Path) -> None:
    """Without the hub its ids are refused, in words that say so, and local models still work."""
    sources = ModelSources(huggingface=False, roots=(base / "llms",), base_dir=base)
    assert "Hugging Face ids are not allowed" in refused(sources, "gpt2")
    assert sources.locate("llms/tiny") == str(base / "llms/tiny")


def test_without_roots_only_the_hub_is_left(base: Path) -> None:
    """Where no folder is allowed the refusal says that none is configured."""
    sources = ModelSources(huggingface=True, roots=(), base_dir=base)
    assert "none is configured" in refused(sources, "./llms/tiny")
    assert sources.locate("gpt2") == "gpt2"


def test_links_do_not_lead_out(sources: ModelSources, base: Path) -> None:
    """A link below a root that points out of it is no way out, and one that stays inside is fine."""
    (base / "llms/out").symlink_to(base / "secret")
    (base / "llms/up").symlink_to("..")
    (base / "llms/in").symlink_to("tiny")
    (base / "llms/loop").symlink_to("loop")
    for model in ("llms/out", "llms/out/keys", "llms/up/secret", "llms/up"):
        assert "neither" in refused(sources, model)
    assert sources.locate("llms/in") == str(base / "llms/in")


def test_dots_behind_a_link_mean_what_is_written(sources: ModelSources, base: Path) -> None:
    """What is located is the path that was checked: dots are resolved as written, not behind a link."""
    (base / "elsewhere/deep").mkdir(parents=True)
    (base / "llms/link").symlink_to(base / "elsewhere/deep")
    assert sources.locate("llms/link/../tiny") == str(base / "llms/tiny")


def test_root_may_be_a_link(base: Path) -> None:
    """A root that is itself a link (a mounted disk) works."""
    (base / "disk").symlink_to(base / "llms")
    sources = ModelSources(huggingface=True, roots=(base / "disk",), base_dir=base)
    assert sources.locate("disk/tiny") == str(base / "disk/tiny")


parts = st.sampled_from(
    ["..", ".", "", "~", "llms", "llms-of-others", "tiny", "secret", "keys", "out", "in", "a", "/", "\0"]
)


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Allowed and forbidden folders with links between them."""
    base = tmp_path_factory.mktemp("maze")
    for folder in ("llms/tiny", "secret/keys", "a"):
        (base / folder).mkdir(parents=True)
    (base / "llms/out").symlink_to(base / "secret")
    (base / "llms/in").symlink_to("tiny")
    (base / "llms/a").symlink_to("..")
    (base / "secret/in").symlink_to(base / "llms")
    return base


@given(words=st.lists(parts, min_size=1, max_size=6), absolute=st.booleans())
def test_nothing_outside_a_root_is_ever_located(maze: Path, words: list[str], absolute: bool) -> None:
    """Whatever is asked for: what comes back is a hub id that is no folder here, or lies below the root for real."""
    root = maze / "llms"
    sources = ModelSources(huggingface=True, roots=(root,), base_dir=maze)
    model = "/".join([str(maze), *words] if absolute else words)
    try:
        located = sources.locate(model)
    except InvalidField:
        return
    if located.startswith("/"):
        real = Path(os.path.realpath(located))
        assert real.is_relative_to(root)
        assert Path(located) != root
        assert ".." not in Path(located).parts
    else:
        assert located == model
        assert not (maze / located).exists()


@given(st.text(max_size=40))
def test_any_text_is_answered(maze: Path, model: str) -> None:
    """Whatever the text, the answer is a place or the error of an invalid field, never a crash."""
    sources = ModelSources(huggingface=True, roots=(maze / "llms",), base_dir=maze)
    try:
        located = sources.locate(model)
    except InvalidField:
        return
    assert located == model or located.startswith(f"{maze}/llms/")
