"""Which files of a repository are downloaded: those that vLLM reads, and no copies in other formats."""

from __future__ import annotations

import pytest

from deployments.models.download import wanted_files

TEXTS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "merges.txt",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ([*TEXTS, *SHARDS, INDEX, "README.md", "LICENSE", ".gitattributes", "cover.png"], [*TEXTS, *SHARDS, INDEX]),
        (["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"], None),
        (["config.json", "pytorch_model.bin", "training_args.bin"], ["config.json", "pytorch_model.bin"]),
        (["config.json", "model.pt", "optimizer.pt"], ["config.json", "model.pt"]),
        (["config.json", "model.safetensors", "model.gguf", "onnx/model.onnx", "onnx/config.json"], None),
        (["config.json", "model.safetensors", "original/params.json", "original/consolidated.00.pth"], None),
        (["params.json", "consolidated.safetensors", *SHARDS, INDEX],
         ["params.json", "consolidated.safetensors", INDEX]),
        (["modules.json", "model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors",
          "2_Dense/pytorch_model.bin"],
         ["modules.json", "model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors"]),
        (["config.json", "model.gguf"], ["config.json"]),
    ],
    ids=["usual", "copies", "bin only", "pt only", "gguf and onnx", "original", "mistral", "parts", "gguf"],
)  # fmt: skip
def test_what_vllm_reads_is_wanted(files: list[str], wanted: list[str] | None) -> None:
    """Weights in one format, configuration and tokenizer; None: config.json and model.safetensors."""
    expected = sorted(wanted or ["config.json", "model.safetensors"])
    assert wanted_files(dict.fromkeys(files, 1)) == expected


def test_the_load_format_decides() -> None:
    """Who asks for safetensors gets those of transformers, though the repository has Mistral's own as well."""
    files = dict.fromkeys(["config.json", "model.safetensors", "consolidated.safetensors"], 1)
    assert "model.safetensors" in wanted_files(files, load_format="safetensors")
    assert "model.safetensors" not in wanted_files(files, load_format="mistral")


def test_without_weights() -> None:
    """For a tokenizer alone no weights come; nor do texts that are none, by their size."""
    sizes = {"tokenizer.json": 10**7, "model.safetensors": 10**9, "eval.json": 10**9}
    assert wanted_files(sizes, weights=False) == ["tokenizer.json"]
