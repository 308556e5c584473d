"""The service config: its settings, how its JSON is read and parsed, and where it comes from."""
