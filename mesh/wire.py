"""What goes over the wire beside messages: the names of metadata keys, and gRPC's enumerations by number."""

from __future__ import annotations

import grpc

PREVIOUS_ATTEMPTS = "grpc-previous-rpc-attempts"
"""How many attempts were sent for the call before this one (A6)."""

ATTEMPT = "weft-attempt"
"""The same, for a first attempt that is a hedge."""

PUSHBACK = "grpc-retry-pushback-ms"
"""The server's word on when to retry, in milliseconds; negative: not at all (A6)."""

ORCA_LOAD = "endpoint-load-metrics-bin"
"""A server's load, as gRPC clients in other languages read it (A51). Core keeps it from Python clients."""

LOAD = "weft-load-bin"
"""The same bytes for Python clients."""

STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
CONNECTIVITY = {state.value[0]: state for state in grpc.ChannelConnectivity}
