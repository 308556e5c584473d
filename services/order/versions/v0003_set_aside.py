"""Events that are set aside because they can't be published, and the page tokens' key.

Replicas of 0002 keep working: their relays don't count attempts, and set nothing aside.
"""

from services.common import paging
from services.events import outbox

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    outbox.add_set_aside()
    paging.create_key()
