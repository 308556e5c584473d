"""Events that are set aside because they can't be published, and the key of the page tokens.

A replica of 0002 relays on as it did: it doesn't count its attempts, and sets nothing aside.
"""

from services.common import paging
from services.events import outbox

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    outbox.add_set_aside()
    paging.create_key()
