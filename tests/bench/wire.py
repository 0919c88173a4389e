"""A client cheap enough not to be what is measured: HTTP/1.1 over one connection that stays open."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit


class Connection:
    """One connection to one server, made when it is needed; one call at a time."""

    def __init__(self, url: str) -> None:
        """``url`` as in ``http://127.0.0.1:8000``; what comes after the port is not used."""
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def call(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            OSError, EOFError: the connection could not be made, or broke; the next call makes a new one.
        """
        try:
            return await self._answer(await self._send(method, path, body, headers))
        except BaseException:  # cancelled, too: what is left of the answer must not be taken for the next one
            self.close()
            raise

    async def stream(self, method: str, path: str, body: bytes) -> AsyncIterator[tuple[float, bytes]]:
        """The chunks of an answer that comes in chunks, each with the second (perf_counter) of its arrival.

        Raises:
            UnexpectedAnswer: it is no success.
            OSError, EOFError: as for ``call``.
        """
        try:
            reader = await self._send(method, path, body, None)
            head = await reader.readuntil(b"\r\n\r\n")
            status, headers = _parsed(head)
            if status != 200 or "transfer-encoding" not in headers:
                raise UnexpectedAnswer(status, await reader.readexactly(int(headers.get("content-length", 0))))
            async for chunk in _chunks(reader):
                yield time.perf_counter(), chunk
        except BaseException:
            self.close()
            raise

    async def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None
    ) -> asyncio.StreamReader:
        lines = [f"{method} {path} HTTP/1.1", f"host: {self._host}:{self._port}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body:
            lines.append("content-type: application/json")
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        return reader

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        status, headers = _parsed(await reader.readuntil(b"\r\n\r\n"))
        if "transfer-encoding" in headers:
            answer = b"".join([chunk async for chunk in _chunks(reader)])
        elif "content-length" in headers or status == HTTPStatus.NO_CONTENT:
            answer = await reader.readexactly(int(headers.get("content-length", 0)))
        else:  # its end is the connection's
            answer = await reader.read()
            self.close()
        if headers.get("connection", "").lower() == "close":
            self.close()
        return status, answer

    async def json(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of an answer that must be a success (None: it has no body). Raises UnexpectedAnswer."""
        status, answer = await self.call(method, path, b"" if body is None else json.dumps(body).encode())
        if not 200 <= status < 300:
            raise UnexpectedAnswer(status, answer)
        return json.loads(answer) if answer else None


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of an answer's body (RFC 9112, 7.1), each as it arrives; trailers are not expected."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status_line.split(" ", 2)[1]), headers


class UnexpectedAnswer(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, answer: bytes) -> None:
        super().__init__(status, answer)
        self.status, self.answer = status, answer

    def __str__(self) -> str:
        return f"HTTP {self.status}: {self.answer.decode(errors='replace')[:500]}"
