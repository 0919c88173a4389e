"""Hostile calls of the registry's HTTP API, by callers with a client's key, and without one."""

# ruff: noqa: E501 - a row is a line

from __future__ import annotations

import base64
from typing import Any

from tests.support.hostile.rows import JSON, Hostile

REQUEST = "/promptingservice/request"
LLM: dict[str, Any] = {"modeltyp": "text-generation", "model": "org/tiny", "uses_chat_template": True, "args": {"prompting": {}, "deployment": {}}}  # fmt: skip
ASKED: dict[str, Any] = {"measurementId": 7, "llms": [LLM]}
NO_KEY = "no key"
"""Value of the header X-Caller of a row that the test sends without a key. Other rows are sent with a client's key."""

_FORM, _PLAIN = (("Content-Type", "application/x-www-form-urlencoded"),), (("Content-Type", "text/plain"),)
_NOT_HERE, _INVALID, _KEY, _ROLE, _PAGE, _HOST = (404,), (422,), (401,), (403,), (403,), (421,)


def _get(name: str, path: str, status: tuple[int, ...], source: str = "own: path", **headers: str) -> Hostile:
    return Hostile(
        name, path, None, status, source, "GET", tuple((key.replace("_", "-"), value) for key, value in headers.items())
    )


def _as(
    name: str, key: str, status: tuple[int, ...] = _KEY, source: str = "own: key", path: str = "/machines"
) -> Hostile:
    return Hostile(name, path, None, status, source, "GET", (("X-Caller", NO_KEY), ("Authorization", key)))


def _body(
    name: str, body: Any, status: tuple[int, ...] = _INVALID, source: str = "own: JSON", **changed: Any
) -> Hostile:
    return Hostile(name, changed.pop("path", REQUEST), {**body, **changed} if changed else body, status, source)


def _basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"lease:{password}".encode()).decode()


_DEEP = 10_000

BODIES = [
    _body("a body 10000 deep", b'{"measurementId": ' + b"[" * _DEEP + b"]" * _DEEP + b"}"),
    _body("objects 10000 deep", b'{"a":' * _DEEP + b"1" + b"}" * _DEEP),
    _body("args 10000 deep", b'{"measurementId": 7, "llms": [{"args": {"prompting": {"a": ' + b"[" * _DEEP + b"]" * _DEEP + b"}}}]}"),
    _body("NaN", b'{"measurementId": NaN, "llms": []}', source="GHSA-7h4p-rffg-7823"),
    _body("Infinity", b'{"measurementId": Infinity, "llms": []}', source="GHSA-7h4p-rffg-7823"),
    _body("a number that is infinite", b'{"measurementId": 1e999, "llms": []}', source="GHSA-7h4p-rffg-7823"),
    _body("a number of 5000 digits", b'{"measurementId": ' + b"9" * 5000 + b', "llms": []}'),
    _body("a key twice", b'{"measurementId": 7, "measurementId": 8, "llms": []}'),
    _body("a byte order mark", b"\xef\xbb\xbf{}"),
    _body("UTF-16", '{"measurementId": 7}'.encode("utf-16")),
    _body("UTF-32", '{"measurementId": 7}'.encode("utf-32")),
    _body("broken UTF-8", b'{"measurementId": "\xff"}'),
    _body("a lone surrogate", b'{"measurementId": 7, "llms": [], "like": "\\ud800"}'),
    _body("a null character", b'{"measurementId": 7, "llms": [], "like": "\\u0000"}'),
    _body("nothing", b""),
    _body("null", b"null"),
    _body("a list", b"[]"),
    _body("text", b'"x"'),
    _body("a comment", b'{"measurementId": 7 /* x */}'),
    _body("a comma too many", b'{"measurementId": 7,}'),
    _body("YAML", b"measurementId: 7"),
    _body("a pickle", b"\x80\x04\x95", source="GHSA-hhrp-gw25-jr43"),
    _body("a body of 5 MiB", b" " * (5 * 2**20), (413, 0), "own: size"),
    _body("a body of 4 MiB of brackets", b"[" * (4 * 2**20), (422,), "own: size"),
    _body("no measurementId", {"llms": [LLM]}),
    _body("no llms", {"measurementId": 7}),
    _body("an empty list of llms", ASKED, llms=[]),
    _body("llms of an object", ASKED, llms={}),
    _body("llms of null", ASKED, llms=[None]),
    _body("1001 llms", ASKED, (413, 422), llms=[LLM] * 1001),
    _body("an unknown field", ASKED, source="GHSA-wpfp-gwwc-vwq6", role="operator"),
    _body("a tenant in the body", ASKED, source="GHSA-wpfp-gwwc-vwq6", tenant="rivals"),
    _body("the id of a request in the body", ASKED, source="GHSA-wpfp-gwwc-vwq6", requestId="r1"),
    *(_body(f"measurementId of {value!r}"[:60], ASKED, measurementId=value) for value in (0, -1, 2**63, 1.5, "7", None, True, [7], {"a": 7})),
    *(_body(f"priority of {value!r}"[:60], ASKED, priority=value) for value in ("", "root", 1, None, ["high"])),
    *(_body(f"gpuType of {value!r}"[:60], ASKED, gpuType=value) for value in ("", "x" * 129, "H100\n", "\u0661", 1, ["H100"], "$(id)")),
    *(_body(f"{field} of {value!r}"[:60], {**ASKED, field: value}) for field in ("maxJoules", "maxGco2eq") for value in (0, -1, 1e16, "1", True, [1])),
    *(_body(f"grade of {value!r}"[:60], ASKED, grade=value) for value in ("", "gold", 1, None)),
    *(_body(f"like of {value!r}"[:60], ASKED, (404, 409, 422), like=value) for value in ("", "x" * 1025, 1, "../machines", "no-such-request", "' OR 1=1 --")),
]  # fmt: skip

