"""Hostile HTTP: bytes that two programs may parse differently, or that only use up resources."""

# ruff: noqa: E501 - a row is a line

from __future__ import annotations

from dataclasses import dataclass

CLOSED = 0
"""No answer: the connection is closed, or the server waits for more."""

LONG = 200_000


@dataclass(frozen=True)
class Bytes:
    """What is sent on a connection, and which status comes first.

    ``{host}`` is the server's own address. ``direct``: allowed statuses of the ingress; ``behind``: those of HAProxy as
    Serve runs it, with the ingress behind it. ``answers``: at most so many answers come on the connection. ``rests_s``:
    longest time until nothing is left, seconds; above 5 where HAProxy keeps a request until its client's timeout.
    """

    name: str
    sent: bytes
    direct: tuple[int, ...]
    behind: tuple[int, ...]
    source: str = "own: HTTP"
    answers: int = 1
    rests_s: float = 5.0


def _get(line: str = "GET /healthz HTTP/1.1", *headers: str, host: bool = True) -> bytes:
    lines = [line, *(["Host: {host}"] if host else []), *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _post(body: str, *headers: str) -> bytes:
    return _get("POST /promptingservice/request HTTP/1.1", *headers) + body.encode()


_HIDDEN = "DELETE /machines/a/drain HTTP/1.1\r\nHost: {host}\r\n\r\n"
_OK, _BAD, _REFUSED = (200,), (400,), (400, CLOSED)
_NO_LIMIT = (200, CLOSED)
"""uvicorn's parser (httptools) has no limit of headers. Serve's replicas are reached through HAProxy, which has one."""
_SMUGGLED = "own: request smuggling"

ROWS = [
    Bytes("an ordinary request", _get(), _OK, _OK),
    Bytes("Content-Length and Transfer-Encoding", _post("0\r\n\r\n" + _HIDDEN, "Content-Length: 5", "Transfer-Encoding: chunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("Transfer-Encoding and Content-Length", _post("0\r\n\r\n" + _HIDDEN, "Transfer-Encoding: chunked", "Content-Length: 5"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("two Content-Lengths", _post("{}" + _HIDDEN, "Content-Length: 2", "Content-Length: 60"), _BAD, _BAD, _SMUGGLED),
    Bytes("two Content-Lengths in a list", _post("{}", "Content-Length: 2, 60"), _BAD, _BAD, _SMUGGLED),
    Bytes("a Content-Length with a sign", _post("{}", "Content-Length: +2"), _BAD, _BAD, _SMUGGLED),
    Bytes("a Content-Length below 0", _post("{}", "Content-Length: -2"), _BAD, _BAD, _SMUGGLED),
    Bytes("a Content-Length in hex", _post("{}", "Content-Length: 0x2"), _BAD, _BAD, _SMUGGLED),
    Bytes("a Content-Length of 30 digits", _post("{}", "Content-Length: " + "9" * 30), (400, 413), (400, 413), _SMUGGLED),
    Bytes("a Content-Length above the limit", _post("{}", "Content-Length: 99999999"), (413,), (413,)),
    Bytes("an unknown Transfer-Encoding", _post("{}", "Transfer-Encoding: xchunked"), (400, 422), (400, 422, 501), _SMUGGLED),
    Bytes("a Transfer-Encoding twice", _post("0\r\n\r\n" + _HIDDEN, "Transfer-Encoding: chunked", "Transfer-Encoding: identity"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a Transfer-Encoding with a tab", _post("0\r\n\r\n", "Transfer-Encoding:\tchunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a Transfer-Encoding with a vertical tab", _post("0\r\n\r\n", "Transfer-Encoding: \x0bchunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a space before the colon", _post("0\r\n\r\n", "Transfer-Encoding : chunked"), (400, 422), _BAD, _SMUGGLED),
    Bytes("a chunk with an extension", _post("2;a=b\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a chunk with an extension of a line feed", _post("2;\n{}\r\n0\r\n\r\n" + _HIDDEN, "Transfer-Encoding: chunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a chunk with an extension of 200 kB", _post("2;" + "a" * LONG + "\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), (400, 413, 422), _REFUSED, rests_s=15.0),
    Bytes("a chunk of a negative size", _post("-2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a chunk of a size of 17 digits", _post("fffffffffffffffff\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a chunk of a size with 0x", _post("0x2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a chunk that ends without a line", _post("2\r\n{}XX0\r\n\r\n", "Transfer-Encoding: chunked"), (400, 422), (400, 422), "GHSA-vqfr-h8mv-ghfj"),
    Bytes("a trailer that is a header", _post("2\r\n{}\r\n0\r\nAuthorization: Bearer x\r\n\r\n", "Transfer-Encoding: chunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("a body of a GET that is a request", _get("GET /healthz HTTP/1.1", f"Content-Length: {len(_HIDDEN)}") + _HIDDEN.encode(), _OK, _OK, _SMUGGLED),
    Bytes("two hosts", _get("GET /healthz HTTP/1.1", "Host: evil.example"), _BAD, _BAD, "GHSA-86qp-5c8j-p5mr"),
    Bytes("two equal hosts", _get("GET /healthz HTTP/1.1", "Host: {host}"), _BAD, (200, 400), "GHSA-86qp-5c8j-p5mr"),
    Bytes("no host", _get(host=False), _OK, _OK),
    Bytes("no host and a change", _get("POST /machines/a/drain HTTP/1.1", host=False), _BAD, _BAD, "GHSA-86qp-5c8j-p5mr"),
    Bytes("an empty host", _get("GET /healthz HTTP/1.1", "Host: ", host=False), _BAD, _BAD, "GHSA-86qp-5c8j-p5mr"),
    Bytes("a host with a path", _get("GET /machines HTTP/1.1", "Host: {host}/healthz?", host=False), _BAD, _BAD, "GHSA-86qp-5c8j-p5mr"),
    Bytes("a host with a user", _get("GET /machines HTTP/1.1", "Host: a@{host}", host=False), _BAD, _BAD, "GHSA-86qp-5c8j-p5mr"),
    Bytes("a host of 200 kB", _get("GET /healthz HTTP/1.1", "Host: " + "a" * LONG, host=False), _REFUSED, _REFUSED, "GHSA-rxc4-3w6r-4v47"),
    Bytes("another host in the line", _get("GET http://evil.example/healthz HTTP/1.1"), (200, 400, 404), _BAD, "GHSA-86qp-5c8j-p5mr"),
    Bytes("the own host in the line", _get("GET http://{host}/healthz HTTP/1.1"), (200, 404), _OK),
    Bytes("a path that begins with a host", _get("GET @evil.example/healthz HTTP/1.1"), (400, 404), _BAD, "GHSA-jp82-jpqv-5vv3"),
    Bytes("a path of two slashes and a host", _get("GET //evil.example/healthz HTTP/1.1"), (404,), (404,), "GHSA-jp82-jpqv-5vv3"),
    Bytes("a path of a UNC name", _get("GET \\\\evil.example\\share HTTP/1.1"), (400, 404), (400, 404), "GHSA-wqp7-x3pw-xc5r"),
    Bytes("CONNECT", _get("CONNECT evil.example:443 HTTP/1.1"), (400, 403, 404, 405, 421), (400, 403, 404, 405, 421), "own: proxy"),
    Bytes("TRACE", _get("TRACE /healthz HTTP/1.1"), (404, 405), (404, 405), "own: proxy"),
    Bytes("a method in lower case", _get("get /healthz HTTP/1.1"), (400, 405), (400, 405), "GHSA-x746-7m8f-x49c"),
    Bytes("a method of an attribute", _get("__init__ /healthz HTTP/1.1"), (400, 405), (400, 405), "GHSA-x746-7m8f-x49c"),
    Bytes("a method of 200 kB", _get("A" * LONG + " /healthz HTTP/1.1"), _REFUSED, _REFUSED),
    Bytes("a method override", _get("GET /machines/a/drain HTTP/1.1", "X-HTTP-Method-Override: DELETE"), (405,), (405,)),
    Bytes("a method override of a POST", _get("POST /healthz HTTP/1.1", "X-HTTP-Method-Override: GET", "Content-Length: 0"), (405,), (405,)),
    Bytes("a folded header", _get("GET /healthz HTTP/1.1", "X-A: b\r\n c"), (200, 400), (200, 400), _SMUGGLED),
    Bytes("a folded Transfer-Encoding", _post("0\r\n\r\n" + _HIDDEN, "Transfer-Encoding:\r\n chunked"), (400, 422), (400, 422), _SMUGGLED),
    Bytes("line feeds alone", b"GET /healthz HTTP/1.1\nHost: {host}\nConnection: close\n\n", (200, 400), (200, 400), _SMUGGLED),
    Bytes("a carriage return alone", b"GET /healthz HTTP/1.1\rHost: {host}\r\r", (400, CLOSED), (400, CLOSED), _SMUGGLED),
    Bytes("a null byte in the path", _get("GET /health\0z HTTP/1.1"), _BAD, _BAD),
    Bytes("a null byte in a header", _get("GET /healthz HTTP/1.1", "X-A: b\0c"), _BAD, _BAD),
    Bytes("a null byte in the name of a header", _get("GET /healthz HTTP/1.1", "X\0A: b"), _BAD, _BAD),
    Bytes("a header without a name", _get("GET /healthz HTTP/1.1", ": b"), _BAD, _BAD),
    Bytes("a header without a colon", _get("GET /healthz HTTP/1.1", "Authorization"), _BAD, _BAD),
    Bytes("a header of bytes above 127", _get("GET /healthz HTTP/1.1", "X-A: \xff\xfe"), (200, 400), (200, 400)),
    Bytes("a header of 200 kB", _get("GET /healthz HTTP/1.1", "X-Forwarded-For: " + "A" * LONG), _NO_LIMIT, _REFUSED, "GHSA-rxc4-3w6r-4v47"),
    Bytes("5000 headers", _get("GET /healthz HTTP/1.1", *(f"X-{number}: b" for number in range(5000))), _NO_LIMIT, _REFUSED, "GHSA-rxc4-3w6r-4v47"),
    Bytes("a path of 200 kB", _get("GET /" + "a" * LONG + " HTTP/1.1"), (400, 404, 414, CLOSED), _REFUSED),
    Bytes("HTTP/0.9", b"GET /healthz\r\n\r\n", (200, 400, CLOSED), _BAD),
    Bytes("HTTP/1.0", b"GET /healthz HTTP/1.0\r\n\r\n", _OK, _OK),
    Bytes("HTTP/3.7", _get("GET /healthz HTTP/3.7"), (200, 400), (200, 400)),
    Bytes("HTTP/2 without an upgrade", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", _REFUSED, _REFUSED),
    Bytes("an upgrade to HTTP/2", _get("GET /healthz HTTP/1.1", "Upgrade: h2c", "HTTP2-Settings: AAAA"), _OK, _OK, _SMUGGLED),
    Bytes("an upgrade to a WebSocket", _get("GET /healthz HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13"), (200, 400, 403, 404, 500), (200, 400, 403, 404, 500)),
    Bytes("TLS on a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"A" * 500, _REFUSED, _REFUSED),
    Bytes("random bytes", bytes(range(256)) * 4 + b"\r\n\r\n", _REFUSED, _REFUSED),
    Bytes("an Expect that nobody knows", _post("{}", "Expect: 42-perhaps", "Content-Length: 2"), (417, 422), (417, 422)),
    Bytes("a Range of 5000 parts", _get("GET /openapi.json HTTP/1.1", "Range: bytes=" + ",".join(f"{n}-" for n in range(3000))), _OK, (200, 400, CLOSED), "GHSA-7f5h-v6xp-fcq8"),
    Bytes("a body that is compressed", _post("\x1f\x8b\x08", "Content-Encoding: gzip", "Content-Length: 3"), (415, 422), (415, 422)),
    Bytes("3 requests at once, the second invalid", _get("GET /healthz HTTP/1.1").replace(b"Connection: close\r\n", b"") + b"GET\r\n\r\n" + _get(), (200, 400), _OK, answers=2),
]  # fmt: skip
