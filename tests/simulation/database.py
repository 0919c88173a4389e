"""The database of the simulations, and what of a registry's memory differs from it."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete

from registry.core.decision import Snapshot
from registry.store.migrations.tables import METADATA
from registry.store.store import Store


@cache
def connection() -> Connection:
    """Return the database of all simulations in this process. Opening one takes longer than most simulations."""
    path = Path(tempfile.mkdtemp(prefix="simulation-")) / "registry.db"
    Finalize(None, shutil.rmtree, (path.parent,), exitpriority=0)  # atexit does not run in a pool's processes
    connection = Store.open(f"sqlite:///{path}")._connection
    driver: Any = connection.connection.driver_connection
    driver.execute("PRAGMA synchronous = OFF")  # power does not fail in a simulation
    return connection


def forget_everything() -> None:
    with connection().begin():
        for table in reversed(METADATA.sorted_tables):
            connection().execute(delete(table))


def _parts(snapshot: Snapshot) -> dict[str, dict[Any, Any]]:
    """Return the records by kind and id."""
    return {
        "machines": {machine.machine_id: machine for machine in snapshot.machines},
        "wrappers": {wrapper.wrapper_id: wrapper for wrapper in snapshot.wrappers},
        "measurements": {measurement.key: measurement for measurement in snapshot.measurements},
        "requests": {request.request_id: request for request in snapshot.requests},
        "leases": {lease.request_id: lease for lease in snapshot.leases},
    }


def difference(store: Store, known: Snapshot) -> str | None:
    """Return the first record that differs between database and memory, None if there is none.

    All records in memory must be in the database, and all records of unfinished requests in memory.
    """
    written, needed = _parts(store.load()), _parts(store.load(ended=False))
    for kind, records in _parts(known).items():
        for key in records.keys() | needed[kind].keys():
            if records.get(key) != written[kind].get(key):
                return f"{kind} {key}: {written[kind].get(key)} is written, {records.get(key)} is known"
    return None
