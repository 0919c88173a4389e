import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from greenprompt_client.demo.tiny_llm import main, make_tiny_llm


def files_of(llm: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in llm.iterdir()}


def test_same_seed_same_files(tmp_path: Path) -> None:
    """Two LLMs of one seed are equal byte for byte."""
    assert files_of(make_tiny_llm(tmp_path / "a", seed=7)) == files_of(make_tiny_llm(tmp_path / "b", seed=7))


def test_other_seed_other_llm(tmp_path: Path) -> None:
    """Another seed gives other weights and another tokenizer."""
    a, b = files_of(make_tiny_llm(tmp_path / "a", seed=1)), files_of(make_tiny_llm(tmp_path / "b", seed=2))
    assert a["model.safetensors"] != b["model.safetensors"]
    assert a["tokenizer.json"] != b["tokenizer.json"]


def test_made_once(tmp_path: Path) -> None:
    """A tiny LLM that is there already is left alone."""
    llm = make_tiny_llm(tmp_path / "a", seed=3)
    before = {entry: entry.stat().st_mtime_ns for entry in llm.iterdir()}
    make_tiny_llm(llm, seed=3)
    assert {entry: entry.stat().st_mtime_ns for entry in llm.iterdir()} == before


@pytest.mark.parametrize("missing", ["tiny_llm.json", "model.safetensors"])
def test_half_written_is_made_anew(tmp_path: Path, missing: str) -> None:
    """What an interrupted run left behind is replaced by a whole LLM."""
    llm = make_tiny_llm(tmp_path / "a", seed=3)
    whole = files_of(llm)
    (llm / "tiny_llm.json").unlink()
    (llm / missing).unlink(missing_ok=True)
    assert files_of(make_tiny_llm(llm, seed=3)) == whole


def test_nothing_but_the_llm_is_left(tmp_path: Path) -> None:
    """Making LLMs leaves no scratch directory beside them."""
    make_tiny_llm(tmp_path / "a", seed=1)
    make_tiny_llm(tmp_path / "a", seed=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_foreign_directory_is_refused(tmp_path: Path) -> None:
    """A directory that holds anything else is not touched."""
    precious = tmp_path / "a" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("five years of work")
    with pytest.raises(FileExistsError, match="not a tiny LLM"):
        make_tiny_llm(tmp_path / "a")
    assert precious.read_text() == "five years of work"


def test_any_text_survives_the_tokenizer(tmp_path: Path) -> None:
    """Every UTF-8 text comes back unchanged, and every token is in the vocabulary."""
    tokenizer = Tokenizer.from_file(str(make_tiny_llm(tmp_path / "a") / "tokenizer.json"))
    text = "naïve façade — 温暖化 🌍\n\t<b>1 kWh</b>"
    tokens = tokenizer.encode(text).ids
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < json.loads((tmp_path / "a" / "config.json").read_text())["vocab_size"]


def test_special_tokens_are_those_of_the_config(tmp_path: Path) -> None:
    """The tokenizer and the config name the same pad, begin and end tokens."""
    llm = make_tiny_llm(tmp_path / "a")
    config, tokenizer = json.loads((llm / "config.json").read_text()), Tokenizer.from_file(str(llm / "tokenizer.json"))
    names = json.loads((llm / "tokenizer_config.json").read_text())
    for kind in ("pad", "bos", "eos"):
        assert tokenizer.token_to_id(names[f"{kind}_token"]) == config[f"{kind}_token_id"]


def test_weights_are_as_small_as_promised(tmp_path: Path) -> None:
    """A tiny LLM has about 0.15 million parameters."""
    weights = load_file(make_tiny_llm(tmp_path / "a") / "model.safetensors")
    assert 140_000 < sum(tensor.size for tensor in weights.values()) < 160_000


def test_command_line_order_does_not_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command gives every name its own LLM, in whatever order the names come."""
    assert main([str(tmp_path / "1" / "a"), str(tmp_path / "1" / "b")]) == 0
    assert main([str(tmp_path / "2" / "b"), str(tmp_path / "2" / "a")]) == 0
    assert files_of(tmp_path / "1" / "a") == files_of(tmp_path / "2" / "a") != files_of(tmp_path / "1" / "b")
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_command_line_without_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a directory the command says how it is used, and fails."""
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
