"""What the Python client sends for a request, and what it gives back."""

from __future__ import annotations

import json
from dataclasses import replace
from urllib.parse import quote

import httpx
import pytest
from pydantic import TypeAdapter

from greenprompt_client.answers import AnswerError
from registry.accounting.report import MeasurementReport
from registry.accounting.window_report import WindowReport
from tests.support.energy_windows import an_experiment
from tests.support.scripted_registry import BUSY, Make


def test_request_gives_ids_in_order(registry: Make) -> None:
    """A request sends the contract's body and gives the ids in the order of the LLMs."""
    accepted = [{"requestId": f"r{n}", "llmconfig": {}, "link": "", "status": "queued"} for n in (2, 1)]
    client, script = registry(httpx.Response(201, json={"requests": accepted}))
    assert client.request(7, [{"model": "a"}, {"model": "b"}]) == ["r2", "r1"]
    assert script.asked == ["POST /promptingservice/request"]
    assert json.loads(script.requests[0].content) == {"measurementId": 7, "llms": [{"model": "a"}, {"model": "b"}]}


@pytest.mark.parametrize("odd", ["a/b", "a?b=c", "a#b", "ä b"])
def test_odd_ids_stay_one_part_of_the_path(registry: Make, odd: str) -> None:
    """Whatever is given for an id, no other path than that of a request with this id is called."""
    client, script = registry(httpx.Response(204))
    client.release(odd)
    (request,) = script.requests
    assert request.url.raw_path.decode() == f"/promptingservice/request/{quote(odd, safe='')}"


def test_each_request_has_a_key_of_its_own(registry: Make) -> None:
    """Every POST has an Idempotency-Key, the same when it is repeated and another one for another request."""
    accepted = httpx.Response(201, json={"requests": []})
    client, script = registry(httpx.Response(503, json=BUSY), accepted, accepted)
    client.request(7, [{}])
    client.request(7, [{}])
    first, again, second = (request.headers["idempotency-key"] for request in script.requests)
    assert first == again != second


def test_idempotency_key_is_sent(registry: Make) -> None:
    """A key goes along as the header."""
    client, script = registry(httpx.Response(201, json={"requests": []}))
    client.request(7, [{}], idempotency_key="key-1")
    assert script.requests[0].headers["idempotency-key"] == "key-1"


def test_budgets_are_sent_if_there_are_any(registry: Make) -> None:
    """What each lease may use goes along in the contract's words; without it the fields are left out."""
    answer = httpx.Response(201, json={"requests": []})
    client, script = registry(answer, answer)
    client.request(7, [{}], max_joules=5.0, max_gco2eq=0.5)
    client.request(7, [{}])
    with_budgets, without = (json.loads(request.content) for request in script.requests)
    assert (with_budgets["maxJoules"], with_budgets["maxGco2eq"]) == (5.0, 0.5)
    assert without == {"measurementId": 7, "llms": [{}]}


def test_windows_are_read_page_by_page(registry: Make) -> None:
    """All pages, one after another; each is asked again while the registry restarts."""
    told = [TypeAdapter(WindowReport).dump_python(each, mode="json") for each in an_experiment().windows[:3]]
    busy = httpx.Response(503, json=BUSY)
    pages = {"windows": told[:2], "next": "2.5_p-1"}, {"windows": told[2:], "next": None}
    client, script = registry(pages[0], busy, pages[1])
    assert [each.window for each in client.windows(7, request_id="r-1")] == [each["window"] for each in told]
    first, _, second = script.asked
    assert first == "GET /measurements/7/windows?limit=1000&request=r-1"
    assert second == "GET /measurements/7/windows?limit=1000&request=r-1&after=2.5_p-1"


def test_report(registry: Make) -> None:
    """A report comes as the registry made it, without windows; of an unknown measurement the registry's error."""
    body = TypeAdapter(MeasurementReport).dump_python(an_experiment(), mode="json", exclude={"windows"})
    client, script = registry(body, httpx.Response(404, json={**BUSY, "code": "unknown_measurement"}))
    assert client.report(7) == replace(an_experiment(), windows=())
    assert script.asked == ["GET /measurements/7/report"]
    with pytest.raises(AnswerError, match="unknown_measurement"):
        client.report(8)


def test_gpu_type_is_sent_when_it_matters(registry: Make) -> None:
    """A measurement that needs certain GPUs says so; one that does not sends no such field."""
    client, script = registry(*[httpx.Response(201, json={"requests": []})] * 2)
    client.request(7, [{}], gpu_type="H100")
    client.request(8, [{}])
    assert json.loads(script.requests[0].content)["gpuType"] == "H100"
    assert "gpuType" not in json.loads(script.requests[1].content)


def test_grade_and_like_are_sent_when_wanted(registry: Make) -> None:
    """Who repeats a measurement says which; who does not care sends nothing of it."""
    client, script = registry(*[httpx.Response(201, json={"requests": []})] * 2)
    client.request(7, [{}], grade="measurement", like="r1")
    client.request(8, [{}])
    sent, plain = (json.loads(request.content) for request in script.requests)
    assert (sent["grade"], sent["like"]) == ("measurement", "r1")
    assert plain.keys() == {"measurementId", "llms"}
