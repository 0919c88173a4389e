"""Code that an LLM brings: only at a commit that the operator names."""

import json

import pytest

from deployments.models.args.mapping import map_llmconfig
from registry.errors import InvalidField
from tests.support.llm_args import fingerprint, llmconfig

COMMIT = "0123456789abcdef" * 2 + "01234567"

OTHER_COMMIT = "f" * 40


def own_code(located=None, allowed=(f"org/llm@{COMMIT}",), **deployment):
    """Map an llmconfig whose LLM brings its own code."""
    config = llmconfig(deployment={"trust_remote_code": True, **deployment})
    return map_llmconfig(config, located=located, allow_remote_code=allowed)


def test_own_code_runs_at_the_commit_that_the_operator_names():
    """trust_remote_code passes with exactly the commit of an entry, also if that is named for the tokenizer again."""
    for deployment in ({"revision": COMMIT}, {"revision": COMMIT, "tokenizer_revision": COMMIT}):
        spec = own_code(**deployment).spec
        assert json.loads(spec.engine_args)["trust_remote_code"] is True
        assert spec.revision == COMMIT
    both = (f"org/llm@{OTHER_COMMIT}", f"org/llm@{COMMIT}")
    assert own_code(allowed=both, revision=OTHER_COMMIT).spec.revision == OTHER_COMMIT
    assert fingerprint(trust_remote_code=False) == fingerprint()


@pytest.mark.parametrize(
    "deployment",
    [
        {"revision": "refs/pr/7"},
        {"revision": OTHER_COMMIT},
        {"revision": COMMIT[:12]},
        {"revision": COMMIT.upper()},
        {"revision": "main"},
        {"revision": None},
        {},
        {"revision": COMMIT, "tokenizer_revision": OTHER_COMMIT},
        {"revision": COMMIT, "tokenizer_revision": "main"},
    ],
)
def test_own_code_of_another_commit_is_refused(deployment):
    """No branch, no pull request, no other commit, and none left to the hub; for the tokenizer as for the LLM."""
    with pytest.raises(InvalidField):
        own_code(**deployment)


@pytest.mark.parametrize(
    "allowed",
    [(), (f"org/other@{COMMIT}",), (f"org@{COMMIT}",), (f"Org/LLM@{COMMIT}",), ("org/llm",), ("/org/llm",)],
)
def test_own_code_of_other_models_is_refused(allowed):
    """An entry holds for one model alone."""
    with pytest.raises(InvalidField, match="runs code that comes with the LLM, which is not allowed for this one"):
        own_code(allowed=allowed, revision=COMMIT)


def test_a_refused_commit_is_told_what_is_allowed():
    """The error names the commit to give."""
    with pytest.raises(InvalidField, match=f"allowed only at the commit {COMMIT}; give it as args.deployment.revision"):
        own_code()


def test_own_code_of_a_folder():
    """A folder's code runs if the operator names the folder; an entry for a hub model of the same name is none."""
    assert own_code("/llms/a", ("/llms/a",)).spec.model == "org/llm"
    for allowed in (("/llms/b",), ("/llms",), (f"org/llm@{COMMIT}",), (f"/llms/a@{COMMIT}",)):
        with pytest.raises(InvalidField, match="not allowed for this one"):
            own_code("/llms/a", allowed, revision=COMMIT)


@pytest.mark.parametrize(
    "word",
    [
        *("tokenizer", "hf_config_path", "model_weights", "code_revision", "hf_overrides", "config", "gguf_file"),
        *("model_class_overrides", "worker_cls", "worker_extension_cls", "scheduler_cls", "logits_processors"),
        *("io_processor_plugin", "reasoning_parser_plugin", "additional_config", "model_loader_extra_config"),
        *("speculative_config", "spec_model", "default_mm_loras", "enable_lora", "adapter_name", "adapter_kwargs"),
        *("pipeline_class", "custom_generate", "use_kernels", "allow_all_kernels", "model_kwargs", "subfolder"),
        *("feature_extractor", "image_processor", "video_processor", "processor", "quantization_config"),
        *("allowed_local_media_path", "allowed_media_domains", "chat_template"),
    ],
)
def test_no_word_names_other_code_or_another_repository(word):
    """Everything in args.deployment that names code, a file or a second repository is refused, also with own code."""
    with pytest.raises(InvalidField):
        own_code(revision=COMMIT, **{word: "other/repo"})
