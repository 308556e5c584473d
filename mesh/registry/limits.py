"""The registry's limits: whatever one peer sends, others are served and memory stays bounded."""

from __future__ import annotations

MAX_TEXT = 1024
"""The longest text of an instance (its id, its address, a label), and of a service's name. Characters."""

MAX_METADATA = 64
"""The most labels that an instance may have."""

MAX_INSTANCE_BYTES = 128 * 1024
"""The largest instance: room for all labels at full length. Bytes, as encoded."""

MAX_SERVICE_BYTES = 8 * 1024 * 1024
"""The instances of one service together: 40,000 of a typical 200 bytes. Each client holds them. Bytes, as encoded."""

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

MAX_CONFIGS_IN_PROGRESS = 16
"""The most service configs that are being checked or wait for it, so that large ones can't fill the memory."""

WATCH_MESSAGE_BYTES = 64 * 1024
"""One message of a watch, or a single instance or config that is larger: far below the 4 MB that gRPC clients accept,
and all that a watcher that doesn't read can hold. Bytes, as encoded."""

SEND_TIMEOUT = 10.0
"""How long a watcher may take to receive a message before it is dropped with RESOURCE_EXHAUSTED. Seconds."""

MAX_PARTS = 2 * MAX_SERVICE_BYTES // WATCH_MESSAGE_BYTES
"""The cached parts of one service's snapshot: two consecutive ones have more than WATCH_MESSAGE_BYTES together."""

MAX_MESSAGE_BYTES = 512 * 1024
"""The largest message that the registry reads: room for the largest service config. Bytes."""

MAX_LEASE_IDS = 1_000
"""The most leases in one message of KeepAlive, which has all leases of one process. Longer lists are refused."""

MAX_STREAMS = 1_000
"""Calls and streams at once on one connection: a process has one watch per service that it calls."""

HANDSHAKE_TIMEOUT = 5.0
"""How long a new connection may take for its HTTP/2 handshake before it is closed. Seconds."""

MAX_PAGE = 1_000
"""The largest page of ListInstances, and the default. Instances."""

PAGE_BYTES = 1024 * 1024
"""One page of ListInstances, or a single instance that is larger. Bytes, as encoded."""
