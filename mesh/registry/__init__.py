"""The registry: which instances serve which service, kept in memory under leases, told to watchers."""
