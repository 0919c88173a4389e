"""Words of an llmconfig that are taken, dropped or refused on purpose, and those that belong together."""

import json

import pytest

from deployments.models.args.mapping import map_deployment, map_llmconfig, map_prompting
from deployments.models.args.rules import Dropped, Mapped, Refused
from deployments.models.args.table import DEPLOYMENT, PROMPTING
from tests.support.llm_args import TAKEN_DEPLOYMENT, TAKEN_PROMPTING, llmconfig, problem, rules


def same(found, expected):
    """Equal in type as well: 1, 1.0 and True are three things in JSON."""
    return json.dumps(found) == json.dumps(expected)


@pytest.mark.parametrize(("word", "value", "to", "expected"), TAKEN_PROMPTING)
def test_prompting_taken(word, value, to, expected):
    """Each prompting word that has an equal on vLLM becomes it, in one spelling."""
    assert same(map_prompting({word: value}).values, {to: expected})


@pytest.mark.parametrize(("word", "value", "to", "expected"), TAKEN_DEPLOYMENT)
def test_deployment_taken(word, value, to, expected):
    """Each deployment word that has an equal on vLLM becomes it, in one spelling."""
    assert same(map_deployment({word: value}).values[to], expected)


@pytest.mark.parametrize(("table", "cases"), [(PROMPTING, TAKEN_PROMPTING), (DEPLOYMENT, TAKEN_DEPLOYMENT)])
def test_every_taken_word_has_a_case(table, cases):
    """No word is taken that the cases above don't try (trust_remote_code has tests of its own)."""
    assert rules(table, Mapped).keys() - {"trust_remote_code"} == {word for word, *_ in cases}


@pytest.mark.parametrize(("mapping", "cases"), [(map_prompting, TAKEN_PROMPTING), (map_deployment, TAKEN_DEPLOYMENT)])
def test_translated_words_are_noted(mapping, cases):
    """A word that becomes another one is told to the client; one of vLLM's own is not."""
    for word, value, to, expected in cases:
        notes = [note for note in mapping({word: value}).notes if f".{word} was translated to {to}" in note]
        assert bool(notes) == (word != to) or (word, expected) == ("temperature", 0.01)


# --- what is dropped or refused on purpose -----------------------------------------------------------------


@pytest.mark.parametrize(("section", "mapping"), [("prompting", map_prompting), ("deployment", map_deployment)])
def test_dropped_words_leave_a_note(section, mapping):
    """A dropped word takes any value, goes nowhere, and is named in the notes."""
    table = {"prompting": PROMPTING, "deployment": DEPLOYMENT}[section]
    for word, rule in rules(table, Dropped).items():
        mapped = mapping({word: {"any": ["thing", 1.5]}})
        assert mapped.values == {}
        assert mapped.notes == (f"args.{section}.{word} has no meaning on vLLM and was dropped: {rule.why}",)


@pytest.mark.parametrize(("section", "mapping"), [("prompting", map_prompting), ("deployment", map_deployment)])
def test_refused_words_are_refused(section, mapping):
    """A refused word is refused with its reason, and its value, which may be a secret, is not repeated."""
    table = {"prompting": PROMPTING, "deployment": DEPLOYMENT}[section]
    for word, rule in rules(table, Refused).items():
        error = problem(mapping, {word: "hf_secret"})
        assert error.field == f"args.{section}.{word}"
        assert rule.why in error.problem
        assert "hf_secret" not in str(error)


@pytest.mark.parametrize(("section", "mapping"), [("prompting", map_prompting), ("deployment", map_deployment)])
def test_values_that_ask_for_nothing(section, mapping):
    """A refused word with the value that vLLM has anyway, or null, changes nothing."""
    table = {"prompting": PROMPTING, "deployment": DEPLOYMENT}[section]
    for word, rule in table.items():
        assert mapping({word: None}) == mapping({})
        for neutral in rule.neutral if isinstance(rule, Refused) else ():
            mapped = mapping({word: neutral})
            assert mapped.values == {}
            assert mapped.notes[0].startswith(f"args.{section}.{word} was dropped")


def test_neutral_is_told_from_lookalikes():
    """num_beams true is not 1, and num_beams 2 needs what vLLM does not do."""
    for value in (True, 2, "1"):
        assert "without beam search; only 1 is allowed" in problem(map_prompting, {"num_beams": value}).problem


def test_do_sample_false_is_greedy():
    """do_sample false gives temperature 0 alone; what only shapes sampling is dropped and noted."""
    mapped = map_prompting({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1})
    assert mapped.values == {"temperature": 0.0, "seed": 1}
    for word in ("temperature", "top_p", "top_k", "min_p"):
        assert any(note.startswith(f"args.prompting.{word} was dropped") for note in mapped.notes)


def test_do_sample_true_leaves_the_rest():
    """do_sample true adds nothing of its own."""
    assert map_prompting({"do_sample": True}).values == {}
    assert map_prompting({"do_sample": True, "temperature": 0.7}).values == {"temperature": 0.7}


def test_do_sample_true_with_temperature_0_is_a_contradiction():
    """Greedy and sampling at once is refused."""
    assert "do_sample is true" in str(problem(map_prompting, {"do_sample": True, "temperature": 0}))


def test_max_length_gives_way():
    """max_length counts the prompt: refused alone, without effect beside max_new_tokens, as in transformers."""
    assert "use max_new_tokens" in str(problem(map_prompting, {"max_length": 100}))
    mapped = map_prompting({"max_length": 100, "max_new_tokens": 20})
    assert mapped.values == {"max_tokens": 20}
    assert "args.prompting.max_length was dropped: max_tokens is given and takes precedence" in mapped.notes


def test_two_words_for_one_thing():
    """Two words for one argument must agree."""
    assert map_prompting({"max_new_tokens": 5, "max_tokens": 5}).values == {"max_tokens": 5}
    assert "max_new_tokens" in str(problem(map_prompting, {"max_new_tokens": 5, "max_tokens": 6}))
    assert map_deployment({"torch_dtype": "torch.half", "dtype": "float16"}).values == {"dtype": "float16"}
    assert "torch_dtype" in str(problem(map_deployment, {"torch_dtype": "float16", "dtype": "bfloat16"}))


def test_bounds_that_cross():
    """Two bounds that exclude each other are refused under the client's own word."""
    error = problem(map_prompting, {"min_new_tokens": 9, "max_tokens": 5})
    assert str(error) == "args.prompting.min_new_tokens: is 9, which is more than max_tokens 5; lower it"
    error = problem(map_deployment, {"max_num_seqs": 9, "max_num_batched_tokens": 5})
    assert error.field == "args.deployment.max_num_seqs"
    error = problem(map_llmconfig, llmconfig({"max_new_tokens": 100}, {"max_model_len": 64}))
    assert error.field == "args.prompting.max_new_tokens"


def test_chat_words_need_a_chat_template():
    """Words of the chat endpoint are refused where the other one is used."""
    config = llmconfig({"chat_template_kwargs": {"enable_thinking": False}}, uses_chat_template=False)
    error = problem(map_llmconfig, config)
    assert error.field == "args.prompting.chat_template_kwargs"
