"""The wire: what a client may send, to the letter of the contract."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from registry.wire import schemas as api
from registry.wire.schemas import (
    MAX_ARGS_DEPTH,
    MAX_ID,
    MAX_LLMS_PER_REQUEST,
    AcceptedRequest,
    ErrorAnswer,
    LLMArgs,
    LLMConfig,
    MachineState,
    PromptingRequest,
    RequestState,
    WrapperState,
)
from registry.wire.words import Priority, RequestStatus
from tests.support.contract_example import BODY, LLM, changed

REQUIRED = [
    ("measurementId",),
    ("llms",),
    ("llms", 0, "modeltyp"),
    ("llms", 0, "model"),
    ("llms", 0, "uses_chat_template"),
    ("llms", 0, "args"),
    ("llms", 0, "args", "prompting"),
    ("llms", 0, "args", "deployment"),
]


def parsed(body: object) -> PromptingRequest:
    return PromptingRequest.model_validate_json(json.dumps(body))


def places(error: ValidationError) -> list[tuple[str | int, ...]]:
    return [problem["loc"] for problem in error.errors()]


def test_example_of_the_contract_is_accepted() -> None:
    """The contract's own example is a good request, and comes back as it was."""
    request = parsed(BODY)
    assert request.measurementId == 1234
    assert request.priority is Priority.NORMAL
    assert [llm.model_dump() for llm in request.llms] == [LLM]


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
@pytest.mark.parametrize("value", [..., None, [[]]], ids=["missing", "null", "wrong type"])
def test_required_fields_are_required(path: tuple[str | int, ...], value: object) -> None:
    """A field that is missing, null or of another type is refused, and the error says which one."""
    with pytest.raises(ValidationError) as caught:
        parsed(changed(path, value))
    assert [place[: len(path)] for place in places(caught.value)] == [path]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("measurementId",), 0),
        (("measurementId",), -1),
        (("measurementId",), MAX_ID + 1),
        (("measurementId",), "1234"),
        (("measurementId",), 1.0),
        (("measurementId",), True),
        (("llms",), []),
        (("llms",), {}),
        (("llms", 0, "model"), ""),
        (("llms", 0, "model"), "x" * 1025),
        (("llms", 0, "model"), 5),
        (("llms", 0, "modeltyp"), ""),
        (("llms", 0, "uses_chat_template"), "true"),
        (("llms", 0, "uses_chat_template"), 1),
        (("llms", 0, "args", "prompting"), []),
        (("llms", 0, "args", "deployment"), "x"),
        (("priority",), "urgent"),
        (("surprise",), 1),
        (("llms", 0, "surprise"), 1),
        (("llms", 0, "args", "surprise"), {}),
    ],
)
def test_wrong_values_are_refused(path: tuple[str | int, ...], value: object) -> None:
    """Nothing is converted or passed over: a value of another kind, or a field that we don't know, is an error."""
    with pytest.raises(ValidationError) as caught:
        parsed(changed(path, value))
    assert places(caught.value) == [path]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("measurementId",), 1),
        (("measurementId",), MAX_ID),
        (("llms", 0, "args"), {"prompting": {}, "deployment": {}}),
        (("llms",), [LLM] * MAX_LLMS_PER_REQUEST),
        (("priority",), "high"),
    ],
    ids=["smallest id", "largest id", "empty args", "most llms", "priority"],
)
def test_limits_are_inside(path: tuple[str | int, ...], value: object) -> None:
    """The limits themselves are allowed, and so are empty args."""
    parsed(changed(path, value))


@pytest.mark.parametrize("value", [math.nan, math.inf, "\ud800", {"\ud800": 1}, [[-math.inf]]], ids=repr)
def test_args_are_json_to_the_letter(value: object) -> None:
    """Args come back in every answer, so what Python's parser takes and JSON does not is refused."""
    with pytest.raises(ValidationError, match="not JSON"):
        LLMArgs.model_validate({"prompting": {"x": value}, "deployment": {}})


@pytest.mark.parametrize(("depth", "good"), [(MAX_ARGS_DEPTH - 1, True), (MAX_ARGS_DEPTH, False), (5000, False)])
def test_args_have_a_depth(depth: int, good: bool) -> None:
    """Args are nested as deep as the limit says and no deeper, so that no answer fails on them."""
    value: object = 1
    for _ in range(depth - 1):
        value = [value]
    args = {"prompting": {"x": value}, "deployment": {}}
    if good:
        assert json.loads(LLMArgs.model_validate(args).model_dump_json()) == args
    else:
        with pytest.raises(ValidationError, match="nested deeper"):
            LLMArgs.model_validate(args)


def test_too_many_llms_are_refused() -> None:
    """One POST can't fill the queue."""
    with pytest.raises(ValidationError):
        parsed(changed(("llms",), [LLM] * (MAX_LLMS_PER_REQUEST + 1)))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_only_sentences_of_the_contract_get_through(value: object) -> None:
    """Whatever JSON stands in the place of an llm, it is an llmconfig of the contract or an error, never a surprise."""
    try:
        request = parsed({"measurementId": 1, "llms": [value]})
    except ValidationError:
        return
    assert request.llms[0].model_dump() == value


def test_bodies_are_frozen() -> None:
    """Nobody changes what a client has sent."""
    with pytest.raises(ValidationError, match="frozen"):
        parsed(BODY).measurementId = 2  # type: ignore[misc]  # that is the test


def test_names_on_the_wire_are_the_contracts() -> None:
    """The contract's fields are in the answers under the contract's names."""
    assert {"requestId", "llmconfig"} <= AcceptedRequest.model_fields.keys()
    assert {"requestId", "llmconfig", "status", "measurementId", "address", "url"} <= RequestState.model_fields.keys()
    assert list(LLMConfig.model_fields) == ["modeltyp", "model", "uses_chat_template", "args"]
    assert {status.value for status in RequestStatus} >= {"queued", "deploying", "deployed"}


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(api).values()
        if isinstance(kind, type) and kind.__module__ == api.__name__ and issubclass(kind, BaseModel)
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_body_has_a_schema(kind: type[BaseModel]) -> None:
    """Each body can be described in the OpenAPI document: requests take no unknown field, answers may have any."""
    schema = kind.model_json_schema()
    assert schema["type"] == "object"
    asked = kind.__name__ in {"_Asked", "KeyRequest", "LLMArgs", "LLMConfig", "PromptingRequest"}
    assert schema["additionalProperties"] is not asked


def test_answers_survive_the_wire() -> None:
    """An answer read back by the client is the answer that was given."""
    wrapper = WrapperState(wrapper="a-0", status="idle", gpus=0, llm=None, leased=False)
    machine = MachineState(
        machine="a", address="10.0.0.1", alive=True, gpus=0, gpuType=None, memoryBytes=None, wrappers=[wrapper]
    )
    assert MachineState.model_validate_json(machine.model_dump_json()) == machine


def test_error_needs_no_field() -> None:
    """An error that is nobody's field has none; one that is names it."""
    error = ErrorAnswer(code="x", message="y", retryable=False)
    assert error.field is None
    assert error.errors is None
