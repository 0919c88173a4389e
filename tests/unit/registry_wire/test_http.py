"""The HTTP client of our own programs, in surroundings that are not friendly."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import certifi
import httpx
import pytest

from registry.errors import BadSettings
from registry.wire.http import LOOPBACK, http_client, is_loopback


class _Says(BaseHTTPRequestHandler):
    """Answers every GET with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def port() -> Iterator[int]:
    """A server on the loopback interface."""
    with HTTPServer(("127.0.0.1", 0), _Says) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize("host", [*LOOPBACK, "127.1.2.3", "0:0:0:0:0:0:0:1"])
def test_this_machine(host: str) -> None:
    """Every loopback address is this machine: a registry there needs no keys, and its statistics stay there, too."""
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "10.0.0.1", "127.1", "localhost.example", "::ffff:10.0.0.1"])
def test_another_machine(host: str) -> None:
    """Whatever may be another machine, or all interfaces of this one, is not loopback."""
    assert not is_loopback(host)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense"])
def test_no_proxy_is_asked_for_this_machine(port: int, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str) -> None:
    """A registry on the loopback interface is reached directly, whatever proxy the environment names."""
    monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    with http_client(f"http://127.0.0.1:{port}/", timeout_s=5) as client:
        assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE: can't be used"),
        ("ALL_PROXY", "socks5://127.0.0.1:9", "ALL_PROXY: Using SOCKS proxy"),
        ("HTTPS_PROXY", "ftp://proxy:1", "HTTPS_PROXY"),
    ],
)
def test_what_can_not_be_used_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str) -> None:
    """A variable that stands in the way is an error of one line with its name."""
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as caught:
        http_client("http://registry.example:8000", timeout_s=5)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_certificates_that_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that holds no certificates is named."""
    (tmp_path / "ca.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(BadSettings, match="SSL_CERT_FILE"):
        http_client("https://registry.example", timeout_s=5)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("none.pem", None, "can't be read: No such file or directory"),
        ("ca.pem", "no certificate", "has no certificates"),
        ("ca.pem", "", "has no certificates"),
    ],
)
def test_a_ca_file_that_is_none(tmp_path: Path, name: str, text: str | None, problem: str) -> None:
    """The file is named, before anything is sent; for this machine's addresses, too."""
    if text is not None:
        (tmp_path / name).write_text(text)
    for url in ("https://registry.example", "http://127.0.0.1:8000"):
        with pytest.raises(BadSettings, match=re.escape(f"{name}: {problem}")):
            http_client(url, timeout_s=5, ca_file=tmp_path / name)


@pytest.mark.parametrize(
    ("code", "message", "said"),
    [
        (18, "self-signed certificate", "GREENPROMPT_CA_FILE"),
        (20, "unable to get local issuer certificate", "GREENPROMPT_CA_FILE"),
        (62, "Hostname mismatch, certificate is not valid for 'x'.", "for 'x'; use a name that the certificate has"),
        (10, "certificate has expired", "certificate has expired"),
    ],
)
def test_a_refused_certificate_has_its_remedy(
    monkeypatch: pytest.MonkeyPatch, code: int, message: str, said: str
) -> None:
    """The error names the server and the reason, and what helps against that."""

    def refuse(*_: object, **__: object) -> httpx.Response:
        cause = ssl.SSLCertVerificationError(1, message)
        cause.verify_code, cause.verify_message = code, message
        below = ConnectionError(message)
        below.__context__ = cause  # as httpcore leaves it
        raise httpx.ConnectError(message) from below

    with http_client("https://registry.example:8443", timeout_s=5) as client:
        monkeypatch.setattr(client._transport, "handle_request", refuse)
        with pytest.raises(BadSettings, match=r"^https://registry\.example:8443: its certificate is not") as caught:
            client.get("https://token:x@registry.example:8443/wrappers/s3cret")
    assert str(caught.value).endswith(said) or said in str(caught.value).partition("; ")[2]
    assert "s3cret" not in str(caught.value)
    assert "token" not in str(caught.value)


@pytest.mark.parametrize("below", [None, ConnectionError("refused"), ConnectionError("its context has one")])
def test_an_earlier_problem_is_not_the_reason(monkeypatch: pytest.MonkeyPatch, below: Exception | None) -> None:
    """A connection that fails after a problem with certificates was dealt with stays a failed connection."""

    def fail(*_: object, **__: object) -> httpx.Response:
        try:
            raise ssl.SSLCertVerificationError(1, "an earlier attempt")
        except ssl.SSLCertVerificationError as earlier:
            if below is not None and "context" in str(below):
                below.__context__ = ConnectionRefusedError()
                below.__context__.__context__ = earlier
            raise httpx.ConnectError("refused") from below

    with http_client("https://registry.example:8443", timeout_s=5) as client:
        monkeypatch.setattr(client._transport, "handle_request", fail)
        with pytest.raises(httpx.ConnectError, match="refused"):
            client.get("/machines")


def test_a_ca_file_needs_https() -> None:
    """With http nothing is encrypted, so a key is not sent; on this machine nobody can read it on the way."""
    ca_file = Path(certifi.where())
    with pytest.raises(BadSettings, match=r"has no use with http://registry\.example:8000, .*; use the .* https URL"):
        http_client("http://registry.example:8000", timeout_s=5, ca_file=ca_file)
    for url in ("https://registry.example", "https://127.0.0.1", "http://127.0.0.1:8000", "http://localhost:8000"):
        http_client(url, timeout_s=5, ca_file=ca_file).close()


def test_https_is_not_left(port: int) -> None:
    """A client of an https URL sends nothing to an http URL; the error names the setting, and no token."""
    with (
        http_client("https://127.0.0.1:1", timeout_s=5) as client,
        pytest.raises(BadSettings, match=rf"^http\.public_url: .* http://127\.0\.0\.1:{port}; set it") as caught,
    ):
        client.get(f"http://127.0.0.1:{port}/wrappers/a-0/s3cret")
    assert "s3cret" not in str(caught.value)
    with http_client(f"http://127.0.0.1:{port}", timeout_s=5) as client:
        assert client.get(f"http://127.0.0.1:{port}/").status_code == 200


@pytest.mark.parametrize("url", ["registry.example:8000", "", "ftp://x", "http://"])
def test_no_base_url(url: str) -> None:
    """What is no base URL is an error that shows one."""
    with pytest.raises(BadSettings, match=r"as in http://127\.0\.0\.1:8000"):
        http_client(url, timeout_s=5)
