"""The registry: which instances serve which service, kept in memory under leases and sent to watchers."""
