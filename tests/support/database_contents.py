"""What somebody finds who has a whole database: its files, or a dump."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from sqlalchemy import NullPool, create_engine, make_url, text


def contents_of(database_url: str) -> bytes:
    """Every byte of an SQLite database, with its log; or every row of a schema of PostgreSQL."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        files = sorted(Path(str(url.database)).parent.iterdir())
        return b"".join(file.read_bytes() for file in files)
    with create_engine(url, poolclass=NullPool).connect() as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")).all()
        rows = [connection.scalars(text(f'SELECT each::text FROM "{name}" AS each')).all() for name in tables]
    return "\n".join(chain.from_iterable(rows)).encode()
