"""The order service: orders, their states and their events."""
