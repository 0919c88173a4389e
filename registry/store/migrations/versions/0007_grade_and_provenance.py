"""Adds a request's grade, its provenance, and the earlier request that it must be like."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("requests", sa.Column("grade", sa.Text(), nullable=False, server_default="standard"))
    op.add_column("requests", sa.Column("like_request_id", sa.Text(), nullable=True))
    op.add_column("requests", sa.Column("provenance", sa.Text(), nullable=True))
