"""Adds indices, so that pages of a measurement, unfinished rows and rows to delete are found without a scan."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_NEW = {
    "requests": (["measurement_id", "tenant", "seq"], ["ended_s"], ["seq"]),
    "events": (["at_s"],),
    "windows": (["measurement_id", "begun_s", "window_id"], ["ended_s"]),
    "idempotency_keys": (["created_s"],),
}


def upgrade() -> None:
    for table, indices in _NEW.items():
        for columns in indices:
            op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, columns)
    for table in ("requests", "windows"):
        op.drop_index(op.f(f"ix_{table}_measurement_id"), table_name=table)
