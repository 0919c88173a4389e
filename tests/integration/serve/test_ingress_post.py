"""POST of requests: the contract's body, and what is wrong with others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.models.args.mapping import map_llmconfig
from deployments.models.checkpoints import checkpoints_here
from deployments.models.sources import ModelSources
from deployments.serve.http_app import IngressConfig, build_app
from registry.service.service import Idempotency
from registry.wire.schemas import PromptingAnswer
from registry.wire.words import Priority
from tests.support.checkpoint_files import LLAMA, write_checkpoint
from tests.support.contract_example import BODY, LLM, changed
from tests.support.fake_registry import FakeRegistry
from tests.support.ingress_calls import COMMIT, REQUEST


async def test_request_is_accepted(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """The contract's example is answered 201, with the client's own llmconfig, an id and a link."""
    answer = await http.post(REQUEST, json=BODY)
    assert answer.status_code == 201
    (accepted,) = answer.json()["requests"]
    assert accepted["llmconfig"] == LLM
    assert accepted["link"].endswith(f"{REQUEST}/{accepted['requestId']}")
    assert (accepted["status"], accepted["address"]) == ("queued", None)
    assert [note for note in accepted["notes"] if "device_map" in note]
    assert PromptingAnswer.model_validate(answer.json()).requests[0].requestId


async def test_llms_keep_their_order(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """One request comes back per LLM, in the order asked, each with an id of its own that was made here."""
    models = [f"org/m{n}" for n in range(5)]
    body = {**BODY, "llms": [{**LLM, "model": model} for model in models]}
    accepted = (await http.post(REQUEST, json=body)).json()["requests"]
    assert [request["llmconfig"]["model"] for request in accepted] == models
    ((method, (measurement_id, llms, *more), _),) = registry.calls
    assert (method, measurement_id, more) == ("request", 1234, ["default", None, None, None, "standard", None])
    assert [request["requestId"] for request in accepted] == [new.request_id for new in llms]
    assert len({request["requestId"] for request in accepted}) == 5


async def test_llmconfig_is_mapped(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """The registry gets what has to run in the engine's words, and the client's own words unchanged."""
    await http.post(REQUEST, json=BODY)
    ((_, (_, (new,), *_), _),) = registry.calls
    assert new.spec == map_llmconfig(LLM).spec
    assert json.loads(new.llmconfig) == LLM
    assert any("torch_dtype" in note for note in new.notes)


async def test_what_is_known_of_memory_is_passed_on(registry: FakeRegistry, tmp_path: Path) -> None:
    """The registry gets the memory of each LLM, as its checkpoint tells it where it lies; None where it does not."""
    write_checkpoint(tmp_path / "known", LLAMA, {"w": ("BF16", (1000,))})
    config = IngressConfig(ModelSources(True, (tmp_path,), tmp_path), ())
    app = build_app(config, registry.call, checkpoints_here())
    body = {**BODY, "llms": [{**LLM, "model": "org/never-loaded-here"}, {**LLM, "model": "known"}]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as http:
        assert (await http.post(REQUEST, json=body)).status_code == 201
    unknown, known = registry.calls[0][1][1]
    assert unknown.memory is None
    assert known.memory is not None
    assert known.memory.weights_bytes == 2000
    assert known.spec == map_llmconfig({**LLM, "model": "known"}).spec


@pytest.mark.parametrize("priority", list(Priority))
async def test_priority_is_passed_on(http: httpx.AsyncClient, registry: FakeRegistry, priority: Priority) -> None:
    """A measurement's priority reaches the registry."""
    await http.post(REQUEST, json={**BODY, "priority": priority.value})
    assert registry.calls[0][1][3] is priority


