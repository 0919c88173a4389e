"""The HTTP ingress: the contract's routes around a registry that is a stand-in."""

from __future__ import annotations

import asyncio
import copy
import csv
import hashlib
import io
import json
import math
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
import stamina
from pydantic import TypeAdapter
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from deployments.models.args.mapping import map_llmconfig
from deployments.models.checkpoints import checkpoints_here
from deployments.models.sources import ModelSources
from deployments.serve import actor_calls, energy_pages
from deployments.serve.actor_calls import ActorCalls
from deployments.serve.http_app import IngressConfig, build_app
from registry.accounting.report import MeasurementReport
from registry.accounting.window_report import WindowReport
from registry.errors import (
    IdempotencyConflict,
    InternalError,
    LLMNeverFits,
    QueueFull,
    RegistryError,
    RegistryUnavailable,
    ShuttingDown,
    StoreUnavailable,
    UnknownRequest,
)
from registry.service.service import Idempotency
from registry.wire.schemas import MAX_ID, MAX_WAIT_S, PromptingAnswer, RequestState
from registry.wire.words import Priority, RequestStatus
from tests.support.checkpoint_files import LLAMA, write_checkpoint
from tests.support.energy_windows import an_experiment
from tests.support.fake_registry import FakeRegistry

COMMIT = "c" * 40
CONFIG = IngressConfig(ModelSources(True, (Path("/llms"),), Path("/")), allow_remote_code=(f"org/codes@{COMMIT}",))
LLM: dict[str, Any] = {
    "modeltyp": "text-generation",
    "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "uses_chat_template": True,
    "args": {
        "prompting": {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95},
        "deployment": {"torch_dtype": "torch.bfloat16", "device_map": "auto"},
    },
}
BODY: dict[str, Any] = {"measurementId": 1234, "llms": [LLM]}
REQUEST = "/promptingservice/request"


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
async def http(registry: FakeRegistry) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_app(CONFIG, registry.call))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """The contract's example with another value at one place; Ellipsis takes the place out."""
    body = copy.deepcopy(BODY)
    at: Any = body
    for step in path[:-1]:
        at = at[step]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return body


# --- POST --------------------------------------------------------------------------------------------------


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


async def test_report_is_json_or_csv(http: httpx.AsyncClient) -> None:
    """The report of a measurement is JSON unless CSV is asked for, by a parameter or by Accept; the parameter wins."""
    await http.post(REQUEST, json=BODY)
    path = "/measurements/1234/report"
    answer = await http.get(path)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["measurementId"] == 1234
    assert "windows" not in answer.json()
    for query, accept in (("", "text/csv"), ("?format=csv", "*/*"), ("?format=csv", "application/json")):
        answer = await http.get(path + query, headers={"accept": accept})
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        assert answer.text.startswith("window,kind,requestId,llm,")
    answer = await http.get(f"{path}?format=json", headers={"accept": "text/csv"})
    assert answer.headers["content-type"] == "application/json"
    assert (await http.get("/measurements/99/report?format=csv")).status_code == 404
    assert (await http.get(f"{path}?format=xml")).json()["field"] == "format"


@pytest.mark.parametrize("size", [1, 2, 3, 37, 38, 1000])
async def test_the_registry_reads_a_few_windows_at_a_time(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, registry: FakeRegistry, size: int
) -> None:
    """However few are read at once, report, CSV and pages are those of all windows; no call wants more than that."""
    await http.post(REQUEST, json=BODY)
    monkeypatch.setattr(energy_pages, "PAGE", size)
    path, whole = "/measurements/1234", an_experiment(1234)
    report = TypeAdapter(MeasurementReport).validate_python((await http.get(f"{path}/report")).json())
    assert report == replace(whole, windows=())
    in_order = sorted(whole.windows, key=lambda each: (each.begunAt, each.window))
    rows = list(csv.DictReader(io.StringIO((await http.get(f"{path}/report?format=csv")).text)))
    assert [row["window"] for row in rows] == [each.window for each in in_order]
    pages = [(await http.get(f"{path}/windows", params={"limit": 20, "detail": True})).json()]
    while pages[-1]["next"] is not None:
        about = {"limit": 20, "detail": True, "after": pages[-1]["next"]}
        pages.append((await http.get(f"{path}/windows", params=about)).json())
    told = [WindowReport(**each | {"flags": tuple(each["flags"])}) for page in pages for each in page["windows"]]
    assert told == in_order
    assert all(args[-1] <= size for method, args, _ in registry.calls if method in {"windows", "measured"})


