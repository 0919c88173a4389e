"""The revision that replaces the tokens of leases by their hashes."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from alembic import command
from sqlalchemy import NullPool, create_engine, text

from registry.core.records import Lease
from registry.service.lease_tokens import LeaseTokens
from registry.store.database import migration_config
from registry.store.store import Store
from tests.support.database_contents import contents_of

TOKEN = "lease_of-a-release-that-stored-tokens"

ROWS = (
    "INSERT INTO machines (machine_id, node_id, address, alive, gpus) VALUES ('m', 'n', '10.0.0.1', true, 0)",
    (
        "INSERT INTO wrappers (wrapper_id, machine_id, url, gpus, status, epoch, last_used_s, failures)"
        " VALUES ('w', 'm', 'http://10.0.0.1:8000/wrappers/w', 0, 'leased', 3, 1.0, 0)"
    ),
    (
        "INSERT INTO measurements (measurement_id, seq, tenant, priority, flags, created_s)"
        " VALUES (7, 1, 'lab', 'normal', '[]', 1.0)"
    ),
    (
        "INSERT INTO requests (request_id, measurement_id, seq, spec, llmconfig, status, notes, failed_on, overtaken,"
        " created_s, tenant) VALUES ('r', 7, 1, '{}', '{}', 'deployed', '[]', '[]', 0, 1.0, 'lab')"
    ),
    f"INSERT INTO leases VALUES ('r', 'w', '{TOKEN}', 1.0, 2.0, 3.0, 4.0)",
)


def test_stored_tokens_become_hashes(database_url: str, tmp_path: Path) -> None:
    """The lease is there with the hash of its token, and without the token; it ends at the next start."""
    (tmp_path / "state").mkdir()
    with create_engine(database_url, poolclass=NullPool).begin() as connection:
        command.upgrade(migration_config(connection), "0012")
        for row in ROWS:
            connection.exec_driver_sql(row)
    assert TOKEN.encode() in contents_of(database_url)
    store = Store.open(database_url)
    with store._transaction() as connection:
        (stored,) = connection.execute(text("SELECT * FROM leases"))
    store.close()
    lease = Lease(*stored)
    assert lease == Lease("r", "w", "", sha256(TOKEN.encode()).hexdigest(), 1.0, 2.0, 3.0, 4.0)
    assert LeaseTokens(b"a key", lambda: "id").lost([lease])
    assert TOKEN.encode() not in contents_of(database_url)