async def test_budgets_are_passed_on(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """What each lease may use reaches the registry with each of the requests; without it there is no limit."""
    await http.post(REQUEST, json={**BODY, "llms": [LLM, LLM], "maxJoules": 5, "maxGco2eq": 0.25})
    await http.post(REQUEST, json=BODY)
    limits = [[(new.max_j, new.max_g) for new in args[1]] for _, args, _ in registry.calls]
    assert limits == [[(5.0, 0.25)] * 2, [(None, None)]]


@pytest.mark.parametrize("field", ["maxJoules", "maxGco2eq"])
@pytest.mark.parametrize("value", [0, -1, "5", True, 1e16])
async def test_bad_budgets_are_named(http: httpx.AsyncClient, field: str, value: object) -> None:
    """A budget is a number above 0."""
    answer = await http.post(REQUEST, json={**BODY, field: value})
    assert (answer.status_code, answer.json()["field"].partition(".")[0]) == (422, field)


async def test_grade_and_like_are_passed_on(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """They are the registry's to judge, and come back with each request's status."""
    answer = await http.post(REQUEST, json={**BODY, "grade": "measurement", "like": "r1"})
    assert registry.calls[0][1][-2:] == ("measurement", "r1")
    state = (await http.get(f"{REQUEST}/{answer.json()['requests'][0]['requestId']}")).json()
    assert (state["grade"], state["like"], state["provenance"]) == ("measurement", "r1", None)


async def test_gpu_type_is_passed_on(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """The GPU type that a measurement asks for reaches the registry."""
    await http.post(REQUEST, json={**BODY, "gpuType": "NVIDIA H100 80GB HBM3"})
    assert registry.calls[0][1][4] == "NVIDIA H100 80GB HBM3"


async def test_idempotency_key_comes_with_the_hash_of_the_json(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """An Idempotency-Key reaches the registry with the SHA-256 of the JSON in its canonical spelling.

    Spaces, escapes and the order of fields make no difference; another value does.
    """
    canonical = json.dumps(BODY, sort_keys=True, separators=(",", ":"))
    headers = {"Idempotency-Key": "key-1", "Content-Type": "application/json"}
    reordered = json.dumps(dict(reversed(BODY.items())), indent=3).replace("/", "\\/")
    other = json.dumps({**BODY, "measurementId": 1235})
    for content in (canonical, reordered, other):
        assert (await http.post(REQUEST, content=content, headers=headers)).status_code == 201
    first, second, third = (args[5] for _, args, _ in registry.calls)
    assert first == second == Idempotency("key-1", hashlib.sha256(canonical.encode()).hexdigest())
    assert third != first


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_idempotency_key_has_a_length(http: httpx.AsyncClient, registry: FakeRegistry, key: str) -> None:
    """A key that is empty or too long is a 422 that names the header."""
    answer = await http.post(REQUEST, json=BODY, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["field"]) == (422, "idempotency-key")
    assert registry.calls == []


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("measurementId",), ..., "measurementId"),
        (("measurementId",), 0, "measurementId"),
        (("measurementId",), 2**63, "measurementId"),
        (("measurementId",), "1", "measurementId"),
        (("llms",), ..., "llms"),
        (("llms",), [], "llms"),
        (("llms", 0), [], "llms[0]"),
        (("llms", 0, "modeltyp"), ..., "llms[0].modeltyp"),
        (("llms", 0, "modeltyp"), "text-to-song", "llms[0].modeltyp"),
        (("llms", 0, "model"), ..., "llms[0].model"),
        (("llms", 0, "model"), "", "llms[0].model"),
        (("llms", 0, "model"), "/etc/passwd", "llms[0].model"),
        (("llms", 0, "model"), "~nobody-has-this-name/x", "llms[0].model"),
        (("llms", 0, "model"), "/llms/a\0b", "llms[0].model"),
        (("llms", 0, "uses_chat_template"), ..., "llms[0].uses_chat_template"),
        (("llms", 0, "args"), ..., "llms[0].args"),
        (("llms", 0, "args", "prompting"), ..., "llms[0].args.prompting"),
        (("llms", 0, "args", "deployment"), None, "llms[0].args.deployment"),
        (("llms", 0, "args", "prompting", "surprise"), 1, "llms[0].args.prompting.surprise"),
        (("llms", 0, "args", "prompting", "temperature"), "hot", "llms[0].args.prompting.temperature"),
        (("llms", 0, "args", "deployment", "trust_remote_code"), True, "llms[0].args.deployment.trust_remote_code"),
        (("priority",), "urgent", "priority"),
        (("gpuType",), "", "gpuType"),
        (("grade",), "gold", "grade"),
        (("grade",), None, "grade"),
        (("like",), "", "like"),
        (("like",), 7, "like"),
        (("gpuType",), "*", "gpuType"),
        (("gpuType",), "H100\n", "gpuType"),
        (("surprise",), 1, "surprise"),
    ],
)
async def test_wrong_fields_are_named(
    http: httpx.AsyncClient, registry: FakeRegistry, path: tuple[str | int, ...], value: object, field: str
) -> None:
    """A field that is missing or invalid is a 422 that names it by its place in the body; nothing is accepted."""
    answer = await http.post(REQUEST, json=changed(path, value))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field")
    assert answer.json()["field"] == field
    assert field in answer.json()["message"]
    assert registry.calls == []


async def test_every_wrong_field_is_listed(http: httpx.AsyncClient) -> None:
    """Several wrong fields are all told at once."""
    answer = await http.post(REQUEST, json={"measurementId": 0, "llms": [{"model": "x"}]})
    fields = [problem["field"] for problem in answer.json()["errors"]]
    assert fields == ["measurementId", "llms[0].modeltyp", "llms[0].uses_chat_template", "llms[0].args"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"measurementId": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
        b'{"measurementId": NaN}',
    ],
    ids=["empty", "cut off", "null", "list", "text", "no text", "huge number", "deep", "NaN"],
)
async def test_bodies_that_are_no_request(http: httpx.AsyncClient, registry: FakeRegistry, content: bytes) -> None:
    """Whatever the bytes, the answer is a 422 in our form; nothing reaches the registry."""
    answer = await http.post(REQUEST, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field")
    assert answer.json()["field"]
    assert registry.calls == []


@pytest.mark.parametrize(
    "value",
    [
        b"NaN",
        b"[-Infinity]",
        b"1e999",
        b'"\\ud800"',
        b'{"\\ud800": 1}',
        b"[" * 400 + b"]" * 400,
        b'{"a":' * 400 + b"1" + b"}" * 400,
    ],
    ids=["NaN", "infinity", "overflow", "half a character", "half a character as key", "deep list", "deep object"],
)
async def test_args_that_json_can_not_carry(http: httpx.AsyncClient, registry: FakeRegistry, value: bytes) -> None:
    """An llmconfig comes back in every answer: what no answer could carry is a 422, even in an arg that is dropped."""
    content = json.dumps(changed(("llms", 0, "args", "deployment"), {"device_map": "@"})).encode()
    content = content.replace(b'"@"', value)
    answer = await http.post(REQUEST, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field")
    assert registry.calls == []


async def test_half_a_character_in_a_name(http: httpx.AsyncClient) -> None:
    """A field whose name no UTF-8 can write is refused, and the refusal is JSON."""
    content = json.dumps(BODY)[:-1].encode() + b', "\\ud800": 1}'
    answer = await http.post(REQUEST, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["field"]) == (422, "body")


async def test_args_may_be_nested(http: httpx.AsyncClient) -> None:
    """What is nested as deep as any argument needs is taken."""
    deep: Any = 1
    for _ in range(30):
        deep = [deep]
    body = changed(("llms", 0, "args", "deployment"), {"device_map": deep})
    answer = await http.post(REQUEST, json=body)
    assert answer.json()["requests"][0]["llmconfig"]["args"]["deployment"] == {"device_map": deep}


async def test_remote_code_where_it_is_allowed(http: httpx.AsyncClient) -> None:
    """A model may bring its code at the commit that the operator names, and at no other revision."""
    for revision, status in ((COMMIT, 201), ("refs/pr/7", 422), ("main", 422), ("d" * 40, 422)):
        body = changed(("llms", 0, "args", "deployment"), {"trust_remote_code": True, "revision": revision})
        body["llms"][0]["model"] = "org/codes"
        assert (await http.post(REQUEST, json=body)).status_code == status
