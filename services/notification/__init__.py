"""The notification service: what users are told of their orders."""
