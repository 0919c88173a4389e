"""Alembic's entry point. The store opens the connection and its transaction; logging is not configured.

Create a new revision with a database that has all older ones::

    with create_engine(url).connect() as connection:
        command.revision(migration_config(connection), message="what changes", autogenerate=True, rev_id="0002")

Then read, correct and test it: ``tests/integration/test_store.py`` compares its result with the tables.
"""

from typing import Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy.types import TypeDecorator

from registry.store.migrations.tables import METADATA


def _plain_type(kind: str, item: object, _: AutogenContext) -> str | Literal[False]:
    """Render our column types as SQLAlchemy's own, so that a revision still works when our code changes.

    Return False to leave other items to Alembic.
    """
    if kind == "type" and isinstance(item, TypeDecorator):
        return f"sa.{item.impl_instance!r}"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,  # SQLite can't alter most parts of a table; batches copy it instead
    render_item=_plain_type,
)
with context.begin_transaction():
    context.run_migrations()
