"""Experiments: what a file may say, how one is told what it may not, and what makes two of them the same."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from greenprompt_client.cli.main import measure
from greenprompt_client.client import RegistryClient
from greenprompt_client.measure.experiment import Experiment, Plan, argument, growth, identity_differences, load_plan
from greenprompt_client.measure.run import OF_REQUEST
from registry.errors import BadSettings
from registry.wire.schemas import PromptingRequest

ROOT = Path(__file__).resolve().parents[4]
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
    assert list(plan(f"llms: [org/a, org/b, {hot}]").llms) == ["org/a", "org/b", "org/a#2"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("llms: []", "llms: Tuple should have at least 1 item"),
        ("llms: org/a", "llms: Input should be a valid"),
        ("llms: [org/a, org/a]", "llms: Value error, org/a occurs twice"),
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


def test_all_missing_fields_are_named() -> None:
    """With the options that give them."""
    with pytest.raises(BadSettings, match=r"the experiment: llms, prompts, output are missing: add") as failed:
        load_plan(None)
    assert "--llm MODEL --prompts FILE --output FOLDER, or name an experiment file" in str(failed.value)
    Path("some.yaml").write_text("llms: [org/a]\nprompts: questions.jsonl")
    with pytest.raises(BadSettings, match=r"some\.yaml: output is missing: add to the command --output FOLDER"):
        load_plan(Path("some.yaml"))


# --- the same, or not --------------------------------------------------------------------------------------


def test_where_it_runs_is_no_part_of_it() -> None:
    """Another folder, registry or time limit, or the prompts in another file, leave an experiment what it is."""
    Path("same.jsonl").write_text('\n{"id": "1", "question": "Why?"}')
    other = plan("llms: [org/a]", url="http://x", output="y", prompt_timeout_s=1, prompts="same.jsonl")
    assert other.identity() == plan("llms: [org/a]").identity()


def test_what_may_grow_is_no_difference() -> None:
    """More repetitions and LLMs are none; fewer are."""
    small, large = plan("llms: [org/a]").identity(), plan("llms: [org/a, org/b]\nrepetitions: 2").identity()
    assert list(identity_differences(small, large)) == []
    assert list(growth(small, large)) == ["llms: 1 → 2", "repetitions: 1 → 2"]
    assert "repetitions is 2 in the folder and 1 now" in list(identity_differences(large, small))


def test_differences_are_told_by_field() -> None:
    """Each field that differs is told with both values, however deep it lies."""
    args = "args: {prompting: {top_k: 5}, deployment: {}}\nllms: [org/a, org/b]"
    there, here = plan(args).identity(), plan(args.replace("5", "6").replace(", org/b", ""), seed=2).identity()
    told = list(identity_differences(there, here))
    assert told[0] == "llms.org/a.args.prompting.top_k is 5 in the folder and 6 now"
    assert told[1].startswith('llms.org/b is {"modeltyp":')
    assert told[1].endswith("in the folder and absent now")
    assert told[2:] == ["seed is 1 in the folder and 2 now"]
    assert list(identity_differences({"a": None}, {})) == ["a is null in the folder and absent now"]


def test_order_depends_on_the_seed_alone() -> None:
    """The same seed gives the same orders, whatever the order in the file; repetitions have different ones."""
    names = [f"org/{name}" for name in "abcdefgh"]
    forth, back = plan(llms=names), plan(llms=names[::-1])
    assert forth.order(1) == back.order(1)
    assert forth.order(1) != forth.order(2)
    assert forth.order(1) != plan(llms=names, seed=2).order(1)


# --- every field, and nothing else -------------------------------------------------------------------------


def test_every_field_of_a_request_can_be_said_everywhere() -> None:
    """Each field of PromptingRequest is one of an experiment, an argument of the client, and an option.

    ``gpuType`` of the wire is ``gpu_type`` there, and ``--gpu-type`` on the command line.
    """
    names = {re.sub(r"([A-Z])", r"_\1", name).lower() for name in PromptingRequest.model_fields}
    assert names <= Experiment.model_fields.keys()
    assert names <= inspect.signature(RegistryClient.request).parameters.keys()
    assert {*OF_REQUEST, "llms", "measurement_id"} == names
    assert names <= inspect.signature(measure).parameters.keys()


def test_every_field_of_an_experiment_has_an_option() -> None:
    """Options alone are enough: each field has one, and those of ``args`` are --arg and --deployment-arg."""
    options = inspect.signature(measure).parameters.keys() - {"experiment", "ca_file"}
    assert options == Experiment.model_fields.keys() - {"args"} | {"arg", "deployment_arg"}


def test_args_go_over_those_of_each_llm() -> None:
    """--arg and --deployment-arg change single words, of LLMs with args of their own, too."""
    own = "llms: [org/a, {model: org/b, args: {prompting: {top_k: 1, seed: 3}, deployment: {}}}]"
    text = f"args: {{prompting: {{top_k: 5}}, deployment: {{}}}}\n{own}"
    llms = plan(text, prompting_args={"top_k": 9}, deployment_args={"dtype": "float16"}).llms
    assert llms["org/a"]["args"] == {"prompting": {"top_k": 9}, "deployment": {"dtype": "float16"}}
    assert llms["org/b"]["args"] == {"prompting": {"top_k": 9, "seed": 3}, "deployment": {"dtype": "float16"}}
    alone = load_plan(None, llms=["org/a"], prompts="prompts.jsonl", output="o", prompting_args={"top_k": 1})
    assert alone.llms["org/a"]["args"] == {"prompting": {"top_k": 1}, "deployment": {}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max_new_tokens=64", 64),
        ("do_sample=true", True),
        ("temperature=0.5", 0.5),
        ("stop=['a', b]", ["a", "b"]),
        ("torch_dtype=torch.bfloat16", "torch.bfloat16"),
        ("x=a=b", "a=b"),
        ("x=", None),
    ],
)
def test_argument_is_read_as_yaml(text: str, value: Any) -> None:
    """What stands after the first = is a value as in an experiment's file."""
    assert argument(text) == (text.partition("=")[0], value)


