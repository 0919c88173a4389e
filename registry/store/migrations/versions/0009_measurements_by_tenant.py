"""Makes a measurement's id unique within its tenant only: two tenants may choose the same one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_KEY = ["measurement_id", "tenant"]


def upgrade() -> None:
    # To change the keys of a table, SQLite copies it and drops the old table. Foreign keys of leases prevent that.
    op.execute("CREATE TEMPORARY TABLE kept_leases AS SELECT * FROM leases")
    op.execute("DELETE FROM leases")
    with op.batch_alter_table("requests") as batch_op:
        batch_op.add_column(sa.Column("tenant", sa.Text(), nullable=True))
        batch_op.drop_constraint(op.f("fk_requests_measurement_id_measurements"), type_="foreignkey")
    op.execute(
        "UPDATE requests SET tenant = (SELECT tenant FROM measurements"
        " WHERE measurements.measurement_id = requests.measurement_id)"
    )
    with op.batch_alter_table("measurements") as batch_op:
        batch_op.drop_constraint(op.f("pk_measurements"), type_="primary")
        batch_op.create_primary_key(op.f("pk_measurements"), _KEY)
    with op.batch_alter_table("requests") as batch_op:
        batch_op.alter_column("tenant", existing_type=sa.Text(), nullable=False)
        batch_op.create_foreign_key(op.f("fk_requests_measurement_id_tenant_measurements"), "measurements", _KEY, _KEY)
    op.execute("INSERT INTO leases SELECT * FROM kept_leases")
    op.execute("DROP TABLE kept_leases")
