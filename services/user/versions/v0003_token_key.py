"""The page tokens' key."""

from services.common import paging

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    paging.create_key()
