"""Stores the SHA-256 of a lease's token, and an id from which the token is made, instead of the token.

The tokens of running leases can't be made from an id, so these leases end at the next start.
"""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        op.execute("PRAGMA secure_delete = ON")  # else the tokens stay in the file's free pages
    rows = [dict(row) for row in connection.execute(sa.text("SELECT * FROM leases")).mappings()]
    op.drop_table("leases")
    leases = op.create_table(
        "leases",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("wrapper_id", sa.Text(), nullable=False),
        sa.Column("token_id", sa.Text(), nullable=False),
        sa.Column("token_sha256", sa.Text(), nullable=False),
        sa.Column("granted_s", sa.Float(), nullable=False),
        sa.Column("deadline_s", sa.Float(), nullable=False),
        sa.Column("idle_limit_s", sa.Float(), nullable=False),
        sa.Column("last_active_s", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["request_id"], ["requests.request_id"], name=op.f("fk_leases_request_id_requests")),
        sa.ForeignKeyConstraint(["wrapper_id"], ["wrappers.wrapper_id"], name=op.f("fk_leases_wrapper_id_wrappers")),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_leases")),
        sa.UniqueConstraint("wrapper_id", name=op.f("uq_leases_wrapper_id")),
    )
    for row in rows:
        row["token_id"], row["token_sha256"] = "", hashlib.sha256(row.pop("token").encode()).hexdigest()
    op.bulk_insert(leases, rows)
