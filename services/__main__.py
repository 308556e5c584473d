"""``python -m services``: the whole shop on this machine (``make run-mesh``)."""

import os
import sys

if __name__ == "__main__":
    # Processes are forked here only to be replaced at once; gRPC would get ready for more than that, and say so.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

    from services.supervisor import main

    sys.exit(main())
