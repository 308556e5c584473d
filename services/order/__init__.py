"""The order service: who ordered what."""