PATHS = [
    _get("a request of another's id", f"{REQUEST}/{'0' * 32}", _NOT_HERE, "own: id"),
    _get("an id of 8000 characters", f"{REQUEST}/{'a' * 8000}", _NOT_HERE, "GHSA-p43p-whwx-q52h"),
    _get("an id of SQL", f"{REQUEST}/'%20OR%201=1--", _NOT_HERE, "GHSA-r75f-5x8p-qvmc"),
    _get("an id with a null character", f"{REQUEST}/a%00b", _NOT_HERE, "GHSA-r75f-5x8p-qvmc"),
    _get("an id of a lone surrogate", f"{REQUEST}/%ed%a0%80", _NOT_HERE, "own: id"),
    _get("an id of broken UTF-8", f"{REQUEST}/%ff%fe", _NOT_HERE, "own: id"),
    _get("an id with line breaks", f"{REQUEST}/a%0d%0aX-Injected:%201", _NOT_HERE, "own: id"),
    _get("an id of dots", f"{REQUEST}/../../machines", _NOT_HERE, "GHSA-j3mh-qmjj-xp83"),
    _get("an id of encoded dots", f"{REQUEST}/%2e%2e%2f%2e%2e%2fetc%2fpasswd", _NOT_HERE, "GHSA-j3mh-qmjj-xp83"),
    _get("an id of dots that are encoded twice", f"{REQUEST}/%252e%252e%252fetc", _NOT_HERE, "GHSA-j3mh-qmjj-xp83"),
    _get("an id of markup", f"{REQUEST}/%3Cscript%3Ealert(1)%3C%2Fscript%3E", _NOT_HERE, "GHSA-c4gm-pwx9-9w8j"),
    _get("an id of a template", f"{REQUEST}/%7B%7B7*7%7D%7D", _NOT_HERE, "GHSA-xqmj-j6mv-4862"),
    _get("a double slash", "//machines", _NOT_HERE),
    _get("a slash at the end", "/machines/", (307, 404)),
    _get("a slash and a host at the end", "//evil.example/machines/", _NOT_HERE, "GHSA-jp82-jpqv-5vv3"),
    _get("a semicolon", "/machines;x=1", _NOT_HERE),
    _get("another case", "/Machines", _NOT_HERE),
    _get("a backslash", "/promptingservice%5crequest", (404, 405)),
    _get("digits of another script", "/measurements/%D9%A7", _INVALID, "own: number"),
    _get("a measurement of 2^63", f"/measurements/{2**63}", _INVALID, "own: number"),
    _get("a measurement of 5000 digits", f"/measurements/{'9' * 5000}", _INVALID, "own: number"),
    _get("a measurement of 0", "/measurements/0", _INVALID, "own: number"),
    _get("a measurement below 0", "/measurements/-7", _INVALID, "own: number"),
    _get("a measurement with a fraction", "/measurements/7.5", _INVALID, "own: number"),
    _get("a measurement with an exponent", "/measurements/1e3", _INVALID, "own: number"),
    _get("a measurement with spaces", "/measurements/%207", (200, 422), "own: number"),
    _get("a page of 2^63", f"/measurements/7?after={2**63}", _INVALID, "own: query"),
    _get("a page below 0", "/measurements/7?after=-1", _INVALID, "own: query"),
    _get("a limit of 0", "/measurements/7?limit=0", _INVALID, "own: query"),
    _get("a limit of 10^9", "/measurements/7?limit=1000000000", _INVALID, "own: query"),
    _get("a limit twice", "/measurements/7?limit=1&limit=0", _INVALID, "own: query"),
    _get("windows after a place that nobody gave out", "/measurements/7/windows?after=AAAA", _INVALID, "own: query"),
    _get("windows after 1025 characters", f"/measurements/7/windows?after={'A' * 1025}", _INVALID, "own: query"),
    _get("windows after a null character", "/measurements/7/windows?after=%00", _INVALID, "own: query"),
    _get("windows of a request of SQL", "/measurements/7/windows?request='%20OR%201=1--", (200, 404), "GHSA-r75f-5x8p-qvmc"),
    _get("a report of an unknown form", "/measurements/7/report?format=xml", _INVALID, "own: query"),
    _get("a report for 10000 types", "/measurements/7/report", (200, 400, 431), "own: query", Accept=",".join(["a/b"] * 10_000)),
    _get("a wait of NaN", f"{REQUEST}/{{request}}?wait=NaN", _INVALID, "GHSA-7h4p-rffg-7823"),
    _get("a wait of infinity", f"{REQUEST}/{{request}}?wait=inf", _INVALID, "GHSA-7h4p-rffg-7823"),
    _get("a wait below 0", f"{REQUEST}/{{request}}?wait=-1", _INVALID, "own: query"),
    _get("a wait of 61 s", f"{REQUEST}/{{request}}?wait=61", _INVALID, "own: query"),
    _get("seen of an unknown word", f"{REQUEST}/{{request}}?wait=1&seen=x", _INVALID, "own: query"),
    _get("events after 2^63", f"{REQUEST}/{{request}}/events?after={2**63}", _INVALID, "own: query"),
    _get("5000 unknown parameters", "/machines?" + "&".join(f"a{n}=1" for n in range(5000)), (200, 400), "GHSA-82w8-qh3p-5jfq"),
    _get("a machine of dots", "/machines/..", _NOT_HERE, "GHSA-j3mh-qmjj-xp83"),
    _get("a machine of an address", "/machines/http:%2f%2f169.254.169.254", _NOT_HERE, "own: SSRF"),
    _get("static files", "/static/js/../../../../etc/passwd", _NOT_HERE, "GHSA-j3mh-qmjj-xp83"),
    _get("pages of FastAPI", "/docs", _NOT_HERE, "own: page"),
    _get("Ray's jobs", "/api/jobs/", _NOT_HERE, "GHSA-gx77-xgc2-4888"),
    Hostile("a job for Ray", "/api/jobs/", {"entrypoint": "id"}, _ROLE, "GHSA-q279-jhrf-cc6v"),
    Hostile("the end of Serve", "/api/serve/applications/", None, _ROLE, "GHSA-q5fh-2hc8-f6rq", "DELETE"),
    Hostile("Ollama's pull of a model", "/api/pull", {"model": "http://evil.example/x"}, _ROLE, "GHSA-93jv-pvg8-hf3v"),
    Hostile("Ollama's model by hand", "/api/create", {"model": "x", "files": {}}, _ROLE, "GHSA-x8qc-fggm-mpqg"),
    Hostile("Ollama's removal of a model", "/api/delete", {"model": "x"}, _ROLE, "GHSA-f6mr-38g8-39rg", "DELETE"),
    Hostile("LiteLLM's settings", "/config/update", {"environment_variables": {"A": "b"}}, _ROLE, "GHSA-53mr-6c8q-9789"),
    Hostile("LiteLLM's test of a server", "/mcp-rest/test/connection", {"command": "id"}, _ROLE, "GHSA-v4p8-mg3p-g94g"),
    Hostile("LiteLLM's test of a prompt", "/prompts/test", {"dotprompt_content": "{{ 7*7 }}"}, _ROLE, "GHSA-xqmj-j6mv-4862"),
    Hostile("LiteLLM's code of a guardrail", "/guardrails/test_custom_code", {"custom_code": "1"}, _ROLE, "GHSA-wxxx-gvqv-xp7p"),
    Hostile("JupyterHub's sharing of a server", "/hub/accept-share", b"code=x", (404, 415), "GHSA-m68r-v472-jgq9", headers=_FORM),
    Hostile("a transcription", "/v1/audio/transcriptions", b"x", (404, 415), "GHSA-v82g-2437-67m2", headers=(("Content-Type", "multipart/form-data; boundary=x"),)),
]  # fmt: skip

