"""The revision that replaces the tokens of leases by their hashes."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from alembic import command
from sqlalchemy import NullPool, create_engine, select, text

from registry.core.records import Lease
from registry.service.lease_tokens import LeaseTokens
from registry.store.database import migration_config
from registry.store.migrations.tables import LEASES
from registry.store.statements import read
from registry.store.store import Store
from tests.support.database_contents import contents_of

LEASED = 200
"""So many leases that they fill several pages of SQLite, which the revision frees."""

ROWS = (
    "INSERT INTO machines (machine_id, node_id, address, alive, gpus) VALUES ('m', 'n', '10.0.0.1', true, 0)",
    (
        "INSERT INTO measurements (measurement_id, seq, tenant, priority, flags, created_s)"
        " VALUES (7, 1, 'lab', 'normal', '[]', 1.0)"
    ),
)

ROWS_OF_A_LEASE = (
    (
        "INSERT INTO wrappers (wrapper_id, machine_id, url, gpus, status, epoch, last_used_s, failures)"
        " VALUES ('w' || :n, 'm', 'http://10.0.0.1:8000/wrappers/w', 0, 'leased', 3, 1.0, 0)"
    ),
    (
        "INSERT INTO requests (request_id, measurement_id, seq, spec, llmconfig, status, notes, failed_on, overtaken,"
        " created_s, tenant) VALUES ('r' || :n, 7, 1, '{}', '{}', 'deployed', '[]', '[]', 0, 1.0, 'lab')"
    ),
    "INSERT INTO leases VALUES ('r' || :n, 'w' || :n, :token, 1.0, 2.0, 3.0, 4.0)",
)


def old_token(n: int) -> str:
    return f"lease_of-a-release-that-stored-tokens-{n:03}"


def test_stored_tokens_become_hashes(database_url: str, tmp_path: Path) -> None:
    """The leases are there with the hashes of their tokens, and without the tokens; they end at the next start."""
    (tmp_path / "state").mkdir()
    with create_engine(database_url, poolclass=NullPool).begin() as connection:
        command.upgrade(migration_config(connection), "0012")
        for row in ROWS:
            connection.exec_driver_sql(row)
        for n in range(LEASED):
            for row in ROWS_OF_A_LEASE:
                connection.execute(text(row), {"n": str(n), "token": old_token(n)})
    before = contents_of(database_url)
    assert all(old_token(n).encode() in before for n in range(LEASED))
    store = Store.open(database_url)
    with store._transaction() as connection:
        leases = read(connection, Lease, select(LEASES))
    store.close()
    hashes = {f"r{n}": sha256(old_token(n).encode()).hexdigest() for n in range(LEASED)}
    assert {lease.request_id: lease.token_sha256 for lease in leases} == hashes
    assert Lease("r0", "w0", "", hashes["r0"], 1.0, 2.0, 3.0, 4.0) in leases
    assert len(LeaseTokens(b"a key", lambda: "id").lost(leases)) == LEASED
    assert old_token(0)[:-3].encode() not in contents_of(database_url)
