"""The Prompting Service's contract over real HTTP, against real Ray, Serve and vLLM."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from registry.core.fit import shown_bytes
from tests.cluster.conftest import Registry
from tests.support.checkpoint_files import LLAMA, write_checkpoint
from tests.support.tool_calls import NAMED, TOOL

pytestmark = pytest.mark.cluster

LLM = Callable[..., dict[str, Any]]


def test_one_llm_from_request_to_release(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """Request, poll, prompt, release: each answer has the contract's status code and fields."""
    config = llm("a")
    body = {"measurementId": measurement_id, "llms": [config]}
    accepted = httpx.post(f"{registry.url}/promptingservice/request", json=body, timeout=60)
    assert accepted.status_code == 201
    (entry,) = accepted.json()["requests"]
    assert entry["llmconfig"] == config
    assert httpx.get(entry["link"], timeout=60).json()["requestId"] == entry["requestId"]

    state = registry.until(entry["requestId"], "deployed")
    assert state["llmconfig"] == config
    assert state["measurementId"] == measurement_id
    address = state["url"]
    status = httpx.get(f"{address}/get_status", timeout=60)
    assert (status.status_code, status.json()["status"], status.json()["message"]) == (200, "success", "ready")

    answer = httpx.post(f"{address}/process_prompt", json={"question": "What is a grid?"}, timeout=60)
    assert answer.status_code == 200
    body = answer.json()
    assert isinstance(body["answer"], str)
    assert "What is a grid?" not in body["answer"]
    assert body["usage"]["completion_tokens"] == 16

    assert registry.delete(entry["requestId"]) == 204
    assert registry.delete(entry["requestId"]) == 204
    assert registry.get(entry["requestId"])["status"] == "released"
    assert registry.get(entry["requestId"])["url"] is None


