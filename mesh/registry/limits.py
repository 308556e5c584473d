"""The registry's limits: whatever one peer sends, others are served, and memory stays within these bounds."""

from __future__ import annotations

MAX_TEXT = 1024
"""The longest text of an instance (its id, its address, a label), and of a service's name. Characters."""

MAX_METADATA = 64
"""The most labels that an instance may have."""

MAX_INSTANCE_BYTES = 128 * 1024
"""The largest instance: room for all labels at full length. Bytes, as encoded."""

MAX_SERVICE_BYTES = 8 * 1024 * 1024
"""The instances of one service together: 40,000 of the usual 200 bytes. Each client holds them. Bytes, as encoded."""

MAX_INSTANCES = 100_000
"""The most instances of all services."""

MAX_TOTAL_BYTES = 64 * 1024 * 1024
"""The instances of all services together, so that many services can't fill the memory. Bytes, as encoded."""

MAX_CONFIG = 256 * 1024
"""The largest service config: a thousand methods with a policy each. Bytes."""

MAX_CONFIGS = 1_000
"""The most services that may have a config."""

MAX_CONFIGS_BYTES = 16 * 1024 * 1024
"""All service configs together: they are in memory, and written to disk with each change. Bytes."""
