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

MAX_SETTING = 16
"""The most service configs that are checked or wait for it, so that large ones can't fill the memory. Further ones are
refused with RESOURCE_EXHAUSTED."""

STEP_BYTES = 64 * 1024
"""How much of a service one message of a watch tells, or one instance or config that is larger. So a message stays far
below the 4 MB that gRPC's clients accept, and a watcher that doesn't read holds no more than it. Bytes, as encoded."""

STALLED = 10.0
"""How long a watcher may take to receive a message, before it is dropped with RESOURCE_EXHAUSTED. Seconds."""

MAX_PARTS = 2 * MAX_SERVICE_BYTES // STEP_BYTES
"""The parts of a snapshot that are kept for all its watchers: two neighbours have over STEP_BYTES together."""

MAX_MESSAGE_BYTES = 512 * 1024
"""The largest message that the registry reads: room for the largest service config. Bytes."""

MAX_LEASE_IDS = 1_000
"""The most leases in one message of KeepAlive, which has all those of one process. A list that is longer is refused."""

MAX_STREAMS = 1_000
"""Calls and streams at once on one connection: a process has a watch for each service that it calls. Further ones wait
in the client."""

HANDSHAKE_TIMEOUT = 5.0
"""How long a new connection may take to say that it speaks HTTP/2, before it is closed. Seconds."""

MAX_PAGE = 1_000
"""The most instances that one answer of ListInstances has, and how many it has when it isn't asked for fewer."""

PAGE_BYTES = 1024 * 1024
"""One answer of ListInstances, or a single instance that is larger. Bytes, as encoded."""
