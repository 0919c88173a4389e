"""The revisions, in files that no code imports by name: Alembic finds them."""
