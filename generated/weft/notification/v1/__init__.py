"""Generated from protos/weft/notification/v1."""