async def test_windows_come_in_pages(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """What page of which request is passed on; a limit out of range or a place that no page named is refused."""
    await http.post(REQUEST, json=BODY)
    path = "/measurements/1234/windows"
    page = (await http.get(path)).json()
    assert page["next"] is None
    assert page["windows"][0]["kind"] == "load"
    await http.get(path, params={"request": "r1", "after": "1800000000.5_process 1-p3", "limit": 7})
    passed_on = [args for method, args, _ in registry.calls if method == "windows"]
    key = ("default", 1234)
    assert passed_on == [(key, None, None, 250), (key, "r1", (1800000000.5, "process 1-p3"), 7)]
    for params, field in (({"limit": 1001}, "limit"), ({"limit": 0}, "limit"), ({"after": "x"}, "after")):
        answer = await http.get(path, params=params)
        assert (answer.status_code, answer.json()["field"]) == (422, field)
    for place in ("nan_x", "1e400_x", "1_\0", "_", "-1_x"):
        assert (await http.get(path, params={"after": place})).status_code == 422
    assert (await http.get("/measurements/99/windows")).status_code == 404


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


# --- GET, DELETE, keepalive --------------------------------------------------------------------------------


async def posted(http: httpx.AsyncClient, headers: dict[str, str] | None = None) -> str:
    request_id: str = (await http.post(REQUEST, json=BODY, headers=headers)).json()["requests"][0]["requestId"]
    return request_id


async def test_status_is_the_contracts(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """The link answers with the contract's fields, address null until it is deployed."""
    request_id = await posted(http)
    answer = await http.get(f"{REQUEST}/{request_id}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    state = RequestState.model_validate(answer.json())
    assert (state.requestId, state.status, state.measurementId, state.address) == (request_id, "queued", 1234, None)
    assert registry.calls[-1] == ("state", (request_id,), 0.0)


async def test_status_can_wait(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """With ``wait`` the answer comes when the status changes, and at once when it is another than ``seen``."""
    request_id = await posted(http)
    get = http.get(f"{REQUEST}/{request_id}", params={"wait": 60})
    waiting = asyncio.create_task(get)
    for _ in range(50):  # until it waits
        await asyncio.sleep(0)
    registry.change(request_id, status="deploying")
    assert (await waiting).json()["status"] == "deploying"
    answer = await http.get(f"{REQUEST}/{request_id}", params={"wait": 60, "seen": "deployed"})
    assert answer.json()["status"] == "deploying"


@pytest.mark.parametrize("wait", ["-1", str(MAX_WAIT_S + 1), "nan", "inf", "long", ""])
async def test_wait_has_limits(http: httpx.AsyncClient, registry: FakeRegistry, wait: str) -> None:
    """A wait that is no number of seconds in its limits is a 422 that names it."""
    answer = await http.get(f"{REQUEST}/x", params={"wait": wait})
    assert (answer.status_code, answer.json()["field"]) == (422, "wait")
    assert registry.calls == []


async def test_seen_is_a_status_word(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """A status that there is not is a 422 that names the parameter and the words."""
    answer = await http.get(f"{REQUEST}/x", params={"wait": 1, "seen": "ready"})
    assert (answer.status_code, answer.json()["field"]) == (422, "seen")
    assert all(word in answer.json()["message"] for word in RequestStatus)
    assert registry.calls == []


async def test_release(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """A release is 204 without a body, and so is the second."""
    request_id = await posted(http)
    for _ in range(2):
        answer = await http.delete(f"{REQUEST}/{request_id}")
        assert (answer.status_code, answer.content) == (204, b"")
    assert registry.calls[-1] == ("release", (request_id,), 0.0)


async def test_keep_alive(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """A keep-alive answers with the state of the request."""
    request_id = await posted(http)
    answer = await http.post(f"{REQUEST}/{request_id}/keepalive")
    assert (answer.status_code, answer.json()["requestId"]) == (200, request_id)
    assert registry.calls[-1] == ("keep_alive", (request_id,), 0.0)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", f"{REQUEST}/none"), ("DELETE", f"{REQUEST}/none"), ("POST", f"{REQUEST}/none/keepalive")],
)
async def test_unknown_ids_are_404(http: httpx.AsyncClient, method: str, path: str) -> None:
    """An id that was never given is a 404 that names it."""
    answer = await http.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_request")
    assert "'none'" in answer.json()["message"]


# --- information -------------------------------------------------------------------------------------------


async def test_measurements_are_those_of_the_callers_tenant(http: httpx.AsyncClient) -> None:
    """A measurement, and its report, are found under the tenant that asked for it, and under no other."""
    request_id = await posted(http, headers={"X-Tenant": "lab"})
    for path in ("/measurements/1234", "/measurements/1234/report"):
        assert (await http.get(path)).status_code == 404
        assert (await http.get(path, headers={"X-Tenant": "lab"})).status_code == 200
    measurement = (await http.get("/measurements/1234", headers={"X-Tenant": "lab"})).json()
    assert [request["requestId"] for request in measurement["requests"]] == [request_id]


async def test_a_priority_counts_only_where_it_was_given(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """A POST that leaves it out has no opinion on that of its measurement; also "normal" is one."""
    await http.post(REQUEST, json=BODY)
    await http.post(REQUEST, json={**BODY, "priority": "normal"})
    assert [args[3] for _, args, _ in registry.calls] == [None, "normal"]


async def test_measurement(http: httpx.AsyncClient) -> None:
    """A measurement is shown with its requests; one that was never asked for is a 404."""
    request_id = await posted(http)
    answer = await http.get("/measurements/1234")
    assert [request["requestId"] for request in answer.json()["requests"]] == [request_id]
    missing = await http.get("/measurements/5")
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_measurement")


@pytest.mark.parametrize("measurement_id", ["0", "-1", str(MAX_ID + 1), "x", "1.5", "9" * 5000])
async def test_measurement_ids_have_limits(http: httpx.AsyncClient, measurement_id: str) -> None:
    """A measurementId that can't be one is a 422, never a 500."""
    answer = await http.get(f"/measurements/{measurement_id}")
    assert (answer.status_code, answer.json()["field"]) == (422, "measurement_id")


@pytest.mark.parametrize("path", ["/machines", "/llms"])
async def test_lists(http: httpx.AsyncClient, path: str) -> None:
    """Machines and LLMs are lists."""
    answer = await http.get(path)
    assert (answer.status_code, len(answer.json())) == (200, 1)


@pytest.mark.parametrize(("health", "status"), [("ok", 200), ("starting", 503), ("degraded", 503)])
async def test_health(http: httpx.AsyncClient, registry: FakeRegistry, health: str, status: int) -> None:
    """Health is 200 only while requests can be served; the body says the same."""
    registry.health = health
    answer = await http.get("/healthz")
    assert (answer.status_code, answer.json()["status"]) == (status, health)


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        IdempotencyConflict("k"),
        LLMNeverFits("f", "m", "r"),
        QueueFull("this registry", 5),
        QueueFull("this registry", 5, 12.3),
        QueueFull("this registry", 5, 1e9),
        ShuttingDown(),
        RegistryUnavailable("r"),
        StoreUnavailable("r"),
        UnknownRequest("x"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_of_the_registry_become_answers(
    http: httpx.AsyncClient, registry: FakeRegistry, error: RegistryError
) -> None:
    """Each error is answered with its status, code, text and field; with Retry-After exactly when that can help."""
    registry.error = error
    for answer in (await http.post(REQUEST, json=BODY), await http.get(f"{REQUEST}/x")):
        assert answer.status_code == error.http_status
        body = {"code": error.code, "message": str(error), "retryable": error.retryable}
        if isinstance(error, LLMNeverFits):
            detail = {"type": "value_error", "loc": ["body", error.field], "msg": str(error)}
            body |= {"field": error.field, "detail": [detail]}
        assert answer.json() == body
        wait_s = getattr(error, "retry_after_s", None)
        told = None if not error.retryable else "1" if wait_s is None else str(min(math.ceil(wait_s), 300))
        assert answer.headers.get("retry-after") == told


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allowed"),
    [
        ("POST", "/", 405, "method_not_allowed", "GET"),
        ("GET", "/process_prompt", 405, "method_not_allowed", "POST"),
        ("GET", "/promptingservice", 404, "no_such_path", None),
        ("PUT", REQUEST, 405, "method_not_allowed", "POST"),
        ("GET", REQUEST, 405, "method_not_allowed", "POST"),
        ("POST", f"{REQUEST}/x", 405, "method_not_allowed", "DELETE, GET"),
    ],
)
async def test_unknown_paths_and_methods(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str, allowed: str | None
) -> None:
    """A path or a method that is not served is an error in our form; a 405 says which methods there are."""
    answer = await http.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers.get("allow") == allowed


async def test_fault_of_ours_is_an_error_in_our_form(registry: FakeRegistry) -> None:
    """What nobody foresaw is a 500 in our form that gives nothing away; the server's log gets it."""
    registry.error = ZeroDivisionError("secret")
    transport = httpx.ASGITransport(app=build_app(CONFIG, registry.call), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        answer = await http.get("/machines")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "secret" not in answer.text


# --- the calls to the actor --------------------------------------------------------------------------------


class FakeMethod:
    """A remote method: each call takes the next of ``outcomes``; errors are raised, awaitables awaited."""

    def __init__(self, outcomes: list[object]) -> None:
        self.outcomes = outcomes
        self.calls: list[tuple[object, ...]] = []

    def remote(self, *args: object) -> Awaitable[object]:
        self.calls.append(args)
        outcome = self.outcomes.pop(0)

        async def answer() -> object:
            if isinstance(outcome, Exception):
                raise outcome
            if callable(outcome):
                return await outcome()
            return outcome

        return answer()


class FakeActor:
    def __init__(self, *outcomes: object) -> None:
        self.state = FakeMethod(list(outcomes))


def task_error(cause: Exception) -> Exception:
    """An exception of an actor's method as Ray delivers it."""
    error: Exception = RayTaskError("state", "a traceback", cause).as_instanceof_cause()
    return error


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets ``ray.get_actor`` find these, one after the other; what is returned counts the searches."""

    def find(*found: FakeActor | Exception) -> list[str]:
        left, searches = list(found), list[str]()

        def get_actor(name: str, _namespace: str) -> FakeActor:
            searches.append(name)
            actor = left.pop(0)
            if isinstance(actor, Exception):
                raise actor
            return actor

        monkeypatch.setattr(ray, "get_actor", get_actor)
        return searches

    return find


@pytest.fixture(autouse=True)
def no_pauses():
    """Calls are tried again five times, without a pause."""
    with stamina.set_testing(True, attempts=5):
        yield


async def test_actor_is_found_once(find: Callable[..., list[str]]) -> None:
    """The actor is looked up by name for the first call and kept."""
    actor = FakeActor("one", "two")
    searches = find(actor)
    client = ActorCalls(Path("/"))
    assert [await client.call("state", "x", 1.0, wait_s=1.0), await client.call("state", "y")] == ["one", "two"]
    assert searches == ["greenprompt-registry"]
    assert actor.state.calls == [("x", 1.0), ("y",)]


async def test_call_outlasts_a_restart(find: Callable[..., list[str]]) -> None:
    """An actor that dies, is not there for a moment and comes back answers the same call, with the same arguments."""
    old, new = FakeActor(ActorUnavailableError("restarting", None), ActorDiedError()), FakeActor("answer")
    find(old, old, ValueError("no such actor"), new)
    assert await ActorCalls(Path("/")).call("state", "x") == "answer"
    assert [*old.state.calls, *new.state.calls] == [("x",)] * 3


async def test_actor_that_stays_away_is_unavailable(find: Callable[..., list[str]]) -> None:
    """An actor that does not come back is a RegistryUnavailable, which clients may try again."""
    find(*[ValueError("no such actor")] * 5)
    with pytest.raises(RegistryUnavailable):
        await ActorCalls(Path("/")).call("state", "x")


async def test_a_full_disk_is_said(find: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that can't write ends, again and again: the answer says that the disk is full."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=0))
    find(*[ValueError("no such actor")] * 5)
    with pytest.raises(RegistryUnavailable, match=r"\(_NoActor; the disk of /state is full \(0 MiB are free\)\)"):
        await ActorCalls(Path("/state")).call("healthz")


async def test_errors_of_the_registry_come_through(find: Callable[..., list[str]]) -> None:
    """What the registry raised is raised here as it was, and not tried again."""
    actor = FakeActor(task_error(UnknownRequest("x")), "never")
    find(actor)
    with pytest.raises(UnknownRequest) as caught:
        await ActorCalls(Path("/")).call("state", "x")
    assert type(caught.value) is UnknownRequest
    assert len(actor.state.calls) == 1


async def test_unforeseen_errors_are_told_as_such(find: Callable[..., list[str]]) -> None:
    """A fault inside the registry is an internal error that names it, and is not tried again."""
    actor = FakeActor(task_error(ZeroDivisionError("boom")), "never")
    find(actor)
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        await ActorCalls(Path("/")).call("state", "x")
    assert len(actor.state.calls) == 1


async def test_reads_wait_for_one_another_and_nothing_waits_for_them(find: Callable[..., list[str]]) -> None:
    """Of each kind of read only so many are in flight at the registry; control and health go past those that wait."""
    answered = asyncio.Event()
    actor = FakeActor(*[answered.wait] * 200)
    find(actor)
    for method in ("request", "release", "health", *actor_calls.AT_ONCE):
        setattr(actor, method, FakeMethod([answered.wait] * 200))
    client = ActorCalls(Path("/"))
    reads = [asyncio.create_task(client.call(method, "x")) for method in actor_calls.AT_ONCE for _ in range(100)]
    await asyncio.sleep(0)
    others = [asyncio.create_task(client.call(method, "x")) for method in ("request", "release", "health")]
    for _ in range(10):
        await asyncio.sleep(0)
    assert {method: len(getattr(actor, method).calls) for method in actor_calls.AT_ONCE} == actor_calls.AT_ONCE
    assert [len(getattr(actor, method).calls) for method in ("request", "release", "health")] == [1, 1, 1]
    answered.set()
    assert all(await asyncio.gather(*reads, *others))


async def test_call_has_a_time_limit(find: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that does not answer is unavailable after the limit, plus what the client asked to wait."""
    monkeypatch.setattr(actor_calls, "CALL_TIMEOUT_S", 0.0)
    find(FakeActor(asyncio.Event().wait))
    with pytest.raises(RegistryUnavailable, match=r"no answer within 0\.01 s"):
        await ActorCalls(Path("/")).call("state", "x", wait_s=0.01)


async def test_turn_of_a_read_has_a_time_limit(find: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that does not get its turn among others is unavailable after the limit; the next read gets it."""
    monkeypatch.setattr(actor_calls, "AT_ONCE", {"state": 1})
    answered = asyncio.Event()
    find(actor := FakeActor(answered.wait, "answer"))
    client = ActorCalls(Path("/"))
    first = asyncio.create_task(client.call("state", "x"))
    for _ in range(10):
        await asyncio.sleep(0)
    monkeypatch.setattr(actor_calls, "CALL_TIMEOUT_S", 0.0)
    with pytest.raises(RegistryUnavailable, match="too many calls of state were in progress for 0 s"):
        await client.call("state", "y")
    monkeypatch.setattr(actor_calls, "CALL_TIMEOUT_S", 30.0)
    answered.set()
    assert await first
    assert await client.call("state", "z") == "answer"
    assert actor.state.calls == [("x",), ("z",)]


# --- machines ----------------------------------------------------------------------------------------------


async def test_machine_is_drained_and_undrained(http: httpx.AsyncClient, registry: FakeRegistry) -> None:
    """Each answers with the machine as it is from then on, also when it is asked twice."""
    for method, drain in (("POST", "draining"), ("POST", "draining"), ("DELETE", None), ("DELETE", None)):
        response = await http.request(method, "/machines/a/drain")
        assert (response.status_code, response.json()["drain"]) == (200, drain)
    assert (await http.get("/machines/a")).json() == (await http.get("/machines")).json()[0]
    assert [method for method, _, _ in registry.calls][:4] == ["drain", "drain", "undrain", "undrain"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/drain"), ("DELETE", "/drain"), ("GET", "")])
async def test_unknown_machine_is_a_404(http: httpx.AsyncClient, method: str, path: str) -> None:
    """It says which there are."""
    response = await http.request(method, f"/machines/b{path}")
    assert (response.status_code, response.json()["code"]) == (404, "unknown_machine")
    assert "there are a" in response.json()["message"]