KEYS = [
    _as("no key", ""),
    _as("a key of another registry", f"Bearer gp_{'0' * 8}_{'x' * 43}"),
    _as("a key that begins like the client's", "Bearer {client:20}", source="GHSA-jjhc-v7c2-5hh6"),
    _as("the client's key without its end", "Bearer {client:-1}", source="GHSA-jjhc-v7c2-5hh6"),
    _as("the client's key with more", "Bearer {client}x", source="GHSA-jjhc-v7c2-5hh6"),
    _as("the client's key in capitals", "Bearer {CLIENT}", source="GHSA-wr9h-g72x-mwhm"),
    _as("the hash of the client's key", "Bearer {hash}", source="GHSA-69x8-hrgq-fjj8"),
    _as("a key of SQL", "Bearer ' OR 1=1 --", source="GHSA-r75f-5x8p-qvmc"),
    _as("a key of SQL in its form", f"Bearer gp_' OR '1_{'x' * 43}", source="GHSA-r75f-5x8p-qvmc"),
    _as("a key of 7000 characters", "Bearer " + "x" * 7000, source="GHSA-p43p-whwx-q52h"),
    _as("a key that is not ASCII", "Bearer gp_\xe4\xf6\xfc", source="own: key"),
    _as("a key of digits of another script", f"Bearer gp_{chr(0xB2) * 8}_{'x' * 43}"),
    _as("a key as user and password", _basic("{client}")),
    _as("a user and a password that are no base64", "Basic %%%", path="/get_status"),
    _as("a lease's token that nobody has", _basic("lease_none"), _ROLE, path="/get_status"),
    _as("a lease's token of SQL", _basic("' OR 1=1 --"), _ROLE, path="/get_status", source="GHSA-r75f-5x8p-qvmc"),
    _as("a lease's token of 5000 characters", _basic("x" * 5000), _ROLE, path="/get_status"),
    _as("a lease's token of a null character", _basic("\0"), _ROLE, path="/get_status"),
    _as("a token of spaces", "Bearer   ."),
    _as("a token of a JWT without a signature", "Bearer eyJhbGciOiJub25lIn0.eyJyb2xlIjoib3BlcmF0b3IifQ.", source="GHSA-7488-6r32-c95q"),
    _get("a key in the query", "/machines?api_key={client}", _KEY, "own: key", X_Caller=NO_KEY),
    _get("a key in another header", "/machines", _KEY, "own: key", X_Caller=NO_KEY, X_API_Key="{client}"),
    _get("a key in a cookie", "/machines", _KEY, "own: key", X_Caller=NO_KEY, Cookie="token={client}"),
    Hostile("two keys", "/machines", None, _KEY, "own: key", "GET", (("X-Caller", NO_KEY), ("Authorization", "Bearer {client}"), ("Authorization", "Bearer x"))),
    _get("a claim to be a trusted address", "/machines", _KEY, "own: address", X_Caller=NO_KEY, X_Forwarded_For="10.0.5.7"),
    _get("a client who asks for keys", "/keys", _ROLE, "GHSA-69x8-hrgq-fjj8"),
    _get("a client who asks for the audit", "/audit", _ROLE, "own: role"),
    Hostile("a client who makes an operator's key", "/keys", {"role": "operator", "name": "x"}, _ROLE, "GHSA-wpfp-gwwc-vwq6"),
    Hostile("a client who makes a client's key", "/keys", {"role": "client", "tenant": "lab", "name": "x"}, _ROLE, "GHSA-qrc4-49gv-mv9m"),
    _get("a host with an open path in it", "/machines", (400,), "GHSA-4xpc-pv4p-pm3w", X_Caller=NO_KEY, Host="127.0.0.1/healthz?"),
    Hostile("a client who revokes a key", "/keys/0a1b2c3d", None, _ROLE, "GHSA-7hp6-4w63-5g45", "DELETE", ()),
    Hostile("a client who drains a machine", "/machines/a/drain", None, _ROLE, "GHSA-q5fh-2hc8-f6rq", "POST", ()),
    Hostile("a client of another tenant", REQUEST, ASKED, _ROLE, "GHSA-mj6q-mp44-53v8", headers=(*JSON, ("X-Tenant", "rivals"))),
    Hostile("a tenant of 1000 characters", REQUEST, ASKED, (403, 422), "own: tenant", headers=(*JSON, ("X-Tenant", "t" * 1000))),
    Hostile("an Idempotency-Key of nothing", REQUEST, ASKED, _INVALID, "own: header", headers=(*JSON, ("Idempotency-Key", ""))),
    Hostile("an Idempotency-Key of 256 characters", REQUEST, ASKED, _INVALID, "own: header", headers=(*JSON, ("Idempotency-Key", "k" * 256))),
]  # fmt: skip

