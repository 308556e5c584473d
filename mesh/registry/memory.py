"""Returning free memory to the system."""

from __future__ import annotations

import ctypes
import sys

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim() -> None:
    """Have glibc return free memory to the system: on its own it keeps all that lies below any memory in use.

    Does nothing with other C libraries. Takes milliseconds: call it rarely.
    """
    if _trim is not None:
        _trim(0)