def test_an_energy_figure_is_labelled(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """A score is as good as its worst part, which is a published factor at best; it has bounds and is no bare zero."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    address = registry.until(request_id, "deployed")["url"]
    answer = httpx.post(f"{address}/process_prompt", json={"question": "How much?"}, timeout=60).json()
    registry.delete(request_id)
    sources = registry.wrapper()["meter"]["sources"]
    counted = {source["label"] for source in sources}
    assert answer["sci_method"] == ("modeled" if "modeled" in counted else "sourced")
    assert answer["sci_score"] > 0
    assert answer["sci_score"] == pytest.approx(
        (answer["carbon"]["o_g"] + answer["carbon"]["m_g"]) / answer["usage"]["completion_tokens"]
    )
    assert 0 < answer["sci_low"] < answer["sci_score"] < answer["sci_high"]
    assert math.isclose(sum(part["joules"] for part in answer["energy"]["components"]), answer["energy"]["total_j"])


def test_a_measurement_has_a_report(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """The report names the LLM and how the figures come about, as JSON and as CSV; no unknown is 0."""
    body = {"measurementId": measurement_id, "llms": [llm("a")], "maxJoules": 1e6}
    answer = httpx.post(f"{registry.url}/promptingservice/request", json=body, timeout=60)
    request_id = answer.json()["requests"][0]["requestId"]
    state = registry.until(request_id, "deployed")
    assert (state["maxJoules"], state["maxGco2eq"]) == (1e6, None)
    httpx.post(f"{state['url']}/process_prompt", json={"question": "Hello"}, timeout=60)
    registry.delete(request_id)
    path = f"{registry.url}/measurements/{measurement_id}/report"
    report = httpx.get(path, timeout=60).json()
    assert report["how"].startswith("computed with the SCI formula")
    assert [one["requestIds"] for one in report["llms"]] == [[request_id]]
    assert all(cost["joules"] != 0 for cost in report["costs"].values())
    table = httpx.get(path, headers={"accept": "text/csv"}, timeout=60)
    assert table.headers["content-type"].startswith("text/csv")
    assert len(table.text.splitlines()) >= 1


def test_what_fits_nowhere_is_refused_at_once(
    registry: Registry, llm: LLM, measurement_id: int, workspace: Path
) -> None:
    """An LLM of 1 TiB, whose weights nobody has to load to know: a 422 that names it, with what it takes and has."""
    write_checkpoint(workspace / "llms" / "huge", LLAMA, {"model.w": ("BF16", (2**39,))})
    body = {"measurementId": measurement_id, "llms": [llm("a"), llm("huge")]}
    answer = httpx.post(f"{registry.url}/promptingservice/request", json=body, timeout=60)
    assert answer.status_code == 422
    assert (answer.json()["code"], answer.json()["field"]) == ("llm_never_fits", "llms[1].model")
    (machine,) = registry.machines()
    has_bytes = -(-machine["memoryBytes"] // 2**26) * 2**26  # machines that are nearly alike count as one size
    assert "its weights take 1024.0 GiB" in answer.json()["message"]
    assert f"the largest wrapper has {shown_bytes(has_bytes)} of main memory" in answer.json()["message"]
    assert httpx.get(f"{registry.url}/measurements/{measurement_id}", timeout=60).status_code == 404


def test_a_gpu_type_that_is_not_there_is_refused_at_once(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """On a machine without GPU a measurement that wants one is told so by name."""
    body = {"measurementId": measurement_id, "llms": [llm("a")], "gpuType": "NVIDIA H100 80GB HBM3"}
    answer = httpx.post(f"{registry.url}/promptingservice/request", json=body, timeout=60)
    assert (answer.status_code, answer.json()["field"]) == (422, "gpuType")


def test_a_measurement_is_made_and_repeated(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """Of measurement grade an LLM is handed over settled, with all that it runs on; the same can be had again."""
    first = post(registry, measurement_id, llm("a"), grade="measurement")
    phases = {state["phase"] for state in until_over(registry, first)}
    assert "settling" in phases
    state = registry.get(first)
    told = state["provenance"]
    assert told["machine"] == state["machine"]
    assert {"ray", "torch", "greenprompt-llm-registry"} <= told["versions"].keys()
    weights = sorted(Path(llm("a")["model"]).glob("*.safetensors"))
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in weights)
    assert told["model"]["weights_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert (told["engine_args"]["dtype"], told["engine_args"]["enforce_eager"]) == ("bfloat16", True)
    counted = {source["label"] for source in registry.wrapper()["meter"]["sources"]}
    assert counted & {"measured", "measured_sampled"} or "steadiness_unknown" in state["flags"]
    registry.delete(first)

    again = post(registry, measurement_id + 1, llm("a"), grade="measurement", like=first)
    same = registry.until(again, "deployed")["provenance"]
    assert (same["model"], same["engine_args"]) == (told["model"], told["engine_args"])
    registry.delete(again)
    body = {"measurementId": measurement_id + 2, "llms": [llm("b")], "grade": "measurement", "like": first}
    refused = httpx.post(f"{registry.url}/promptingservice/request", json=body, timeout=60)
    assert (refused.status_code, refused.json()["field"]) == (422, "like")
    assert "llms[0].model: was" in refused.json()["message"]


def post(registry: Registry, measurement_id: int, config: dict[str, Any], **more: Any) -> str:
    """Ask for one LLM with more than the contract's fields; its request's id."""
    body = {"measurementId": measurement_id, "llms": [config], **more}
    answer = httpx.post(f"{registry.url}/promptingservice/request", json=body, timeout=60)
    assert answer.status_code == 201, answer.text
    request_id: str = answer.json()["requests"][0]["requestId"]
    registry.posted.append(request_id)
    return request_id


def until_over(registry: Registry, request_id: str) -> Iterator[dict[str, Any]]:
    """All that its status says until a request is deployed."""
    while (state := registry.get(request_id, wait=0.25, seen="deploying"))["status"] != "deployed":
        assert state["endedAt"] is None, state
        yield state


def test_llms_of_a_measurement_come_one_after_another(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """The second LLM stays queued until the first is released, then runs on the same machine."""
    first, second = registry.post(measurement_id, llm("a"), llm("b"))
    one = registry.until(first, "deployed")
    assert registry.get(second, wait=2)["status"] == "queued"
    assert first in registry.get(second)["reason"]
    registry.delete(first)
    two = registry.until(second, "deployed")
    assert two["machine"] == one["machine"]
    model = httpx.get(f"{two['url']}/v1/models", timeout=60).json()["data"][0]["id"]
    assert model.endswith("/b")
    registry.delete(second)
    whole = httpx.get(f"{registry.url}/measurements/{measurement_id}", timeout=60).json()
    assert [entry["status"] for entry in whole["requests"]] == ["released", "released"]


def test_another_temperature_does_not_restart_the_engine(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """Requests that differ only in how they prompt share a running LLM."""
    (first,) = registry.post(measurement_id, llm("a", temperature=0.2))
    registry.until(first, "deployed")
    registry.delete(first)
    engines = {engine.pid for engine in registry.engines()}
    (second,) = registry.post(measurement_id + 1, llm("a", do_sample=True, temperature=0.9, max_new_tokens=5))
    state = registry.until(second, "deployed")
    answer = httpx.post(f"{state['url']}/process_prompt", json={"question": "Hi"}, timeout=60).json()
    registry.delete(second)
    assert {engine.pid for engine in registry.engines()} == engines
    assert answer["usage"]["completion_tokens"] == 5


def test_a_wrapper_is_leased_to_one_request_at_a_time(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """Of two measurements that want the same LLM the second waits until the first lets go."""
    (first,) = registry.post(measurement_id, llm("a"))
    registry.until(first, "deployed")
    (second,) = registry.post(measurement_id + 1, llm("a"))
    assert registry.get(second, wait=2)["status"] == "queued"
    assert registry.get(second)["position"] == 1
    registry.delete(first)
    registry.until(second, "deployed")
    assert registry.delete(second) == 204


def test_a_measurement_can_be_added_to_after_it_ended(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """A measurementId that is used again is served again."""
    for _ in range(2):
        (request_id,) = registry.post(measurement_id, llm("a"))
        registry.until(request_id, "deployed")
        registry.delete(request_id)


def test_a_queued_request_can_be_cancelled(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """DELETE of a queued request takes it out of the queue and frees nobody else's lease."""
    (holder,) = registry.post(measurement_id, llm("a"))
    address = registry.until(holder, "deployed")["url"]
    (waiting,) = registry.post(measurement_id + 1, llm("b"))
    assert registry.delete(waiting) == 204
    assert registry.get(waiting)["status"] == "cancelled"
    assert httpx.get(f"{address}/get_status", timeout=60).status_code == 200
    registry.delete(holder)


def test_after_release_the_address_answers_410(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """A released address is refused at the wrapper itself; a made-up one is refused, too."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    address = registry.until(request_id, "deployed")["url"]
    registry.delete(request_id)
    (next_id,) = registry.post(measurement_id + 1, llm("a"))
    registry.until(next_id, "deployed")
    refused = httpx.post(f"{address}/process_prompt", json={"question": "Still mine?"}, timeout=60)
    assert (refused.status_code, refused.json()["code"]) == (410, "lease_ended")
    made_up = address.rsplit("/", 1)[0] + "/made-up/get_status"
    assert httpx.get(made_up, timeout=60).status_code == 403
    registry.delete(next_id)


def test_the_openai_package_chats_streams_and_calls_tools(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """The address is a base URL for any OpenAI client; operator's endpoints are not there."""
    config = llm("b", deployment={"tool_call_parser": "hermes"})
    (request_id,) = registry.post(measurement_id, config)
    address = registry.until(request_id, "deployed")["url"]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60)
    stream = client.chat.completions.create(
        model=config["model"],
        messages=[{"role": "user", "content": "Tell me more"}],
        max_tokens=12,
        extra_body={"ignore_eos": True},
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(stream)
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 12
    assert len(pieces) > 5
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=config["model"], messages=[], max_tokens=-3)
    ask: Any = {"model": config["model"], "messages": [{"role": "user", "content": "Is it green?"}], "tools": [TOOL]}
    answer: Any = client.chat.completions.create(**ask, tool_choice=NAMED, max_tokens=200, seed=1)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments).keys()) == ("report_grid", {"green", "grid"})
    for path in ("sleep", "collective_rpc", "v1/load_lora_adapter"):
        assert httpx.post(f"{address}/{path}", json={}, timeout=60).status_code == 404
    client.close()
    registry.delete(request_id)


