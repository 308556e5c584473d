"""Metadata keys, and gRPC's status codes and connectivity states by number."""

from __future__ import annotations

import grpc

PREVIOUS_ATTEMPTS = "grpc-previous-rpc-attempts"
"""The number of attempts sent before this one (A6)."""

HEDGED_ATTEMPTS = "weft-attempt"
"""The same, for a first attempt that is a hedge."""

PUSHBACK = "grpc-retry-pushback-ms"
"""The server's pushback: when to retry, in milliseconds; negative: not at all (A6)."""

ORCA_LOAD_REPORT = "endpoint-load-metrics-bin"
"""A server's load report (ORCA), for gRPC clients in other languages (A51). Core hides it from Python clients."""

WEFT_LOAD_REPORT = "weft-load-bin"
"""The same report, for Python clients."""

STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
CONNECTIVITY = {state.value[0]: state for state in grpc.ChannelConnectivity}