BROWSERS = [
    Hostile("a POST of another page", REQUEST, ASKED, _PAGE, "GHSA-m68r-v472-jgq9", headers=(*JSON, ("Origin", "http://evil.example"))),
    Hostile("a POST of a page of no origin", REQUEST, ASKED, _PAGE, "GHSA-m68r-v472-jgq9", headers=(*JSON, ("Origin", "null"))),
    Hostile("a POST of a page without CORS", REQUEST, ASKED, _PAGE, "GHSA-m68r-v472-jgq9", headers=(*_PLAIN, ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors"))),
    Hostile("a POST of a page of the same site", REQUEST, ASKED, _PAGE, "GHSA-m68r-v472-jgq9", headers=(*JSON, ("Sec-Fetch-Site", "same-site"))),
    Hostile("a POST of a page at another port", REQUEST, ASKED, _PAGE, "own: origin", headers=(*JSON, ("Origin", "http://127.0.0.1:1"))),
    Hostile("a POST of a page by its name", REQUEST, ASKED, _HOST, "GHSA-q279-jhrf-cc6v", headers=(*JSON, ("Host", "evil.example"), ("Origin", "http://evil.example"))),
    Hostile("a POST by a browser that hides it", REQUEST, ASKED, _HOST, "GHSA-q279-jhrf-cc6v", headers=(*JSON, ("Host", "evil.example"), ("User-Agent", "Other"))),
    Hostile("a DELETE of another page", "/machines/a/drain", None, _PAGE, "GHSA-q5fh-2hc8-f6rq", "DELETE", (("Origin", "http://evil.example"),)),
    Hostile("a DELETE by another name", "/machines/a/drain", None, _HOST, "GHSA-q5fh-2hc8-f6rq", "DELETE", (("Host", "evil.example"),)),
    _get("a GET by another name", "/machines", _HOST, "GHSA-q279-jhrf-cc6v", Host="evil.example"),
    _get("a GET by a name that ends like ours", "/machines", _HOST, "GHSA-q279-jhrf-cc6v", Host="localhost.evil.example"),
    _get("a GET by a number that is an address", "/machines", (400, 421), "GHSA-q279-jhrf-cc6v", Host="2130706433"),
    Hostile("a form to the keys", "/keys", b"role=operator", (415,), "GHSA-82w8-qh3p-5jfq", headers=_FORM),
    Hostile("an upload to the keys", "/keys", b"--x--", (415,), "GHSA-2c2j-9gv5-cj73", headers=(("Content-Type", "multipart/form-data; boundary=x"),)),
    Hostile("a form of 100000 fields", REQUEST, b"a=1&" * 100_000, _INVALID, "GHSA-82w8-qh3p-5jfq", headers=_FORM),
    Hostile("an upload of 2 MB", REQUEST, b"--x\r\n\r\n" + b"a" * 2_000_000 + b"\r\n--x--", _INVALID, "GHSA-2c2j-9gv5-cj73", headers=(("Content-Type", "multipart/form-data; boundary=x"),)),
    Hostile("a preflight of another page", REQUEST, None, (405,), "own: CORS", "OPTIONS", (("Origin", "http://evil.example"), ("Access-Control-Request-Method", "DELETE"))),
]  # fmt: skip

ROWS = [*BODIES, *PATHS, *KEYS, *BROWSERS]
