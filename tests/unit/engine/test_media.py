"""Which images, audio and video of prompts may be loaded."""

from __future__ import annotations

import pytest

from deployments.engine.media import CLOSED, MediaLimits

LIMITS = MediaLimits(("images.example.com", "192.0.2.7"), most_bytes=100)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,AAAA",
        "DATA:image/png;base64,AAAA",
        "http://images.example.com/a.png",
        "https://images.example.com:8443/a.png",
        "HTTPS://Images.Example.com/a.png",
        "http://192.0.2.7/a.png",
        "data:" + "A" * 95,
    ],
)
def test_media_that_may_be_loaded(url: str) -> None:
    """Content in the prompt itself, and URLs of the hosts that the operator allows."""
    assert LIMITS.problem(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:8265/api/jobs/",
        "http://other.example.com/a.png",
        "http://images.example.com.evil.example/a.png",
        "http://evil.example/images.example.com",
        "http://images.example.com@evil.example/a.png",
        "http://evil.example\\@images.example.com/a.png",
        "http://evil.example#@images.example.com/a.png",
        "http://images.example.com./a.png",
        "http://images.example.com%2eevil.example/a.png",
        "http:///a.png",
        "http://[::1]/a.png",
        "http://[",
        "httpx://images.example.com/a.png",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file://images.example.com/etc/passwd",
        "ftp://images.example.com/a.png",
        "/etc/passwd",
        " data:image/png;base64,AAAA",
        "\thttp://evil.example/a.png",
        "",
    ],
)
def test_media_that_may_not_be_loaded(url: str) -> None:
    """Other hosts, also in disguise; files of the machine; and whatever is no URL."""
    problem = LIMITS.problem(url)
    assert problem is not None
    assert "data: URL" in problem


def test_by_default_no_host_is_allowed() -> None:
    """A prompt makes no LLM Machine open a connection. vLLM is given no empty list, which it would take as all."""
    for url in ("http://images.example.com/a.png", "https://localhost/a.png", "http:///a.png", "file:///etc/passwd"):
        assert CLOSED.problem(url) is not None
    assert CLOSED.problem("data:image/png;base64,AAAA") is None
    assert CLOSED.domains == [" "]
    assert LIMITS.domains == ["images.example.com", "192.0.2.7"]


def test_a_large_data_url_is_refused() -> None:
    """The error says its size and the limit."""
    problem = LIMITS.problem("data:" + "A" * 96)
    assert problem == "a data: URL has 101 bytes, and at most 100 are allowed; send a smaller one"


def test_redirects_are_not_followed() -> None:
    """An allowed host could lead to any other. Downloads have the limit of data: URLs, in whole MiB."""
    assert LIMITS.variables["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert LIMITS.variables["VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"] == "1"
    assert CLOSED.variables["VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"] == "32"
