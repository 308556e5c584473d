"""``python -m services``: the whole shop on this machine (``make run-mesh``)."""

import os
import sys

if __name__ == "__main__":
    # This process forks only to exec; otherwise gRPC would prepare for forks, and log about it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

    from services.supervisor.command import main

    sys.exit(main())
