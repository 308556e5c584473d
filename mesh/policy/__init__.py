"""Decisions: plain code over values. Time and chance are arguments; nothing here does IO, waits, or knows gRPC's
classes."""
