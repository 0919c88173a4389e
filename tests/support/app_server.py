"""Serves an ASGI app with uvicorn on a free port of 127.0.0.1, in a thread of its own or in the test's event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn

END_S = 10.0
"""Longest wait for the end of a server's thread, seconds."""


@contextmanager
def served_in_thread(app: Any, **config: Any) -> Iterator[tuple[uvicorn.Server, int]]:
    """Serve an app in a thread; yield the server and its port. ``config`` is for ``uvicorn.Config``."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = _server(app, config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield server, listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(END_S)


@asynccontextmanager
async def served(app: Any, **config: Any) -> AsyncIterator[int]:
    """Serve an app in this event loop; yield its port. At the end, open connections are closed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = _server(app, config)
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


def _server(app: Any, config: dict[str, Any]) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, lifespan="off", **{"log_level": "critical"} | config))
