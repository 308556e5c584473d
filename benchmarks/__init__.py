"""Measurements: the same work, in the same run, against a peer that is tuned as well."""
