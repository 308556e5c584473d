"""The wrappers around a server's handlers: deadlines, admission control, statuses, observers."""
