"""Adds energy windows, and the budgets of leases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "windows",
        sa.Column("window_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("wrapper_id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("measurement_id", sa.BigInteger(), nullable=True),
        sa.Column("begun_s", sa.Float(), nullable=False),
        sa.Column("ended_s", sa.Float(), nullable=False),
        sa.Column("total_j", sa.Float(), nullable=True),
        sa.Column("o_g", sa.Float(), nullable=True),
        sa.Column("m_g", sa.Float(), nullable=True),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("machine_id", sa.Text(), nullable=True),
        sa.Column("tenant", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("window_id", name=op.f("pk_windows")),
    )
    op.create_index(op.f("ix_windows_measurement_id"), "windows", ["measurement_id"])
    op.create_index(op.f("ix_windows_request_id"), "windows", ["request_id"])
    op.create_index(op.f("ix_windows_tenant_kind_ended_s"), "windows", ["tenant", "kind", "ended_s"])
    op.create_index(op.f("ix_requests_wrapper_id"), "requests", ["wrapper_id"])
    op.add_column("requests", sa.Column("max_j", sa.Float(), nullable=True))
    op.add_column("requests", sa.Column("max_g", sa.Float(), nullable=True))
