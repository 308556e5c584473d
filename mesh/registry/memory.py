"""What is freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim() -> None:
    """Have glibc return free memory: by itself it keeps what lies below anything in use, however much that is.

    Does nothing with another C library. It takes milliseconds, so it is for rare occasions.
    """
    if _trim is not None:
        _trim(0)
