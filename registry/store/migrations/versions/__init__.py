"""The revisions. Alembic finds the files; no code imports them by name."""
