"""Admission control: which calls a server runs, queues or refuses."""