def test_the_openai_package_embeds(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """An LLM that was requested to embed does so, is scored per token of its input, and generates nothing."""
    config = llm("b") | {"modeltyp": "feature-extraction"}
    config["args"] = {"prompting": {}, "deployment": config["args"]["deployment"]}
    (request_id,) = registry.post(measurement_id, config)
    address = registry.until(request_id, "deployed")["url"]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60) as client:
        raw = client.embeddings.with_raw_response.create(
            model=config["model"], input=["one", "two"], encoding_format="float"
        )
        answer = raw.parse()
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=config["model"], prompt="one")
    told = json.loads(raw.headers["x-greenprompt-energy"])
    assert told["unit"] == "token"
    assert told["sci_score"] == pytest.approx((told["o_g"] + told["m_g"]) / answer.usage.prompt_tokens)
    refused = httpx.post(f"{address}/process_prompt", json={"question": "one"}, timeout=60)
    assert (refused.status_code, refused.json()["code"]) == (422, "writes_no_text")
    assert "/v1/embeddings" in refused.json()["message"]
    first, second = (entry.embedding for entry in answer.data)
    assert len(first) == len(second)
    assert first != second
    registry.delete(request_id)


def test_what_the_args_became_is_told(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """The answer names what of the args was translated and what was dropped."""
    config = llm("a", deployment={"device_map": "auto"})
    body = {"measurementId": measurement_id, "llms": [config]}
    (entry,) = httpx.post(f"{registry.url}/promptingservice/request", json=body, timeout=60).json()["requests"]
    registry.delete(entry["requestId"])
    assert any("device_map" in note for note in entry["notes"])


def test_an_llm_that_does_not_exist_fails_with_the_reason(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """The request fails within a minute, says why, and the wrapper is usable afterwards."""
    broken = llm("a")
    broken["model"] = broken["model"] + "-that-is-not-there"
    (request_id, after) = registry.post(measurement_id, broken, llm("a"))
    state = registry.until(request_id, "failed", limit_s=60)
    assert "there is no folder" in state["reason"]
    registry.until(after, "deployed")
    registry.delete(after)


def test_a_hub_llm_that_does_not_exist_fails_with_the_reason(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """An id that the hub can't give fails within a minute, with the name of what could not be had."""
    config = llm("a")
    config["model"] = "greenprompt-no-such-owner/no-such-llm"
    (request_id,) = registry.post(measurement_id, config)
    state = registry.until(request_id, "failed", limit_s=60)
    assert "greenprompt-no-such-owner/no-such-llm" in state["reason"]


BAD_BODIES: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "no measurementId": ("measurementId", lambda body: body.pop("measurementId")),
    "measurementId 0": ("measurementId", lambda body: body.update(measurementId=0)),
    "measurementId 2^63": ("measurementId", lambda body: body.update(measurementId=2**63)),
    "measurementId text": ("measurementId", lambda body: body.update(measurementId="12")),
    "measurementId true": ("measurementId", lambda body: body.update(measurementId=True)),
    "measurementId fraction": ("measurementId", lambda body: body.update(measurementId=1.5)),
    "measurementId null": ("measurementId", lambda body: body.update(measurementId=None)),
    "no llms": ("llms", lambda body: body.pop("llms")),
    "empty llms": ("llms", lambda body: body.update(llms=[])),
    "llms no list": ("llms", lambda body: body.update(llms={})),
    "llm no object": ("llms[0]", lambda body: body.update(llms=["a"])),
    "no modeltyp": ("llms[0].modeltyp", lambda body: body["llms"][0].pop("modeltyp")),
    "unknown modeltyp": ("llms[0].modeltyp", lambda body: body["llms"][0].update(modeltyp="image-to-text-2")),
    "no model": ("llms[0].model", lambda body: body["llms"][0].pop("model")),
    "empty model": ("llms[0].model", lambda body: body["llms"][0].update(model="")),
    "model outside the roots": ("llms[0].model", lambda body: body["llms"][0].update(model="/etc")),
    "model climbing out": ("llms[0].model", lambda body: body["llms"][0].update(model="../../etc")),
    "no uses_chat_template": ("llms[0].uses_chat_template", lambda body: body["llms"][0].pop("uses_chat_template")),
    "uses_chat_template text": (
        "llms[0].uses_chat_template",
        lambda body: body["llms"][0].update(uses_chat_template="yes"),
    ),
    "no args": ("llms[0].args", lambda body: body["llms"][0].pop("args")),
    "no prompting": ("llms[0].args.prompting", lambda body: body["llms"][0]["args"].pop("prompting")),
    "no deployment": ("llms[0].args.deployment", lambda body: body["llms"][0]["args"].pop("deployment")),
    "unknown prompting word": (
        "llms[0].args.prompting.temprature",
        lambda body: body["llms"][0]["args"]["prompting"].update(temprature=1),
    ),
    "temperature out of range": (
        "llms[0].args.prompting.temperature",
        lambda body: body["llms"][0]["args"]["prompting"].update(temperature=-1),
    ),
    "unknown deployment word": (
        "llms[0].args.deployment.torch_dtyp",
        lambda body: body["llms"][0]["args"]["deployment"].update(torch_dtyp="auto"),
    ),
    "code that comes with the LLM": (
        "llms[0].args.deployment.trust_remote_code",
        lambda body: body["llms"][0]["args"]["deployment"].update(trust_remote_code=True),
    ),
    "unknown field": ("tenantt", lambda body: body.update(tenantt="x")),
    "unknown priority": ("priority", lambda body: body.update(priority="highest")),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_every_bad_field_is_named(registry: Registry, llm: LLM, measurement_id: int, case: str) -> None:
    """A missing or wrong field of the contract is a 422 that names it, and nothing is accepted."""
    field, spoil = BAD_BODIES[case]
    body = copy.deepcopy({"measurementId": measurement_id, "llms": [llm("a")]})
    spoil(body)
    answer = httpx.post(f"{registry.url}/promptingservice/request", json=body, timeout=60)
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == field
    assert field in answer.json()["message"]
    assert httpx.get(f"{registry.url}/measurements/{measurement_id}", timeout=60).status_code == 404


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff"])
def test_a_body_that_is_no_object_is_refused(registry: Registry, content: bytes) -> None:
    """What is not a JSON object is a 422 that says so."""
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{registry.url}/promptingservice/request", content=content, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["field"]) == (422, "body")


@pytest.mark.parametrize("request_id", ["nope", "0", "%00", "a" * 3000, "..%2f..", "ümlaut"])
def test_an_unknown_id_is_a_404(registry: Registry, request_id: str) -> None:
    """GET, DELETE and keep-alive of an id that nobody got answer 404."""
    link = f"{registry.url}/promptingservice/request/{request_id}"
    assert httpx.get(link, timeout=60).status_code == 404
    assert httpx.delete(link, timeout=60).status_code == 404
    assert httpx.post(f"{link}/keepalive", timeout=60).status_code == 404


@pytest.mark.parametrize("number", ["1", "0", "-1", str(2**63), "x", "1.5"])
def test_an_unknown_measurement_is_refused(registry: Registry, number: str) -> None:
    """A measurement that nobody asked for is a 404, a number that can't be one a 422."""
    answer = httpx.get(f"{registry.url}/measurements/{number}", timeout=60)
    assert answer.status_code == (404 if number == "1" else 422)


def test_the_same_key_gives_the_same_requests(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """A client that lost the answer asks again with its Idempotency-Key; another body with it is a 409."""
    body = {"measurementId": measurement_id, "llms": [llm("a")]}
    url, headers = f"{registry.url}/promptingservice/request", {"Idempotency-Key": f"key-{measurement_id}"}
    first, again = (httpx.post(url, json=body, headers=headers, timeout=60) for _ in range(2))
    ids = [[entry["requestId"] for entry in answer.json()["requests"]] for answer in (first, again)]
    assert ids[0] == ids[1]
    other = httpx.post(url, json={**body, "measurementId": measurement_id + 1}, headers=headers, timeout=60)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    registry.delete(ids[0][0])


PAGES: dict[str, tuple[dict[str, str], int]] = {
    "another origin": ({"Origin": "http://evil.example"}, 403),
    "a file": ({"Origin": "null"}, 403),
    "another port": ({"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-site"}, 403),
    "no Origin": ({"Sec-Fetch-Site": "cross-site"}, 403),
    "DNS rebinding": ({"Host": "evil.example", "Origin": "http://evil.example"}, 421),
}


def test_a_web_page_changes_nothing(registry: Registry, llm: LLM, measurement_id: int) -> None:
    """No page of another origin drains a machine, releases an LLM or prompts it, also if it knows the URLs."""
    (request_id,) = registry.post(measurement_id, llm("a"))
    lease = registry.until(request_id, "deployed")["url"]
    (machine,) = registry.machines()
    own = registry.url
    calls = [
        ("POST", f"{own}/machines/{machine['machine']}/drain", None),
        ("DELETE", f"{own}/promptingservice/request/{request_id}", None),
        ("POST", f"{own}/promptingservice/request", {"measurementId": measurement_id, "llms": [llm("a")]}),
        ("POST", f"{lease}/process_prompt", {"question": "Whose?"}),
        ("POST", f"{lease}/v1/completions", {"prompt": "Whose?"}),
    ]
    for method, url, body in calls:
        for name, (headers, status) in PAGES.items():
            answer = httpx.request(method, url, json=body, headers=headers, timeout=60)
            assert answer.status_code == status, (name, method, url)
    assert registry.machines()[0]["drain"] is None
    assert registry.get(request_id)["status"] == "deployed"
    models = httpx.get(f"{lease}/v1/models", headers={"Origin": "http://evil.example"}, timeout=60)
    assert models.status_code == 200  # but no page of that origin can read it:
    assert [name for name in models.headers if name.startswith("access-control-")] == []
    assert (models.headers["cache-control"], models.headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert registry.delete(request_id) == 204


HEADS = {
    "a name": ("GET /machines HTTP/1.1\r\nHost: evil.example", {421}),
    "a name in the target": ("GET http://evil.example/machines HTTP/1.1\r\nHost: localhost", {400, 421}),
    "a name in both": ("GET http://evil.example/machines HTTP/1.1\r\nHost: evil.example", {421}),
    "no host": ("GET /machines HTTP/1.1", {200}),  # as health checks of load balancers have
    "no host where something changes": ("POST /machines/x/drain HTTP/1.1\r\nContent-Length: 0", {400}),
    "an empty host": ("GET /machines HTTP/1.1\r\nHost:", {400}),
    "two hosts": ("GET /machines HTTP/1.1\r\nHost: localhost\r\nHost: evil.example", {400}),
    "our host": ("GET /machines HTTP/1.1\r\nHost: LocalHost.:1", {200}),
    "our host in the target": ("GET http://localhost/machines HTTP/1.1\r\nHost: localhost", {200}),
}


@pytest.mark.parametrize("name", HEADS)
def test_other_hosts_are_not_served(registry: Registry, name: str) -> None:
    """Whatever way a request names its host, only the registry's own are served."""
    head, statuses = HEADS[name]
    parts = urlsplit(registry.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").readline()
    assert int(answer.split()[1]) in statuses


@pytest.mark.parametrize("words", [("-X", "POST"), ("-X", "DELETE")])
def test_curl_is_not_refused(registry: Registry, words: tuple[str, ...]) -> None:
    """A program that sends no body and no type may change something: the answer says that there is no such machine."""
    command = ["curl", "-s", *words, f"{registry.url}/machines/nowhere/drain"]
    answer = subprocess.run(command, capture_output=True, check=True, text=True)
    assert json.loads(answer.stdout)["code"] == "unknown_machine"


def test_the_information_pages_answer(registry: Registry) -> None:
    """/healthz, /machines, /llms and the API's description tell how things are."""
    assert httpx.get(f"{registry.url}/healthz", timeout=60).json()["status"] == "ok"
    wrapper = registry.wrapper()
    assert wrapper["versions"]["ray"]
    assert {"sources", "not_found"} <= wrapper["meter"].keys()
    assert isinstance(httpx.get(f"{registry.url}/llms", timeout=60).json(), list)
    paths = httpx.get(f"{registry.url}/openapi.json", timeout=60).json()["paths"]
    assert "/promptingservice/request/{request_id}" in paths
    missing = httpx.get(f"{registry.url}/no/such/page", timeout=60)
    assert (missing.status_code, missing.json()["code"]) == (404, "no_such_path")
