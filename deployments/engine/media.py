"""Decides which images, audio and video of prompts vLLM may load: none by URL, unless the operator allows its host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

CONNECTOR: Final = "greenprompt"
"""Name of our class in vLLM's registry of media connectors."""

_NO_HOST: Final = " "


# D123: prompts make no machine open a connection
@dataclass(frozen=True, slots=True)
class MediaLimits:
    """The media that prompts may contain.

    ``hosts``: vLLM may load media from http(s) URLs of these hosts, at any port. ``most_bytes``: largest data: URL, and
    largest download.
    """

    hosts: tuple[str, ...] = ()
    most_bytes: int = 32 * 2**20

    def problem(self, url: str) -> str | None:
        """Return why media may not be loaded from a URL; None if they may."""
        from urllib3.exceptions import LocationParseError
        from urllib3.util import parse_url  # as vLLM reads it: another parser might see another host

        if url[:5].lower() == "data:":
            if len(url) <= self.most_bytes:
                return None
            return (
                f"a data: URL has {len(url):,} bytes, and at most {self.most_bytes:,} are allowed; send a smaller one"
            )
        try:
            parts = parse_url(url)
        except LocationParseError:
            return "a URL of an image, audio or video can't be read; send its content as a data: URL"
        if parts.scheme in ("http", "https") and parts.hostname in self.hosts:
            return None
        allowed = f"; http and https URLs are allowed from these hosts: {', '.join(self.hosts)}" if self.hosts else ""
        return f"images, audio and video are not loaded from this URL; send their content as a data: URL{allowed}"

    @property
    def domains(self) -> list[str]:
        """The engine argument ``allowed_media_domains``. Never empty: vLLM takes an empty list as all hosts."""
        return list(self.hosts) or [_NO_HOST]

    @property
    def variables(self) -> Mapping[str, str]:
        """Environment variables for vLLM: connector, size limit, no redirects. A redirect could lead to any host."""
        return {
            "VLLM_MEDIA_CONNECTOR": CONNECTOR,
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
            "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": str(-(-self.most_bytes // 2**20)),
        }


CLOSED: Final = MediaLimits()
"""No media by URL."""
