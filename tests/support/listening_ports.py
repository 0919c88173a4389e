"""The TCP ports on which processes listen."""

from __future__ import annotations

import psutil


def listening_ports(*processes: psutil.Process) -> set[int]:
    """The TCP ports on which these processes listen. Raises psutil.NoSuchProcess if one has ended."""
    connections = [each for process in processes for each in process.net_connections("tcp")]
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
