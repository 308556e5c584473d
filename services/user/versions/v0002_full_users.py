"""Users that can be changed and deleted, with names in parts. Replicas of 0001 keep working."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("users", sa.Column("version", sa.Integer, nullable=False, server_default="1"))
    op.add_column("users", sa.Column("delete_time", sa.DateTime(timezone=True)))
    op.add_column("users", sa.Column("given_name", sa.Text))
    op.add_column("users", sa.Column("family_name", sa.Text))
    op.create_index("users_by_name", "users", ["name", "sequence"])
    op.create_index("users_by_create_time", "users", ["create_time", "sequence"])
