"""The decisions, as plain code over values. Time and randomness are arguments; nothing here does IO, waits, or uses
gRPC's classes."""
