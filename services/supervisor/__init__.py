"""Runs the whole shop on one machine: a registry, NATS, users, orders and notifications, one process per replica.

Each process gets its settings in ``MESH_*`` variables and is restarted when it exits: immediately if it had been ready,
with exponential backoff if it keeps failing at startup. Its files are readable by this user only. The shop is ready
when the broker greets clients, and every other process answers SERVING to ``grpc.health.v1`` and is registered. SIGINT,
SIGTERM and SIGHUP drain it: orders, then notifications, users, the broker and the registry, so that nothing loses what
it calls before it has stopped. A second signal kills what is left. No process outlives the supervisor, even if the
supervisor is killed.

``plan`` says what to run, ``process`` runs one of it, ``shop`` all of it, ``screen`` is what the user sees.

Exit codes: 0 drained; 1 not ready in time; 2 it can't run here (a port in use, a bad argument), with a one-line reason.
"""
