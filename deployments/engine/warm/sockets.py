"""Lets engines of a second user connect to the sockets that vLLM creates in the wrapper."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from deployments.machine.second_user import SecondUser


def hand_sockets_over(folder: Path, user: SecondUser) -> None:
    """Make every Unix socket that ZeroMQ creates in ``folder``, from now on, belong to ``user``.

    Only the owner of a socket, and root, can connect to it. No other user may be able to write to the folder.
    An engine that tries to connect before the change is refused; ZeroMQ tries again.
    """
    from vllm.utils.network_utils import zmq  # the one that vLLM creates sockets with

    bind, start = zmq.Socket.bind, f"ipc://{folder}/"

    @functools.wraps(bind)
    def bound(self: Any, addr: str) -> Any:
        context = bind(self, addr)
        if addr.startswith(start):
            os.chown(addr.removeprefix("ipc://"), user.uid, -1, follow_symlinks=False)
        return context

    zmq.Socket.bind = bound
