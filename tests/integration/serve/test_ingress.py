"""The HTTP ingress around a registry that is a stand-in: all but the POST of requests."""

from __future__ import annotations

import asyncio
import csv
import io
import math
from dataclasses import replace

import httpx
import pytest
from pydantic import TypeAdapter

from deployments.serve import energy_pages
from deployments.serve.http_app import build_app
from registry.accounting.report import MeasurementReport
from registry.accounting.window_report import WindowReport
from registry.errors import (
    IdempotencyConflict,
    LLMNeverFits,
    QueueFull,
    RegistryError,
    RegistryUnavailable,
    ShuttingDown,
    StoreUnavailable,
    UnknownRequest,
)
from registry.wire.schemas import MAX_ID, MAX_WAIT_S, RequestState
from registry.wire.words import RequestStatus
from tests.support.contract_example import BODY
from tests.support.energy_windows import an_experiment
from tests.support.fake_registry import FakeRegistry
from tests.support.ingress_calls import CONFIG, REQUEST

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
