"""Experiments: what a file may say, how one is told what it may not, and what makes two of them the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.experiment import Plan, differences, load_plan, load_prompts
from registry.errors import BadSettings

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A current directory of our own, with a prompts file."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"question": "Why?"}\n')


def plan(text: str = "", **overrides: Any) -> Plan:
    """The plan of a file that says this beside what it must."""
    path = Path("experiment.yaml")
    path.write_text(f"prompts: prompts.jsonl\noutput: out\n{text}")
    return load_plan(path, **overrides)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_example_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each experiment in configs/ loads from the repository's root, and the README names it."""
    monkeypatch.chdir(ROOT)
    assert load_plan(path).answers > 0
    assert str(path.relative_to(ROOT)) in (ROOT / "README.md").read_text()


def test_llms_are_completed() -> None:
    """A name is an llmconfig with the shared fields; an llmconfig's own fields go first."""
    shared = "args: {prompting: {top_k: 5}, deployment: {dtype: float16}}\n"
    llms = plan(shared + "llms: [org/a, {model: org/b, uses_chat_template: false}]").llms
    args = {"prompting": {"top_k": 5}, "deployment": {"dtype": "float16"}}
    same = {"modeltyp": "text-generation", "args": args}
    assert llms["org/a"] == {"model": "org/a", "uses_chat_template": True, **same}
    assert llms["org/b"] == {"model": "org/b", "uses_chat_template": False, **same}


def test_overrides_go_over_the_file() -> None:
    """Options are put over what the file says, and are enough without one."""
    assert list(plan("llms: [org/a]\nseed: 7", llms=["org/b"]).llms) == ["org/b"]
    alone = load_plan(None, llms=["org/a"], prompts="prompts.jsonl", output="out", repetitions=3)
    assert alone.answers == 3


def test_same_model_twice_is_numbered() -> None:
    """A model with different args is several LLMs, each with a name of its own."""
    hot = "{model: org/a, args: {prompting: {temperature: 1}, deployment: {}}}"
    assert list(plan(f"llms: [org/a, org/b, {hot}]").llms) == ["org/a#1", "org/b", "org/a#2"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("llms: []", "llms: Tuple should have at least 1 item"),
        ("llms: org/a", "llms: Input should be a valid"),
        ("llms: [org/a, org/a]", "llms: Value error, org/a is there twice"),
        ("llms: [{modl: x}]", "llms.0.model: Field required"),
        ("llms: [7]", "llms.0: Input should be a valid dictionary"),
        ("llms: [org/a]\nrepetition: 3", "repetition: Extra inputs are not permitted"),
        ("llms: [org/a]\nrepetitions: 0", "repetitions: Input should be greater than or equal to 1"),
        ("llms: [org/a]\nargs: {prompting: {}}", "args.deployment: Field required"),
        ("- 1", "is not YAML"),
        ("llms: [org/a", "is not YAML"),
    ],
)
def test_unusable_experiment_names_the_field(text: str, problem: str) -> None:
    """What can't be used is told with the file and the field."""
    with pytest.raises(BadSettings) as caught:
        plan(text)
    assert str(caught.value).startswith(f"experiment.yaml: {problem}")


def test_experiment_that_is_no_mapping() -> None:
    """A file that holds something else than fields is told so, and one that is not there."""
    Path("list.yaml").write_text("- 1\n")
    with pytest.raises(BadSettings, match=r"list\.yaml: must be a mapping of fields"):
        load_plan(Path("list.yaml"))
    with pytest.raises(BadSettings, match=r"none\.yaml: can't be read: No such file"):
        load_plan(Path("none.yaml"))
    with pytest.raises(BadSettings, match=r"the experiment: llms: Field required \(and 2 more\)"):
        load_plan(None)


# --- prompts -----------------------------------------------------------------------------------------------


def test_ids_default_to_line_numbers() -> None:
    """A prompt is called what its line says, else by the number of the line; empty lines are no prompts."""
    odd = json.dumps({"question": "one\u2028prompt"}, ensure_ascii=False)
    Path("p.jsonl").write_text(
        f'{{"question": "a"}}\n\n{{"id": "x", "question": "b"}}\n{odd}\n{{"id": 7, "question": "c"}}'
    )
    assert [prompt.id for prompt in load_prompts(Path("p.jsonl"))] == ["1", "x", "4", "7"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no prompts"),
        (b'{"question": "a"}\n{"id": 1, "question": "b"}', "line 2: id: '1' is another prompt's, too"),
        (b'{"question": "a"}\nwhat', "line 2 is not JSON"),
        (b'{"question": ""}', "line 1: question: String should have at least 1 character"),
        (b'{"query": "a"}', "line 1: question: Field required (and 1 more)"),
        (b"[1]", "line 1: Input should be a valid dictionary"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_unusable_prompts_name_the_line(content: bytes, problem: str) -> None:
    """What can't be used is told with the file, the line and the field."""
    Path("p.jsonl").write_bytes(content)
    with pytest.raises(BadSettings) as caught:
        load_prompts(Path("p.jsonl"))
    assert str(caught.value).startswith(f"p.jsonl: {problem}")


# --- the same, or not --------------------------------------------------------------------------------------


def test_where_it_runs_is_no_part_of_it() -> None:
    """Another folder, registry or time limit, or the prompts in another file, leave an experiment what it is."""
    Path("same.jsonl").write_text('\n{"id": "1", "question": "Why?"}')
    other = plan("llms: [org/a]", url="http://x", output="y", prompt_timeout_s=1, prompts="same.jsonl")
    assert other.identity() == plan("llms: [org/a]").identity()


def test_differences_are_told_by_field() -> None:
    """Each field that differs is told with both values, however deep it lies."""
    args = "args: {prompting: {top_k: 5}, deployment: {}}\nllms: [org/a, org/b]"
    there, here = plan(args).identity(), plan(args.replace("5", "6").replace(", org/b", ""), seed=2).identity()
    told = list(differences(there, here))
    assert told[0] == "llms.org/a.args.prompting.top_k is 5 there and 6 here"
    assert told[1].startswith('llms.org/b is {"modeltyp":')
    assert told[1].endswith("there and absent here")
    assert told[2:] == ["seed is 1 there and 2 here"]
    assert list(differences({"a": None}, {})) == ["a is null there and absent here"]


def test_order_depends_on_the_seed_alone() -> None:
    """The same seed gives the same orders, whatever the order in the file; repetitions have different ones."""
    names = [f"org/{name}" for name in "abcdefgh"]
    forth, back = plan(llms=names), plan(llms=names[::-1])
    assert forth.order(1) == back.order(1)
    assert forth.order(1) != forth.order(2)
    assert forth.order(1) != plan(llms=names, seed=2).order(1)