@pytest.mark.parametrize("text", ["max_new_tokens", "=1", "x=[1", "x=NO"])
def test_unusable_argument_is_told(text: str) -> None:
    """No value, no word, no YAML, or YAML that can be read in two ways."""
    with pytest.raises(BadSettings):
        argument(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: -1", "seed: Input should be greater than or equal to 0"),
        ("repetitions: true", "repetitions: Input should be a valid integer"),
        ("prompt_timeout_s: 1.0e+300", "prompt_timeout_s: Input should be less than or equal to"),
        ("prompt_timeout_s: .nan", "prompt_timeout_s: Input should be greater than 0"),
        ("url: 'http://[x'", "url: Value error, http://[x: is not a base URL"),
        ("url: localhost:8000", "url: Value error, localhost:8000: is not a base URL"),
        ("priority: soon", "priority: Input should be 'low', 'normal' or 'high'"),
        ("tenant: a b", "tenant: String should match pattern"),
        ("grade: best", "grade: Input should be 'standard' or 'measurement'"),
        ("max_joules: 0", "max_joules"),
        ('like: "\\ud800"', "like"),
        ("modeltyp: feature-extraction", "llms.0: Value error, feature-extraction writes no text"),
        ("args: {prompting: {a: !!timestamp 2024-01-01}, deployment: {}}", "args.prompting: Value error, contains NaN"),
        ("7: 1", "7 is not the name of a field"),
        ("seed: !!int x", "is not YAML"),
    ],
)
def test_every_field_is_checked_when_it_is_loaded(text: str, problem: str) -> None:
    """A value that would fail later, when all prompts are answered, is refused at once, by name."""
    with pytest.raises(BadSettings) as caught:
        plan(f"llms: [org/a]\n{text}")
    assert str(caught.value).startswith(f"experiment.yaml: {problem}")


@pytest.mark.parametrize("name", ["output", "prompts"])
@pytest.mark.parametrize("path", ["", " ", "a\0b"])
def test_unusable_path_is_told(name: str, path: str) -> None:
    """An empty path is not the current directory."""
    with pytest.raises(BadSettings, match=f"{name}: Value error, give a path that is not empty"):
        plan("llms: [org/a]", **{name: path})


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 0, 1, 2**63, float("nan"), float("inf"), 1e308])
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["prompts.jsonl", "org/a", "http://x", "http://[", "a\0", "\ud800", "measurement", "high"])
    | st.binary()
    | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(sorted(Experiment.model_fields)), VALUES, max_size=6),
    st.dictionaries(st.text(), VALUES, max_size=2),
)
def test_any_experiment_is_loaded_or_told(fields: dict[str, Any], args: dict[str, Any]) -> None:
    """Whatever the fields hold: a plan that can be run, posted and written, or one error of ours; no other."""
    usable = {"llms": ["org/a"], "prompts": "prompts.jsonl", "output": "out"}
    try:
        found = load_plan(None, prompting_args=args, **usable | fields)
    except BadSettings:
        return
    assert found.order(1)
    yaml.safe_dump({"experiment": found.identity(), "order": found.order(1)})
    json.dumps(list(found.llms.values()), allow_nan=False, ensure_ascii=False).encode()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.text("[]{}:,-!&*|>'\"#\n a1.~?%@`"))
def test_any_file_is_loaded_or_told(text: str) -> None:
    """Whatever is in an experiment's file: one error of ours at worst."""
    Path("any.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(BadSettings):
        load_plan(Path("any.yaml"))
