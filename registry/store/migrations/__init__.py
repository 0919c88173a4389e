"""The store's tables, and the Alembic revisions by which ``Store.open`` brings a database up to date."""
