"""The page tokens' key."""

from services.common import paging

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    paging.create_key()
