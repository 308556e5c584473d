"""Orders with prices, states and their history, and the outbox.

Replicas of 0001 keep working: orders that they create are PENDING, and have no prices and no event.
"""

import sqlalchemy as sa
from alembic import op

from services.events import outbox

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("orders", sa.Column("state", sa.String(16), nullable=False, server_default="PENDING"))
    op.add_column("orders", sa.Column("version", sa.Integer, nullable=False, server_default="1"))
    op.add_column("orders", sa.Column("user_stale", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("orders_in_state", "orders", ["state", "sequence"])
    op.add_column("items", sa.Column("currency", sa.String(3)))
    op.add_column("items", sa.Column("units", sa.BigInteger))
    op.add_column("items", sa.Column("nanos", sa.Integer))
    op.create_table(
        "changes",
        sa.Column("order_id", sa.String(36), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table("known_users", sa.Column("user_id", sa.String(36), primary_key=True))
    outbox.create_tables()
