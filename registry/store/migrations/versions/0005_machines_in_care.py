"""Adds draining, zone and region of machines, and the software versions of a measurement's latest hand-over."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("machines", sa.Column("draining", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("machines", sa.Column("zone", sa.Text(), nullable=True))
    op.add_column("machines", sa.Column("region", sa.Text(), nullable=True))
    op.add_column("measurements", sa.Column("versions", sa.Text(), nullable=True))
