"""The installed vLLM loads only the media of prompts that the operator allows."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deployments.engine.media import CLOSED, MediaLimits
from deployments.engine.vllm_api import register_connector

pytestmark = pytest.mark.vllm


def png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


class Site:
    """A site at 127.0.0.1 with an image at /image and a redirect to it at /redirect; ``asked`` are the requests."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        site, image = self, png()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                redirect = self.path == "/redirect"
                body = b"" if redirect else image
                self.send_response(302 if redirect else 200)
                self.send_header("Content-Length", str(len(body)))
                if redirect:
                    self.send_header("Location", "/image")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site() -> Iterator[Site]:
    """The site, running."""
    site = Site()
    thread = threading.Thread(target=lambda: site.server.serve_forever(poll_interval=0.01))
    thread.start()
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


def connector(limits: MediaLimits, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the connector that vLLM's chat endpoint would use."""
    for name, value in limits.variables.items():
        monkeypatch.setenv(name, value)
    import vllm.envs
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

    register_connector(limits)
    loaded = MEDIA_CONNECTOR_REGISTRY.load(vllm.envs.VLLM_MEDIA_CONNECTOR, allowed_media_domains=limits.domains)
    from vllm.connections import HTTPConnection

    loaded.connection = HTTPConnection()
    return loaded


async def test_no_connection_is_opened(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default URLs are refused as the client's error, whatever kind of media; the site is not asked."""
    from vllm.exceptions import VLLMClientError

    media = connector(CLOSED, monkeypatch)
    for url in (f"{site.url}/image", "file:///etc/passwd"):
        for load in (media.fetch_image, media.fetch_audio, media.fetch_video):
            with pytest.raises(VLLMClientError, match="send their content as a data: URL"):
                load(url)
        for load in (media.fetch_image_async, media.fetch_audio_async, media.fetch_video_async):
            with pytest.raises(VLLMClientError, match="send their content as a data: URL"):
                await load(url)
    assert site.asked == []


async def test_vllm_itself_refuses_other_hosts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument that engines are given closes vLLM's own connector, too."""
    from vllm.multimodal.media import MediaConnector

    with pytest.raises(ValueError, match="one of the allowed domains"):
        await MediaConnector(allowed_media_domains=CLOSED.domains).fetch_image_async(f"{site.url}/image")
    assert site.asked == []


async def test_content_in_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data: URL is loaded, up to the limit."""
    from vllm.exceptions import VLLMClientError

    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    media = connector(MediaLimits(most_bytes=len(url)), monkeypatch)
    assert media.fetch_image(url).size == (4, 4)
    assert (await media.fetch_image_async(url)).size == (4, 4)
    with pytest.raises(VLLMClientError, match="send a smaller one"):
        await connector(MediaLimits(most_bytes=len(url) - 1), monkeypatch).fetch_image_async(url)


async def test_an_allowed_host(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its media are loaded, but no redirect is followed, even to the same host."""
    media = connector(MediaLimits(("127.0.0.1",)), monkeypatch)
    assert (await media.fetch_image_async(f"{site.url}/image")).size == (4, 4)
    with pytest.raises(ValueError, match="cannot identify image"):
        media.fetch_image(f"{site.url}/redirect")
    with pytest.raises(ValueError, match="cannot identify image"):
        await media.fetch_image_async(f"{site.url}/redirect")
    assert site.asked == ["/image", "/redirect", "/redirect"]
    await (await media.connection.get_async_client()).close()
