"""What the integration tests stand on: real databases, each test in an empty one of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import pytest
from sqlalchemy import URL, Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from registry.store.store import Store

POSTGRES_URL = os.environ.get("REGISTRY_TEST_POSTGRES_URL", "postgresql+psycopg://root@127.0.0.1:5432/test")


def _unavailable(why: str) -> NoReturn:
    """Skip on a developer's machine; fail in CI, where nobody would notice that half of the suite did not run."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Connection]:
    """A connection to the PostgreSQL server as its administrator sees it; every statement commits by itself."""
    try:
        connection = create_engine(POSTGRES_URL, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect()
    except ModuleNotFoundError:
        _unavailable("psycopg is not installed")
    except OperationalError as error:
        _unavailable(f"no PostgreSQL at {make_url(POSTGRES_URL)!r}: {error.orig}")
    with connection:
        yield connection


@pytest.fixture
def postgres_url(postgres: Connection) -> Iterator[str]:
    """The URL of an empty schema of the server, which is dropped after the test."""
    schema = f"test_{uuid4().hex}"
    postgres.execute(text(f"CREATE SCHEMA {schema}"))
    url: URL = make_url(POSTGRES_URL).update_query_dict({"options": f"-csearch_path={schema}"})
    yield url.render_as_string(hide_password=False)
    postgres.execute(text(f"DROP SCHEMA {schema} CASCADE"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite database that is not there yet, nor its directory."""
    return f"sqlite:///{tmp_path}/state/registry.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: the test runs once on each kind."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An open store on an empty database."""
    opened = Store.open(database_url)
    yield opened
    opened.close()
