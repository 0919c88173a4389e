"""Adds the time until which a resumed measurement is pinned to its previous machine."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("measurements", sa.Column("pinned_until_s", sa.Float(), nullable=True))
